"""The default search: who proposes when, what agents may add, and when it stops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.strategy import Evidence, Items, Observation, Proposal, rng_factory
from agentmerge.space import seeds
from agentmerge.strategies.auto import (
    GRADIENT_STEPS,
    MOST_ADVICE,
    PATIENCE,
    STALE,
    Auto,
    advice,
    gain_rate,
    nothing_to_gain,
    operator_of,
    since_gain,
    since_rise,
)
from agentmerge.strategies.gradient import GradientSteps, next_step
from agentmerge.strategies.margins import prospect_for
from agentmerge.testing.landscapes import Landscape
from tests.strategies.item_searches import SPACE, Quiz, best, searched
from tests.strategies.test_contract import space


def told(generation: int, score: float | None, operator: str = "margins") -> Observation:
    point = tuple(float(x) for x in np.random.default_rng(generation).random(SPACE.dimensions))
    return Observation(generation, 0, point, operator, score)


def test_it_ends_by_itself_once_nothing_is_left_to_gain() -> None:
    for seed in range(2):
        history = searched(Auto(), Quiz(seed), 100, seed)
        assert len(history) < 90
        assert best(history) > 0.9


@pytest.mark.parametrize("kind", ["values", "perplexity"])
def test_it_ends_by_itself_without_margins_too(kind: str) -> None:
    objective = Landscape(kind, (0.3, 0.45, 0.6, 0.4))
    there = space()
    points = [p for _, _, p in [*seeds.parents(there), *seeds.scale_points(there)] if p]
    history = [objective.observe(0, i, p, "scale") for i, p in enumerate(points)]
    while len(history) < 80:
        asked = Auto().propose(there, tuple(history), None, 1, rng_factory(0))
        if not asked:
            break
        point = asked[0].vector or ()
        history.append(objective.observe(history[-1].generation + 1, 0, point, asked[0].operator))
    assert len(history) < 80
    scores = [o.score for o in history if o.score is not None]
    assert max(scores) - max(scores[: len(points)]) > 0.1


@pytest.mark.parametrize("kind", ["values", "whole"])
def test_promises_that_are_not_kept_end_a_search_without_margins(kind: str) -> None:
    """Items that jump say nothing of how far they are: a model of them promises gains for ever."""
    quiz = Quiz(1, values_only=True)
    share = quiz.items.weight

    def seen(observation: Observation) -> Observation:
        assert observation.evidence is not None
        if kind == "values":
            return observation
        loss = 3.0 - 2.0 * observation.evidence.values @ share  # one metric of all documents
        items = Items(np.zeros(1, int), -np.ones(1), np.zeros(1, bool), np.array([len(share)]))
        evidence = Evidence(items, np.array([loss]), np.array([loss]))
        return replace(observation, score=-loss, evidence=evidence)

    rng = np.random.default_rng(0)
    good = quiz.centre + 0.05
    points = [good, *(good + rng.normal(0, 0.2, (PATIENCE * STALE, SPACE.dimensions))).clip(0, 1)]
    history = [seen(quiz.observe(0, 0, (0.1,) * SPACE.dimensions, "uniform"))]
    for generation, point in enumerate(points, 1):
        assert Auto().propose(SPACE, tuple(history), None, 1, rng_factory(0))
        history.append(seen(quiz.observe(generation, 0, tuple(map(float, point)), "margins")))
    assert since_gain(history) == PATIENCE * STALE
    assert not Auto().propose(SPACE, tuple(history), None, 1, rng_factory(0))
    unasked = [replace(o, evidence=None) for o in history]
    assert Auto().propose(SPACE, tuple(unasked), None, 1, rng_factory(0)), "its owner ends it"


def test_small_rises_that_add_up_are_rises() -> None:
    climbing = [told(g, 0.1 * g) for g in range(10)]
    assert since_rise(climbing, by=0.25) == 0
    assert since_rise(climbing, by=0.35) == 1
    assert since_rise([told(0, 0.5), *(told(g, 0.5) for g in range(1, 6))]) == 5


def test_it_does_not_end_on_a_score_that_nobody_took_apart() -> None:
    history = [told(g, 0.5) for g in range(40)]
    assert Auto().propose(SPACE, history, None, 1, rng_factory(0))


def test_others_step_in_when_nothing_was_gained_for_long() -> None:
    history = [told(0, 0.5), *(told(g, 0.4) for g in range(1, STALE + 8))]
    seen = {operator_of(history, False, rng_factory(seed)).name for seed in range(60)}
    assert seen == {"margins", "one_plus_one"}


def test_what_gained_most_an_evaluation_gets_most() -> None:
    history = [told(0, 0.5)]
    for g in range(1, 9):
        history.append(told(g, 0.5 + 0.01 * g, ("one_plus_one", "margins")[g % 2]))
    assert gain_rate(history, "margins") > 0
    assert gain_rate(history, "cma_es") == 0
    leap = [*history, told(9, 0.9, "one_plus_one")]
    assert gain_rate(leap, "one_plus_one") > gain_rate(leap, "margins")
    faded = [*leap, *(told(g, 0.1, "one_plus_one") for g in range(10, 20))]
    assert gain_rate(faded, "one_plus_one") < gain_rate(leap, "one_plus_one")


def test_since_gain_counts_failures_as_nothing() -> None:
    assert since_gain([told(0, 0.5), told(1, None), told(2, 0.5), told(3, 0.4)]) == 3
    assert since_gain([told(0, 0.5), told(1, 0.6)]) == 0


def test_since_gain_counts_no_cheap_rival_and_nothing_from_before_a_branch() -> None:
    rivals = [told(0, 0.5), *(told(0, 0.4) for _ in range(STALE + 2))]
    assert since_gain(rivals) == 0
    assert since_gain([*rivals, told(1, 0.45)]) == 1
    before = [replace(told(g, None), prior=True) for g in range(STALE + 2)]
    again = [replace(o, generation=o.generation + 20) for o in rivals]
    assert since_gain([*before, *again, told(21, 0.3)]) == 1
    assert gain_rate([*before, *again, told(21, 0.7)], "margins") == pytest.approx(0.2)


def test_a_gradient_counts_with_the_score_that_comes_with_it() -> None:
    leap = told(1, 0.9, "gradient")
    priced = [told(0, 0.5), replace(leap, gradient=(0.0,) * SPACE.dimensions)]
    assert gain_rate(priced, "gradient") == pytest.approx(
        0.4 / Proposal((), "", want="gradient").cost
    )


def ends(scores: list[float]) -> bool:
    """Whether a search ends whose own candidates had these scores, far below a cheap rival, and
    whose model promises nothing."""
    quiz = Quiz(0)
    history = [quiz.observe(0, 0, told(0, 1.0).vector or (), "parent")]
    history += [
        replace(quiz.observe(g, 0, told(g, score).vector or (), "margins"), score=score)
        for g, score in enumerate(scores, start=1)
    ]
    history[0] = replace(history[0], score=1.0)
    prospect = prospect_for(SPACE, history)
    assert prospect is not None
    return nothing_to_gain(SPACE, history, replace(prospect, least_gain=1e9), rng_factory(0))


def test_it_does_not_end_while_its_own_candidates_climb() -> None:
    level = [0.1] * (2 * STALE + SPACE.dimensions)
    assert ends(level)
    assert not ends([*level, 0.2])
    assert not ends([*level, 0.2, *[0.15] * (STALE - 1)])
    assert ends([*level, 0.2, *[0.15] * STALE])


def test_a_models_points_are_extra_and_capped() -> None:
    history = [told(g, 0.5) for g in range(20)]
    points = tuple(tuple(np.full(SPACE.dimensions, x)) for x in (0.1, 0.2, 0.3, 0.4))
    words = Guidance(candidates=points, mean=points[0], source="model")
    found = advice(history, words, 4)
    assert 0 < len(found) <= 4
    later = [*history, *(replace(told(20 + i, 0.4), operator="agent") for i in range(7))]
    assert advice(later, words, 4) == []
    assert advice(history, replace(words, source="rules"), 4) == []
    assert advice(history, None, 4) == []
    asked = 0
    for generation in range(20, 60):
        count = len(advice(history, words, 4))
        asked += count
        history += [told(generation, 0.5, "agent")] * count
        history += [told(generation, 0.5)] * (4 - count)
    assert asked <= MOST_ADVICE * len(history) + 1


def test_nonsense_advice_costs_no_more_than_its_share() -> None:
    quiz = Quiz(5)
    words = Guidance(candidates=((0.0,) * SPACE.dimensions,), source="model")
    history = searched(Auto(), quiz, 12, 0)
    (asked,) = Auto().propose(SPACE, history, words, 1, rng_factory(0))
    assert asked.vector not in {o.vector for o in history}


def test_a_models_first_points_wait_until_the_items_say_they_are_worth_it() -> None:
    quiz = Quiz(3)
    history = searched(Auto(), quiz, 12, 0)
    hopeless = (0.01,) * SPACE.dimensions
    (own,) = Auto().propose(SPACE, history, None, 1, rng_factory(0))
    near = tuple(
        0.9 * x + 0.1 * float(c) for x, c in zip(own.vector or (), quiz.centre, strict=True)
    )

    def asked(history: list[Observation], point: tuple[float, ...]) -> str:
        words = Guidance(candidates=(point,), source="model")
        (found,) = Auto().propose(SPACE, history, words, 1, rng_factory(0))
        return found.operator

    assert asked(history, hopeless) == "margins"
    assert asked(history, near) == "agent"
    rivals = [o for o in history if o.generation == 0]
    centre = quiz.observe(1, 0, tuple(map(float, quiz.centre)), "agent")
    later = [quiz.observe(2 + i, 0, told(i, 0).vector or (), "margins") for i in range(7)]
    assert asked([*rivals, centre, *later], hopeless) == "agent"
    assert asked([*rivals, replace(centre, operator="margins"), *later], hopeless) == "margins"


def test_gradients_come_first_where_there_are_some_and_never_where_none_came() -> None:
    history = [told(0, 0.5)]
    for _ in range(GRADIENT_STEPS):
        (asked,) = Auto(gradients_from=1).propose(SPACE, history, None, 1, rng_factory(0))
        assert (asked.operator, asked.want) == ("gradient", "gradient")
        slope = tuple(2 * (x - 0.4) for x in asked.vector or ())
        history.append(
            Observation(
                history[-1].generation + 1,
                0,
                asked.vector,
                "gradient",
                0.5,
                gradient=slope,
                loss=1.0,
            )
        )
    (asked,) = Auto(gradients_from=1).propose(SPACE, history, None, 1, rng_factory(0))
    assert asked.want == "score"
    refused = [told(0, 0.5), replace(told(1, 0.5, "gradient"), vector=told(0, 0.5).vector)]
    assert next_step(refused) is None
    assert (
        Auto(gradients_from=1).propose(SPACE, refused, None, 1, rng_factory(0))[0].want == "score"
    )


def test_descent_reaches_the_bottom() -> None:
    history = [told(0, 0.5)]
    for generation in range(1, 60):
        (asked,) = GradientSteps().propose(SPACE, history, None, 1, rng_factory(0))
        point = np.array(asked.vector)
        slope = tuple(float(x) for x in 2 * (point - 0.4))
        history.append(
            Observation(generation, 0, asked.vector, "gradient", 0.5, gradient=slope, loss=1.0)
        )
    assert np.abs(point - 0.4).max() < 0.1
