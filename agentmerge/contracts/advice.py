"""What agents tell a strategy: the advice of one generation, and structural moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: No merge has such a score: a forecast beyond it is none.
MOST_SCORE = 1e9

Change = Literal[
    "method", "granularity", "filters", "drop_model", "layers", "models", "add_model", "swap_model"
]


@dataclass(frozen=True, slots=True)
class StructuralMove:
    """Another search space. value: the merge method, the layers a group, filters separated by
    commas ("" for none), the short name of the model to leave out, or the candidate (as 3.0) whose
    layers are kept; of a pool the short names of the models that are merged, separated by commas,
    that of the model that joins them, or "one -> another"."""

    change: Change
    value: str
    why: str = ""

    @property
    def sentence(self) -> str:
        what = {
            "method": f"merge method {self.value}",
            "granularity": f"layer_granularity {self.value}",
            "filters": f"filters {self.value or 'none'}",
            "drop_model": f"without {self.value}",
            "models": f"merges of {self.value}",
            "add_model": f"with {self.value}",
            "swap_model": f"another expert, {self.value}",
            "layers": f"layers beside those of {self.value or 'the best'}",
        }[self.change]
        return f"{what} ({self.why})" if self.why else what


@dataclass(frozen=True, slots=True)
class Subset:
    """Experts of a pool, by short name, that a curator would merge. expected_score: of the best
    merge of them, None where none was given."""

    models: tuple[str, ...]
    why: str = ""
    expected_score: float | None = None


@dataclass(frozen=True, slots=True)
class Guidance:
    """Advice of one generation; a strategy may use it as extra points. Vectors are unit-box.

    operator_weights: (operator, weight), how much of the next generation each should get.
    forecasts: the score expected of each candidate, None where none was given.
    structural_move: a change that no value of an axis can make. It is recorded; who carries it out
        is the strategy.
    source: "model" as soon as a chat model wrote any part of it.
    """

    mean: tuple[float, ...] | None = None
    candidates: tuple[tuple[float, ...], ...] = ()
    sigma: float | None = None
    operator_weights: tuple[tuple[str, float], ...] = ()
    structural_move: StructuralMove | None = None
    critique: str = ""
    thought: str = ""
    source: Literal["rules", "model"] = "rules"
    expected_score: float | None = None
    forecasts: tuple[float | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-plain; `from_json` gives back an equal Guidance."""
        plain = asdict(self)
        plain["mean"] = None if self.mean is None else list(self.mean)
        plain["candidates"] = [list(vector) for vector in self.candidates]
        plain["forecasts"] = list(self.forecasts)
        plain["operator_weights"] = [list(pair) for pair in self.operator_weights]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Guidance:
        mean, move = plain.get("mean"), plain.get("structural_move")
        return cls(
            **{
                **plain,
                "mean": None if mean is None else tuple(mean),
                "structural_move": StructuralMove(**move) if isinstance(move, dict) else None,
                # Ledgers of before scores were bounded may hold any number.
                "expected_score": bounded_score(plain.get("expected_score")),
                "forecasts": tuple(map(bounded_score, plain.get("forecasts", ()))),
                "candidates": tuple(tuple(v) for v in plain.get("candidates", ())),
                "operator_weights": tuple(
                    (name, weight) for name, weight in plain.get("operator_weights", ())
                ),
            }
        )


def subsets_of(words: Iterable[Mapping[str, Any]]) -> list[Subset]:
    """The subsets of a pool that a curator named, best first. words: its rows of advice."""
    return [
        Subset(tuple(s["models"]), s["why"], bounded_score(s["expected_score"]))
        for word in words
        for s in word.get("subsets", ())
    ]


def bounded_score(value: Any) -> float | None:
    said = isinstance(value, (int, float)) and abs(value) <= MOST_SCORE
    return value if said else None
