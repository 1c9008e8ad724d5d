"""Workers as actors of a Ray cluster, one each, wherever it has room for them.

Ray places them and tells when they die, and does nothing else: what travels is a recipe, item
numbers and results. A cluster is joined where one is named (``worker.ray_address``,
``RAY_ADDRESS``, or by the program that we are part of); else one is started on this machine, and
ends with the search. Each worker has a placement group: its devices, all on one node. Needs the
extra ``ray``.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

from agentmerge.config import WorkerSettings
from agentmerge.contracts.worker import Build, Worker, WorkerSpec
from agentmerge.errors import AgentmergeError, NoRoom, UserError, WorkerLost
from agentmerge.system.redaction import clean_screen, redact
from agentmerge.system.temporary import discard_unfinished
from agentmerge.workers.hosts.nodes import at_home, refuse_other_versions, versions
from agentmerge.workers.hosts.proxy import Proxy, one_line, portable

#: Seconds that a worker may take to end by itself.
_CLOSING_S = 30
#: Seconds that the first worker waits for a node with room (one may still be starting), and others.
FIRST_ROOM_S, ROOM_S = 120.0, 15.0


_MISSING = "worker.host 'ray' needs Ray: pip install 'agentmerge[ray]', on every node"


class RayHost:
    apart = True
    places = True

    def __init__(self, count: int, address: str | None = None) -> None:
        self._count = count
        self._address = address
        self._lock = threading.Lock()
        self._cluster: _Cluster | None = None
        self.had_room = False

    @staticmethod
    def faults(settings: WorkerSettings) -> list[str]:
        return [] if find_spec("ray") else [_MISSING]

    @classmethod
    def settled(cls, settings: WorkerSettings) -> Any:
        return lambda count: cls(count, settings.ray_address)

    def start(self, spec: WorkerSpec, build: Build) -> RayWorker:
        with self._lock:
            if self._cluster is None:
                self._cluster = _Cluster(self._address, self._count)
        return RayWorker(self, spec, build, self._count)

    def close(self) -> None:
        with self._lock:
            if self._cluster is not None:
                self._cluster.close()
                self._cluster = None


class _Cluster:
    """A connection to Ray, which is this process's one: who opens it first ends it.

    It is made on a thread of its own, since what Ray starts here ends with the *thread* that
    started it.
    """

    def __init__(self, address: str | None, count: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        try:
            self._ours = self._thread.submit(_connect, address, count).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    def close(self) -> None:
        if self._ours:
            import ray

            self._thread.submit(ray.shutdown).result()
        self._thread.shutdown()


def _connect(address: str | None, count: int) -> bool:
    """Whether it was us who connected.

    Raises:
        UserError: no such cluster answers.
    """
    import ray

    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local: Mapping[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Cores are shared by as many workers as the user asked for.
        cores = max(count, os.cpu_count() or 1)
        local = {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(
            address,
            namespace="agentmerge",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **local,
        )
    except Exception as error:
        raise UserError(
            f"worker.ray_address {redact(address)!r}: no Ray cluster can be joined there "
            f"({one_line(error)}); start one with `ray start --head`, or leave it out"
        ) from error
    return True


def bundle(spec: WorkerSpec) -> dict[str, float]:
    """What one worker takes of a node."""
    if not spec.device.startswith("cuda"):
        return {"CPU": 1}
    args = spec.options.get("engine_args") or {}
    return {"GPU": int(args.get("tensor_parallel_size") or 1)}


class RayWorker(Proxy):
    """The worker of an actor; count: how many share the cluster."""

    def __init__(self, host: RayHost, spec: WorkerSpec, build: Build, count: int) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._host, self._needs = host, bundle(spec)
        self._ended = threading.Event()
        self._place: tuple[str, int] | None = None  # (machine, process) once it is there
        try:
            self._group = placement_group([self._needs], strategy="STRICT_PACK")
            self._actor = (
                _actor_class()
                .options(
                    num_cpus=self._needs.get("CPU", 0),
                    num_gpus=self._needs.get("GPU", 0),
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, 0),
                )
                .remote()
            )
            self._opened = self._actor.open.remote(spec, build, versions(), count)
        except ray.exceptions.RayError as error:
            raise WorkerLost(_why(error)) from error

    def ready(self) -> Worker:
        self._wait_for_room()
        self._place = self._got(self._actor.place.remote())
        self._info = self._got(self._opened)
        return self

    def close(self) -> None:
        import ray

        said: Any = None
        if self._info is not None and not self._ended.is_set():
            with suppress(ray.exceptions.RayError):  # it died before, or has nothing to say
                _, said = ray.get(self._actor.call.remote("close", ()), timeout=_CLOSING_S)
        self.end()
        if self._place is not None and self._place[0] == socket.gethostname():
            # A model's size, where it was writing one as it died.
            discard_unfinished(dry_run=False, shared=False, pid=self._place[1])
        if isinstance(said, AgentmergeError):
            raise said

    def end(self) -> None:
        """With what Ray has for it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        self._ended.set()
        with suppress(Exception):  # the cluster may be gone
            ray.kill(self._actor)
            remove_placement_group(self._group)

    def _wait_for_room(self) -> None:
        from ray.exceptions import RayError

        limit_s = ROOM_S if self._host.had_room else FIRST_ROOM_S
        ends = time.monotonic() + limit_s
        try:
            while not self._group.wait(1):
                if self._ended.is_set():
                    raise self._lost("it was ended before it had a place")
                if time.monotonic() >= ends:
                    wanted = " and ".join(f"{n:g} {kind}" for kind, n in self._needs.items())
                    raise NoRoom(
                        f"no node of the Ray cluster had {wanted} free within {limit_s:.0f} s; "
                        "lower worker.count, or add nodes"
                    )
        except RayError as error:
            raise self._lost(_why(error)) from None
        self._host.had_room = True

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._got(self._actor.call.remote(name, arguments))

    def _got(self, answer: Any) -> Any:
        import ray

        try:
            good, value = ray.get(answer)
        except ray.exceptions.RayError as error:
            raise self._lost(_why(error)) from None
        if not good:
            raise value
        return value

    def _lost(self, why: str) -> WorkerLost:
        where = f" on {self._place[0]}, process {self._place[1]}" if self._place else ""
        return WorkerLost(
            f"a worker of the Ray cluster{where} is gone ({why}); if it was killed for memory, "
            "lower worker.count or worker.batch_size"
        )


