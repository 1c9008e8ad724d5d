"""What ``python -m benchmarks.demo`` counts, and that it goes on where it was. Trains nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.demo import measured_here
from agentmerge.contracts.card import Card
from benchmarks import demo


def card(answer: str, sealed: float, against_parent: float) -> dict[str, Any]:
    rows = {"parent a": 0.5, "parent b": 0.6, "uniform": 0.4}
    named = [{"name": name, "sealed_score": score} for name, score in rows.items()]
    gaps = {name: sealed - score for name, score in rows.items()} | {"parent b": against_parent}
    return {
        "answer": {"name": answer, "score": 0.9, "sealed_score": sealed},
        "parents": named[:2],
        "best_rival": named[2],
        "differences": [
            {"against": name, "mean": gap, "low": gap - 0.02, "high": gap + 0.02}
            for name, gap in gaps.items()
        ],
        "verdict": "",
        "sealed": True,
    }


def test_the_rival_is_the_best_of_parents_and_cheap_merges() -> None:
    found = demo.read(card("margins 3.0", 0.7, 0.1))
    assert (found["rival_name"], found["rival"]) == ("parent b", 0.6)
    assert demo.ahead(found)


@pytest.mark.parametrize(
    "closing", [card("margins 3.0", 0.61, 0.01), card("parent b", 0.6, 0.0)], ids=["noise", "rival"]
)
def test_what_is_within_the_noise_or_a_rival_itself_is_not_ahead(closing: dict[str, Any]) -> None:
    assert not demo.ahead(demo.read(closing))


def test_what_ran_before_is_counted_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(demo.subprocess, "run", fails)
    for kernels in demo.KERNELS:
        for seed, sealed in enumerate((0.7, 0.61, 0.8)):
            row = demo.read(card("margins 3.0", sealed, sealed - 0.6))
            row |= {"kernels": kernels, "used": 40 + seed, "training_s": 30.0, "search_s": 60.0}
            (tmp_path / f"{kernels}-{seed}.json").write_text(json.dumps(row))
    demo.main(["--seeds", "3", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(demo.KERNELS)
    assert lines[2].startswith("| default | 3 | 2 | 0.700 (0.610 to 0.800) | 0.600")
    assert "| 41 (40 to 42) | 30 (30 to 30) |" in lines[2]
    assert (tmp_path / "results.md").read_text().splitlines() == lines


def test_the_demo_closes_with_what_it_measured_itself() -> None:
    told = measured_here(Card.parse(card("margins 3.0", 0.7, 0.1)), 41, 100)
    assert "sealed items: the best parent 0.600, the best cheap merge 0.400" in told
    assert "this search after 41 of 100 evaluations 0.700" in told
    alone = card("parent b", 0.6, 0.0) | {"best_rival": None}
    alone["parents"][0]["sealed_score"] = None
    assert "the best parent 0.600, this search" in measured_here(Card.parse(alone), 41, 100)
