"""A Ray cluster as this process sees it: joined or started, its nodes, and what its errors say.

Knows no worker.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from agentmerge.errors import UserError
from agentmerge.system.redaction import redact
from agentmerge.workers.hosts.nodes import versions
from agentmerge.workers.hosts.proxy import one_line

#: Seconds that a node may take to say what it has.
_ASKING_S = 120
#: Seconds that the machine of a named cluster may take to answer.
_REACHING_S = 10
_KINDS = ("CPU", "GPU")


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a cluster as it says itself. resources: CPU and GPU, in all."""

    name: str
    resources: Mapping[str, float]
    versions: Mapping[str, str]


def taken(node: Node, needs: Mapping[str, float]) -> int:
    """How many times a node has what one worker needs."""
    return min(int(node.resources.get(kind, 0) // n) for kind, n in needs.items())


def nodes_of(address: str | None) -> list[Node]:
    """The cluster's living nodes.

    Raises:
        UserError: no such cluster answers.
    """
    cluster = Cluster(address, 1)
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ask = ray.remote(num_cpus=0, max_retries=0)(_self_portrait)
        alive = [node for node in ray.nodes() if node["Alive"]]
        answers = [
            ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote()
            for node in alive
        ]
        return [
            Node(
                f"{name} ({node['NodeManagerAddress']})",
                {kind: node["Resources"][kind] for kind in _KINDS if kind in node["Resources"]},
                found,
            )
            for node, (name, found) in zip(alive, _answers(answers), strict=True)
        ]
    finally:
        cluster.close()


def _answers(asked: Sequence[Any]) -> list[tuple[str, dict[str, str]]]:
    """What each node says; of one that cannot say it, why."""
    import ray

    found = []
    for answer in asked:
        try:
            found.append(ray.get(answer, timeout=_ASKING_S))
        except ray.exceptions.RayError as error:
            found.append(("a node", {"agentmerge": f"that does not answer: {why(error)}"}))
    return found


def _self_portrait() -> tuple[str, dict[str, str]]:
    return socket.gethostname(), versions()


def is_named(address: str | None) -> bool:
    """Whether there is a cluster to join, or one is to be started."""
    import ray

    named = address or os.environ.get("RAY_ADDRESS")
    return ray.is_initialized() or named not in (None, "", "local")


class Cluster:
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
    if address in (None, "", "auto"):
        address = os.environ.get("RAY_ADDRESS") or address or "local"
    local: Mapping[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Cores are shared by as many workers as the user asked for.
        cores = max(count, os.cpu_count() or 1)
        local = {"num_cpus": cores, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        _reach(address)
        ray.init(
            address,
            namespace="agentmerge",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **local,
        )
    except Exception as error:
        if address == "local":
            raise UserError(
                f"Ray cannot be started on this machine ({one_line(error)}); name a running "
                "cluster in worker.ray_address, or set worker.host: process"
            ) from error
        raise UserError(
            f"worker.ray_address (or RAY_ADDRESS) {redact(address)!r}: no Ray cluster can be "
            f"joined there ({one_line(error)}); start one with `ray start --head`, or leave it "
            "out; one that asks for a token is joined with RAY_AUTH_MODE=token and its own "
            "~/.ray/auth_token"
        ) from error
    return True


def _reach(address: str) -> None:
    """Where nothing listens ``ray.init`` tries for a quarter of an hour.

    Raises:
        OSError: nothing does at HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if "://" not in address and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHING_S).close()


def why(error: BaseException) -> str:
    """What Ray says of a fault, without the traceback and colours that it says it in."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    # Of something raised there, the last line is what was raised.
    told = lines[-1 if "Traceback" in str(cause) else 0] if lines else ""
    return " ".join(filter(None, (f"{type(cause).__name__}:", told)))
