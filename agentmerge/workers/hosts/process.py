"""Workers in processes of their own on this machine, each answering over a pipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from dataclasses import replace
from typing import Any

from agentmerge.config import WorkerSettings
from agentmerge.contracts.worker import Build, Worker, WorkerSpec
from agentmerge.errors import AgentmergeError, WorkerLost
from agentmerge.system.redaction import clean_screen
from agentmerge.system.temporary import discard_unfinished
from agentmerge.workers.hosts.proxy import Proxy, portable
from agentmerge.workers.processes import end, end_with, uninterrupted

_VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Seconds that a worker may take to end by itself.
CLOSING_S = 30


class Processes:
    apart = True

    def __init__(self, count: int) -> None:
        self._count = count

    @staticmethod
    def room(settings: WorkerSettings, device: str) -> int:
        """As many as this machine has devices; of one that is named, one."""
        if device != "cuda":
            return 1
        from agentmerge.merging.memory import cuda_devices

        return cuda_devices() // settings.ranks

    def start(self, spec: WorkerSpec, build: Build) -> WorkerProcess:
        return WorkerProcess(spec, build, self._count)

    def close(self) -> None:
        pass


class WorkerProcess(Proxy):
    """The worker of a process; count: how many such processes share the machine's cores."""

    def __init__(self, spec: WorkerSpec, build: Build, count: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # An engine of several ranks has processes of its own, which a daemon may not.
        alone = spec.ranks == 1
        self._process = context.Process(
            target=_serve, args=(theirs, spec, build, count), daemon=alone
        )
        with uninterrupted():
            self._process.start()
        theirs.close()

    def ready(self) -> Worker:
        self._info = self._receive()
        return self

    def close(self) -> None:
        said, answers = None, False
        with suppress(OSError, EOFError):  # it died before, or has nothing to say
            self._pipe.send(("close", ()))
            answers = self._pipe.poll(CLOSING_S)
            if answers:
                _, said = self._pipe.recv()
        self._process.join(10 if answers else 0)
        self.end()
        self._process.join(10)
        self._pipe.close()
        # A model's size, where it was writing one as it died.
        discard_unfinished(dry_run=False, shared=False, pid=self._process.pid or 0)
        if isinstance(said, AgentmergeError):
            raise said

    def end(self) -> None:
        """With the processes that it has started."""
        end(self._process)

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            self._pipe.send((name, arguments))
        except OSError:
            raise self._lost() from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            good, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if not good:
            raise value
        return value

    def _lost(self) -> WorkerLost:
        self._process.join(5)
        return WorkerLost(
            f"worker process {self._process.pid} died (exit code {self._process.exitcode}); "
            "if it was killed for memory, lower worker.count or worker.batch_size"
        )


def _serve(pipe: Any, spec: WorkerSpec, build: Build, count: int) -> None:
    """The other side: answers calls until told to close."""
    os.setpgid(0, 0)  # Ctrl-C drains the search, not its workers; and it is ended as a whole
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if count > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    with clean_screen():
        _answer(pipe, with_own_devices(spec), build)


def with_own_devices(spec: WorkerSpec) -> WorkerSpec:
    """The spec in a process that sees only its worker's devices (``CUDA_VISIBLE_DEVICES``), before
    anything there has looked: no context, and no library, can take another's memory."""
    kind, _, first = spec.device.partition(":")
    if kind != "cuda" or not first:
        return spec
    given, ranks = os.environ.get(_VISIBLE), spec.ranks
    places = range(int(first), int(first) + ranks)
    names = given.split(",") if given else None
    if names is not None and places[-1] >= len(names):
        return spec  # not there: whoever takes it says so
    os.environ[_VISIBLE] = ",".join(names[place] if names else str(place) for place in places)
    return replace(spec, device=kind)


def _answer(pipe: Any, spec: WorkerSpec, build: Build) -> None:
    try:
        worker = build(spec)
        pipe.send((True, worker.info))
        while True:
            name, arguments = pipe.recv()
            if name == "close":
                worker.close()
                return
            try:
                reply = (True, getattr(worker, name)(*arguments))
            except AgentmergeError as error:
                reply = (False, portable(error))
            pipe.send(reply)
    except (EOFError, OSError):
        return  # the search is gone
    except BaseException as error:
        pipe.send((False, portable(error)))
