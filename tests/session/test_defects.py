"""The defects of LLM-Evo-Merge and mergekit-evolve that this program must not inherit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agentmerge import session
from agentmerge.agents.schemas import percent
from agentmerge.agents.testing import scripted_chat_model
from agentmerge.config import GenomeConfig, SearchConfig
from agentmerge.genome import SearchSpace
from agentmerge.ledger import Ledger
from agentmerge.report.summary import run_summary
from agentmerge.strategies.base import Observation, rng_factory
from agentmerge.strategies.cma_es import STRATEGY as CMA_ES
from tests.session.conftest import config, trace_of

ROLES = ("critic", "controller", "proposer")


def summary_of(runs: Path, name: str) -> dict:
    with Ledger(runs / session.LEDGER) as ledger:
        return run_summary(ledger, ledger.run(name))


def space(**genome: object) -> SearchSpace:
    body = {"models": ("a", "b"), "base_model": "base", "merge_method": "task_arithmetic"}
    return SearchSpace(GenomeConfig(**(body | genome)), 4)


@pytest.mark.parametrize("reply", [ConnectionError("no route"), "no JSON here", '{"thought": 1}'])
def test_defect_01_an_api_error_or_bad_json_ends_the_run(tmp_path: Path, reply: object) -> None:
    model = scripted_chat_model(lambda messages: reply)
    settings = config(search={"algorithm": "llm_evo"}, agents={"max_retries": 0})
    row = session.run(settings, name="a", runs_dir=tmp_path, models=dict.fromkeys(ROLES, model))
    assert row.status == "done"
    assert summary_of(tmp_path, "a")["agents"]["failures"] > 0


def test_defect_02_the_best_recipe_is_written_only_after_a_worse_generation(
    tmp_path: Path,
) -> None:
    seen: list[bool] = []

    def look(event: dict) -> None:
        if event["event"] == "generation":
            seen.append((tmp_path / "a" / "best.yml").is_file())

    session.run(config(), name="a", runs_dir=tmp_path, emit=look)
    assert len(seen) > 2
    assert all(seen)


def test_defect_03_the_seed_seeds_neither_population_nor_mutation(tmp_path: Path) -> None:
    for algorithm in ("llm_evo", "cma_es", "random"):
        traces = []
        for run, seed in enumerate((5, 5, 6)):
            runs = tmp_path / f"{algorithm}{run}"
            settings = config(search={"seed": seed, "algorithm": algorithm})
            session.run(settings, name="a", runs_dir=runs)
            traces.append(trace_of(runs, "a")["candidates"])
        assert traces[0] == traces[1]
        assert traces[0] != traces[2]


def test_defect_04_negative_weights_and_random_init_do_nothing(tmp_path: Path) -> None:
    weights = space(allow_negative_weights=True).recipe([0.0, 0.0]).slices[0].sources[0].parameters
    assert dict(weights)["weight"].at("", 0) < 0
    session.run(config(search={"random_init": True}), name="a", runs_dir=tmp_path)
    session.run(config(), name="b", runs_dir=tmp_path)
    with Ledger(tmp_path / session.LEDGER) as ledger:
        drawn = [
            {c.operator for c in ledger.candidates(ledger.run(name).id, 0)} for name in ("a", "b")
        ]
    assert "random" in drawn[0]
    assert "random" not in drawn[1]


def test_defect_05_a_failed_merge_crashes_the_generation(tmp_path: Path) -> None:
    failing = config(worker={"options": {"fail_when": "max_weight>0.7"}})
    row = session.run(failing, name="a", runs_dir=tmp_path)
    assert row.status == "done"
    assert summary_of(tmp_path, "a")["evaluations"]["failed"] > 0


def test_defect_06_the_count_leaves_out_generation_0(tmp_path: Path) -> None:
    session.run(config(budget={"max_evaluations": 6}), name="a", runs_dir=tmp_path)
    found = summary_of(tmp_path, "a")
    assert found["evaluations"]["total"] == 6
    assert found["generations"] == 1


def test_defect_07_integers_are_truncated() -> None:
    assert percent(0.29) == 29
    assert [percent(i / 100) for i in range(101)] == list(range(101))


def test_defect_08_the_prompt_grows_without_bound_and_says_nothing(tmp_path: Path) -> None:
    sizes: dict[int, int] = {}
    texts = []

    def reply(messages: list) -> dict:
        text = "\n".join(str(message.content) for message in messages)
        texts.append(text)
        sizes[len(sizes)] = len(text)
        return {"summary": "x", "findings": []}

    settings = config(budget={"max_evaluations": 150}, search={"algorithm": "llm_evo"})
    models = {"critic": scripted_chat_model(reply)}
    session.run(settings, name="a", runs_dir=tmp_path, models=models)
    assert len(sizes) > 15
    assert max(sizes.values()) < 1.3 * sizes[3]
    for word in ("north", "task_arithmetic", "one: acc", "weight 0.5", "| one 0."):
        assert word in texts[-1]


def test_defect_09_nothing_is_kept_and_the_key_is_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-3344")
    reply = {"summary": "x", "findings": []}
    models = {"critic": scripted_chat_model(lambda messages: reply)}
    session.run(config(), name="a", runs_dir=tmp_path, models=models)
    session.run(config(), name="b", runs_dir=tmp_path, models=models)
    assert summary_of(tmp_path, "b")["evaluations"]["reused"] == 34
    assert summary_of(tmp_path, "a")["agents"]["tokens_out"] > 0
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-canary" not in path.read_bytes()


def test_defect_10_half_of_the_dimensions_are_redundant_and_nothing_notices() -> None:
    there = space(normalize=True, layer_granularity=2)
    assert (there.dimensions, there.freedoms) == (4, 2)
    one, other = there.recipe([0.2, 0.4, 0.3, 0.3]), there.recipe([0.4, 0.8, 0.9, 0.9])
    assert one.hash() == other.hash()


def test_upstream_the_seed_never_reaches_cma_es() -> None:
    there = space(layer_granularity=2)
    history = [Observation(0, 0, (0.5,) * 4, "uniform", 0.1)]
    asked = [
        CMA_ES.propose(there, history, None, 8, rng_factory(seed))[0].vector for seed in (1, 1, 2)
    ]
    assert asked[0] == asked[1] != asked[2]


def test_upstream_slerp_with_a_base_outside_the_list_fails(tmp_path: Path) -> None:
    settings = config(genome={"merge_method": "slerp"})
    assert session.run(settings, name="a", runs_dir=tmp_path).status == "done"
    recipe = (tmp_path / "a" / "best.yml").read_text()
    assert "model: base" not in recipe.replace("base_model: base", "")


def test_upstream_the_saved_recipe_names_local_copies(tmp_path: Path) -> None:
    session.run(config(), name="a", runs_dir=tmp_path)
    assert "model: north" in (tmp_path / "a" / "best.yml").read_text()


def test_upstream_shuffle_asks_every_candidate_other_questions(tmp_path: Path) -> None:
    from agentmerge.workers.fake import fake_tasks

    body = {"tasks": [{"name": "one"}], "limit": 20, "shuffle": True}
    genome = {"models": ["a", "b"], "merge_method": "linear"}
    orders = []
    for seed in (1, 1, 2):
        text = json.dumps(body | {"genome": genome, "search": {"seed": seed}})
        orders.append([ref.index for ref in fake_tasks(SearchConfig.from_text(text).tasks).refs()])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_upstream_a_density_near_zero_raises_mid_run(tmp_path: Path) -> None:
    import torch

    from agentmerge.merging.kernels import KERNELS, Operand

    base, expert = torch.zeros(3, 3), torch.ones(3, 3)
    shared = {"normalize": 1.0, "lambda": 1.0, "rescale": 1.0}
    for method in ("ties", "dare_ties"):
        for density in np.array([0.0, 1e-9, 1e-3, 1.0]):
            operand = Operand(expert, 0.5, float(density), "key")
            merged = KERNELS[method](base, [operand, operand], shared, torch.float32)
            assert torch.isfinite(merged).all()
