"""What the agents are told, and what they say without a model."""

import json

import pytest

from agentmerge.agents import controller, critic, proposer
from agentmerge.agents.prompts import COMMON, load_prompts, prompt_hash
from agentmerge.agents.schemas import json_schema, parse_reply
from agentmerge.agents.view import (
    MAX_INTEGERS,
    correlations,
    integers,
    observations,
    shown,
    variables,
)
from agentmerge.config import GenomeConfig
from agentmerge.contracts.advice import Guidance
from agentmerge.space.grouped import SearchSpace

ROLES = (critic, controller, proposer)


def told(role, view, guidance=Guidance(critique="the critic's words", sigma=0.1)):  # noqa: B008
    return "\n".join(m["content"] for m in role.messages(view, load_prompts(), guidance))


def test_variables_are_what_the_prompts_may_use(view):
    assert variables(view).keys() == COMMON


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_told_the_facts(role, view):
    text = told(role, view)
    for fact in (
        "task_arithmetic; normalize is off",
        "exact_match,none, higher: shift 1",
        "word_perplexity,none, lower: perplexity -.1",
        ".4 | .4 9.6 | parent expert-shift",
        ".35 | .35 9.65 | uniform 0.5",
        "best .8 (generation 1, llm_evo)",
        "Evaluations left: 60",
    ):
        assert fact in text
    assert "{{" not in text


def test_proposer_is_told_axes_with_real_ranges_and_what_came_before_it(view):
    text = told(proposer, view)
    assert "layers 0-1, 2-3; in each expert-shift weight, expert-sort weight; 0 is 0, 100" in text
    assert "the critic's words" in text
    assert "sigma: 0.1 of an axis" in text
    assert "exactly 4 integers" in text
    assert ".8 | .8 9.2 | 80,20 30,40 | 1 llm_evo" in text


def test_history_is_sorted_least_to_most_fit_in_rounded_integers(view):
    rows = variables(view)["history"].splitlines()
    scores = [float(row.split()[1]) for row in rows]
    assert scores == sorted(scores)
    assert "[29, 20, 30, 40]" in variables(view)["history"], "0.29 is 29, not 28"
    assert "[67, 0, 67, 0]" in variables(view)["history"]


def test_failures_are_shown_clean_and_apart(view):
    text = variables(view)["failures"]
    assert text == "generation 1, slot 2: weights cancel[31m in group 1 | [90, 90, 90, 90]"
    assert "90, 90" not in variables(view)["history"]


def test_history_is_bounded(make_view, observe):
    entries = [
        observe(g, s, (s / 40, g / 40, 0.5, 0.5), s / 40 + g / 1000)
        for g in range(40)
        for s in range(40)
    ]
    view = make_view(entries)
    assert len(shown(view)) <= 8 + 40
    assert {entry.generation for entry in shown(view)} == {39, 38, 37, 36, 35, 34, 33, 32}
    assert (
        sum(len(m["content"]) for m in proposer.messages(view, load_prompts(), Guidance())) < 20_000
    )


def test_a_wide_space_shows_fewer_rows(make_view, observe):
    genome = GenomeConfig(
        models=("a", "b", "c"),
        merge_method="ties",
        base_model="base",
        layer_granularity=1,
        filters=("self_attn", "mlp"),
    )
    space = SearchSpace(genome, num_layers=48)
    assert space.dimensions == 864
    entries = [observe(0, s, (s / 50,) * 864, s / 50) for s in range(50)]
    view = make_view(entries, space=space)
    assert len(shown(view)) == MAX_INTEGERS // 864
    assert shown(view)[-1].score == 49 / 50


def test_a_prompt_depends_on_the_history_alone(view, make_view, entries):
    for role in ROLES:
        first = role.messages(view, load_prompts(), Guidance())
        again = role.messages(make_view(entries), load_prompts(), Guidance())
        assert prompt_hash(first) == prompt_hash(again)


def test_slerp_axes_say_what_they_pick(make_view):
    genome = GenomeConfig(models=("x/a", "x/b", "x/c"), merge_method="slerp")
    view = make_view([], space=SearchSpace(genome, num_layers=4))
    assert "base: equal parts of 0 to 100 pick one of a, b, c" in variables(view)["axes"]
    assert "t: 0 is 0, 100 is 1" in variables(view)["axes"]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shape", ["empty", "all failed", "no vectors"])
