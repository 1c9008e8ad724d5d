"""Losers of races still teach: what they were asked is kept, the rest is what is expected of it."""

from __future__ import annotations

import numpy as np
import pytest

from agentmerge.contracts.strategy import Evidence, Items, Observation
from agentmerge.strategies.surrogate import completed, conditioned, fitted
from agentmerge.strategies.table import table_of


def answers(points: np.ndarray, items: int = 40) -> np.ndarray:
    rng = np.random.default_rng(1)
    lean, level = rng.normal(size=(points.shape[1], items)), rng.normal(size=items)
    return level + 4 * (points - 0.5) @ lean


@pytest.fixture
def race() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points, all answers, answers with holes): 8 whole rows, 6 losers of two rungs."""
    points = np.random.default_rng(2).random((14, 3))
    whole = answers(points)
    holed = whole.copy()
    holed[8:11, 5:] = np.nan
    holed[11:, 20:] = np.nan
    return points, whole, holed


def test_what_was_seen_is_untouched_and_the_rest_is_near_the_truth(race) -> None:
    points, whole, holed = race
    found = completed(points, holed)
    seen = np.isfinite(holed)
    assert (found[seen] == holed[seen]).all()
    assert np.isfinite(found).all()
    unexplained = ((found - whole)[~seen] ** 2).mean() / whole[~seen].var()
    assert unexplained < 0.1


def test_the_expectation_moves_nothing_else(race) -> None:
    """Told with its own expectation, the process predicts every item as its rung's would."""
    points, _, holed = race
    found = completed(points, holed)
    hyper = fitted(points, holed[:, :5]).hyper
    rows = np.isfinite(holed[:, 30])
    of_the_rung = conditioned(points[rows], holed[rows, 30:], hyper)
    of_all = conditioned(points, found[:, 30:], hyper)
    elsewhere = np.random.default_rng(3).random((20, 3))
    gap = np.abs(of_the_rung.predict(elsewhere)[0] - of_all.predict(elsewhere)[0])
    assert gap.max() < 0.05 * np.abs(found).max()


def test_losers_make_predictions_better(race) -> None:
    points, _, holed = race
    elsewhere = np.random.default_rng(4).random((200, 3))
    truth = answers(elsewhere)

    def error(rows: slice, signals: np.ndarray) -> float:
        model = fitted(points[rows], signals[rows])
        return float(((model.predict(elsewhere)[0] - truth)[:, :5] ** 2).mean())

    assert error(slice(None), completed(points, holed)) < error(slice(0, 8), holed)


@pytest.mark.parametrize("hole", [np.s_[:, :], np.s_[1:, 3:], np.s_[0, 0:0]])
def test_what_cannot_be_completed_is_left(race, hole) -> None:
    points, whole, _ = race
    signals = whole.copy()
    signals[hole] = np.nan
    assert np.array_equal(completed(points, signals), signals, equal_nan=True)


def test_margins_learns_from_losers(race) -> None:
    points, whole, holed = race
    items = Items(np.zeros(40, int), np.full(40, 1 / 40), np.ones(40, bool))
    history = [
        Observation(
            1, slot, tuple(point), "x", 0.5, rung=1.0 if np.isfinite(row).all() else 0.25,
            evidence=Evidence(items, row, np.where(np.isfinite(row), row > 0, np.nan)),
        )
        for slot, (point, row) in enumerate(zip(points, holed, strict=True))
    ]  # fmt: skip
    table = table_of(history)
    assert len(table.points) == len(points)
    assert np.isfinite(table.values).all()
    assert (table.values[8:] == (table.signals[8:] > 0)).mean() > 0.99
    assert (table.signals[:8] == np.clip(whole[:8], -12, 12)).all()
