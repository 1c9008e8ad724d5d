"""The defects of the programs we succeed, one test each: none may come back.

Numbers 1 to 10 are LLM-Evo-Merge's; the last ones are mergekit-evolve's. A density near 0 on a
small tensor, one more of the latter, is in tests/merging/test_kernels.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentmerge.agents.schemas import percent
from agentmerge.agents.view import integers
from agentmerge.cli.app import run_app
from agentmerge.config import GenomeConfig, SearchConfig, TasksConfig
from agentmerge.ledger import Candidate, Ledger, RunRow
from agentmerge.recipe import Recipe
from agentmerge.report.summary import run_summary
from agentmerge.session import driving
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.scripted import ScriptedServer, scripted_chat_model
from agentmerge.workers.fake import fake_tasks

DIMENSIONS = 4
ROLES = ("critic", "controller", "proposer")


def config(text: str, **overrides: Any) -> SearchConfig:
    """``fake_config`` with dotted keys replaced (a double underscore stands for the dot)."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return SearchConfig.from_text(text, overrides=dotted)


def run(settings: SearchConfig, runs: Path, name: str = "a", **rest: Any) -> RunRow:
    return driving.run(settings, name=name, runs_dir=runs, **rest)


def candidates(runs: Path, row: RunRow, generation: int | None = None) -> list[Candidate]:
    with Ledger(runs / driving.LEDGER) as ledger:
        return ledger.candidates(row.id, generation)


def summary(runs: Path, row: RunRow) -> dict[str, Any]:
    with Ledger(runs / driving.LEDGER) as ledger:
        return run_summary(ledger, row)


def recipe_of(runs: Path, candidate: Candidate) -> Recipe:
    with Ledger(runs / driving.LEDGER) as ledger:
        return Recipe.parse(ledger.recipe(candidate.recipe_hash))


def adviser(system: str) -> dict[str, Any]:
    """A valid reply of whichever role asks."""
    if "You propose" in system:
        point = [29, 60, 29, 60]
        return {"thought": "here", "mean_genome": point, "candidates": [point]}
    if "You judge" in system:
        return {"summary": "north helps", "findings": []}
    return {"thought": "small", "sigma": 0.1}


def chat(reply: Any = None) -> Any:
    """A chat model that always says ``reply``, or what fits its role."""
    return scripted_chat_model(
        lambda messages: adviser(messages[0].text) if reply is None else reply
    )


def all_roles(model: Any) -> dict[str, Any]:
    return dict.fromkeys(ROLES, model)


@pytest.mark.parametrize(
    "reply",
    [
        ConnectionError("the API is down"),
        "I would rather talk about the weather.",
        "{'thought': broken JSON",
        {"thought": "shape", "mean_genome": [1, 2], "sigma": "wide", "summary": ""},
        "",
    ],
    ids=["error", "prose", "broken JSON", "wrong shape", "empty"],
)
def test_defect_01_a_bad_reply_costs_advice_and_never_the_run(
    fake_config: str, tmp_path: Path, reply: Any
) -> None:
    settings = config(
        fake_config, search__algorithm="llm_evo", agents__max_retries=0, agents__timeout_s=5.0
    )
    row = run(settings, tmp_path, models=all_roles(chat(reply)))
    assert (row.status, row.stop_reason) == ("done", "budget")
    found = summary(tmp_path, row)
    assert found["agents"]["failures"] == found["agents"]["calls"] > 0
    assert found["evaluations"]["total"] == 19
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        words = ledger.advice(row.id)
    assert {word["role"] for word in words} == set(ROLES)
    assert all(word["failure"] and word["guidance"]["source"] == "rules" for word in words)


def test_defect_02_the_best_recipe_is_on_disk_after_every_generation(
    fake_config: str, tmp_path: Path
) -> None:
    seen: list[tuple[float, str]] = []

    def look(event: dict[str, Any]) -> None:
        if event["event"] == "generation":
            seen.append((event["best"], (tmp_path / "a" / "best.yml").read_text()))

    row = run(config(fake_config, budget__max_evaluations=40), tmp_path, emit=look)
    scores = [score for score, _ in seen]
    assert scores == sorted(scores)
    assert len(set(scores)) > 1, "the search must improve for this to show anything"
    best_of = {c.recipe_hash: c.score for c in candidates(tmp_path, row)}
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        texts = {ledger.recipe(found): score for found, score in best_of.items()}
    assert [texts[text] for _, text in seen] == scores


