"""A host: workers in processes that let everybody else on this machine go first."""

import os
from dataclasses import dataclass

from agentmerge.contracts import Build, Worker, WorkerSpec, load_plugin


class Polite(load_plugin("agentmerge.hosts", "process")):
    def start(self, spec, build):
        return super().start(spec, _Nicely(build))


@dataclass(frozen=True)
class _Nicely:
    """Sent to the process, and called there."""

    build: Build

    def __call__(self, spec: WorkerSpec) -> Worker:
        os.nice(10)
        return self.build(spec)
