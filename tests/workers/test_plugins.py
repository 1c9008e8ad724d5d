"""One door for what ships and what is installed."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from agentmerge import plugins
from agentmerge.errors import UserError
from agentmerge.workers.fake import FakeWorker


def test_built_ins_load_by_name() -> None:
    assert plugins.load("agentmerge.workers", "fake") is FakeWorker
    assert {"hf", "disk", "fake"} <= plugins.known("agentmerge.workers").keys()
    assert plugins.load("agentmerge.strategies", "random").name == "random"


def test_unknown_names_are_answered_with_the_known() -> None:
    with pytest.raises(UserError, match="'fakes' is not one of the workers; did you mean 'fake'"):
        plugins.load("agentmerge.workers", "fakes")
    with pytest.raises(UserError, match="known: none installed"):
        plugins.load("agentmerge.models", "x")
    with pytest.raises(UserError, match=r"agentmerge\.trackers"):
        plugins.load("agentmerge.nothing", "x")


def installed(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    def found(group: str, path: tuple[str, ...]) -> list[Any]:
        return [point for point in points if point.group == group]

    monkeypatch.setattr(plugins, "_installed", found)


def test_an_installed_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "agentmerge.strategies"
    installed(monkeypatch, EntryPoint("mine", "agentmerge.strategies.random:STRATEGY", group))
    assert plugins.load(group, "mine").name == "random"
    installed(monkeypatch, EntryPoint("random", "somebody.else:STRATEGY", group))
    with pytest.raises(UserError, match=r"two .* called 'random'.*somebody\.else"):
        plugins.load(group, "random")
    installed(monkeypatch, EntryPoint("mine", "not_installed_at_all:X", group))
    with pytest.raises(UserError, match="cannot be imported"):
        plugins.load(group, "mine")
