"""What answers cost in generated tokens: kept, shown, bounded, and traded for score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.report.summary import run_summary
from agentmerge.session import driving
from tests.session.conftest import config

TASKS = [{"name": "one", "metric": "exact_match,none"}, {"name": "two", "metric": "acc,none"}]


def searched(runs: Path, name: str = "s", /, **sections: Any) -> dict[str, Any]:
    """What ``show`` has of a search of a task that generates beside one that does not."""
    search = {"algorithm": "random", "population": None} | sections.pop("search", {})
    body = {"tasks": TASKS, "limit": 40, "budget": {"max_evaluations": 12}, "search": search}
    driving.run(config(**(body | sections)), name=name, runs_dir=runs)
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        return run_summary(ledger, ledger.run(name))


def test_tokens_of_the_best_and_the_parents_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = searched(tmp_path)
    lengths = {row["label"]: row["tokens_per_item"] for row in shown["parents"]}
    assert lengths["south"] > lengths["uniform"] > lengths["north"] > 0, "south is the wordy one"
    assert run_app(["show", "s", "--runs-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"tokens an item: this search's answer {shown['answer']['tokens_per_item']:.1f}" in said
    assert run_app(["show", "s", "--json", "--runs-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["tokens_per_item"] > 0
    likelihoods = searched(tmp_path, "l", tasks=[{"name": "two", "metric": "acc,none"}])
    assert likelihoods["best"]["tokens_per_item"] is None, "nothing is generated there"
