"""The search benchmark's own rules: processes, advice and its control. No network, no training."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmerge.agents.models import AgentModel
from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Observation, rng_factory
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.functions import SyntheticProblem
from agentmerge.testing.prefixes import NO_TOKEN, Rows, answer_logits
from agentmerge.testing.scripted import scripted_chat_model
from benchmarks import comparing, search
from benchmarks.advised import Adviser, dealt_anew
from benchmarks.mergekit_rival import MergekitEvolve
from benchmarks.running import Arm, run_search

POINT = [20, 80]


def runs(out: Path, *options: str) -> dict[str, Any]:
    search.main(
        ["--suite", "synthetic", "--problems", "sphere-2-noisy", "--arms", "cma_es,null_llm",
         "--seeds", "2", "--budget", "20", "--out", str(out), *options]
    )  # fmt: skip
    return {path.name: json.loads(path.read_text()) for path in (out / "runs").iterdir()}


def test_processes_change_no_result(tmp_path: Path) -> None:
    alone, shared = runs(tmp_path / "1"), runs(tmp_path / "2", "--processes", "2")
    for run in (*alone.values(), *shared.values()):
        del run["thinking_s"]
    assert alone == shared
    assert len(alone) == 4


def advised(arm: str, shuffled: bool) -> tuple[dict[str, Any], Any]:
    """A search with a model that always says the same point, and that model."""

    def reply(messages: Any) -> Any:
        text = messages[-1].text + messages[0].text
        if "mean_genome" in text:
            return {
                "thought": "", "mean_genome": POINT, "expected_score": 0.9, "candidates": [],
                "structural_move": None,
            }  # fmt: skip
        return {"sigma": 0.1, "thought": ""} if "sigma_low" in text or '"sigma"' in text else {
            "summary": "it goes on", "findings": []
        }  # fmt: skip

    chat = scripted_chat_model(reply)

    def advise(seed: int) -> Adviser:
        return Adviser(AgentModel(chat), seed, shuffled)

    problem = SyntheticProblem("sphere", 2, True, 0)
    return run_search(problem, Arm(arm, search.arm_of(arm).make, advise), 0, 24), chat


@pytest.mark.parametrize("arm", ["auto", "llm_evo"])
def test_a_model_advises_as_in_the_product(arm: str) -> None:
    run, chat = advised(arm, shuffled=False)
    assert run["advice"]["failures"] == 0
    assert run["advice"]["calls"] == len(chat.calls) > 0
    assert run["spent"] <= 24
    operators = {point["operator"] for point in run["points"]}
    assert ("agent" if arm == "auto" else "llm_evo") in operators


@pytest.mark.parametrize("name", ["cma_es_mergekit", "tpe_alone"])
def test_a_rival_that_begins_by_itself_is_told_nothing(name: str) -> None:
    problem = SyntheticProblem("sphere", 5, False, 0)
    run = run_search(problem, search.arm_of(name), 3, 40)
    again = run_search(problem, search.arm_of(name), 3, 40)
    assert run["points"] == again["points"]
    assert [p["spent"] for p in run["points"]] == list(range(1, 41)), "all of the budget is its own"
    assert {p["operator"] for p in run["points"]} == {name.removesuffix("_alone")}
    first = problem.first_points()
    best = max(p["score"] for p in run["points"])
    assert run["answers"]["best"]["search"] >= max(
        best, *(problem.evaluate(v).score for *_, v in first)
    )


def test_mergekits_rival_begins_as_mergekit_does() -> None:
    genome = GenomeConfig(models=("a", "b"), base_model="base", merge_method="ties")
    space = SearchSpace(genome, 4)
    before = [Observation(0, 0, None, "uniform", None)]
    values = []
    for seed in range(40):
        asked = MergekitEvolve().propose(space, before, None, 99, rng_factory(seed))
        assert len(asked) == 4 + int(3 * np.log(space.dimensions))
        for proposal in asked:
            assert proposal.vector is not None
            values.append([a.value(u) for a, u in zip(space.axes, proposal.vector, strict=True)])
    weights, densities = (
        np.array(values)[:, [axis.parameter == name for axis in space.axes]]
        for name in ("weight", "density")
    )
    assert weights.mean() == pytest.approx(1 / 2, abs=0.02)
    assert weights.std() == pytest.approx(1 / 6, abs=0.02)
    assert densities.mean() == pytest.approx(1 - 0.3989 / 6, abs=0.02), "1, and no more"


def test_shuffled_feedback_is_only_what_the_model_is_told() -> None:
    history = [Observation(0, i, (i / 4,), "init", None if i == 2 else i / 10) for i in range(5)]
    told = dealt_anew(history, np.random.default_rng(0))
    assert [o.vector for o in told] == [o.vector for o in history]
    assert told[2].score is None
    assert sorted(o.score for o in told if o.score is not None) == [0.0, 0.1, 0.3, 0.4]
    assert told != history


def test_the_control_is_told_other_scores_and_scored_on_true_ones() -> None:
    (plain, chat), (control, other) = (advised("llm_evo", shuffled) for shuffled in (False, True))
    assert chat.calls[0] != other.calls[0]
    # The same words from a model that cannot be misled: the same search.
    assert plain["points"] == control["points"]


def test_an_advised_arm_needs_a_model() -> None:
    with pytest.raises(SystemExit, match="--llm"):
        search.arm_of("auto_llm")
    arm = search.arm_of("auto_llm_shuffled", "openai:local", "http://127.0.0.1:9/v1")
    assert isinstance(arm.advise, partial)


def test_prefixes_give_what_transformers_gives() -> None:
    """Rows of different lengths that share beginnings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=50, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    inputs = [[1, 7, 9, 4, 5], [1, 7, 9, 8], [1, 7, 9, 4, 6, 11, 2], [3, 7]]
    rows = Rows.of(inputs, [[5, 6], [8], [6, 11, 2], [7, 9]])
    assert len(rows.tokens) == 11
    with torch.no_grad():
        found = answer_logits(dict(model.named_parameters()), config, rows)
        for row, (tokens, count) in enumerate(zip(inputs, (2, 1, 3, 2), strict=True)):
            whole = model(torch.tensor([tokens])).logits[0, -count:]
            torch.testing.assert_close(found[row, :count], whole, atol=1e-5, rtol=1e-4)
            assert (rows.gold[row, count:] == NO_TOKEN).all()


def test_an_arm_stands_beside_the_best_of_the_others() -> None:
    sealed = {"auto": (0.8, 0.9), "tpe": (0.7, 0.6), "cma_es": (0.5, 0.4)}
    found = comparing.standing(
        [
            {"problem": "hill", "arm": arm, "seed": seed, "answers": {"chosen": {"sealed": score}}}
            for arm, scores in sealed.items()
            for seed, score in enumerate(scores)
        ],
        "auto",
    )
    assert found.splitlines()[2].startswith("| hill | 2 | 0.850 | tpe | 0.650 | +0.200 |")
    assert comparing.standing([], "auto") == ""


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # botorch's import
def test_botorchs_own_search_climbs_and_repeats_itself() -> None:
    found = [
        run_search(SyntheticProblem("sphere", 2, False, 0), search.arm_of("botorch"), 0, 16)
        for _ in range(2)
    ]
    scores = [[p["score"] for p in run["points"]] for run in found]
    assert scores[0] == scores[1]
    own = [p["score"] for p in found[0]["points"] if p["operator"] == "botorch"]
    assert max(own) > 0.99 > max(scores[0][: -len(own)])
