"""``agentmerge demo`` from training to verdict, whatever family this machine trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.demo.family import TinyFamily
from benchmarks.demo import ahead, read


@pytest.mark.slow
def test_the_demo_finds_a_merge_ahead_of_every_cheap_rival(
    family: TinyFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["demo", "--dir", str(tmp_path), "--json", "-q"]) == 0
    found = read(json.loads(capsys.readouterr().out)["final"])
    assert ahead(found), found
