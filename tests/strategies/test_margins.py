"""The search on items' margins: it learns more from a candidate, whatever the items are like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agentmerge.contracts.strategy import Items, rng_factory
from agentmerge.strategies.cma_es import CmaEs
from agentmerge.strategies.margins import Margins, believed, prospect_for, prospect_of
from agentmerge.strategies.soft_score import SoftScore
from agentmerge.strategies.surrogate import _cost, conditioned, fitted
from agentmerge.strategies.table import Table, softened, table_of, thinned
from tests.strategies.item_searches import COUNT, SPACE, Quiz, best, searched


def test_thirty_evaluations_are_worth_more_than_cma_es_hundred() -> None:
    ahead = []
    for seed in range(3):
        quiz = Quiz(seed)
        few = best(searched(Margins(), quiz, 30, seed))
        many = best(searched(CmaEs(), quiz, 100, seed))
        ahead.append(few - many)
    assert np.median(ahead) > 0


def test_values_alone_are_lived_with() -> None:
    quiz = Quiz(1, values_only=True)
    history = searched(Margins(), quiz, 25, 0)
    assert best(history) > best(history[:8])


def test_a_candidate_that_was_not_asked_everything_does_not_poison_the_rest() -> None:
    quiz = Quiz(2)
    history = searched(Margins(), quiz, 14, 0)
    evidence = history[-1].evidence
    assert evidence is not None
    half = np.arange(COUNT) < COUNT // 2
    signals = np.where(half, evidence.signals, np.nan)
    values = np.where(half, evidence.values, np.nan)
    history[-1] = replace(history[-1], evidence=replace(evidence, signals=signals, values=values))
    (asked,) = Margins().propose(SPACE, history, None, 1, rng_factory(0))
    assert asked.vector is not None
    assert np.isfinite(asked.vector).all()


def test_several_at_once_differ() -> None:
    history = searched(Margins(), Quiz(3), 14, 0)
    asked = Margins().propose(SPACE, history, None, 4, rng_factory(0))
    points = np.array([p.vector for p in asked])
    assert len({p.vector for p in asked}) == 4
    apart = np.abs(points[:, None] - points[None]).max(-1)[np.triu_indices(4, 1)]
    assert apart.min() > 1e-3


def test_what_is_pending_is_believed_at_once_as_one_after_the_other() -> None:
    """A proposal beside many workers costs one factorisation, not one for each of them."""
    history = searched(Margins(), Quiz(3), 14, 0)
    prospect = prospect_for(SPACE, history)
    assert prospect is not None
    rng = np.random.default_rng(0)
    points = prospect.ratios.representative(rng.random((20, SPACE.dimensions)))
    together, each = believed(prospect, points), prospect
    for point in points:
        each = believed(each, point[None])
    asked = prospect.ratios.representative(rng.random((50, SPACE.dimensions)))
    for one, other in zip(together.model.predict(asked), each.model.predict(asked), strict=True):
        assert np.allclose(one, other, atol=1e-6)
    assert np.allclose(together.model.predict(asked)[0], prospect.model.predict(asked)[0])
    assert together.best == pytest.approx(each.best)


def test_the_model_predicts_what_it_was_told_and_knows_which_axes_matter() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((40, 5))
    loads = rng.normal(size=(2, 60))
    signals = np.sin(4 * points[:, :2]) @ loads
    model = fitted(points, signals)
    means, deviation = model.predict(points)
    assert np.abs(means - signals).max() < 0.1
    assert deviation.max() < 0.1
    assert model.hyper.scales[:2].max() < model.hyper.scales[2:].min()
    fresh = rng.random((20, 5))
    error = model.predict(fresh)[0] - np.sin(4 * fresh[:, :2]) @ loads
    assert (error**2).mean() < 0.05 * (signals - signals.mean(0)).var()


def test_slopes_are_the_slopes() -> None:
    rng = np.random.default_rng(1)
    points, signals = rng.random((15, 3)), rng.normal(size=(15, 20)) * 3
    theta = np.log([0.5, 0.7, 0.9, 0.01])
    _, slope = _cost(points, signals, theta)
    for axis in range(4):
        step = np.eye(4)[axis] * 1e-5
        rise = _cost(points, signals, theta + step)[0] - _cost(points, signals, theta - step)[0]
        assert slope[axis] == pytest.approx(rise / 2e-5, rel=1e-4, abs=1e-6)
    history = searched(Margins(), Quiz(4), 12, 0)
    table = table_of(history)
    assert table is not None
    prospect = prospect_of(table)
    point = rng.random(SPACE.dimensions)
    _, slope = prospect.smooth_loss(point)
    for axis in range(SPACE.dimensions):
        step = np.eye(SPACE.dimensions)[axis] * 1e-6
        rise = prospect.smooth_loss(point + step)[0] - prospect.smooth_loss(point - step)[0]
        assert slope[axis] == pytest.approx(rise / 2e-6, rel=1e-3, abs=1e-6)


def test_conditioning_one_by_one_is_conditioning_at_once() -> None:
    rng = np.random.default_rng(2)
    points, signals = rng.random((10, 3)), rng.normal(size=(10, 7))
    whole = fitted(points, signals)
    part = conditioned(points[:6], signals[:6], whole.hyper).told(points[6:], signals[6:])
    fresh = rng.random((4, 3))
    np.testing.assert_allclose(part.predict(fresh)[0], whole.predict(fresh)[0], atol=1e-6)


def test_softening_follows_how_well_margins_tell_right_from_wrong() -> None:
    rng = np.random.default_rng(0)
    sharp, blurred = Quiz(0), Quiz(0)
    told = {}
    for name, quiz, noise in (("sharp", sharp, 0.0), ("blurred", blurred, 3.0)):
        history = searched(Margins(), quiz, 10, 0)
        table = table_of(history)
        assert table is not None
        signals = table.signals * 5
        values = (signals + noise * rng.normal(size=signals.shape) > 0).astype(float)
        told[name] = softened(replace(table, signals=signals, values=values)).softening[0]
    assert told["sharp"] < told["blurred"]


def test_a_soft_score_counts_values_as_they_are() -> None:
    score = SoftScore(np.array([0.5, 2.0]), np.array([True, False]), np.ones(2), np.zeros(2))
    assert score(np.array([0.0, 0.25])) == pytest.approx(0.25 + 0.5)


def test_many_items_and_points_are_thinned_and_still_say_the_score() -> None:
    rng = np.random.default_rng(0)
    task = np.repeat([0, 1], [2500, 500])
    items = Items(task, np.where(task == 0, 0.7 / 2500, 0.3 / 500), np.ones(3000, bool))
    points = rng.random((450, 3))
    signals = rng.normal(size=3000) * 2 + (points @ [1.0, 2.0, -1.0])[:, None]
    values = (signals > 0).astype(float)
    few = thinned(Table(points, signals, values, items, np.zeros(3000), np.ones(450, bool)))
    assert few.signals.shape == few.values.shape == (400, 1000)
    assert few.items.weight.sum() == pytest.approx(1.0)
    scores = values @ items.weight
    kept = few.values @ few.items.weight
    where = [int(np.flatnonzero((points == point).all(1))[0]) for point in few.points]
    np.testing.assert_allclose(kept, scores[where], atol=0.01)
    assert scores.argmax() in where
