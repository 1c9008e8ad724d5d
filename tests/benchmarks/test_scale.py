"""The yardstick of many workers: real searches on a virtual clock."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.real_workers import counted
from benchmarks.scale import searched


def test_a_window_keeps_workers_at_work_that_a_barrier_leaves_waiting() -> None:
    used = {}
    for lag in (False, True):
        pool = searched(4, 0.6, lag, 60)
        used[lag] = pool.busy / (pool.now * 4)
    assert used[False] < 0.75
    assert used[True] > 0.85
    alone = searched(1, 0.6, True, 25)
    assert abs(alone.busy - alone.now) < 1e-9


def test_candidates_an_hour_are_counted_from_the_fourth(tmp_path: Path) -> None:
    times = [0.0, 40.0, 50.0, 60.0, 61.0, 62.5]  # the first ones wait for a start
    lines = [{"time": at, "event": "candidate"} for at in times]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, [{"time": 1, "event": "x"}, *lines])))
    assert counted(tmp_path / "log") == 3600 * 2 / 2.5
