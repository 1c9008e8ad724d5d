"""Workers in the search's own process. Nothing there can be ended while it works."""

from __future__ import annotations

from agentmerge.contracts.worker import Build, Worker, WorkerSpec


class Here:
    apart = False

    def __init__(self, count: int) -> None:
        pass

    def start(self, spec: WorkerSpec, build: Build) -> _Hosted:
        return _Hosted(spec, build)

    def close(self) -> None:
        pass


class _Hosted:
    def __init__(self, spec: WorkerSpec, build: Build) -> None:
        self._spec, self._build = spec, build
        self._worker: Worker | None = None

    def ready(self) -> Worker:
        self._worker = self._build(self._spec)
        return self._worker

    def end(self) -> None:
        raise AssertionError("nothing can be ended here")

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
