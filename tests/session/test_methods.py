"""Every merge method can be searched from a config, and the command line lists them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.methods import METHODS
from agentmerge.session import driving
from tests.session.conftest import config, trace_of


@pytest.mark.parametrize("name", METHODS)
def test_a_search_of_every_method(name: str, tmp_path: Path) -> None:
    """Also where there are few merges to find: arcee_fusion of two models has four here."""
    genome = {"merge_method": name}
    if METHODS[name].base == "ignored":
        genome["base_model"] = None
    settings = config(genome=genome, budget={"max_evaluations": 20})
    row = driving.run(settings, name="run", runs_dir=tmp_path)
    assert row.status == "done"
    found = trace_of(tmp_path, "run")["candidates"]
    assert found
    assert not [c for c in found if c.get("failure")]


def test_the_command_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["methods"]) == 0
    text = capsys.readouterr().out
    for name, method in METHODS.items():
        assert f"\n\n{name}: {method.doc}" in f"\n\n{text}"
        assert all(p.doc in text for p in (*method.source, *method.shared))
    assert run_app(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(METHODS)
    assert {row["engine"] for row in rows} == {"agentmerge", "mergekit"}
    della = next(row for row in rows if row["name"] == "della")
    assert [p["name"] for p in della["parameters"]][:3] == ["weight", "density", "epsilon"]


def test_the_docs_name_every_method_and_parameter() -> None:
    text = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
    for name, method in METHODS.items():
        assert f"`{name}`" in text
        switches = ("normalize", "normalize_weights")
        for parameter in (*method.source, *method.shared):
            assert parameter.name in switches or parameter.name in text
