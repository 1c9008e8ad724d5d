"""Searches of every kind run as they did when their traces were stored (``tests.golden``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden import SEARCHES, STORED, differences, stored, write_apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("golden")
    done = write_apart(found)
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("name", SEARCHES)
def test_its_trace_is_the_stored_one(folder: Path, name: str) -> None:
    new = json.loads((folder / f"{name}.json").read_text())
    found = differences(name, new)
    assert not found, "meant to change? then `python -m tests.golden --write`:\n" + "\n".join(found)


def test_every_stored_trace_has_its_search() -> None:
    assert {path.stem for path in STORED.glob("*.json")} == set(SEARCHES)


def test_another_candidate_is_a_difference() -> None:
    for name in ("random", "hf"):
        found = stored(name)
        found["candidates"][-1]["vector"][0] += 1e-6
        assert len(differences(name, found)) == 1
        found["models"] = ["another machine's"]
        assert len(differences(name, found)) == 1
        del found["candidates"][-1]
        assert differences(name, found)
