"""The benchmark of fronts: its problems are told as a search tells them, and its areas compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import front


def test_a_search_for_the_front_beats_chance_on_a_landscape_of_lengths() -> None:
    there = front.lengths(0)
    found = {arm: front.run(there, arm, 0, 14) for arm in ("auto", "random")}
    again = front.run(front.lengths(0), "auto", 0, 14)
    for told in (again, found["auto"]):
        assert told.pop("cpu_s") > 0
    assert again == found["auto"], "the same seed, the same search"
    score, tokens, evidence = there.ask((0.5,) * there.space.dimensions)
    assert evidence.items.tokens is not None
    assert float(evidence.values @ evidence.items.tokens) == pytest.approx(tokens)
    assert float(evidence.values @ evidence.items.weight) == pytest.approx(score)
    parents = found["auto"]["parents"]
    assert front.area(parents, parents) > 0
    better = [*parents, (max(s for s, _ in parents) + 0.1, min(t for _, t in parents))]
    assert front.area(better, parents) > front.area(parents, parents)


def test_results_are_shares_of_the_best_of_each_seed_and_stored_runs_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parents = [[0.2, 10.0], [0.6, 20.0]]
    asked: list[tuple[str, int]] = []

    def scripted(there: object, arm: str, seed: int, budget: int) -> dict[str, object]:
        asked.append((arm, seed))
        points = [[0.9 + seed / 10, 10.0]] if arm == "auto" else parents
        fronts = {"50": parents, "100": points}
        return {"arm": arm, "seed": seed, "fronts": fronts, "parents": parents, "cpu_s": 1.0}

    monkeypatch.setattr(front, "run", scripted)
    monkeypatch.setitem(front.FAMILIES, "skills", str)
    rows = ["--out", str(tmp_path), "--arms", "auto,random", "--seeds"]
    front.main([*rows, "1"])
    front.main([*rows, "2"])
    assert asked == [(arm, seed) for seed in (0, 1) for arm in ("auto", "random")]
    assert len(list((tmp_path / "runs").glob("*.json"))) == 4
    said = (tmp_path / "results.md").read_text()
    assert said in capsys.readouterr().out
    least = front.area(parents, parents)
    shares = [least / front.area([[0.9 + seed / 10, 10.0]], parents) for seed in (0, 1)]
    of_random = [row for row in said.splitlines() if row.startswith("| random |")]
    assert f"| {np.mean(shares):.3f} ± " in of_random[0]
    assert "| random | 50 evaluations | 2 | +0.000 | +0.000 to +0.000 | 1.0000 |" in said
    assert f"| random | 100 evaluations | 2 | {1 - np.mean(shares):+.3f} |" in said


@pytest.mark.slow
def test_a_terse_and_a_wordy_expert_are_right_and_merges_trade_right_answers_for_length() -> None:
    there = front.wordy(0)
    points = {
        Path(label).name: there.ask(point) for _, label, point in front.first_points(there.space)
    }
    (terse, short, _), (wordy, long, shown) = points["expert-shift"], points["expert-wordy-sort"]
    assert (terse, wordy) == (pytest.approx(0.5, abs=0.05), pytest.approx(0.5, abs=0.05))
    assert short == pytest.approx(6, abs=0.2), "five letters and the end"
    assert long == pytest.approx(12, abs=0.2), "the question and '=' besides"
    assert float(shown.values @ shown.items.tokens) == pytest.approx(long)
    best, cost, _ = max(points.values(), key=lambda found: found[0])
    assert best > 0.6
    assert short < cost < long
