"""Searches on the fake worker, driven in this process or in one that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.report.summary import trace

BODY = {
    "genome": {
        "models": ["north", "south"],
        "base_model": "base",
        "merge_method": "task_arithmetic",
        "layer_granularity": 2,
    },
    "tasks": [
        {"name": "one", "metric": "acc,none"},
        {"name": "two", "metric": "acc,none", "weight": 0.5},
    ],
    "limit": 60,
    "search": {"algorithm": "cma_es", "seed": 7, "population": 5},
    "budget": {"max_evaluations": 34},
    "worker": {"kind": "fake", "options": {"base": "base"}},
}


#: Objectives that are not a mean of right and wrong with a margin each: a text's perplexity (lower
#: is better, no mean over items) beside a group of right and wrong without margins, whose leaves
#: have unequal sizes; a loss that should be low beside margins of two scales.
OBJECTIVES: dict[str, dict] = {
    "accuracy": {
        "tasks": BODY["tasks"],
        "worker": {"kind": "fake", "options": {"base": "base", "groups": {}, "scales": [1.0]}},
    },
    "perplexity": {
        "tasks": [
            {"name": "one", "metric": "exact_match,none"},
            {"name": "two", "metric": "word_perplexity,none", "weight": 0.2},
        ],
        "worker": {"kind": "fake", "options": {"base": "base", "groups": {"one": 2}}},
    },
    "loss": {
        "tasks": [
            {"name": "one", "metric": "acc,none"},
            {"name": "two", "metric": "mse,none", "weight": 0.3},
        ],
        "worker": {"kind": "fake", "options": {"base": "base", "scales": [0.05, 4.0]}},
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--objective", choices=OBJECTIVES, help="every session test's, but for its own"
    )


@pytest.fixture(autouse=True, scope="session")
def everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--objective`` all searches of this folder are on it."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in OBJECTIVES.get(request.config.getoption("--objective", None), {}).items():
            patch.setitem(BODY, key, value)
        yield


@pytest.fixture(params=OBJECTIVES, scope="module")
def objectives(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every search of a module on each of these: ``pytestmark`` with ``usefixtures``."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in OBJECTIVES[request.param].items():
            patch.setitem(BODY, key, value)
        yield request.param


@pytest.fixture
def objective(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The searches of one test on those that it names: ``parametrize`` with ``indirect``."""
    for key, value in OBJECTIVES[request.param].items():
        monkeypatch.setitem(BODY, key, value)
    return request.param


def config_text(**sections: object) -> str:
    """BODY with some keys of some sections replaced."""
    body = {key: dict(value) if isinstance(value, dict) else value for key, value in BODY.items()}
    for section, values in sections.items():
        if isinstance(values, dict):
            body.setdefault(section, {}).update(values)
        else:
            body[section] = values
    options = body["worker"]["options"]
    body["worker"]["options"] = BODY["worker"]["options"] | options
    return yaml.safe_dump(body)


def config(**sections: object) -> SearchConfig:
    return SearchConfig.from_text(config_text(**sections))


def trace_of(runs_dir: Path, name: str) -> dict:
    with Ledger(runs_dir / LEDGER) as ledger:
        return trace(ledger, ledger.run(name))


def command(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "agentmerge", *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(config_text())
    return path
