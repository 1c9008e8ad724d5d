"""Workers as actors of a Ray cluster, one each, wherever it has room for them.

Ray places them and tells when they die, and does nothing else: what travels is a recipe, item
numbers and results. A cluster is joined where one is named (``worker.ray_address``,
``RAY_ADDRESS``, or by the program that we are part of); else one is started on this machine, and
ends with the search. Each worker has a placement group: its devices, all on one node. Needs the
extra ``ray``.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from typing import Any

from agentmerge.config import WorkerSettings
from agentmerge.contracts.worker import Build, Worker, WorkerSpec
from agentmerge.errors import AgentmergeError, NoRoom, UserError, WorkerLost
from agentmerge.system.redaction import clean_screen
from agentmerge.system.temporary import discard_unfinished
from agentmerge.workers.hosts.cluster import Cluster, is_named, nodes_of, taken, why
from agentmerge.workers.hosts.nodes import at_home, differing, refuse_other_versions, versions
from agentmerge.workers.hosts.process import CLOSING_S, Processes
from agentmerge.workers.hosts.proxy import Proxy, portable

#: Seconds that a worker waits for a node with room where none has a place (one may be starting, or
#: another job have what was given back), and beside others that have.
FIRST_ROOM_S, ROOM_S = 120.0, 15.0

_MISSING = "worker.host 'ray' needs Ray: pip install 'agentmerge[ray]', on every node"


class RayHost:
    apart = True
    places = True
    keeps = True

    def __init__(self, count: int, address: str | None = None) -> None:
        self._count = count
        self._address = address
        self._lock = threading.Lock()
        self._cluster: Cluster | None = None
        self._refused: UserError | None = None
        self.placed: set[RayWorker] = set()

    @staticmethod
    def faults(settings: WorkerSettings) -> list[str]:
        return [] if find_spec("ray") else [_MISSING]

    @staticmethod
    def room(settings: WorkerSettings, device: str) -> int:
        """As many as the cluster's nodes of the same versions have devices for; of a CPU, one a
        node."""
        needs = bundle(device, settings.ranks)
        if not is_named(settings.ray_address):
            return Processes.room(settings, device)
        here = versions()
        alike = [n for n in nodes_of(settings.ray_address) if not differing(n.versions, here)]
        found = [taken(node, needs) for node in alike]
        return sum(found) if "GPU" in needs else sum(map(bool, found))

    @staticmethod
    def findings(settings: WorkerSettings, device: str) -> list[dict[str, Any]]:
        """The nodes of a cluster that is there, and the workers that each would have; for
        ``doctor``."""
        if not is_named(settings.ray_address):
            return []
        needs = bundle(device, settings.ranks)
        here, left, found = versions(), settings.number, []
        for node in nodes_of(settings.ray_address):
            other = differing(node.versions, here)
            workers = 0 if other else min(left, taken(node, needs))
            left -= workers
            devices = ", ".join(f"{n:g} {kind}" for kind, n in sorted(node.resources.items()))
            detail = other or f"{devices or 'no devices'}; room for {workers} of the workers"
            remedy = "install the same there, or leave it out of the cluster"
            found.append(
                {"what": f"node {node.name}", "ok": not other, "detail": detail, "remedy": remedy}
            )
        placed = settings.number - left
        detail = f"{placed} of {settings.number} have a place"
        lower = f"lower worker.count to {placed}, or " if placed else ""
        remedy = f"{lower}add nodes with such devices"
        found.append({"what": "workers", "ok": not left, "detail": detail, "remedy": remedy})
        return found

    @classmethod
    def settled(cls, settings: WorkerSettings) -> Any:
        return lambda count: cls(count, settings.ray_address)

    def start(self, spec: WorkerSpec, build: Build) -> RayWorker:
        with self._lock:
            if self._refused is not None:  # no worker waits for it again
                raise self._refused
            if self._cluster is None:
                try:
                    self._cluster = Cluster(self._address, self._count)
                except UserError as error:
                    self._refused = error
                    raise
        return RayWorker(self, spec, build, self._count)

    def close(self) -> None:
        with self._lock:
            if self._cluster is not None:
                self._cluster.close()
                self._cluster = None


def bundle(device: str, ranks: int) -> dict[str, int]:
    """What one worker takes of a node."""
    return {"GPU": ranks} if device.startswith("cuda") else {"CPU": 1}


class RaySerial(RayHost):
    """A placement group a candidate: its devices are given back after each."""

    keeps = False


class RayWorker(Proxy):
    """The worker of an actor; count: how many share the cluster."""

    def __init__(self, host: RayHost, spec: WorkerSpec, build: Build, count: int) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._host, self._needs = host, bundle(spec.device, spec.ranks)
        self._ended = threading.Event()
        self._place: tuple[str, int] | None = None  # (machine, process) once it is there
        self._group: Any = None
        self._actor: Any = None
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
        except BaseException as error:
            self.end()
            if isinstance(error, ray.exceptions.RayError):
                raise WorkerLost(why(error)) from error
            raise

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
                _, said = ray.get(self._actor.call.remote("close", ()), timeout=CLOSING_S)
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
        self._host.placed.discard(self)
        for let_go, what in ((ray.kill, self._actor), (remove_placement_group, self._group)):
            with suppress(Exception):  # the cluster may be gone, or it had none yet
                let_go(what)

    def _wait_for_room(self) -> None:
        from ray.exceptions import RayError

        limit_s = ROOM_S if self._host.placed else FIRST_ROOM_S
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
            raise self._lost(why(error)) from None
        self._host.placed.add(self)

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._got(self._actor.call.remote(name, arguments))

    def _got(self, answer: Any) -> Any:
        import ray

        try:
            good, value = ray.get(answer)
        except ray.exceptions.RayError as error:
            raise self._lost(why(error)) from None
        if not good:
            raise value
        return value

    def _lost(self, why: str) -> WorkerLost:
        where = f" on {self._place[0]}, process {self._place[1]}" if self._place else ""
        return WorkerLost(
            f"a worker of the Ray cluster{where} is gone ({why}); if it was killed for memory, "
            "lower worker.count or worker.batch_size"
        )


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
