"""Where workers live: the contract on every host that ships, and what a config may say."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge import plugins
from agentmerge.config import SearchConfig, TasksConfig
from agentmerge.contracts.worker import Host, WorkerSpec
from agentmerge.errors import ConfigError, WorkerLost
from agentmerge.parents.layout import read_layout
from agentmerge.preflight.faults import device_faults, host_faults
from agentmerge.preflight.prepare import prepare
from agentmerge.preflight.spec import counted, memory_of, spec_of
from agentmerge.testing import HostSuite
from agentmerge.workers.hosts.process import with_own_devices


class TestHere(HostSuite):
    name = "here"


class TestProcess(HostSuite):
    name = "process"

    def test_a_killed_one_is_lost_and_told_how(self, host: Host, spec: WorkerSpec) -> None:
        from agentmerge.testing.host_suite import Fakes

        hosted = host.start(spec, Fakes())
        worker = hosted.ready()
        os.kill(hosted._process.pid, 9)  # type: ignore[attr-defined]
        with pytest.raises(WorkerLost, match="lower worker"):
            worker.score(())
        hosted.close()


@pytest.fixture
def spec() -> WorkerSpec:
    return WorkerSpec("fake", (), "base", TasksConfig(tasks=({"name": "one"},)), "float32", 8)


def config(**worker: object) -> SearchConfig:
    body = {
        "genome": {"models": ["a", "b"], "merge_method": "linear"},
        "tasks": [{"name": "one"}],
        "worker": {"kind": "fake", **worker},
    }
    return SearchConfig.from_text(yaml.safe_dump(body))


def test_workers_are_counted_by_the_devices_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentmerge.merging.memory.cuda_devices", lambda: 5)
    assert counted(config(count="auto")).worker.count == 5
    pairs = {"engine_args": {"tensor_parallel_size": 2}}
    assert counted(config(count="auto", **pairs)).worker.count == 2
    assert counted(config(count="auto", device="cuda:1")).worker.count == 1
    assert counted(config(count="auto", device="cpu")).worker.count == 1
    assert counted(config(count="auto", host="here")).worker.count == 1
    assert counted(config(count=3)).worker.count == 3
    monkeypatch.setattr("agentmerge.merging.memory.cuda_devices", lambda: 0)
    assert counted(config(count="auto")).worker.count == 1


def test_a_process_sees_its_own_devices_only(
    spec: WorkerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = replace(spec, options={"engine_args": {"tensor_parallel_size": 2}})
    for given, device, visible in (
        (None, "cuda:2", "2,3"),
        ("4,5,6,7", "cuda:2", "6,7"),
        ("GPU-a,GPU-b", "cuda:0", "GPU-a,GPU-b"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
        if given is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        assert with_own_devices(replace(pairs, device=device)).device == "cuda"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    for device in ("cpu", "cuda", "cuda:2"):  # the last is not among the two
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        assert with_own_devices(replace(pairs, device=device)).device == device
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_buffered_device_has_two_workers_where_two_models_fit(
    parents: dict[str, Path], tasks_dir: Path
) -> None:
    def found(**worker: object) -> tuple[object, object, list[str]]:
        body = {
            "genome": {"models": [str(parents["b"]), str(parents["c"])], "merge_method": "linear"},
            "tasks": [{"name": "tiny_choice"}],
            "task_search_path": [str(tasks_dir)],
            "worker": {"placement": "host", **worker},
        }
        prepared = prepare(SearchConfig.from_text(yaml.safe_dump(body)), weights=False)
        settings = prepared.config.worker
        notes = [note for note in prepared.notes if note.startswith("worker.buffered")]
        assert prepared.memory is not None
        needed.append(max(f.host.total for f in prepared.memory.forecasts))
        return settings.count, settings.buffered, notes

    needed: list[int] = []
    assert found(count=1) == (1, False, [])
    assert found(count=2, buffered=True) == (4, False, [])
    count, _, notes = found(count=1, buffered=True, memory_gb=1.2 * needed[0] / 1e9)
    assert count == 1
    assert "one model a device, since" in notes[0]


def test_a_host_without_a_way_to_end_workers_has_one_and_no_deadline() -> None:
    assert host_faults(config(host="here")) == []
    assert host_faults(config(host="process", count=4, timeout_s=3)) == []
    faults = host_faults(config(host="here", count=4, timeout_s=3))
    assert [fault.split(" is not")[0] for fault in faults] == [
        "worker.count 4",
        "worker.timeout_s 3.0",
    ]
    assert "did you mean 'process'" in host_faults(config(host="proces"))[0]


def test_auto_is_one_where_one_worker_lives() -> None:
    asked = config(host="here", count="auto", device="cpu")
    assert host_faults(asked) == []
    assert counted(asked).worker.count == 1
    assert prepare(asked).config.worker.count == 1


class NoApart:
    start = close = lambda *given: None


class ApartOnly:
    apart = False


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("NoApart", "apart"), ("ApartOnly", "start, close"), ("config", "apart, start, close")],
)
def test_a_host_that_lacks_what_a_host_has_is_a_fault_of_the_config(
    name: str, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = "agentmerge.hosts"
    point = EntryPoint("mine", f"{__name__}:{name}", group)
    monkeypatch.setattr(plugins, "_installed", lambda asked, path: [point] * (asked == group))
    (fault,) = host_faults(config(host="mine", count=4, timeout_s=3))
    assert fault.startswith(f"worker.host 'mine' ({point.value}) has no {lacks}")
    with pytest.raises(ConfigError) as error:
        prepare(config(host="mine"))
    assert error.value.faults == [fault]


def test_no_device_is_named_where_the_host_gives_each_worker_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentmerge.merging.memory.cuda_devices", lambda: 2)
    assert device_faults(config(host="process", device="cuda:1")) == []
    assert device_faults(config(host="ray", device="cuda")) == []
    for host in ("ray", "ray_serial"):
        (fault,) = device_faults(config(host=host, device="cuda:1"))
        assert fault.startswith(f"worker.device 'cuda:1' is not possible with worker.host '{host}'")


@pytest.mark.parametrize(
    ("host", "why"),
    [("here", "one worker lives in this process"), ("ray", "gives each worker devices of its own")],
)
def test_where_no_two_share_a_device_there_is_no_buffer_and_that_is_said(
    host: str, why: str, fake_config: str
) -> None:
    count, lag, notes = buffered(fake_config, {"host": host, "count": 1})
    assert (count, lag, len(notes)) == (1, 2, 1)
    assert notes[0].startswith("worker.buffered: one model a device, since ")
    assert why in notes[0]


def test_a_window_follows_from_the_workers_that_a_buffer_makes(fake_config: str) -> None:
    assert buffered(fake_config, {"count": 2}) == (4, 8, [])


def buffered(text: str, worker: dict[str, object]) -> tuple[object, object, list[str]]:
    over = {f"worker.{key}": value for key, value in (worker | {"buffered": True}).items()}
    over |= {"search.algorithm": "auto", "search.lag": "auto"}
    prepared = prepare(SearchConfig.from_text(text, overrides=over))
    notes = [note for note in prepared.notes if note.startswith("worker.buffered")]
    return prepared.config.worker.count, prepared.config.search.lag, notes


@pytest.mark.parametrize(
    ("host", "device", "workers"), [("ray", "cuda", 4), ("ray", "cpu", 16), ("process", "cuda", 16)]
)
def test_memory_is_foreseen_of_the_workers_that_a_node_like_this_one_has_room_for(
    host: str,
    device: str,
    workers: int,
    parents: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentmerge.merging.memory.cuda_devices", lambda: 8)
    monkeypatch.setattr("agentmerge.merging.placement.plan_memory", lambda layout, **asked: asked)
    body = {
        "genome": {"models": ["b", "c"], "merge_method": "linear"},
        "tasks": [{"name": "one"}],
        "worker": {"host": host, "count": 16, "engine_args": {"tensor_parallel_size": 2}},
    }
    given = SearchConfig.from_text(yaml.safe_dump(body))
    paths = {name: parents[name] for name in ("b", "c")}
    spec = spec_of(given, paths, "float32", device)
    found: Any = memory_of(given, spec, read_layout(paths, None), {})
    assert found["workers"] == workers
    assert found["devices"] == (4 if device == "cuda" else 1)
