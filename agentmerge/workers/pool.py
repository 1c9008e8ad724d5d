"""Gives work to workers in turn, first come, first served; safe to call from many threads.

Whoever submits work gets its future: it runs on one of the pool's threads, of which there is one a
worker, and has that worker to itself until it ends. A worker is built when it is first needed,
where its host has it (``hosts``). A worker that is lost is built anew and its candidate tried once
more; one that is late is ended and counts as lost. A place where none can be started, or where one
ran out of memory, rests, and its candidate goes to another. What lives in this process cannot be
ended: it is left alone, and nothing else is begun there. The pool knows no search, no budget and no
database.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from agentmerge.contracts.strategy import cost_of
from agentmerge.contracts.worker import (
    Differentiator,
    EngineInfo,
    Fingerprint,
    Gradient,
    Host,
    ItemRef,
    ItemResult,
    Loss,
    Worker,
    WorkerSpec,
)
from agentmerge.errors import (
    AgentmergeError,
    CandidateFailed,
    NoRoom,
    NotBegun,
    NoWorker,
    RunFailed,
    UserError,
    WorkerLost,
)
from agentmerge.merging.memory import ran_out
from agentmerge.recipe import Recipe
from agentmerge.system.redaction import remembered
from agentmerge.system.waits import waiting_for
from agentmerge.workers.hosts.proxy import one_line
from agentmerge.workers.kinds import Building, Make, worker_class
from agentmerge.workers.places import (
    INTERRUPTED,
    Deadlines,
    Late,
    NoLongerAwaited,
    Place,
    close_quietly,
)
from agentmerge.workers.sharing import crowd_of, devices_for, host_class

if TYPE_CHECKING:
    from agentmerge.evaluation.tasks import TaskSet

#: Candidates in a row, each of which lost two workers, after which the machine is at fault.
LOSSES = 3
#: Seconds that a worker may take to be ready.
_STARTING_S = 3600
#: Seconds after which a place where none could be started is tried again.
REST_S = 60.0
T = TypeVar("T")


class Turn(Future[T]):
    """What comes of submitted work. place: where it is at work. unwanted: nobody waits for it."""

    place: Place | None = None
    unwanted = False


class Pool:
    """Workers of one spec.

    make: builds a worker from a spec (and a task set); by default by ``spec.kind``. For several
        workers it must be picklable.
    taskset: what is asked, where the caller has built it already; worker processes build it anew.
    deadlines: how long candidates may take, and when whatever runs is ended.
    host: where workers live, by name or made of their number; by default see ``host_class``.
    tell: is told why a place rests.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        count: int = 1,
        make: Make | None = None,
        taskset: TaskSet | None = None,
        deadlines: Deadlines | None = None,
        host: str | Callable[[int], Host] | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.spec = spec
        self._tell, self._told = tell, set[Place]()
        self._deadlines = deadlines or Deadlines()
        if not callable(host):
            host = host_class(host, count, self._deadlines.asked_s)
        self._host = _host(host, count)
        self._make = make
        self._taskset = taskset
        self._crowd = crowd_of(spec, count, type(self._host))
        self._places = [Place(device) for device in devices_for(spec, count, type(self._host))]
        self._free = [*self._places]
        self._left_alone: threading.Thread | None = None
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="pool")
        self._mine = threading.local()  # .turn: that a thread of the pool has
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._stopped = False
        self._lost_in_a_row = 0

    @cached_property
    def info(self) -> EngineInfo:
        """What the workers are, without building one."""
        found: EngineInfo = worker_class(self.spec).describe(self.spec)
        return found

    @property
    def mine(self) -> int | None:
        """Which worker, from 1, the work of this thread has."""
        place = getattr(getattr(self._mine, "turn", None), "place", None)
        return None if place is None else self._places.index(place) + 1

    def submit(self, work: Callable[..., T], *arguments: Any) -> Turn[T]:
        """The future of ``work(*arguments)``, called once a worker is free.

        What it asks of the pool meanwhile, one thing after another, is that worker's to answer:
        ``submit(pool.evaluate, recipe, refs)`` is one candidate's results, and a function that
        asks for them, looks at them and asks on is all of a candidate's.

        Raises, through the future, what the work raises, and:
            NotBegun: the pool was stopped before its turn came.
        """
        turn: Turn[T] = Turn()
        with self._lock:
            if not self._stopped:
                self._threads.submit(self._take_turn, turn, partial(work, *arguments))
                return turn
        turn.set_exception(_stopped())
        return turn

    def wait(self, turns: Collection[Turn[Any]], beside: Collection[Turn[Any]] = ()) -> None:
        """Until all have ended; where one fails, or one of those beside, what has not begun is
        cancelled and all the others have ended.

        Whoever is interrupted meanwhile leaves none of them at work.
        """
        due, others = set(turns), set(beside)
        try:
            while due:
                done, _ = wait_for(due | others, return_when=FIRST_COMPLETED)
                due, others = due - done, others - done
                if any(turn.cancelled() or turn.exception() for turn in done):
                    for turn in due | others:
                        turn.cancel()
                    with self._freed:  # what waits for a place has not begun either
                        for turn in due | others:
                            turn.unwanted = turn.unwanted or turn.place is None
                        self._freed.notify_all()
                    wait_for(due | others)
                    return
        except BaseException:  # Ctrl-C: nobody waits for the workers any more
            for turn in (*turns, *beside):
                turn.cancel()
                with self._lock:
                    turn.unwanted = True
                    if turn.place is not None:
                        turn.place.interrupt()
                    self._freed.notify_all()
            raise

    def _take_turn(self, turn: Turn[T], work: Callable[[], T]) -> None:
        """Runs on a thread of the pool."""
        if not turn.set_running_or_notify_cancel():
            return
        self._mine.turn = turn
        result: T | None = None
        error: BaseException | None = None
        try:
            if self._stopped:
                raise _stopped()
            self._take_place(turn)
            result = work()
        except BaseException as raised:
            error = raised
        if turn.place is not None and not getattr(self._host, "keeps", True):
            error = _emptied(turn.place) or error
        self._leave_place(turn)
        self._mine.turn = None
        if error is None:
            turn.set_result(cast(T, result))
        else:
            turn.set_exception(error)

    def _take_place(self, turn: Turn[T]) -> Place:
        """A free place, one with a worker first; where all rest, once one has rested.

        Raises:
            NotBegun: the pool was stopped meanwhile, or nobody waits for this any more.
        """
        with self._freed:
            while not (turn.unwanted or self._stopped):
                now = time.monotonic()
                rested = [place for place in self._free if place.rests_until <= now]
                if rested or len(self._free) == len(self._places):  # nobody else is at work
                    place = min(
                        rested or self._free, key=lambda p: (p.worker is None, p.rests_until)
                    )
                    self._free.remove(place)
                    turn.place, place.interrupted = place, False
                    return place
                waits_s = min((p.rests_until - now for p in self._free), default=None)
                self._freed.wait(waits_s)
            raise NoLongerAwaited(INTERRUPTED) if turn.unwanted else _stopped()

    def _leave_place(self, turn: Turn[T]) -> None:
        with self._freed:
            if turn.place is not None:
                self._free.append(turn.place)
            turn.place = None
            self._freed.notify_all()

    def _elsewhere(self, turn: Turn[T], error: WorkerLost, *, barren: bool) -> Place:
        """Another place than one where no worker can be started (barren), or goes on, which rests
        from now on.

        Raises:
            NoWorker: at no other one either.
            NotBegun: as ``_take_place``.
        """
        here = turn.place
        assert here is not None
        here.barren = barren
        if all(place.barren for place in self._places):
            raise NoWorker(f"no worker can be started: {error}")
        self._rest(here, error)
        self._leave_place(turn)
        return self._take_place(turn)

    def _rest(self, place: Place, error: WorkerLost) -> None:
        place.rests_until = time.monotonic() + REST_S
        if place not in self._told:
            self._told.add(place)
            self._tell(
                f"a worker on {place.device} is left out, and tried again every {REST_S:.0f} s; "
                f"the others go on: {error}"
            )

    def evaluate(
        self,
        recipe: Recipe,
        refs: Sequence[ItemRef],
        wanted: Callable[[], bool] = lambda: True,
    ) -> tuple[Fingerprint, list[ItemResult], float]:
        """(fingerprint, results in the order of ``refs``, seconds), once a worker is free.

        wanted: asked when the candidate's turn comes, which may be long after the call.

        Raises:
            NotBegun: it was no longer wanted, the pool's time ended while it ran, or the pool was
                stopped before it was begun: what stopped the pool is to be told, not this.
            CandidateFailed: the recipe's fault, or what the worker gave is not what its contract
                says; the pool goes on.
            WorkerLost: two workers were lost over it, whatever their errors.
            NoWorker: none can be started, or ``LOSSES`` candidates in a row lost two each.
        """

        def job(worker: Worker) -> tuple[Fingerprint, list[ItemResult]]:
            proof = self._due("load()", worker.load(recipe), Fingerprint)
            return proof, self._one_an_item(worker.score(refs), len(refs))

        (fingerprint, results), seconds = self._on_a_worker(job, len(refs), wanted)
        return fingerprint, results, seconds

    def _due(self, what: str, given: object, kind: type[T]) -> T:
        """What a worker gave, where it is of the kind that is due.

        Raises:
            CandidateFailed: it is not. Its code does so again, on any worker: none is lost.
        """
        if isinstance(given, kind):
            return given
        said = "None" if given is None else f"a {type(given).__name__}"
        raise CandidateFailed(
            f"the {self.spec.kind!r} worker's {what} is {said}, not {kind.__name__}; "
            "mend the worker"
        )

    def _one_an_item(self, given: object, items: int) -> list[ItemResult]:
        """What ``score`` gave; raises as ``_due`` does."""
        rows = self._due("score()", list(given) if isinstance(given, tuple) else given, list)
        if len(rows) != items:
            raise CandidateFailed(
                f"the {self.spec.kind!r} worker's score() has {len(rows)} results for {items} "
                "items; mend the worker"
            )
        return [self._due(f"score()[{i}]", row, ItemResult) for i, row in enumerate(rows)]

    @cached_property
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
            slope = cast(Differentiator, worker).gradient(recipe, refs, loss, weights)
            return self._due("gradient()", slope, Gradient)

        return self._on_a_worker(job, cost_of(with_gradient=True) * len(refs), wanted)

    def _on_a_worker(
        self, job: Callable[[Worker], T], items: int, wanted: Callable[[], bool]
    ) -> tuple[T, float]:
        """What a job gives, and its seconds, in this thread's turn or in one of its own."""
        mine = getattr(self._mine, "turn", None)
        if mine is not None:
            return self._tried(mine, job, items, wanted)
        turn = self.submit(self._on_a_worker, job, items, wanted)
        self.wait([turn])
        return turn.result()

    def _tried(
        self, turn: Turn[Any], job: Callable[[Worker], T], items: int, wanted: Callable[[], bool]
    ) -> tuple[T, float]:
        """On a new worker where the first is lost over it."""
        place = turn.place
        assert place is not None
        if self._stopped:
            raise _stopped()
        if not wanted() or not self._deadlines.left_s:
            raise NotBegun("the search was told to stop before this candidate's turn")
        if self._left_alone is not None and self._left_alone.is_alive():
            raise NoWorker("the worker still works on a candidate that was given up")
        self._left_alone = None
        # Where all were lost lately, one more try shows whether that is over.
        tries = 1 if self._lost_in_a_row >= LOSSES else 2
        while True:
            start = time.monotonic()
            built = place.worker is not None
            try:
                if not built:
                    self._within(place, partial(self._start, place), _STARTING_S, "ready")
                    built = True
                done = self._scored(place, job, items), time.monotonic() - start
            except AgentmergeError as error:
                if not isinstance(error, WorkerLost):
                    self._lost_in_a_row = 0
                    raise
                if self._left_alone is not None:
                    raise
                lost = error
            except Exception as error:  # the worker's own fault, or of what it runs on
                lost = WorkerLost(one_line(error))
                lost.__cause__ = error
            except BaseException:  # a worker's SystemExit
                self._end(place)
                raise
            else:
                self._lost_in_a_row = 0
                return done
            full = len(self._places) > 1 and ran_out(lost)  # its device, and perhaps no other
            no_place = isinstance(lost, NoRoom) or (full and not built)
            tries -= not no_place
            if not tries and built:
                _emptied(place)
                if full:
                    self._rest(place, lost)
                raise self._lost(lost) from lost.__cause__
            _emptied(place)
            if not tries or full or no_place:
                place = self._elsewhere(turn, lost, barren=not built)
                tries = max(tries, 1)

    def _scored(self, place: Place, job: Callable[[Worker], T], items: int) -> T:
        worker, start = place.worker, time.monotonic()
        assert worker is not None
        done = self._within(place, lambda: job(worker), self._deadlines.of(items), "scored")
        self._deadlines.took(time.monotonic() - start, items)
        return done

    def _within(self, place: Place, work: Callable[[], T], limit_s: float, done: str) -> T:
        """What the work gives, if it does so in time; else its worker is ended.

        Raises:
            NotBegun: the pool's time is over.
            WorkerLost: the work's is.
            NoWorker: it is, and the worker cannot be ended.
        """
        left_s = self._deadlines.left_s
        what = "a worker to load its models" if done == "ready" else "a candidate's scores"
        try:
            with waiting_for(what):
                return place.ask(work, min(limit_s, left_s))
        except NoLongerAwaited:
            self._end(place)
            raise
        except Late:
            self._end(place)
        if left_s <= limit_s:
            raise NotBegun("the time was up before this candidate was scored; it stays open")
        late = f"not {done} within {limit_s:.3g} s"
        if done == "scored":
            late += f" ({self._deadlines.why})"
        if self._host.apart:
            raise WorkerLost(f"{late}: its worker process was ended; a longer limit may do")
        raise NoWorker(
            f"{late}, and a worker in this process cannot be ended: set worker.timeout_s "
            "(--worker-timeout S, also on resume), and it gets a process of its own"
        )

    def _end(self, place: Place) -> None:
        """Give a place's worker up and end it where it has a process of its own."""
        hosted = place.hosted
        thread = place.give_up()
        if self._host.apart and hosted is not None:
            hosted.end()
        else:
            self._left_alone = thread

    def _lost(self, error: WorkerLost) -> WorkerLost:
        """What to raise where the second worker was lost, too."""
        self._lost_in_a_row += 1
        if self._lost_in_a_row >= LOSSES:
            return NoWorker(f"{LOSSES} candidates in a row lost two workers each: {error}")
        return error

    def stop(self) -> None:
        """Let running evaluations end and begin no other."""
        with self._freed:
            self._stopped = True
            self._freed.notify_all()

    def close(self) -> None:
        """Stop, wait for running evaluations, and close every worker; safe to call twice.

        Raises:
            RunFailed: a worker that looks back at its end found its answers wrong.
        """
        self.stop()
        with waiting_for("the end of the workers"):
            self._threads.shutdown()
            found = [failure for place in self._places if (failure := _emptied(place)) is not None]
            self._host.close()
        if found:
            raise found[0]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, place: Place) -> None:
        """Runs on the place's own thread."""
        spec, build = self.spec, Building(self._make, self._taskset, {})
        if self._host.apart:
            spec = replace(spec, device=place.device, crowd=self._crowd)
            build = Building(self._make, None, remembered(spec.options))
        hosted = self._host.start(spec, build)
        if not place.lodge(hosted):
            if self._host.apart:
                hosted.end()
            close_quietly(hosted)
        elif place.lodge(hosted, hosted.ready()):
            place.barren = False


def _host(make: Callable[[int], Host], count: int) -> Host:
    """
    Raises:
        UserError: it cannot be built.
    """
    try:
        return make(count)
    except AgentmergeError:
        raise
    except Exception as error:
        name = f"{make.__module__}.{getattr(make, '__qualname__', make)}"
        raise UserError(
            f"the worker host {name} cannot be built: {one_line(error)}; mend it, or set another "
            "worker.host"
        ) from error


def _stopped() -> NotBegun:
    return NotBegun("the worker pool is stopped; this candidate was not begun")


def _emptied(place: Place) -> RunFailed | None:
    """Close a place's worker, on the thread that it worked on; what it had against its answers."""
    hosted = place.taken()
    failure = place.ask(partial(close_quietly, hosted)) if hosted is not None else None
    place.leave()
    return failure
