"""COCO's harness: arms keep their budget and their seed, and shares are those of the log."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import coco
from benchmarks.coco_arms import ARMS, HIGH, LOW, STARTUP, minimised

CENTRE = np.array([1.3, -2.1])


def sphere(point: np.ndarray) -> float:
    return float(((point - CENTRE) ** 2).sum()) + 1000.0


SLOW = {"smac": pytest.mark.slow}


@pytest.mark.parametrize("arm", [pytest.param(arm, marks=SLOW.get(arm, ())) for arm in ARMS])
def test_an_arm_uses_its_budget_and_follows_its_seed(arm: str) -> None:
    pytest.importorskip(coco.NEEDED.get(arm, "numpy"), reason="extra coco")
    budget = STARTUP + 4
    seen: list[np.ndarray] = []

    def watched(point: np.ndarray) -> float:
        seen.append(point)
        return sphere(point)

    one, again = (minimised(arm, watched, 2, budget, 3) for _ in range(2))
    assert len(one.values) == budget
    assert one.values == again.values
    assert one.values != minimised(arm, sphere, 2, budget, 4).values
    if arm != "pycma":  # which has no bounds, as it was entered
        assert all((point >= LOW).all() and (point <= HIGH).all() for point in seen)


def test_ours_is_ahead_of_chance() -> None:
    chance, ours = (min(minimised(arm, sphere, 2, 30, 3).values) for arm in ("random", "auto"))
    assert ours - 1000.0 < 1e-2 * (chance - 1000.0)


def test_where_auto_ends_the_search_goes_on() -> None:
    found = minimised("auto", lambda point: float((point**2).sum()), 2, 60, 0)
    assert found.ended is not None
    assert found.ended < 60 == len(found.values)


LOG = """\
% f evaluations | g evaluations | best noise-free fitness - Fopt (7.948e+01) + sum g_i+ | measured
1 0 +1.500000000e+02 +2.294800000e+02 +2.294800000e+02 +1.3696e+00
4 0 +9.000000000e-01 +8.038000000e+01 +8.038000000e+01 -4.1435e+00
20 0 +1.000000000e-09 +7.948000000e+01 +7.948000000e+01 +3.4507e+00
"""


def one(arm: str, function: int, way: list[tuple[int, float]], **others: Any) -> coco.Run:
    found = {"suite": "bbob", "arm": arm, "function": function, "dimension": 2, "instance": 1}
    return found | {"budget": 40, "ended": None, "cpu_s": 1.5, "way": way} | others


def test_shares_are_those_of_the_log(tmp_path: Path) -> None:
    (tmp_path / "data_f1").mkdir()
    (tmp_path / "data_f1" / "f1_DIM2.dat").write_text(LOG)
    way = coco.way(tmp_path)
    assert way == [(1, 150.0), (4, 0.9), (20, 1e-9)]
    found = one("auto", 1, way)
    assert coco.reached(found, 3) == 0.0
    assert coco.reached(found, 19) == 11 / 51  # 1e2, 1e1.8 ... 1e0
    assert coco.reached(found, 20) == 1.0
    assert coco.shares([found], 2, [1]) == [11 / 51]
    assert coco.shares([found], 2, [2]) == []


def test_tables_compare_what_all_arms_have_searched() -> None:
    near, far = [(1, 150.0), (15, 1e-9)], [(1, 150.0), (15, 50.0)]
    runs = [one("auto", 1, near), one("auto", 24, far, ended=12), one("random", 1, far)]
    text = coco.tables(runs, lambda function, dimension, evaluations: 0.25)
    assert "| auto | 0.000 | 0.000 | 1.000 |" not in text
    assert "| auto | 1.000 | 1.000 | 1.000 | 1.5 |  |" in text
    assert "| random | 0.039 | 0.039 | 0.039 | 1.5 |  |" in text
    assert "| *best of BBOB 2009* | 0.250 | 0.250 | 0.250 |" in text
    assert "1 functions, 1 instances, 40 evaluations" in text
    assert "weak structure" not in text


def test_a_longer_run_stands_for_a_shorter_one(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    runs = [one("auto", 1, [(1, 9.0), (30, 0.0)], budget=100)]
    runs += [one("auto", 2, [(1, 9.0)], budget=100), one("auto", 2, [(1, 8.0)], budget=20)]
    runs += [one("auto", 3, [(1, 9.0)], budget=10)]
    runs += [one("smac", 1, [(1, 9.0)], budget=100)]  # whose design depends on the budget
    for run in runs:
        name = f"bbob--{run['arm']}--{run['function']:03}-02-01-{run['budget']}.json"
        (tmp_path / "runs" / name).write_text(json.dumps(run))
    asked = argparse.Namespace(
        suite="bbob", dimensions="2", instances="1", arms="auto,smac", per_dimension=10, most=500,
        out=tmp_path,
    )  # fmt: skip
    found = coco.stored(asked)
    assert [(r["arm"], r["function"], r["way"][0][1]) for r in found] == [
        ("auto", 1, 9.0), ("auto", 2, 8.0),
    ]  # fmt: skip
    assert "| auto | 0.118 |" in coco.tables(found)


def test_numbers() -> None:
    assert coco.numbers("1-3,5") == [1, 2, 3, 5]


def test_an_arm_that_nobody_knows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        coco.main(["--arms", "auto,guess"])
    assert "no arm 'guess'" in capsys.readouterr().err


def test_a_run_is_judged_by_coco_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cocoex", reason="extra coco")
    options = ["--dimensions", "2", "--instances", "1", "--per-dimension", "10"]
    options += ["--arms", "random,auto", "--out", str(tmp_path)]
    coco.main(options)
    first = capsys.readouterr().out
    assert first.count("bbob--auto--") == 24
    coco.main(options)
    again = capsys.readouterr().out
    assert "bbob--auto--" not in again
    assert again.splitlines()[-5:] == first.splitlines()[-5:]
    assert "24 functions, 1 instances, 20 evaluations" in again
