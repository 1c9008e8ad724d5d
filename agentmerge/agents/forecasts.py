"""What proposer and curator expected, against what came: whether forecasts are worth anything.

A forecast is of a candidate that was tried as it was proposed, or of a mean, which is held against
its own score where it was tried, else against the median of what ``llm_evo`` drew around it. Where
neither came, nothing is held against it. Of a subset it is the best that came in its space. Pure
functions of advice and history.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmerge.contracts.advice import Guidance, subsets_of
from agentmerge.contracts.operators import LLM_EVO
from agentmerge.contracts.strategy import History, Observation

_SAME = 1e-9


@dataclass(frozen=True, slots=True)
class Forecast:
    """generation: in which it was tried first. of: "candidate", "mean" or "subset"."""

    generation: int
    of: str
    expected: float
    actual: float


@dataclass(frozen=True, slots=True)
class Track:
    """How good forecasts were. rank_correlation: Spearman's, None below three forecasts or where
    one side never varied. bias: mean of expected minus actual."""

    count: int
    rank_correlation: float | None
    bias: float | None

    def sentence(self) -> str:
        if not self.count or self.bias is None:
            return "no forecast has been tried yet"
        side = "too high" if self.bias > 0 else "too low"
        text = f"{self.count} tried, on average {abs(self.bias):.3f} {side}"
        if self.rank_correlation is None:
            return text
        return f"{text}; rank correlation with what came {self.rank_correlation:+.2f}"


def forecasts(advice: Iterable[Mapping[str, Any]], history: History) -> list[Forecast]:
    """Every forecast that can be held against a score, in order.

    advice: rows of the ledger. Only words of a model count: rules forecast nothing.
    """
    by_generation: dict[int, list[Observation]] = {}
    for entry in history:
        if entry.score is not None and entry.vector is not None:
            by_generation.setdefault(entry.generation, []).append(entry)
    found = []
    for word in advice:
        if not foretells(word):
            continue
        guidance = Guidance.from_json(word["guidance"])
        space = word.get("of_space")
        tried = [
            e for e in by_generation.get(word["generation"] + 1, []) if space in (None, e.space)
        ]
        itself = [e.score for e in tried if _same(e.vector, guidance.mean or ())]
        around = [e.score for e in tried if e.operator == LLM_EVO]
        drawn = [score for score in itself or around if score is not None]
        where = word["generation"] + 1
        if guidance.expected_score is not None and drawn:
            actual = statistics.median(drawn)
            found.append(Forecast(where, "mean", guidance.expected_score, actual))
        for vector, expected in zip(guidance.candidates, guidance.forecasts, strict=False):
            score = next((e.score for e in tried if _same(e.vector, vector)), None)
            if expected is not None and score is not None:
                found.append(Forecast(where, "candidate", expected, score))
    return found


def subset_forecasts(advice: Sequence[Mapping[str, Any]], history: History) -> list[Forecast]:
    """What a curator expected of subsets of a pool that were tried, in the order of its word."""
    spaces = {
        frozenset(word["guidance"]["structural_move"]["value"].split(", ")): word["space"]
        for word in advice
        if word.get("space")
    }
    found = []
    for subset in subsets_of(advice):
        space = spaces.get(frozenset(subset.models))
        came = [o for o in history if o.space == space and o.score is not None and not o.prior]
        if space is not None and came and subset.expected_score is not None:
            best = max(o.score or 0.0 for o in came)
            found.append(Forecast(came[0].generation, "subset", subset.expected_score, best))
    return found


def foretells(word: Mapping[str, Any]) -> bool:
    """Whether a row of advice holds a forecast; most do not, and to read them takes time."""
    said = word["guidance"]
    foretold = said.get("expected_score") is not None or bool(said.get("forecasts"))
    return word["role"] == "proposer" and foretold


def track(found: Sequence[Forecast]) -> Track:
    """The record of some forecasts."""
    if not found:
        return Track(0, None, None)
    bias = statistics.fmean(f.expected - f.actual for f in found)
    correlation = None
    if len(found) >= 3:
        expected, actual = [f.expected for f in found], [f.actual for f in found]
        if len(set(expected)) > 1 and len(set(actual)) > 1:
            correlation = statistics.correlation(_ranks(expected), _ranks(actual))
    return Track(len(found), correlation, bias)


def _same(a: Sequence[float] | None, b: Sequence[float]) -> bool:
    return (
        a is not None
        and len(a) == len(b)
        and all(abs(x - y) < _SAME for x, y in zip(a, b, strict=True))
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]
