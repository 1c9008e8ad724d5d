"""Where workers live: the contract on every host that ships, and what a config may say."""

from __future__ import annotations

import os

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import Host, WorkerSpec
from agentmerge.errors import WorkerLost
from agentmerge.preflight.faults import host_faults
from agentmerge.testing import HostSuite


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


def config(**worker: object) -> SearchConfig:
    body = {
        "genome": {"models": ["a", "b"], "merge_method": "linear"},
        "tasks": [{"name": "one"}],
        "worker": {"kind": "fake", **worker},
    }
    return SearchConfig.from_text(yaml.safe_dump(body))


def test_a_host_without_a_way_to_end_workers_has_one_and_no_deadline() -> None:
    assert host_faults(config(host="here")) == []
    assert host_faults(config(host="process", count=4, timeout_s=3)) == []
    faults = host_faults(config(host="here", count=4, timeout_s=3))
    assert [fault.split(" is not")[0] for fault in faults] == [
        "worker.count 4",
        "worker.timeout_s 3.0",
    ]
    assert "did you mean 'process'" in host_faults(config(host="proces"))[0]
