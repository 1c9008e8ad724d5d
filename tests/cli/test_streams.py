"""Streams that cannot be written, and what is said of it: in one line, and never a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.errors import NoWorker
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.workers.pool import Pool

LINK = '<a href="https://example.org/">win</a>'


def shell(command: str, place: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    line = command.replace("agentmerge", f"{sys.executable} -m agentmerge")
    return subprocess.run(
        ["sh", "-c", line], cwd=place, capture_output=True, text=True, check=False, **more
    )


@pytest.fixture
def place(tmp_path: Path, fake_config: str) -> Path:
    (tmp_path / "c.yml").write_text(fake_config)
    return tmp_path


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_a_stderr_that_cannot_be_written_stops_no_search(place: Path, stderr: str) -> None:
    done = shell(f"agentmerge run c.yml --name a {stderr}", place)
    assert done.returncode == 0
    assert "score" in done.stdout
    assert done.stderr == ""
    said = shell("agentmerge show a --json", place)
    assert json.loads(said.stdout)["status"] == "done"
    assert json.loads(said.stdout)["evaluations"]["total"] == 19
    refused = shell(f"agentmerge show nothing {stderr}", place)
    assert (refused.returncode, refused.stdout) == (2, "")


def test_a_result_that_cannot_be_written_is_one_line(place: Path) -> None:
    driving.run(SearchConfig.from_file(place / "c.yml"), name="a", runs_dir=place / "runs")
    for command in ("list", "show a", "best a --json"):
        done = shell(f"agentmerge {command} >/dev/full", place)
        assert done.returncode == 1
        assert done.stderr.startswith("error: a result cannot be written: No space left on device")
        assert len(done.stderr.splitlines()) == 1
    assert shell("agentmerge show a --json | head -c 5", place).stderr == ""


def test_a_crash_is_one_line_even_where_its_file_cannot_be_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("agentmerge.config.SearchConfig.from_file", crash)
    monkeypatch.setattr("tempfile.tempdir", str(place / "none"))
    assert run_app(["run", str(place / "c.yml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "unexpected ZeroDivisionError: division (its details could not be written" in line
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert run_app(["run", str(place / "c.yml")]) == 1
    found = re.search(r"details in (.*)\)", capsys.readouterr().err)
    assert found
    path = Path(found[1])
    assert path.stat().st_mode & 0o777 == 0o600
    assert "ZeroDivisionError" in path.read_text()
    path.unlink()


def broken(spec: Any, taskset: Any) -> Any:
    """A worker that cannot be made, said in many lines as drivers do."""
    raise OverflowError("no kernel image\n" + "for this device\n" * 40)


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_cannot_be_made_is_said_in_one_line(place: Path, count: int) -> None:
    """In this process and in others, without their tracebacks."""
    from agentmerge.preflight.prepare import prepare

    prepared = prepare(SearchConfig.from_file(place / "c.yml"))
    recipe = Recipe.of_model("north", prepared.space.num_layers)
    with (
        Pool(prepared.spec, count=count, make=broken) as pool,
        pytest.raises(NoWorker) as failed,
    ):
        pool.evaluate(recipe, [])
    assert str(failed.value) == "no worker can be started: OverflowError: no kernel image"


def test_names_are_no_links_in_the_reports_charts(place: Path) -> None:
    """Plotly draws tags in every text."""
    text = (place / "c.yml").read_text()
    config = SearchConfig.from_text(text.replace("name: one", f"name: '{LINK}'"))
    driving.run(config, name="a", runs_dir=place / "runs")
    page = place / "report.html"
    assert run_app(["report", "a", "--to", str(page), "--runs-dir", str(place / "runs")]) == 0
    html = page.read_text()
    data = re.search(r'<script[^>]* id="data"[^>]*>(.*?)</script>', html, re.DOTALL)
    assert data
    drawn = json.loads(data[1])
    texts: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict):
            collect([*value, *value.values()])
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(drawn)
    assert any("&lt;a href" in text for text in texts)
    assert not [text for text in texts if re.search(r"<(?!br>|extra>|/extra>)", text)]
    assert '<a href="https://example.org' not in html.replace(data[0], "")
