"""The arrays that a model is fitted on: scales, directions, failures, what may be the best."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agentmerge.contracts.strategy import Bound, Evidence, Items, Observation, rng_factory
from agentmerge.strategies.margins import Margins, least_gain_of, prospect_of
from agentmerge.strategies.soft_score import SoftScore, scaled
from agentmerge.strategies.surrogate import FIT_POINTS
from agentmerge.strategies.table import Table, softened, table_of
from agentmerge.testing.landscapes import Landscape
from tests.strategies.test_contract import space

CENTRE = (0.3, 0.45, 0.6, 0.4)
BETTER = np.ones(1)


def told(values: list[list[float]], weight: list[float], failed: int = 0) -> Table:
    """A table of values without margins, and failures."""
    rng = np.random.default_rng(0)
    items = Items(np.arange(len(weight)), np.array(weight), np.zeros(len(weight), bool))
    history = [
        Observation(0, slot, tuple(rng.random(3)), "x", float(np.dot(row, weight)),
                    evidence=Evidence(items, np.array(row), np.array(row)))
        for slot, row in enumerate(values)
    ]  # fmt: skip
    history += [
        Observation(1, slot, tuple(rng.random(3)), "x", None, failure="it failed")
        for slot in range(failed)
    ]
    found = table_of(history)
    assert found is not None
    return found


def test_what_spans_decades_is_told_as_its_logarithm_and_back() -> None:
    table = told([[3.4, 0.5], [6.1, 0.4], [2.8e14, 0.1]], [-1.0, 1.0])
    assert table.decades.tolist() == [1.0, 0.0]
    np.testing.assert_allclose(table.signals[:, 0], np.log([3.4, 6.1, 2.8e14]))
    score = softened(table)
    np.testing.assert_allclose(score(table.signals), [-2.9, -5.7, -2.8e14])
    below = told([[-3.0], [-4e5]], [1.0])
    assert below.decades.tolist() == [-1.0]
    np.testing.assert_allclose(softened(below)(below.signals), [-3.0, -4e5])


@pytest.mark.parametrize("decade", [20, 100, 300])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_nothing_wild_reaches_a_fit(decade: int, sign: float) -> None:
    """Of both signs, so that no logarithm helps: the far worse is fenced in, the better is not."""
    rng = np.random.default_rng(1)
    values = sign * np.append(rng.normal(size=11), [-(10.0**decade), 30.0])[:, None]
    signals, decades = scaled(values, np.array([sign]))
    assert not decades.any()
    assert abs(signals).max() < 100
    assert (sign * signals).argmax() == 12
    assert signals[12] == sign * 30.0
    table = told(values.tolist(), [sign])
    assert np.isfinite(prospect_of(table).gains(rng.random((20, 3)))).all()


def test_right_and_wrong_are_left_as_they_are() -> None:
    values = np.array([[1.0], [1.0], [0.0], [1.0], [np.nan]])
    for better in (1.0, -1.0):
        signals, decades = scaled(values, np.array([better]))
        np.testing.assert_array_equal(signals, values)
        assert not decades.any()


@pytest.mark.parametrize(("weight", "poor"), [(1.0, 1.75), (-1.0, 3.25)])
def test_a_failure_is_told_as_poor_which_is_high_where_lower_is_better(
    weight: float, poor: float
) -> None:
    table = told([[1.0], [2.0], [3.0], [4.0]], [weight], failed=2)
    assert table.signals[-2:, 0].tolist() == [poor, poor]
    assert table.values[-2:, 0].tolist() == [poor, poor]
    assert table.counts.tolist() == [True] * 4 + [False] * 2


def test_a_failure_is_poor_on_a_scale_of_decades_too() -> None:
    for sign, weight in ((1.0, -1.0), (-1.0, 1.0)):
        table = told([[sign * 10.0**k] for k in range(5)], [weight], failed=1)
        assert np.exp(table.signals[-1, 0]) == pytest.approx(1e3)


@pytest.mark.parametrize("kind", ["lower", "perplexity"])
def test_it_leaves_where_candidates_fail(kind: str) -> None:
    objective = Landscape(kind, CENTRE)
    rng = np.random.default_rng(2)
    points = [tuple(p) for p in rng.random((14, 4))]
    history = [objective.observe(0, i, p, "x", fail=True) for i, p in enumerate(points)]
    failed = 0
    for generation in range(1, 9):
        (asked,) = Margins().propose(space(), history, None, 1, rng_factory(generation))
        history.append(objective.observe(generation, 0, asked.vector or (), "x", fail=True))
        failed += history[-1].failed
    assert failed <= 3


def test_rows_are_in_the_historys_order_so_that_failures_do_not_crowd_out_the_rest() -> None:
    """Length scales are fitted on the latest rows: they may not be failures alone."""
    objective = Landscape("margins", CENTRE)
    rng = np.random.default_rng(3)
    history = []
    for generation in range(2 * FIT_POINTS):
        point = tuple(rng.random(4))
        if generation % 3:
            history.append(Observation(generation, 0, point, "x", None, failure="it failed"))
        else:
            history.append(objective.observe(generation, 0, point, "x"))
    table = table_of(history)
    assert table is not None
    np.testing.assert_array_equal(table.points, [o.vector for o in history])
    assert table.counts[-FIT_POINTS:].sum() > FIT_POINTS // 4


def test_a_bound_is_part_of_the_score_with_its_slope() -> None:
    rng = np.random.default_rng(4)
    weight, margins = np.array([0.5, 0.5, -0.3, 0.0]), np.array([True, True, False, False])
    bounds = (
        Bound(np.array([0.5, 0.5, 0.0, 0.0]), 1.0, 0.9, 10.0),
        Bound(np.array([0.0, 0.0, 1.0, 0.0]), -1.0, -2.0, 10.0),
    )
    score = SoftScore(weight, margins, np.ones(4), np.array([0.0, 0.0, 1.0, 0.0]), bounds)
    free = replace(score, bounds=())
    for _ in range(8):
        signals = rng.normal(size=4)
        lacking = sum(max(0.0, float(b.lacking(score.values(signals)))) for b in bounds)
        assert score(signals) == pytest.approx(free(signals) - 10 * lacking)
        slope = score.slope(signals)
        for i in range(4):
            step = np.eye(4)[i] * 1e-6
            rise = (score(signals + step) - score(signals - step)) / 2e-6
            assert slope[i] == pytest.approx(rise, rel=1e-4, abs=1e-6)


def test_only_what_keeps_its_constraints_is_the_best_so_far() -> None:
    table = told([[0.9], [0.6], [0.5]], [1.0])
    kept = replace(table, counts=np.array([False, True, True]))
    assert prospect_of(table).best > prospect_of(kept).best + 0.2


def test_a_least_gain_is_as_large_as_the_metric_and_as_small_as_its_documents_are_many() -> None:
    def least(weight: float, value: float, documents: int) -> float:
        items = Items(
            np.zeros(1, int), np.array([weight]), np.zeros(1, bool), np.array([documents])
        )
        table = told([[value], [value * 1.1], [value * 1.2]], [weight])
        return least_gain_of(replace(table, items=items), table.values[:, 0] * weight)

    assert least(-1.0, 6.0, 400) == pytest.approx(6 * least(1.0, 0.5, 400), rel=0.25)
    assert least(-1.0, 6.0, 100) == pytest.approx(2 * least(-1.0, 6.0, 400))
    few = told([[0.2], [0.5], [0.9]], [1.0])
    assert least_gain_of(few, few.values[:, 0]) == pytest.approx(4e-4), (
        "nothing is known of its noise"
    )