def test_thin_histories_are_fine(role, shape, make_view, observe):
    entries = {
        "empty": [],
        "all failed": [observe(0, s, (0.5,) * 4, None, failure="x") for s in range(3)],
        "no vectors": [observe(0, s, None, 0.1 * s, "init") for s in range(9)],
    }[shape]
    view = make_view(entries, sigma=None)
    assert role.messages(view, load_prompts(), Guidance())
    assert isinstance(role.by_rules(view, Guidance()), Guidance)
    assert json_schema(role.REPLY, view.bounds)["type"] == "object"


def test_critic_by_rules_reads_the_history(view):
    text = critic.by_rules(view, Guidance()).critique
    assert "Best score 0.8000 (generation 1, llm_evo)" in text
    assert "improved on what came before: best 0.8000, median 0.7000" in text
    assert (
        "shift: the best candidate has 0.8000, ahead of the best parent there "
        "(expert-shift, 0.4000)" in text
    )
    assert "perplexity: the best candidate has 9.2000, ahead of" in text
    assert "1 of 3 candidates of the last generation failed" in text
    assert "layers 0-1 expert-shift weight 67→80" in text
    assert critic.by_rules(view, Guidance()).source == "rules"


def test_correlation_finds_the_axis_that_matters_and_no_other(make_view, observe):
    entries = [observe(0, s, (s / 10, (s * 7 % 11) / 11, 0.5, 0.5), s / 10) for s in range(10)]
    by_axis = correlations(entries, 4)
    assert by_axis[0] == pytest.approx(1.0)
    assert by_axis[2:] == [0.0, 0.0]
    line = next(line for line in observations(make_view(entries)) if "go with" in line)
    assert "layers 0-1 expert-shift weight (r +1.00)" in line
    assert "layers 2-3" not in line


def test_controller_by_rules_is_the_seed_programs_rule(view, make_view, entries):
    assert controller.by_rules(view, Guidance()).sigma == 0.05
    assert controller.by_rules(make_view(entries, improved_last=False), Guidance()).sigma == 0.2


def test_proposer_by_rules_weighs_the_four_best_by_score(view):
    mean = proposer.by_rules(view, Guidance()).mean
    # 0.8, 0.6, 0.4 and 0.35, less the worst score 0.1
    weights, firsts = (0.7, 0.5, 0.3, 0.25), (0.8, 0.6, 2 / 3, 0.5)
    expected = sum(w * v for w, v in zip(weights, firsts, strict=True)) / sum(weights)
    assert mean[0] == pytest.approx(expected)
    assert all(0 <= value <= 1 for value in mean)


def test_proposer_by_rules_with_equal_scores_is_the_plain_mean(make_view, observe):
    entries = [observe(0, s, (s / 4,) * 4, 0.5) for s in range(4)]
    assert proposer.by_rules(make_view(entries), Guidance()).mean == pytest.approx((0.375,) * 4)


def test_each_role_adds_its_piece(view):
    said = {
        critic: {"summary": "s", "findings": ["one", "", "two"]},
        controller: {"thought": "", "sigma": 0.07},
        proposer: {
            "thought": "go there",
            "mean_genome": [0, 29, 50, 100],
            "candidates": [[1, 2, 3, 4]],
            "expected_score": 0.9,
        },
    }
    guidance = Guidance()
    for role, reply in said.items():
        guidance = role.by_model(parse_reply(json.dumps(reply), role.REPLY, view.bounds), guidance)
    assert guidance == Guidance(
        mean=(0.0, 0.29, 0.5, 1.0),
        candidates=((0.01, 0.02, 0.03, 0.04),),
        sigma=0.07,
        critique="s\n- one\n- two",
        thought="go there",
        source="model",
        expected_score=0.9,
        forecasts=(None,),
    )


def test_integers_of_a_point_outside_the_box_stay_inside():
    assert integers((-0.1, 0.285, 1.3)) == [0, 28, 100]
