"""The yardstick of many workers: real searches on a virtual clock."""

from __future__ import annotations

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
