"""A pool of experts as their weights and cards show them: how long each task vector is, how alike
two are, what is damaged, which tokenizer, template and licence each has. No forward pass.

Weights are read once, one tensor of each model at a time; adapters are applied a layer at a time
and written nowhere. Of big models evenly spread blocks are read, and the share is said. Knows no
recipe and no score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from agentmerge.errors import ParentError, UserError
from agentmerge.parents.applying import Adapted
from agentmerge.parents.cards import cards_of
from agentmerge.parents.checkpoint import Checkpoint
from agentmerge.parents.headers import chat_template
from agentmerge.parents.layout import layout_faults
from agentmerge.parents.plain import survey
from agentmerge.parents.sources import Parent, find_parent
from agentmerge.parents.vocabulary import read_tokens
from agentmerge.parents.writing import stored_tensor
from agentmerge.system.waits import waiting_for

#: Task vectors with a larger cosine are one expert twice, for a merge.
DUPLICATE = 0.98
#: Numbers of a model that are read where no share is given: all of one of 0.1 billion.
MOST_NUMBERS = 1 << 27
#: Tensors of fewer are read whole, and others in blocks of so many.
SMALL, BLOCK = 1 << 16, 1 << 12
#: So many times the norm of the base's tensor, or the median's length, is no training's doing.
HUGE, FAR = 10.0, 5.0
_CONSTANT = "hold one number throughout"
#: Columns that are summed at a time.
_COLUMNS = 1 << 18


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """What is known of one expert without asking it anything.

    misfit: why it is no family with the first, "" where it is. length: of its task vector, as a
    share of the origin's; None where it is not compared. damage: a sentence a kind. tokenizer,
    template: "same" as the first's, "other" or "none".
    """

    model: str
    misfit: str
    length: float | None
    damage: tuple[str, ...]
    tokenizer: str
    template: str
    licence: str
    languages: tuple[str, ...]
    base_models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExpertSurvey:
    """A pool of experts. base: the origin of task vectors; None: the mean of the experts.

    share: of the numbers, how many were read. cosines, agreement: a row and a column an expert, in
    order; None where one is not compared or its task vector is zero. agreement: the share of the
    numbers that both change, which both move to the same side. duplicates: (one, another, cosine).
    """

    base: str | None
    share: float
    experts: tuple[ExpertFacts, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    agreement: tuple[tuple[float | None, ...], ...]
    duplicates: tuple[tuple[str, str, float], ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def survey_experts(
    models: Sequence[str], base: str | None = None, share: float | None = None
) -> ExpertSurvey:
    """The facts of these models, adapters among them (``model+adapter``).

    base: what they were trained from; where all are adapters of one model, that one by default.
    share: of each model's numbers to read, by default as many as ``MOST_NUMBERS``.

    Raises:
        ParentError: a model is not there.
        UserError: there is nothing to compare.
    """
    if share is not None and not 0 < share <= 1:
        raise UserError(f"a share of {share:g} cannot be read; it is above 0 and at most 1")
    models = list(dict.fromkeys(models))
    under = {name.partition("+")[0] for name in models}
    adapted = all(find_parent(name).adapter is not None for name in models)
    if base is None and len(under) == 1 and adapted:
        base = under.pop()
    models = [name for name in models if name != base]
    if len(models) + (base is not None) < 2:
        alone = next(iter(models), base)
        raise UserError(f"{alone} alone has nothing to be compared with; name another, or --base")
    names = [*([base] if base else []), *models]
    parents = {name: find_parent(name) for name in names}
    with waiting_for("a survey of the models"):
        return _surveyed(parents, base, models, share)


def _surveyed(
    parents: Mapping[str, Parent], base: str | None, models: Sequence[str], share: float | None
) -> ExpertSurvey:
    found, misfits = _members(parents)
    if base in misfits:
        raise ParentError(f"{base}: {misfits[base]}")
    compared = [name for name in parents if name in found]
    if not compared:
        raise ParentError("; ".join(f"{name}: {why}" for name, why in misfits.items()))
    reader = _Reader(parents, found, compared, share)
    sums = _Sums([name for name in compared if name != base])
    damage = _Damage(base)
    for name, values in reader.tensors():
        damage.look(name, values)
        sums.add(values, base)
    lengths = sums.lengths()
    first = next(iter(parents))
    experts = tuple(
        _facts(parents[name], parents[first], misfits.get(name, ""), damage, lengths)
        for name in models
    )
    cosines = sums.matrix(models, sums.cosine)
    pairs = [
        (one, other, value)
        for i, one in enumerate(models)
        for j, other in enumerate(models[:i])
        if (value := cosines[i][j]) is not None and value > DUPLICATE
    ]
    notes = [f"{base}, the base: {said}" for said in damage.sentences(base or "")]
    return ExpertSurvey(
        base,
        reader.share,
        experts,
        cosines,
        sums.matrix(models, sums.agree),
        tuple((other, one, value) for one, other, value in pairs),
        tuple(notes),
    )


def _members(parents: Mapping[str, Parent]) -> tuple[dict[str, Checkpoint], dict[str, str]]:
    """The models that are one family with the first of them, and why others are not."""
    found: dict[str, Checkpoint] = {}
    misfits: dict[str, str] = {}
    for name, parent in parents.items():
        seen = survey([parent])
        own, faults = seen.checkpoints, list(seen.faults)
        if not faults:
            first = next(iter(found), name)
            faults = layout_faults({first: found.get(first) or own[first], **own}, first)
        if faults:
            misfits[name] = faults[0].removeprefix(f"{name}: ")
        else:
            found[name] = own[name]
    return found, misfits


class _Reader:
    """Reads the tensors of a family one by one. share: what it will have read of them."""

    def __init__(
        self,
        parents: Mapping[str, Parent],
        found: Mapping[str, Checkpoint],
        compared: Sequence[str],
        share: float | None,
    ) -> None:
        self._found, self._compared = found, compared
        self._adapted: dict[str, Adapted] = {}
        for name in compared:
            parent = parents[name]
            if parent.adapter is not None:
                headers = found[name].tensors
                self._adapted[name] = Adapted(parent.model, parent.adapter, headers, False)
        first, *others = [found[name] for name in compared]
        self._names = [inner for inner in first.text if all(inner in one.text for one in others)]
        sizes = [math.prod(first.tensors[first.text[inner]].shape) for inner in self._names]
        total = sum(sizes)
        wanted = share or min(1.0, MOST_NUMBERS / max(total, 1))
        self._step = max(1, round(1 / wanted))
        read = sum(size if size <= SMALL else _read(size, self._step) for size in sizes)
        self.share = read / total if total else 1.0

    def tensors(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Name -> what is read of it in each model, as a vector in float32."""
        for inner in self._names:
            values = {}
            for model in self._compared:
                name = self._found[model].text[inner]
                if model in self._adapted:
                    tensor = self._adapted[model].value(name)
                else:
                    tensor = stored_tensor(self._found[model].tensors[name], name)
                values[model] = _sample(tensor, self._step).float()
            yield inner, values


