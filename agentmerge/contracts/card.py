"""The closing card: what a search answers, beside its parents and the best cheap merge.

It is kept with the run as JSON; what a card of an older version lacks is empty here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def known(kind: type[T], body: Mapping[str, Any]) -> T:
    """A dataclass from those of its fields that an object has."""
    own = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: body[name] for name in own if name in body})


@dataclass(frozen=True)
class Compared:
    """A row of the card. sealed_failure: why it has no score on the sealed items. tokens,
    sealed_tokens: generated an item, where the search was told to look at that."""

    candidate: Sequence[int] = ()
    name: str = ""
    operator: str = ""
    recipe_hash: str = ""
    score: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    truncated: int = 0
    cut_off: int = 0
    sealed_score: float | None = None
    sealed_tasks: Mapping[str, float] | None = None
    sealed_failure: str | None = None
    tokens: float | None = None
    sealed_tokens: float | None = None

    def to_json(self) -> dict[str, Any]:
        keep = ("score", "interval", "" if self.sealed_failure is None else "sealed_score")
        return {k: v for k, v in asdict(self).items() if v is not None or k in keep}


@dataclass(frozen=True)
class Answered(Compared):
    """votes: of so many ``splits`` of the search items that it won. interval: of its score."""

    votes: int = 0
    splits: int = 0
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class DepthRow(Compared):
    """A stack of so many layers. ahead: of the merge that lies under it, [mean, low, high], on
    sealed items, or on search items where none are sealed; None of that merge itself."""

    layers: int = 0
    ahead: Sequence[float] | None = None


@dataclass(frozen=True)
class FrontRow(Compared):
    """A point of the front. interval, tokens_interval: 95 % over items, of score and length, on
    sealed items, or on search items where those were not asked; None of fewer than ten."""

    interval: Sequence[float] | None = None
    tokens_interval: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """How far the answer is ahead of another, paired by item, and the 95 % interval."""

    against: str = ""
    operator: str = ""
    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True, slots=True)
class Card:
    """sealed: whether sealed items were asked. fallen: recipe hash -> why its sealed items could
    not be scored; lost: why nobody could be asked. uplift: what the agents earned, where an arm
    without them says so. depths: what each layer of the best stack bought, from the merge under it
    on; none of an answer of the models' depth. front: where short answers are an objective too,
    what nothing dominates on search items, best score first."""

    answer: Answered = Answered()
    parents: Sequence[Compared] = ()
    best_rival: Compared | None = None
    sealed: bool = False
    differences: Sequence[Difference] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    constraints: Sequence[Mapping[str, Any]] = ()
    fallen: Mapping[str, str] = field(default_factory=dict)
    lost: str = ""
    verdict: str = ""
    uplift: Mapping[str, Any] | None = None
    depths: Sequence[DepthRow] = ()
    front: Sequence[FrontRow] = ()

    @property
    def rows(self) -> list[Compared]:
        return [self.answer, *self.parents, *([self.best_rival] if self.best_rival else [])]

    def to_json(self) -> dict[str, Any]:
        body = {f.name: getattr(self, f.name) for f in fields(self)} | {
            "answer": self.answer.to_json(),
            "parents": [row.to_json() for row in self.parents],
            "best_rival": self.best_rival and self.best_rival.to_json(),
            "differences": [asdict(difference) for difference in self.differences],
            "depths": [row.to_json() for row in self.depths],
            "front": [row.to_json() for row in self.front],
        }
        return {k: v for k, v in body.items() if v or k not in ("uplift", "depths", "front")}

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Card:
        rival = body.get("best_rival")
        return known(
            cls,
            dict(body)
            | {
                "answer": known(Answered, body.get("answer", {})),
                "parents": [known(Compared, row) for row in body.get("parents", ())],
                "best_rival": known(Compared, rival) if rival else None,
                "differences": [known(Difference, d) for d in body.get("differences", ())],
                "depths": [known(DepthRow, row) for row in body.get("depths", ())],
                "front": [known(FrontRow, row) for row in body.get("front", ())],
            },
        )
