"""A graph of the user's own: what is wrong with it is one sentence, before anything is paid for."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from tests.session.conftest import config_text


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("seed()", "seed"),
        ("first_state(0)", "seed"),
        ("open_slots(0)", "select"),
        ("evaluate(0, 0)", "evaluate"),
        ("select(0)", "select"),
        ("advise('critic', 0)", "advise"),
        ("propose(0)", "propose"),
        ("finish('budget')", "finish"),
    ],
)
def test_a_graph_of_version_0_1_is_told_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], node: str, module: str
) -> None:
    (tmp_path / "mine.py").write_text(
        "from langgraph.graph import END, START, StateGraph\n"
        "from agentmerge import Context\n"
        "from agentmerge.search.state import SearchState\n"
        "from agentmerge.session.context import search_of\n"
        "def build():\n"
        "    graph = StateGraph(SearchState, context_schema=Context)\n"
        f"    graph.add_node('seed', lambda state, runtime: search_of(runtime).{node})\n"
        "    graph.add_edge(START, 'seed')\n"
        "    graph.add_edge('seed', END)\n"
        "    return graph\n"
    )
    (tmp_path / "c.yml").write_text(config_text(search={"graph": f"{tmp_path}/mine.py:build"}))
    code = run_app(["run", str(tmp_path / "c.yml"), "--runs-dir", str(tmp_path / "runs"), "-q"])
    name = node.partition("(")[0]
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: a search has no .{name}() of its own since version 0.1: write `from "
        f"agentmerge.search.{module} import {name}` and `{name}(search, ...)` in its place (see "
        "CHANGELOG.md)"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from agentmerge.context import Context\n", "'agentmerge.context'; modules of agentmerge"),
        ("from agentmerge.session import load_graph\n", "load_graph"),
        ("def build(:\n", "SyntaxError"),
        (
            "import nowhere_at_all\n",
            "mine.py:1 cannot be loaded: ModuleNotFoundError: No module named",
        ),
        ("def build():\n    return {}['a key']\n", "mine.py:2 cannot be loaded: KeyError: 'a key'"),
    ],
)
def test_a_graph_that_cannot_be_loaded_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "c.yml").write_text(config_text(search={"graph": f"{tmp_path}/mine.py:build"}))
    for command in (["run", "-q"], ["check", "--run-code"]):
        verb, option = command
        line = [verb, str(tmp_path / "c.yml"), "--runs-dir", str(tmp_path / "runs"), option]
        assert run_app(line) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path}/mine.py" in said
        assert " cannot be loaded: " in said
        assert words in said
        assert ("see CHANGELOG.md" in said) == ("agentmerge" in text)
    assert not (tmp_path / "runs").exists()
