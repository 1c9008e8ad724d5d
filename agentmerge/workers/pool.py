"""Hands candidates to free workers, one at a time each; safe to call from many threads.

A worker is built when it is first needed. One lives in this process, several in a process each.
A worker that is lost is built anew and its candidate tried once more. The pool knows no search,
no budget and no database.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from agentmerge import plugins
from agentmerge.errors import AgentmergeError, NotBegun, NoWorker, RunFailed, WorkerLost
from agentmerge.recipe import Recipe
from agentmerge.workers.base import (
    Differentiator,
    EngineInfo,
    Fingerprint,
    Gradient,
    ItemRef,
    ItemResult,
    Loss,
    Worker,
    WorkerSpec,
)
from agentmerge.workers.processes import end_with

if TYPE_CHECKING:
    from agentmerge.evaluation.tasks import TaskSet

Make = Callable[..., Worker]
#: Candidates in a row, each of which lost two workers, after which the machine is at fault.
LOSSES = 3
#: Seconds that a worker process may take to end by itself.
_CLOSING_S = 30
T = TypeVar("T")


def worker_class(spec: WorkerSpec) -> Any:
    """The class of ``spec.kind``: called with (spec, taskset or None); ``tasks(spec)`` gives the
    TaskSet it asks, and ``describe(spec)`` its EngineInfo without building it."""
    return plugins.load("agentmerge.workers", spec.kind)


def devices_for(spec: WorkerSpec, count: int) -> list[str]:
    """The device of each of ``count`` workers: where only ``cuda`` is asked for, they take turns
    (each as many in a row as its engine has ranks)."""
    if spec.device != "cuda" or count == 1:
        return [spec.device] * count
    from agentmerge.merging.memory import cuda_devices

    args = spec.options.get("engine_args") or {}
    ranks = int(args.get("tensor_parallel_size") or 1)
    places = max(1, cuda_devices() // ranks)
    return [f"cuda:{worker % places * ranks}" for worker in range(count)]


def crowd_of(spec: WorkerSpec, count: int) -> int:
    """How many of ``count`` workers share the fullest device."""
    devices = devices_for(spec, count)
    return max(map(devices.count, devices))


class Pool:
    """Workers of one spec.

    make: builds a worker from a spec (and a task set); by default by ``spec.kind``. For several
        workers it must be picklable.
    taskset: what is asked, where the caller has built it already; worker processes build it anew.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        count: int = 1,
        make: Make | None = None,
        taskset: TaskSet | None = None,
    ) -> None:
        self.spec = spec
        self._make = make
        self._taskset = taskset
        self._apart = count > 1
        self._devices = devices_for(spec, count)
        self._crowd = crowd_of(spec, count)
        self._free: list[Worker | None] = [None] * count
        self._size = count
        self._change = threading.Condition()
        self._stopped = False
        self._lost_in_a_row = 0

    @cached_property
    def info(self) -> EngineInfo:
        """What the workers are, without building one."""
        found: EngineInfo = worker_class(self.spec).describe(self.spec)
        return found

    def evaluate(
        self,
        recipe: Recipe,
        refs: Sequence[ItemRef],
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[Fingerprint, list[ItemResult], float]:
        """(fingerprint, results in the order of ``refs``, seconds), once a worker is free.

        wanted: asked when the candidate's turn comes, which may be long after the call.

        Raises:
            NotBegun: it was no longer wanted.
            CandidateFailed: the recipe's fault; the pool goes on.
            WorkerLost: two workers were lost over it, whatever their errors.
            NoWorker: none can be started, or ``LOSSES`` candidates in a row lost two each.
            RunFailed: the pool was stopped before this candidate was begun.
        """

        def job(worker: Worker) -> tuple[Fingerprint, list[ItemResult]]:
            return worker.load(recipe), worker.score(refs)

        (fingerprint, results), seconds = self._on_a_worker(job, wanted)
        return fingerprint, results, seconds

    @property
    def differentiates(self) -> bool:
        """Whether its workers have gradients, without building one."""
        return hasattr(worker_class(self.spec), "gradient")

    def gradient(
        self,
        recipe: Recipe,
        refs: Sequence[ItemRef],
        loss: Loss,
        weights: Sequence[float],
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[Gradient, float]:
        """(gradient, seconds), once a worker is free; raises as ``evaluate`` does.

        Only where ``differentiates``; see ``Differentiator.gradient``.
        """

        def job(worker: Worker) -> Gradient:
            return cast(Differentiator, worker).gradient(recipe, refs, loss, weights)

        return self._on_a_worker(job, wanted)

    def _on_a_worker(
        self, job: Callable[[Worker], T], wanted: Callable[[], bool]
    ) -> tuple[T, float]:
        """What a job gives, and its seconds; on a new worker where the first is lost over it."""
        worker = self._take()
        try:
            if not wanted():
                raise NotBegun("the search was told to stop before this candidate's turn")
            # Where all were lost lately, one more try shows whether that is over.
            for again in (False,) if self._lost_in_a_row >= LOSSES else (True, False):
                start = time.monotonic()
                try:
                    worker = worker or self._build()
                    done = job(worker), time.monotonic() - start
                except AgentmergeError as error:
                    if not isinstance(error, WorkerLost):
                        self._lost_in_a_row = 0
                        raise
                    lost = error
                except Exception as error:  # the worker's own fault, or of what it runs on
                    lost = WorkerLost(_one_line(error))
                    lost.__cause__ = error
                else:
                    self._lost_in_a_row = 0
                    return done
                built, worker = worker, None
                self._discard(built)
                if not again:
                    raise self._lost(lost, built is not None) from lost.__cause__
            raise AssertionError("unreachable")
        finally:
            with self._change:
                self._free.append(worker)
                self._change.notify()

    def _lost(self, error: WorkerLost, built: bool) -> WorkerLost:
        """What to raise where the second worker was lost, too; built: it had been started."""
        if not built:
            return NoWorker(f"no worker can be started: {error}")
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= LOSSES:
            return NoWorker(f"{LOSSES} candidates in a row lost two workers each: {error}")
        return error

    def stop(self) -> None:
        """Let running evaluations end and begin no other."""
        with self._change:
            self._stopped = True
            self._change.notify_all()

    def close(self) -> None:
        """Stop, wait for running evaluations, and close every worker; safe to call twice.

        Raises:
            RunFailed: a worker that looks back at its end found its answers wrong.
        """
        self.stop()
        with self._change:
            self._change.wait_for(lambda: len(self._free) == self._size)
            workers, self._free = self._free, [None] * self._size
        found = [failure for worker in workers if (failure := _close_quietly(worker)) is not None]
        if found:
            raise found[0]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> Worker | None:
        with self._change:
            self._change.wait_for(lambda: self._free or self._stopped)
            if self._stopped:
                raise RunFailed("the worker pool is stopped; this candidate was not begun")
            built = next((i for i, worker in enumerate(self._free) if worker is not None), 0)
            return self._free.pop(built)

    def _build(self) -> Worker:
        if self._apart:
            with self._change:
                device = self._devices.pop(0)
            own = replace(self.spec, device=device, crowd=self._crowd)
            try:
                return _WorkerProcess(own, self._make, self._size)
            except BaseException:
                self._devices.append(device)
                raise
        make = self._make or worker_class(self.spec)
        return make(self.spec, self._taskset)

    def _discard(self, lost: Worker | None) -> None:
        _close_quietly(lost)
        if isinstance(lost, _WorkerProcess):
            self._devices.append(lost.device)


def _close_quietly(worker: Worker | None) -> RunFailed | None:
    """What a worker had against its own answers; one that is gone already has nothing."""
    if worker is not None:
        try:
            worker.close()
        except WorkerLost:
            pass
        except RunFailed as failure:
            return failure
        except Exception:  # of a broken worker there is nothing left to be closed
            pass
    return None


class _WorkerProcess:
    """A worker in a process of its own, with the contract of ``base.Worker``."""

    def __init__(self, spec: WorkerSpec, make: Make | None, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, spec, make, count), daemon=True
        )
        self.device = spec.device
        self._process.start()
        theirs.close()
        self._info: EngineInfo = self._receive()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def load(self, recipe: Recipe) -> Fingerprint:
        found: Fingerprint = self._call("load", recipe)
        return found

    def score(self, items: Sequence[ItemRef]) -> list[ItemResult]:
        found: list[ItemResult] = self._call("score", tuple(items))
        return found

    def gradient(
        self,
        recipe: Recipe,
        items: Sequence[ItemRef],
        loss: Loss = "margin",
        weights: Sequence[float] | None = None,
    ) -> Gradient:
        found: Gradient = self._call("gradient", recipe, tuple(items), loss, weights)
        return found

    def close(self) -> None:
        said = None
        with suppress(OSError, EOFError):  # it died before, or has nothing to say
            self._pipe.send(("close", ()))
            if self._pipe.poll(_CLOSING_S):
                _, said = self._pipe.recv()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(10)
        self._pipe.close()
        if isinstance(said, AgentmergeError):
            raise said

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


def _serve(pipe: Any, spec: WorkerSpec, make: Make | None, count: int) -> None:
    """The other side of ``_WorkerProcess``: answers calls until told to close.

    count: how many such processes share the machine's cores.
    """
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C drains the search, not its workers
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    try:
        worker = (make or worker_class(spec))(spec, None)
        pipe.send((True, worker.info))
        while True:
            name, arguments = pipe.recv()
            if name == "close":
                worker.close()
                return
            try:
                reply = (True, getattr(worker, name)(*arguments))
            except AgentmergeError as error:
                reply = (False, _portable(error))
            pipe.send(reply)
    except (EOFError, OSError):
        return  # the search is gone
    except BaseException as error:
        lost = error if isinstance(error, AgentmergeError) else WorkerLost(_one_line(error))
        pipe.send((False, _portable(lost)))


def _one_line(error: BaseException) -> str:
    """A candidate's failure is read among others: no traceback, and not a driver's ten lines."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _portable(error: AgentmergeError) -> AgentmergeError:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a plugin's own exception
        return WorkerLost(str(error))
    return error
