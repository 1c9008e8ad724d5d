"""What the models are told of scores, and how their own forecasts are held against them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from agentmerge.agents.forecasts import Forecast, Track, forecasts, track
from agentmerge.agents.ladder import Ladder, release
from agentmerge.agents.schemas import Bounds, ProposerReply, json_schema, parse_reply
from agentmerge.agents.standings import Standings
from agentmerge.agents.view import variables
from agentmerge.contracts.advice import Guidance, StructuralMove
from agentmerge.contracts.operators import CHEAP
from agentmerge.contracts.strategy import Observation, fittest, improved
from agentmerge.errors import ModelReplyError


def test_an_improvement_within_the_noise_is_not_reported(observe) -> None:
    history = [observe(0, slot, (0.1 * slot,), score) for slot, score in
               enumerate([0.50, 0.52, 0.49, 0.56, 0.58, 0.61])]  # fmt: skip
    history = [replace(o, recipe_hash=str(o.slot)) for o in history]
    found = release(history, lambda a, b: 0.03)
    assert [e.score for e in found.entries] == [0.50, 0.50, 0.49, 0.56, 0.56, 0.61]
    assert found.tied == {(0, 1), (0, 4)}
    assert found.entries[1].tasks == found.entries[0].tasks, "tasks would tell what the score hides"


def test_what_was_walked_is_told_as_if_it_were_walked_anew(observe) -> None:
    """Whether a history goes on, or what was pending in it comes in between."""
    scores = [0.5, 0.52, None, 0.49, 0.56, 0.58, 0.61, 0.3, 0.7]
    every = [
        replace(observe(g, 0, (0.1 * g,), score), recipe_hash=str(g))
        for g, score in enumerate(scores)
    ]
    ladder = Ladder(lambda a, b: 0.03)
    for history in [every[:3], every[:5], [*every[:4], *every[5:7]], every[:7], every[1:], every]:
        assert ladder.release(history) == release(history, lambda a, b: 0.03)


@pytest.mark.parametrize("seed", range(6))
def test_where_a_history_stands_is_as_defined_however_it_grew(seed: int) -> None:
    rng = np.random.default_rng(seed)
    every = [
        Observation(
            int(g), slot, (0.5,) if rng.random() < 0.8 else None,
            str(rng.choice(["random", "parent", "depth"])), score,
        )
        for slot, g in enumerate(sorted(rng.integers(0, 8, size=30)))
        for score in [None if rng.random() < 0.2 else float(rng.integers(-3, 3))]
    ]  # fmt: skip
    standings = Standings()
    for end in [0, 1, 2, 7, 12, 11, 30, 30, 25]:
        told = every[:end]
        found = standings.of(told)
        scores = [o.score for o in told if o.score is not None]
        placed = [o for o in told if o.score is not None and o.vector is not None]
        top = max(scores, default=math.inf)
        assert found.best is next((o for o in told if o.score == top), None)
        assert list(found.elites) == fittest(told, 4)
        assert list(found.recent) == placed
        assert [o.operator for o in found.rivals] == [
            o.operator for o in told if o.operator in CHEAP
        ]
        assert found.floor == min(scores, default=math.inf)
        assert found.improved == bool(told and improved(told))
    assert standings.of(tuple(every[5:])) == Standings().of(every[5:])


def test_many_lucky_candidates_climb_nothing(observe) -> None:
    """A hundred candidates of one true score: what is told does not creep up with their luck."""
    rng = np.random.default_rng(3)
    items = rng.random((100, 400)) < 0.6
    history = [
        replace(observe(g, 0, (0.5,), float(row.mean())), recipe_hash=str(g))
        for g, row in enumerate(items)
    ]

    def noise(a, b):
        gaps = items[a.generation].astype(float) - items[b.generation]
        return float(gaps.std(ddof=1) / np.sqrt(gaps.size))

    told = release(history, noise).entries
    distinct = {max(e.score for e in told[: n + 1]) for n in range(100)}
    seen = {max(e.score for e in history[: n + 1]) for n in range(100)}
    assert len(distinct) <= 3
    assert len(seen) >= len(distinct)
    assert max(e.score for e in told) <= max(e.score for e in history)


def test_prompts_are_made_of_what_was_released(make_view, observe) -> None:
    history = [
        replace(observe(0, 0, (0.1, 0.1, 0.1, 0.1), 0.5), recipe_hash="a"),
        replace(observe(1, 0, (0.9, 0.9, 0.9, 0.9), 0.5123), recipe_hash="b"),
    ]
    told = variables(make_view(history, noise=lambda a, b: 0.05))
    assert "0.5123" not in json.dumps(told)
    assert "score 0.5000 (as the best)" in told["history"]
    assert told["improved_last"] == "no"
    assert told["noise"] == "about 0.050"
    assert "0.5123" in json.dumps(variables(make_view(history)))


def proposed(generation: int, **words) -> dict:
    guidance = Guidance(source="model", **words)
    return {"role": "proposer", "generation": generation, "guidance": guidance.to_json()}


def test_forecasts_are_held_against_what_was_tried(observe) -> None:
    advice = [
        proposed(0, mean=(0.5,), expected_score=0.7, candidates=((0.1,), (0.2,)),
                 forecasts=(0.9, None)),
        proposed(1, mean=(0.5,), expected_score=0.6, candidates=((0.3,),), forecasts=(0.4,)),
        {"role": "critic", "generation": 0, "guidance": Guidance().to_json()},
    ]  # fmt: skip
    history = [
        observe(0, 0, (0.5,), 0.5, "parent"),
        observe(1, 0, (0.1,), 0.8, "agent"),
        observe(1, 1, (0.2,), 0.1, "agent"),
        observe(1, 2, (0.45,), 0.5),
        observe(1, 3, (0.55,), 0.6),
        observe(1, 4, (0.6,), 0.9, "probe"),
        observe(2, 0, (0.3,), None, "agent", failure="no"),
    ]
    found = forecasts(advice, history)
    assert found == [Forecast(1, "mean", 0.7, 0.55), Forecast(1, "candidate", 0.9, 0.8)]
    assert track(found).bias == pytest.approx(0.125)
    assert track(found).rank_correlation is None


@pytest.mark.parametrize(
    "operator",
    ["margins", "one_plus_one", "cma_es", "gradient", "structure", "shadow", "depth", "elite_mean"],
)
def test_what_is_not_drawn_around_the_mean_says_nothing_of_it(observe, operator: str) -> None:
    advice = [proposed(0, mean=(0.5,), expected_score=0.7)]
    others = [observe(1, 0, (0.45,), 0.2, operator), observe(1, 1, (0.55,), 0.3, operator)]
    assert forecasts(advice, others) == []
    # with ``auto`` the mean is a candidate, beside the strategy's own
    tried = [*others, observe(1, 2, (0.5,), 0.6, "agent")]
    assert forecasts(advice, tried) == [Forecast(1, "mean", 0.7, 0.6)]


def test_models_are_told_of_every_cheap_rival(observe, make_view) -> None:
    history = [
        observe(0, slot, (slot / 10,) * 4, slot / 10, operator)
        for slot, operator in enumerate(("parent", "uniform", "scale", "depth", "margins"))
    ]
    told = [entry.operator for entry in make_view(history).standing.rivals]
    assert told == ["parent", "uniform", "scale", "depth"]


@pytest.mark.parametrize(
    ("actual", "correlation"), [([1, 2, 3], 1.0), ([3, 2, 1], -1.0), ([2, 2, 2], None)]
)
def test_the_rank_correlation_is_spearmans(actual, correlation) -> None:
    found = [Forecast(1, "mean", e, a) for e, a in zip([1.0, 5.0, 9.0], actual, strict=True)]
    assert track(found).rank_correlation == correlation
    assert track([]) == Track(0, None, None)
    assert "too high" in track(found).sentence()


BOUNDS = Bounds(2, 0.05, 0.2, layers=12, methods=("linear", "ties"), models=("north", "south"))


def reply(change: str, value: str) -> str:
    move = {"change": change, "value": value, "why": "bounds"}
    return json.dumps({"thought": "t", "mean_genome": [1, 2], "structural_move": move})


@pytest.mark.parametrize(
    ("change", "value"),
    [("none", "anything"), ("method", "ties"), ("granularity", "4"), ("granularity", "0"),
     ("filters", "self_attn, mlp"), ("filters", ""), ("drop_model", "south")],
)  # fmt: skip
def test_a_possible_move_is_read(change: str, value: str) -> None:
    found = parse_reply(reply(change, value), ProposerReply, BOUNDS).structural_move
    assert (found.change, found.value) == (change, value)


@pytest.mark.parametrize(
    ("change", "value", "says"),
    [
        ("method", "/etc/passwd", "no merge method; use linear, ties"),
        ("granularity", "5", "does not divide the 12 layers"),
        ("granularity", "-3", "does not divide"),
        ("granularity", "9" * 5000, "does not divide"),
        ("granularity", "²", "does not divide"),
        ("filters", "../../x; rm", "no list of parts"),
        ("drop_model", "east", "no model here; use north, south"),
        ("rewrite_the_program", "", "structural_move.change"),
    ],
)
def test_an_impossible_move_is_refused_with_the_reason(change, value, says) -> None:
    with pytest.raises(ModelReplyError, match=says):
        parse_reply(reply(change, value), ProposerReply, BOUNDS)


def test_the_schema_offers_the_moves_that_are_possible() -> None:
    moves = json_schema(ProposerReply, BOUNDS)["properties"]["structural_move"]["anyOf"]
    offered = {
        move["properties"]["change"]["enum"][0]: move["properties"]["value"].get("enum")
        for move in moves
    }
    assert offered == {
        "none": [""],
        "method": ["linear", "ties"],
        "granularity": ["0", "1", "2", "3", "4", "6", "12"],
        "filters": None,
        "drop_model": ["north", "south"],
    }
    for change, values in offered.items():
        for value in values or ["mlp"]:
            assert parse_reply(reply(change, value), ProposerReply, BOUNDS).structural_move


def test_experts_of_a_pool_may_join_where_there_is_room() -> None:
    full = replace(BOUNDS, absent=("east",))
    room = replace(full, room=True)
    swap = ("swap_model", "south -> east")
    for change, value, bounds in ((*swap, full), (*swap, room), ("add_model", "east", room)):
        found = parse_reply(reply(change, value), ProposerReply, bounds).structural_move
        assert (found.change, found.value) == (change, value)
    for change, value, bounds, says in (
        ("add_model", "east", full, "cannot join"),
        ("add_model", "west", room, "of these one may: east"),
        ("swap_model", "east -> south", full, "write one as north -> east"),
        ("swap_model", "north -> south", BOUNDS, "there is none"),
    ):
        with pytest.raises(ModelReplyError, match=says):
            parse_reply(reply(change, value), ProposerReply, bounds)
    moves = json_schema(ProposerReply, full)["properties"]["structural_move"]["anyOf"]
    offered = {move["properties"]["change"]["enum"][0] for move in moves}
    assert "swap_model" in offered
    assert "add_model" not in offered


def test_moves_and_forecasts_reach_the_guidance() -> None:
    from agentmerge.agents import proposer

    text = json.dumps(
        {"thought": "t", "mean_genome": [1, 2], "expected_score": 0.5,
         "candidates": [{"genome": [3, 4], "expected_score": 0.6}, [5, 6]],
         "structural_move": {"change": "drop_model", "value": "north", "why": "idle"}}
    )  # fmt: skip
    found = proposer.by_model(parse_reply(text, ProposerReply, BOUNDS), Guidance())
    assert found.structural_move == StructuralMove("drop_model", "north", "idle")
    assert found.candidates == ((0.03, 0.04), (0.05, 0.06))
    assert found.forecasts == (0.6, None)
    assert Guidance.from_json(json.loads(json.dumps(found.to_json()))) == found
