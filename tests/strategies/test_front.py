"""The area between score and length: what a point adds, its slopes, and the model's expectation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentmerge.contracts.strategy import Bound, Evidence, Items, Observation
from agentmerge.search.trials import seen_from
from agentmerge.strategies.front import Front, Worst, by_area, undominated, worst_of
from agentmerge.strategies.margins import LITTLE, Prospect, least_gain_of, prospect_of
from agentmerge.strategies.table import table_of


@pytest.mark.parametrize("seed", range(40))
def test_what_a_point_adds_is_what_the_area_grows_by(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = seed % 8
    scores, tokens = rng.random(count).round(1), (100 * rng.random(count)).round(-1)
    front = Front.of(Worst(0.1, 90.0, 60.0), scores, tokens)
    grid = rng.random((20_000, 2)) * [0.9, 90.0] + [0.1, 0.0]
    held = np.zeros(len(grid), bool)
    for score, length in zip(scores, tokens, strict=True):
        held |= (grid[:, 0] <= score) & (grid[:, 1] >= length)
    assert front.area == pytest.approx(held.mean() * 0.9 * 90 / 60, abs=0.03)
    some = np.column_stack([rng.random(30), 100 * rng.random(30)])
    grown = [front.told(*point).area - front.area for point in some]
    assert front.added(*some.T) == pytest.approx(grown, abs=1e-12)
    assert set(map(tuple, front.points)) <= set(zip(scores, tokens, strict=True))
    for score, length in some[:5]:
        step = 1e-6
        ends = np.array([[score + step, score - step, score, score],
                         [length, length, length + step, length - step]])  # fmt: skip
        more, less, longer, shorter = front.added(*ends)
        slopes = ((more - less) / 2 / step, (longer - shorter) / 2 / step)
        assert front.slopes(score, length) == pytest.approx(slopes, abs=1e-4)


def test_equals_and_what_is_dominated_are_left_out() -> None:
    scores = np.array([0.5, 0.9, 0.9, 0.5, 0.2, 0.95])
    tokens = np.array([10.0, 30.0, 30.0, 10.0, 10.0, 30.5])
    assert undominated(scores, tokens).tolist() == [5, 1, 0]
    assert undominated(np.zeros(0), np.zeros(0)).tolist() == []


@pytest.mark.parametrize("level", [0.0, 0.5, -2.0])
def test_parents_of_one_score_leave_room_for_shorter_answers(level: float) -> None:
    worst = Worst.of([level, level], [40.0, 80.0])
    front = Front.of(worst, np.full(2, level), np.array([40.0, 80.0]))
    assert front.area > 0
    assert front.added(np.array([level]), np.array([20.0])) > 0


def history(noisy: bool, scale: float = 1.0, ahead: float = 0.0) -> list[Observation]:
    """Parents and merges of two models; ten items are right or wrong, and ten have a length.

    scale: of the margins. ahead: how far all of them are up.
    """
    rng = np.random.default_rng(3)
    task, weight = np.repeat([0, 1], 10), np.repeat([0.1, 0.0], 10)
    items = Items(
        task, weight, np.repeat([True, False], 10), tokens=np.repeat([0.0, 0.1], 10), traded=True
    )
    points = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), *map(tuple, rng.random((12, 2)))]
    found = []
    for n, point in enumerate(points):
        x, y = point
        margins = 3 * (x + 0.5 * y) - np.linspace(0, 4, 10) + noisy * rng.normal(size=10) * 3
        margins = scale * (margins + ahead)
        lengths = np.round(20 + 60 * x * np.linspace(0.5, 1.5, 10))
        signals = np.concatenate([margins, lengths])
        values = np.concatenate([margins > 0, lengths])
        score = float(values @ weight)
        found.append(
            Observation(
                0 if n < 3 else n, n if n < 3 else 0, point, "parent" if n < 3 else "x", score,
                evidence=Evidence(items, signals, values), tokens=float(lengths.mean()),
            )
        )  # fmt: skip
    return found


def prospect(noisy: bool = False) -> Prospect:
    told = history(noisy)
    table = table_of(told)
    assert table is not None
    return prospect_of(table, worst_of(told))


@pytest.mark.parametrize("noisy", [False, True])
def test_the_items_model_knows_lengths_and_its_slope_is_its_gains(noisy: bool) -> None:
    found = prospect(noisy)
    assert found.front is not None
    assert found.by_item == (not noisy)
    rng = np.random.default_rng(0)
    points = rng.random((40, 2))
    means, _ = found.model.predict(points)
    true = 20 + 60 * points[:, 0]
    assert np.abs(found.score.length(means) - true).max() < 6.0
    gains = found.gains(points)
    assert (gains >= 0).all()
    assert gains.max() > 0
    for point in points[:10]:
        value, slope = found.smooth_loss(point)
        assert -value == pytest.approx(float(found.gains(point[None])[0]))
        step = 1e-6
        for axis in np.eye(2):
            ends = found.gains(np.array([point + step * axis, point - step * axis]))
            assert slope @ axis == pytest.approx(-(ends[0] - ends[1]) / 2 / step, abs=1e-3)
    front = found.front.points
    assert (np.diff(front[:, 0]) > 0).all()
    assert (np.diff(front[:, 1]) > 0).all()
    assert len(found.elites()) <= 8


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_narrow_margins_leave_the_front_what_it_has(noisy: bool, breaks: bool) -> None:
    """Softly right items are worth far less than what the parents scored."""
    told = history(noisy, 0.02, 2.5)
    if breaks:  # one that breaks a constraint, whose told score is lower by far
        broken = replace(told[5], score=-50.0, violation=1.0)
        told = [*told[:5], broken, *told[6:]]
    table, worst = table_of(told), worst_of(told)
    assert table is not None
    assert worst is not None
    found = prospect_of(table, worst)
    assert found.front is not None
    assert found.front.worst.score < worst.score - 0.1, "soft scores are lower"
    assert len(found.front.scores) > 1
    assert found.gains(np.random.default_rng(0).random((40, 2))).max() > 0


def test_parents_that_break_a_constraint_set_the_front_with_their_true_score() -> None:
    """Two experts of two skills, each to be kept: every parent lacks what another one has."""
    plain = history(noisy=False)
    evidence = plain[0].evidence
    assert evidence is not None
    steep, lacking = 10.0, (0.6, 0.0, 0.3)
    bounds = (Bound(evidence.items.weight, 1.0, 0.5, steep),)
    told = [
        replace(
            o, score=(o.score or 0.0) - steep * lack, violation=lack,
            evidence=replace(o.evidence, items=replace(evidence.items, bounds=bounds)),
        )
        for o, lack in zip(plain, [*lacking, *[0.0] * len(plain)], strict=False)
        if o.evidence is not None
    ]  # fmt: skip
    worst, true = worst_of(told), worst_of(plain)
    assert worst is not None
    assert true is not None
    assert (worst.score, worst.tokens) == pytest.approx((true.score, true.tokens))
    assert 0 < max(o.score or 0.0 for o in by_area(told)) < 2, "in scores, not in penalties"


def test_lengths_are_no_documents() -> None:
    table = table_of(history(noisy=False))
    assert table is not None
    assert table.items.documents_scored == 10
    assert replace(table.items, tokens=None).documents_scored == 20
    scores = table.values @ table.items.weight
    spread = float(scores.max() - np.median(scores))
    assert least_gain_of(table, scores) == LITTLE * spread, "of ten answers no noise is known"


def test_parents_that_a_branch_scored_anew_set_the_front_of_another_space_too() -> None:
    told = [replace(o, generation=o.generation + 4, space="first") for o in history(noisy=False)]
    here: Any = SimpleNamespace(key="second")
    seen = seen_from(told, here, lambda o: None)
    assert worst_of(seen) == worst_of(told)
    assert by_area(seen) != seen
    assert {o.operator for o in seen[3:]} == {"carried"}