@pytest.mark.parametrize("algorithm", ["llm_evo", "random", "cma_es"])
def test_defect_03_the_seed_decides_the_population_and_every_mutation(
    fake_config: str, tmp_path: Path, algorithm: str
) -> None:
    def vectors(name: str, seed: int) -> list[tuple[Any, ...]]:
        settings = config(
            fake_config, search__algorithm=algorithm, search__seed=seed, search__random_init=True
        )
        row = run(settings, tmp_path / name)
        return [
            (c.generation, c.slot, c.vector, c.score)
            for c in candidates(tmp_path / name, row)
            if c.operator not in ("parent", "uniform", "scale", "depth")
        ]

    first = vectors("one", 1)
    assert first == vectors("again", 1)
    other = {(g, s): vector for g, s, vector, _ in vectors("two", 2)}
    assert {g for g, *_ in first} >= {0, 1}
    assert all(vector != other.get((g, s)) for g, s, vector, _ in first)


def test_defect_04_negative_weights_are_searched_where_they_are_allowed(
    fake_config: str, tmp_path: Path
) -> None:
    def weights(allowed: bool) -> list[float]:
        settings = config(
            fake_config,
            genome__allow_negative_weights=allowed,
            search__algorithm="random",
        )
        runs = tmp_path / str(allowed)
        found = []
        for candidate in candidates(runs, run(settings, runs)):
            effective = recipe_of(runs, candidate).effective("model.layers.0.mlp.w", 0)
            found += [dict(own)["weight"] for _, _, own in effective.sources if own]
        return found

    assert min(weights(True)) < -0.1
    assert min(weights(False)) >= 0.0


@pytest.mark.parametrize("asked", [True, False])
def test_defect_04_random_init_draws_a_random_first_population(
    fake_config: str, tmp_path: Path, asked: bool
) -> None:
    text = fake_config + f"random_init: {str(asked).lower()}\n"
    row = run(config(text), tmp_path)
    drawn = [c for c in candidates(tmp_path, row, 0) if c.operator == "random"]
    assert len(drawn) == (5 if asked else 0)


def test_defect_05_a_failed_merge_is_a_result_with_its_reason(
    fake_config: str, tmp_path: Path
) -> None:
    settings = config(
        fake_config,
        worker__options={"base": "base", "fail_when": "max_weight>0.9"},
        search__algorithm="llm_evo",
    )
    row = run(settings, tmp_path)
    found = candidates(tmp_path, row)
    failed = [c for c in found if c.state == "failed"]
    assert failed
    assert all(c.score is None and "fails this candidate" in c.failure for c in failed)
    assert max(c.generation for c in found) > min(c.generation for c in failed)
    assert row.stop_reason == "budget"
    assert summary(tmp_path, row)["evaluations"]["failed"] == len(failed)


def test_defect_05_even_where_every_merge_fails(fake_config: str, tmp_path: Path) -> None:
    settings = config(fake_config, worker__options={"fail_when": "max_weight>-1"})
    row = run(settings, tmp_path)
    assert (row.status, row.stop_reason) == ("done", "every candidate failed")
    assert summary(tmp_path, row)["best"] is None


def test_defect_06_the_evaluations_of_generation_zero_are_counted(
    fake_config: str, tmp_path: Path
) -> None:
    paid: Counter[int] = Counter()

    def count(event: dict[str, Any]) -> None:
        if event["event"] == "candidate":
            paid[event["generation"]] += 1

    row = run(config(fake_config), tmp_path, emit=count)
    assert paid[0] > 0
    assert summary(tmp_path, row)["evaluations"]["total"] == paid.total() == 19


def test_defect_07_integers_are_rounded_not_truncated(fake_config: str, tmp_path: Path) -> None:
    assert percent(0.29) == 29
    assert integers([n / 100 for n in range(101)]) == list(range(101))
    model = chat()
    settings = config(fake_config, search__algorithm="llm_evo", budget__max_evaluations=40)
    run(settings, tmp_path, models={"proposer": model})
    # What was advised as 29 is shown as 29 when it comes back as a scored candidate.
    assert "29,60 29,60" not in _text(model.calls[0])
    assert any("| 29,60 29,60 | " in _text(call) for call in model.calls[1:])


