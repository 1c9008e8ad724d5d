"""Fakes, problems and contract suites for whoever builds on agentmerge; the suites need pytest.

``scripted`` has chat models that say what a script says, the fake worker scores without a model,
who inherits a suite is judged as what ships is, and ``problems`` are what searches are measured on.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmerge.testing.host_suite import HostSuite as HostSuite
    from agentmerge.testing.landscapes import Landscape as Landscape
    from agentmerge.testing.method_suite import MethodSuite as MethodSuite
    from agentmerge.testing.scripted import Fault as Fault
    from agentmerge.testing.scripted import ScriptedServer as ScriptedServer
    from agentmerge.testing.scripted import ToolCalls as ToolCalls
    from agentmerge.testing.scripted import scripted_chat_model as scripted_chat_model
    from agentmerge.testing.space_suite import SpaceSuite as SpaceSuite
    from agentmerge.testing.space_suite import space_of as space_of
    from agentmerge.testing.strategy_suite import StrategySuite as StrategySuite
    from agentmerge.testing.worker_suite import ModelWorkerSuite as ModelWorkerSuite
    from agentmerge.testing.worker_suite import WorkerSuite as WorkerSuite
    from agentmerge.testing.worker_suite import demo_spec as demo_spec
    from agentmerge.workers.fake import FakeWorker as FakeWorker

_HOMES = {
    "FakeWorker": "workers.fake",
    "Fault": "testing.scripted",
    "HostSuite": "testing.host_suite",
    "MethodSuite": "testing.method_suite",
    "ModelWorkerSuite": "testing.worker_suite",
    "Landscape": "testing.landscapes",
    "ScriptedServer": "testing.scripted",
    "SpaceSuite": "testing.space_suite",
    "StrategySuite": "testing.strategy_suite",
    "ToolCalls": "testing.scripted",
    "WorkerSuite": "testing.worker_suite",
    "demo_spec": "testing.worker_suite",
    "scripted_chat_model": "testing.scripted",
    "space_of": "testing.space_suite",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agentmerge.testing' has no attribute {name!r}")
    home = f"agentmerge.{_HOMES[name]}"
    if home.endswith("_suite") and home not in sys.modules:
        import pytest

        pytest.register_assert_rewrite(home)  # so that what fails says with which values
    return getattr(import_module(home), name)
