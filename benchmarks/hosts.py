"""Faults of where workers live: a worker, a node, a whole Ray cluster, or the search itself.

A search runs on ``process``, or on a Ray cluster of two nodes of this machine, and is hit again and
again, until it is done. A worker is not taken from a candidate that has lost one before: what loses
two is a failed candidate by contract. The search itself is hit at any moment.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

#: Workers of a search, and candidates of its window.
WORKERS, LAG = 3, 6
#: Faults that end an attempt.
ENDS = ("search", "cluster")
ENDING_S = 600
NODE = {"num_cpus": 2}


class Processes:
    """The workers of one search that runs in a process of its own."""

    faults: tuple[str, ...] = ("worker", "worker", "worker", "search")

    def __init__(self) -> None:
        self.env: dict[str, str] = {}

    def begin(self, search: int) -> None:
        self._search = search

    def workers(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            children = psutil.Process(self._search).children(recursive=True)
            return [child for child in children if _said(child, "multiprocessing.spawn")]
        return []

    def left(self) -> int:
        return 0  # the session's processes are all that there may be

    def hit(self, fault: str, rng: random.Random) -> bool:
        """Whether there was anything to be hit."""
        there = self.workers()
        if fault == "worker" and there:
            with suppress(psutil.Error):
                rng.choice(there).kill()
                return True
        return False

    def close(self) -> None:
        pass


class RayCluster(Processes):
    """Two nodes; every worker of any search in it."""

    faults = ("worker", "worker", "node", "node", "search", "cluster")

    def __init__(self) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.pop("RAY_ADDRESS", None)
        self._start()

    def _start(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._add(include_dashboard=False)
        self._other: Any = self._add()
        self.env = {"RAY_ADDRESS": self._cluster.address}

    def _add(self, **more: Any) -> Any:
        """A node; Ray gives one half a minute to start, which a busy machine may not keep."""
        known = set(psutil.Process().children())
        for last in (*(False,) * 9, True):
            try:
                return self._cluster.add_node(**NODE, **more)
            except Exception:
                for process in set(psutil.Process().children()) - known:
                    process.kill()
                if last:
                    raise
        raise AssertionError

    def _processes(self) -> list[psutil.Process]:
        """The cluster's own, and what they started."""
        found = []
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        for kind in (kind for node in nodes if node for kind in node.all_processes.values()):
            for info in kind:
                with suppress(psutil.Error):
                    own = psutil.Process(info.process.pid)
                    found += [own, *own.children(recursive=True)]
        return found

    def workers(self) -> list[psutil.Process]:
        return [process for process in self._processes() if _said(process, "ray::_Actor")]

    def left(self) -> int:
        """Actors and placement groups that the cluster has."""
        import ray
        from ray.util import placement_group_table

        ray.init(self._cluster.address, log_to_driver=False, logging_level=40)
        try:
            groups = placement_group_table().values()
            return len(self.workers()) + sum(group["state"] != "REMOVED" for group in groups)
        finally:
            ray.shutdown()

    def hit(self, fault: str, rng: random.Random) -> bool:
        if fault == "node" and self._other is None:
            self._other = self._add()  # one that joins late
        elif fault == "node":
            self._cluster.remove_node(self._other, allow_graceful=False)
            self._other = None
        elif fault == "cluster":
            for process in self._processes():
                with suppress(psutil.Error):
                    process.kill()
            self.close()
            self._start()
        else:
            return super().hit(fault, rng)
        return True

    def close(self) -> None:
        with suppress(Exception):  # its processes may be gone
            self._cluster.shutdown()


def _said(process: psutil.Process, words: str) -> bool:
    with suppress(psutil.Error):
        return words in " ".join(process.cmdline())
    return False


@contextmanager
def host_of(name: str) -> Iterator[Processes]:
    host = RayCluster() if name == "ray" else Processes()
    try:
        yield host
    finally:
        host.close()


def ended(log: Path) -> int:
    """Candidates that have ended, by a search's log."""
    return log.read_text().count('"event": "candidate"') if log.is_file() else 0


def disturb(
    search: Any, log: Path, host: Processes, whole_s: float, rng: random.Random
) -> Iterator[str]:
    """Hit a running search until it has ended; each fault that hit, as it did."""
    host.begin(search.pid)
    since = ended(log)
    while search.poll() is None:
        fault = rng.choice(host.faults)
        if fault == "search":
            moment = time.monotonic() + rng.uniform(0.0, 1.0) * whole_s
            while search.poll() is None and time.monotonic() < moment:
                time.sleep(0.02)
        else:  # once a candidate that lost its worker has had another
            until = since + (LAG + WORKERS if fault != "cluster" else 1) + rng.randrange(3)
            while search.poll() is None and ended(log) < until:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.1))
        if search.poll() is not None:
            return
        if fault == "search":
            search.send_signal(signal.SIGKILL)
        elif not host.hit(fault, rng):
            continue
        since = ended(log)
        yield fault
        if fault in ENDS:
            search.wait(timeout=ENDING_S)