def test_defect_08_prompts_are_bounded_and_say_what_the_search_is_about(
    fake_config: str, tmp_path: Path
) -> None:
    model = chat()
    settings = config(fake_config, search__algorithm="llm_evo", budget__max_evaluations=120)
    run(settings, tmp_path, models={"proposer": model})
    assert len(model.calls) > 15
    sizes = [len(_text(call)) for call in model.calls]
    assert max(sizes[5:]) < 1.25 * sizes[4], "the prompt grows with the search"
    assert max(len(call) for call in model.calls) <= 2
    last = _text(model.calls[-1])
    for word in ("north", "south", "base", "task_arithmetic", "one 1, two .5"):
        assert word in last
    table = last.partition("Candidates, worst first")[2].partition("\nFailures")[0]
    scored = [line.split(" | ") for line in table.splitlines()[1:] if " | " in line]
    assert scored
    assert all(len(tasks.split()) == 2 for score, tasks, *_ in scored if "=" not in score)
    shown = [float(score.rstrip("=")) for score, *_ in scored]
    assert shown == sorted(shown), "least to most fit"


def test_defect_09_nothing_is_paid_for_twice(fake_config: str, tmp_path: Path) -> None:
    first = run(config(fake_config), tmp_path, "first")
    second = run(config(fake_config), tmp_path, "second")
    found = summary(tmp_path, second)["evaluations"]
    assert found["reused"] == found["total"] == 19
    pairs = zip(candidates(tmp_path, first), candidates(tmp_path, second), strict=True)
    assert all((one.vector, one.score) == (two.vector, two.score) for one, two in pairs)


def test_defect_09_an_equal_merge_in_one_search_is_a_twin(fake_config: str, tmp_path: Path) -> None:
    path = tmp_path / "north.yml"
    path.write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
        "- {model: north, parameters: {weight: 1}}\n- {model: south, parameters: {weight: 0}}\n"
    )
    row = run(config(fake_config, search__init=[str(path)]), tmp_path / "runs")
    zero = candidates(tmp_path / "runs", row, 0)
    north = next(c for c in zero if c.label == "north")
    again = next(c for c in zero if c.operator == "init")
    assert again.state == "twin"
    assert again.twin == (0, north.slot)
    assert again.score == north.score


def test_defect_09_models_are_paid_for_in_the_open_by_any_server(
    fake_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another base URL, the key from the environment, tokens counted."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-defect-09")
    with ScriptedServer(lambda body: adviser(body["messages"][0]["content"])) as server:
        settings = config(
            fake_config,
            search__algorithm="llm_evo",
            agents__llm="openai:any-model",
            agents__base_url=server.base_url,
        )
        row = run(settings, tmp_path)
        asked = server.requests
        assert all(r.headers["authorization"] == "Bearer sk-canary-defect-09" for r in asked)
    agents = summary(tmp_path, row)["agents"]
    assert agents["calls"] == len(asked) > 0
    assert agents["tokens_in"] > agents["tokens_out"] > 0
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-canary-defect-09" not in path.read_bytes(), path


