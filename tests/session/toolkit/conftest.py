"""A toolkit over the real tiny family, and one on the fake worker."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from agentmerge import MergeToolkit, SearchConfig
from agentmerge.demo.tasks import demo_config, write_tasks


@pytest.fixture
def toolkit(fake_config: str, tmp_path: Path) -> Iterator[MergeToolkit]:
    with MergeToolkit(SearchConfig.from_text(fake_config), runs_dir=tmp_path) as kit:
        yield kit


@pytest.fixture(scope="session")
def real_config(family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    tasks = write_tasks(folder / "tasks", family.skills)
    body = demo_config(family, tasks)
    body |= {
        "task_search_path": [str(tasks)],
        "limit": 20,
        "worker": {"batch_size": 60, "options": {"threads": 1}},
        "budget": {"max_evaluations": 12},
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(body))
    return path


@pytest.fixture
def ask(toolkit: MergeToolkit):
    """Calls a tool by name; returns (status, text)."""
    by_name = {tool.name: tool for tool in toolkit.get_tools()}

    def call(name: str, **arguments):
        request = {"type": "tool_call", "id": "1", "name": name, "args": arguments}
        message = by_name[name].invoke(request)
        return message.status, message.text

    return call


def pytest_pyfunc_call(pyfuncitem):
    """Runs the coroutines of LangChain's suites, which expect a plugin that we do not load."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