def _read(size: int, step: int) -> int:
    return len(range(0, size // BLOCK, step)) * BLOCK


def _sample(tensor: torch.Tensor, step: int) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if step == 1 or flat.numel() <= SMALL:
        return flat
    return flat[: flat.numel() // BLOCK * BLOCK].view(-1, BLOCK)[::step].reshape(-1)


class _Sums:
    """Products of task vectors, and where they move to the same side."""

    def __init__(self, models: Sequence[str]) -> None:
        self._models = list(models)
        count = len(models)
        self._dots, self._same, self._both = (
            torch.zeros(count, count, dtype=torch.float64) for _ in range(3)
        )
        self._origin = 0.0

    def add(self, values: Mapping[str, torch.Tensor], base: str | None) -> None:
        if not self._models:
            return
        numel = len(values[self._models[0]])
        for start in range(0, numel, _COLUMNS):
            part = {n: v[start : start + _COLUMNS].double() for n, v in values.items()}
            part = {n: torch.nan_to_num(v, 0.0, 0.0, 0.0) for n, v in part.items()}
            stack = torch.stack([part[name] for name in self._models])
            origin = part[base] if base in part else stack.mean(0)
            self._origin += float(origin @ origin)
            stack -= origin
            self._dots += stack @ stack.T
            signs = stack.sign().float()
            self._same += (signs @ signs.T).double()
            self._both += (signs.abs() @ signs.abs().T).double()

    def lengths(self) -> dict[str, float]:
        own = math.sqrt(self._origin) or 1.0
        norms = self._dots.diagonal().sqrt() / own
        return dict(zip(self._models, map(float, norms), strict=True))

    def cosine(self, i: int, j: int) -> float | None:
        size = math.sqrt(float(self._dots[i, i])) * math.sqrt(float(self._dots[j, j]))
        return float(self._dots[i, j]) / size if size else None

    def agree(self, i: int, j: int) -> float | None:
        both = float(self._both[i, j])
        return (1 + float(self._same[i, j]) / both) / 2 if both else None

    def matrix(
        self, models: Sequence[str], of: Callable[[int, int], float | None]
    ) -> tuple[tuple[float | None, ...], ...]:
        place = {name: index for index, name in enumerate(self._models)}
        return tuple(
            tuple(
                of(place[one], place[other]) if one in place and other in place else None
                for other in models
            )
            for one in models
        )


class _Damage:
    """What no training does to a tensor, by model and kind."""

    def __init__(self, base: str | None) -> None:
        self._base = base
        self._found: dict[str, dict[str, list[str]]] = {}

    def look(self, tensor: str, values: Mapping[str, torch.Tensor]) -> None:
        norms, flat = {}, set[str]()
        kinds: dict[str, str] = {}
        for model, value in values.items():
            finite = torch.isfinite(value)
            if not finite.all():
                kinds[model] = "hold numbers that are not finite"
            norms[model] = float(torch.where(finite, value, 0.0).double().norm())
            if value.numel() > 1 and bool((value == value[0]).all()):
                kinds.setdefault(model, _CONSTANT if norms[model] else "are zero")
                flat.add(model)
        usual = norms.get(self._base or "", median(norms.values()))
        usually_flat = self._base in flat if self._base in values else 2 * len(flat) > len(values)
        for model in values:
            kind = kinds.get(model, "")
            if (kind == _CONSTANT and usually_flat) or not (norms[model] or usual):
                kind = ""  # as a fresh norm's
            if usual and norms[model] > HUGE * usual and not kind:
                kind = f"are more than {HUGE:g} times as large as the others'"
            if kind:
                self._found.setdefault(model, {}).setdefault(kind, []).append(tensor)

    def sentences(self, model: str) -> list[str]:
        return [
            f"{len(names)} tensors {kind}, the first is {names[0]}"
            for kind, names in self._found.get(model, {}).items()
        ]


def _facts(
    parent: Parent,
    first: Parent,
    misfit: str,
    damage: _Damage,
    lengths: Mapping[str, float],
) -> ExpertFacts:
    length = lengths.get(parent.name)
    said = damage.sentences(parent.name)
    others = [value for name, value in lengths.items() if name != parent.name]
    usual = median(others) if len(others) > 1 else 0.0
    if length is not None and usual and length > FAR * usual and not said:
        said.append(f"its task vector is {length / usual:.0f} times as long as the others'")
    card = cards_of(parent)
    template, asked = _template(parent), _template(first)
    return ExpertFacts(
        parent.name,
        misfit,
        length,
        tuple(said),
        _likeness(read_tokens(parent.model), read_tokens(first.model)),
        _likeness(template, asked),
        card.licence,
        card.languages,
        card.base_models,
    )


def _template(parent: Parent) -> str | None:
    own = None if parent.adapter is None else chat_template(parent.adapter)
    return own or chat_template(parent.model)


def _likeness(own: Any, first: Any) -> str:
    if own is None:
        return "none"
    return "same" if own == first else "other"
