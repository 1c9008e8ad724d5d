"""What test_ray.py has built on nodes; it imports little, since every worker there imports it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.workers.fake import FakeWorker


class FakeOnCpu(FakeWorker):
    """Whatever device it has a place on."""

    def __init__(self, given: WorkerSpec, taskset: Any) -> None:
        super().__init__(replace(given, device="cpu"), taskset)


class SaysWhere(FakeWorker):
    """A digest that tells where it is, and with which devices; slow enough for all to be asked."""

    def __init__(self, given: WorkerSpec, taskset: Any) -> None:
        super().__init__(replace(given, device="cpu"), taskset)
        import ray

        node = ray.get_runtime_context().get_node_id()
        devices = os.environ["CUDA_VISIBLE_DEVICES"]
        self.where = f"{node} {given.device} {devices} {given.crowd}"

    def load(self, asked: Any) -> Any:
        time.sleep(0.5)
        return replace(super().load(asked), digest=self.where)