def test_defect_09_a_key_on_the_command_line_is_refused_and_kept_nowhere(
    fake_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, runs = tmp_path / "config.yml", tmp_path / "runs"
    path.write_text(fake_config)
    code = run_app(["run", str(path), "--runs-dir", str(runs), "--api-key", "sk-canary-line"])
    out, err = capsys.readouterr()
    assert code == 2
    assert "OPENAI_API_KEY" in err
    assert "sk-canary-line" not in out + err
    for found in tmp_path.rglob("*"):
        assert not found.is_file() or b"sk-canary-line" not in found.read_bytes(), found


def test_defect_09_a_stopped_search_goes_on_from_its_checkpoint(
    fake_config: str, tmp_path: Path
) -> None:
    drain = driving.Drain()
    scored: Counter[tuple[int, int]] = Counter()

    def stop_in_the_middle(event: dict[str, Any]) -> None:
        if event["event"] == "candidate":
            scored[event["generation"], event["slot"]] += 1
            if scored.total() == 11:
                drain.request()

    row = run(config(fake_config), tmp_path, emit=stop_in_the_middle, drain=drain)
    assert row.status == "interrupted"
    done = driving.resume("a", runs_dir=tmp_path, emit=stop_in_the_middle)
    assert done.status == "done"
    assert set(scored.values()) == {1}
    calm = run(config(fake_config), tmp_path / "calm")
    mine, theirs = candidates(tmp_path, done), candidates(tmp_path / "calm", calm)
    assert [(c.vector, c.score) for c in mine] == [(c.vector, c.score) for c in theirs]


def test_defect_10_redundant_dimensions_are_noticed_and_cost_nothing(
    fake_config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genome = GenomeConfig(
        models=("north", "south"),
        base_model="base",
        merge_method="task_arithmetic",
        layer_granularity=2,
        normalize=True,
    )
    space = SearchSpace(genome, 4)
    assert (space.dimensions, space.freedoms) == (4, 2)
    one, two = space.recipe((0.8, 0.4, 0.3, 0.6)), space.recipe((0.4, 0.2, 0.15, 0.3))
    assert one == two
    assert one.hash() == two.hash()
    path = tmp_path / "config.yml"
    path.write_text(
        fake_config.replace("layer_granularity: 2", "layer_granularity: 2\n  normalize: true")
    )
    assert run_app(["check", str(path), "--runs-dir", str(tmp_path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["dimensions"], plan["freedoms"]) == (4, 2)


# --- mergekit-evolve's ----------------------------------------------------------------------


def test_defect_evolve_a_lost_worker_does_not_end_the_run(fake_config: str, tmp_path: Path) -> None:
    row = run(config(fake_config, worker__options={"base": "base", "die_at": 6}), tmp_path)
    calm = run(config(fake_config, worker__options={"base": "base"}), tmp_path / "calm")
    assert row.stop_reason == "budget"
    scores = [c.score for c in candidates(tmp_path, row)]
    assert scores == [c.score for c in candidates(tmp_path / "calm", calm)]


def test_defect_evolve_slerp_with_a_base_outside_the_list(fake_config: str, tmp_path: Path) -> None:
    row = run(config(fake_config, genome__merge_method="slerp"), tmp_path)
    assert (row.status, row.stop_reason) == ("done", "budget")
    found = candidates(tmp_path, row)
    assert "base" in {c.label for c in found if c.operator == "parent"}
    assert not [c for c in found if c.state == "failed"]


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_defect_evolve_any_density_is_a_merge(
    fake_config: str, tmp_path: Path, method: str
) -> None:
    settings = config(fake_config, genome__merge_method=method, search__algorithm="random")
    row = run(settings, tmp_path)
    assert not [c for c in candidates(tmp_path, row) if c.state == "failed"]
    genome = settings.genome
    space = SearchSpace(genome, 4)
    nothing_kept = tuple(0.0 if a.parameter == "density" else 0.5 for a in space.axes)
    effective = space.recipe(nothing_kept).effective("model.layers.0.mlp.w", 0)
    assert [dict(own)["density"] for _, _, own in effective.sources if own] == [0.0, 0.0]


def test_defect_evolve_every_candidate_sees_the_same_shuffled_items() -> None:
    def items(seed: int) -> Sequence[Any]:
        tasks = TasksConfig(tasks=("one",), limit=30, shuffle=True, seed=seed)
        return fake_tasks(tasks).refs("search")

    assert items(1) == items(1)
    assert set(items(1)) != set(items(2))
    assert len(items(1)) == 30


def test_defect_evolve_recipes_name_the_users_models(fake_config: str, tmp_path: Path) -> None:
    row = run(config(fake_config), tmp_path)
    best = Recipe.parse(tmp_path / row.name / "best.yml")
    assert set(best.models) <= {"north", "south", "base"}
    assert set(best.models) >= {"north", "south"}


def test_defect_evolve_unknown_keys_are_named(fake_config: str) -> None:
    settings = config(fake_config.replace("layer_granularity", "layer_granularty"))
    assert ["layer_granularty" in warning for warning in settings.warnings] == [True]
    assert "did you mean 'layer_granularity'" in settings.warnings[0]


def _text(messages: Sequence[Any]) -> str:
    return "\n".join(message.text for message in messages)
