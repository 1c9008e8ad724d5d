"""A worker: the built-in one, and how long each swap took."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from agentmerge.contracts import EngineInfo, Fingerprint, Recipe, WorkerSpec, load_plugin

HfWorker: Any = load_plugin("agentmerge.workers", "hf")


class TimedWorker(HfWorker):
    """Its name is part of every result's key: results are not mixed with the built-in one's."""

    def __init__(self, spec: WorkerSpec, taskset: Any = None) -> None:
        super().__init__(spec, taskset)
        self.swaps_s: list[float] = []

    @staticmethod
    def describe(spec: WorkerSpec) -> EngineInfo:
        return replace(HfWorker.describe(spec), engine="timed_hf")

    def load(self, recipe: Recipe) -> Fingerprint:
        began = time.monotonic()
        fingerprint = super().load(recipe)
        self.swaps_s.append(time.monotonic() - began)
        return fingerprint
