"""The swap into a live model, and its proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import A, B, recipe

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import CandidateFailed, ParentError, RunFailed, WorkerLost
from agentmerge.recipe import Recipe
from agentmerge.testing.worker_suite import same
from agentmerge.workers.hf import HfWorker


@pytest.fixture(scope="module")
def spec(parents: dict[str, Path], tasks_dir: Path) -> WorkerSpec:
    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", limit=20)
    return tiny.spec(parents, config)


@pytest.fixture(scope="module")
def worker(spec: WorkerSpec) -> Iterator[HfWorker]:
    made = HfWorker(spec)
    yield made
    made.close()


def test_a_parents_recipe_makes_that_parent(worker: HfWorker, parents: dict[str, Path]) -> None:
    worker.load(A)
    worker.load(Recipe.of_model("b", 2).canonical(2))
    weights = load_file(parents["b"] / "model.safetensors")
    assert weights.keys() == worker._live.keys()
    for name, value in weights.items():
        assert torch.equal(worker._live[name], value), name


def test_buffers_and_the_tied_head(worker: HfWorker) -> None:
    buffers = {name: value.clone() for name, value in worker._model.named_buffers()}
    assert buffers
    worker.load(B)
    for name, value in worker._model.named_buffers():
        assert torch.equal(value, buffers[name])
    head, embedding = worker._model.lm_head.weight, worker._model.model.embed_tokens.weight
    assert head is embedding
    assert not worker._model.training


def test_a_foreign_write_never_reaches_a_score(worker: HfWorker, spec: WorkerSpec) -> None:
    """Also into a tensor that the next candidate leaves as it is."""
    refs = worker.tasks(spec).refs()
    worker.load(A)
    right = worker.score(refs)
    with torch.no_grad():
        worker._live["model.norm.weight"][0] += 1
    with pytest.raises(RunFailed, match=r"not the merged ones, the first is model\.norm\.weight"):
        worker.load(A)
    with pytest.raises(RunFailed, match="load"):
        worker.score(refs)
    worker.load(A)
    assert same(worker.score(refs), right)


def test_an_exception_in_the_middle_leaves_nothing_behind(
    worker: HfWorker, spec: WorkerSpec
) -> None:
    refs = worker.tasks(spec).refs()
    worker.load(A)
    right = worker.score(refs)
    huge = recipe(0.5, [{"filter": "layers.1.mlp", "value": 1e42}, {"value": 0.5}])
    with pytest.raises(CandidateFailed, match="not finite"):
        worker.load(huge)
    with pytest.raises(RunFailed, match="load"):
        worker.score(refs)
    worker.load(A)
    assert same(worker.score(refs), right)


def test_untied_heads_and_bfloat16(tmp_path: Path, tasks_dir: Path) -> None:
    shape: dict[str, Any] = {"tie_word_embeddings": False, "dtype": "bfloat16"}
    base = tiny.write_model(tmp_path / "base", seed=1, **shape)
    family = {"base": base}
    for name, seed in (("b", 2), ("c", 3)):
        family[name] = tiny.write_model(tmp_path / name, seed=seed, near=base, **shape)
    config = tiny.tasks_config(tasks_dir, "tiny_choice", limit=10)
    worker = HfWorker(tiny.spec(family, config, dtype="bfloat16"))
    assert worker.load(A).tensors == 21
    head, embedding = worker._live["lm_head.weight"], worker._live["model.embed_tokens.weight"]
    assert head.dtype is torch.bfloat16
    assert not torch.equal(head, embedding)
    worker.score(worker.tasks(worker._spec).refs())


def test_names_that_transformers_does_not_use(tmp_path: Path, tasks_dir: Path) -> None:
    """A file whose names lack the prefix loads in transformers: the values prove which is which."""
    family, short = {}, {}
    for name, seed in (("base", 1), ("b", 2), ("c", 3)):
        family[name] = tiny.write_model(tmp_path / name, seed=seed)
        short[name] = tiny.write_model(tmp_path / f"{name}-short", seed=seed)
        weights = load_file(short[name] / "model.safetensors")
        named = {key.removeprefix("model."): value for key, value in weights.items()}
        save_file(named, short[name] / "model.safetensors", metadata={"format": "pt"})
    config = tiny.tasks_config(tasks_dir, "tiny_choice", limit=10)
    results = []
    for parents in (family, short):
        worker = HfWorker(tiny.spec(parents, config))
        worker.load(A)
        results.append(worker.score(worker.tasks(worker._spec).refs()))
    assert same(*results)


def test_a_live_tensor_with_other_values_than_the_file_is_refused(
    worker: HfWorker, parents: dict[str, Path]
) -> None:
    from agentmerge.workers.targets import live_targets

    weights = load_file(parents["b"] / "model.safetensors")
    short = {name.removeprefix("model."): value for name, value in weights.items()}
    with pytest.raises(ParentError, match=r"other values than .* has in the files"):
        live_targets(worker._model, short, (), lambda name: short[name] + 1)
    with pytest.raises(ParentError, match=r"1 only in the files \(e\.g\. other\.thing\);"):
        live_targets(worker._model, [*short, "other.thing"], (), lambda name: short[name])


def test_out_of_memory_says_what_to_lower(
    worker: HfWorker, spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = worker.tasks(spec).refs()
    worker.load(A)
    monkeypatch.setattr(worker._scorer, "score", lambda _: torch.empty(1 << 50))
    with pytest.raises(WorkerLost, match=r"allocate memory.*lower worker\.batch_size \(now 16\)"):
        worker.score(refs)


def test_two_hundred_swaps_in_flat_memory(worker: HfWorker, spec: WorkerSpec) -> None:
    refs = worker.tasks(spec).refs()

    def resident_mib() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    def swaps(count: int) -> None:
        for i in range(count):
            worker.load(recipe(0.1 + 0.001 * i, 0.5))
            if i % 10 == 0:
                worker.score(refs)

    swaps(50)
    before = resident_mib()
    swaps(200)
    assert resident_mib() - before < 8