def _why(error: BaseException) -> str:
    """What Ray says of a fault, without the traceback and colours that it says it in."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    # Of something raised there, the last line is what was raised.
    told = lines[-1 if "Traceback" in str(cause) else 0] if lines else ""
    return " ".join(filter(None, (f"{type(cause).__name__}:", told)))


@cache
def _actor_class() -> Any:
    import ray

    return ray.remote(max_restarts=0, max_task_retries=0)(_Actor)


class _Actor:
    """The other side; one call at a time, each answered with (True, value) or (False, error)."""

    def __init__(self) -> None:
        self._worker: Any = None

    def place(self) -> tuple[bool, tuple[str, int]]:
        return True, (socket.gethostname(), os.getpid())

    def open(
        self, spec: WorkerSpec, build: Build, asked: Mapping[str, str], count: int
    ) -> tuple[bool, Any]:
        threads = max(1, (os.cpu_count() or 1) // count)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray says one a CPU that it was told of
        return self._answered(lambda: self._built(spec, build, asked))

    def _built(self, spec: WorkerSpec, build: Build, asked: Mapping[str, str]) -> Any:
        refuse_other_versions(asked)
        self._worker = build(at_home(spec))
        return self._worker.info

    def call(self, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        return self._answered(lambda: getattr(self._worker, name)(*arguments))

    def _answered(self, work: Any) -> tuple[bool, Any]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C drains the search, not its workers
        with clean_screen():
            try:
                return True, work()
            except BaseException as error:
                return False, portable(error)
