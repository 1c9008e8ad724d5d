"""What a recipe is made of: settings, sources, slices. Knows no file, method or whole recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from agentmerge.errors import RecipeError, RecipeRejected

#: No model has as many, and lists are made of them.
MOST_LAYERS = 10_000


def round12(value: float) -> float:
    """``value`` at 12 significant digits; minus zero becomes zero."""
    return float(f"{value:.12g}") + 0.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One parameter: ``entries`` of (filter or None, values); the first that matches a name wins.

    More than one value is a gradient over the slice's layers.
    """

    entries: tuple[tuple[str | None, tuple[float, ...]], ...]

    @classmethod
    def scalar(cls, value: float) -> Setting:
        return cls(((None, (float(value),)),))

    @classmethod
    def parse(cls, raw: Any, where: str) -> Setting:
        """From YAML: a number, a list of numbers, or a list of {filter, value}.

        Raises:
            RecipeError: anything else, or a number that is not finite.
        """
        if isinstance(raw, dict):
            raw = [raw]
        if isinstance(raw, list) and raw and all(isinstance(item, dict) for item in raw):
            entries: list[tuple[str | None, tuple[float, ...]]] = []
            for item in raw:
                if "value" not in item:
                    raise RecipeError(f"{where}: {item!r} has no 'value'; write {{filter, value}}")
                name = item.get("filter")
                name = None if name in (None, "*") else str(name)
                if name not in dict(entries):  # the first that matches wins
                    entries.append((name, _numbers(item["value"], where)))
                if name is None:
                    break  # nothing after an entry without a filter can match
            return cls(tuple(entries))
        return cls(((None, _numbers(raw, where)),))

    def to_yaml(self) -> Any:
        if len(self.entries) == 1 and self.entries[0][0] is None:
            return _plain(self.entries[0][1])
        return [
            {"value": _plain(values)} if name is None else {"filter": name, "value": _plain(values)}
            for name, values in self.entries
        ]

    def at(self, tensor: str, t: float) -> float | None:
        """The value for a tensor at depth ``t`` in [0, 1] of its slice, or None if none matches."""
        for name, values in self.entries:
            if name is None or name in tensor:
                if len(values) == 1:
                    return values[0]
                scaled = t * (len(values) - 1)
                low = int(scaled)
                high = min(len(values) - 1, low + 1)
                share = scaled - low
                return (1 - share) * values[low] + share * values[high]
        return None

    def then(self, fallback: Setting | None) -> Setting:
        """This setting, with ``fallback`` for the tensors that no entry matches."""
        if fallback is None or any(name is None for name, _ in self.entries):
            return self
        mine = set(self.filters)  # a later entry with the same filter never matches
        return Setting(self.entries + tuple(e for e in fallback.entries if e[0] not in mine))

    def map(self, function: Any) -> Setting:
        return Setting(tuple((n, tuple(function(v) for v in values)) for n, values in self.entries))

    @property
    def filters(self) -> tuple[str | None, ...]:
        return tuple(name for name, _ in self.entries)

    @property
    def is_scalar(self) -> bool:
        """The same value for every tensor."""
        return self.filters == (None,) and len(self.entries[0][1]) == 1


Parameters = tuple[tuple[str, Setting], ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A model's share of a slice; ``layer_range`` None means the whole model."""

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = ()


@dataclass(frozen=True, slots=True)
class Slice:
    sources: tuple[Source, ...]
    base_model: str | None = None
    parameters: Parameters = ()


@dataclass(frozen=True, slots=True)
class Effective:
    """What one tensor of the merge is made from: each source's own values, and the shared ones."""

    method: str
    base_model: str | None
    sources: tuple[tuple[str, int | None, tuple[tuple[str, float], ...]], ...]
    shared: tuple[tuple[str, float], ...]


def length(piece: Slice) -> int:
    """How many layers a slice makes; 0 where its sources are whole models of unknown depth."""
    spans = {
        source.layer_range[1] - source.layer_range[0] if source.layer_range else 0
        for source in piece.sources
    }
    if len(spans) != 1:
        raise RecipeRejected("the sources of a slice must all have the same number of layers")
    return spans.pop()


def _numbers(raw: Any, where: str) -> tuple[float, ...]:
    values = raw if isinstance(raw, list) else [raw]
    numbers = []
    for value in values:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RecipeError(f"{where}: {value!r} is not a number") from None
        except OverflowError:
            raise RecipeError(f"{where}: {value!r} is too large") from None
        if not math.isfinite(number):
            raise RecipeError(f"{where}: {value!r} is not finite")
        numbers.append(number)
    if not numbers:
        raise RecipeError(f"{where} is an empty list")
    return tuple(numbers)


def _plain(values: tuple[float, ...]) -> Any:
    return values[0] if len(values) == 1 else list(values)


@dataclass(frozen=True, slots=True)
class Body:
    """What a recipe says; ``Recipe`` knows what follows from it.

    merges: recipes that are merged first, by the names under which slices have them (``stages``).
    """

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None = None
    parameters: Parameters = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    merge_seed: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    merges: tuple[tuple[str, Any], ...] = ()
