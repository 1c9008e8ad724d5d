"""Axes of a search over layers: how strongly each runs, and so which run at all.

A layer whose two outputs (what its attention and its mlp add to the stream) are scaled by 0 is the
identity, so depth is a matter of numbers. The merge that lies under the space keeps its layers;
beside each of them stand those of others, and every such place has a scale for either output:

    M0 A0 B0 | M1 A1 B1 | M2 A2 B2 | A3 B3 M3    (M: the merge's own, A and B: experts')

With ``path`` the layers of all stand one model after the other, as often as is asked, with a switch
and one scale a place (arXiv 2403.13187). The first and the last layer are always the merge's own.
Recipes are linear merges, a slice a layer: of the models, where the merge is a sum of weighted
models; of the merge, as a first stage of its own, where it is not. Knows no weights and no scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from agentmerge.config import LayersConfig
from agentmerge.contracts.space import Axis
from agentmerge.contracts.worker import Gradient
from agentmerge.errors import RecipeRejected, UserError
from agentmerge.methods import RECIPE_METHODS
from agentmerge.recipe import Parameters, Recipe, Setting, Slice, Source, length, round12
from agentmerge.recipe.copying import stacked_layers
from agentmerge.recipe.names import short_name
from agentmerge.recipe.stages import NAME
from agentmerge.space.groups import LayerGroups, same_merge

#: Scales nearer to 0 than this are 0: a layer that adds so little is not worth its time.
DEAD = 0.05
#: Digits of a scale, fewer than a recipe's: what was multiplied by a weight is found again.
DIGITS = 6

#: Names of tensors of models whose layers can be scaled (``merging.stack``), around an output.
_NAMES = tuple(
    f"{layers}.{{}}.{{}}.{ending}"
    for layers in (
        "language_model.model.layers",
        "model.language_model.layers",
        "transformer.h",
        "gpt_neox.layers",
    )
    for ending in ("weight", "bias")
)

#: How much of what its attention and its mlp add a layer adds.
Strength = tuple[float, float]
ABSENT, AS_IT_IS = (0.0, 0.0), (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Position:
    """A place of the deepest stack.

    model: whose layer; None for the merge's. home: it is where the merge has it. fixed: it is there
    in every stack, as it is, and has no axes.
    """

    model: str | None
    layer: int
    home: bool = False
    fixed: bool = False


#: One layer of a stack: (model or None for the merge, layer, strength).
Run = tuple[str | None, int, Strength]


@dataclass(frozen=True)
class LayersForm:
    """A ``contracts.space.SpaceForm``, but for ``slices``: it makes whole recipes.

    under: the canonical recipe at the neutral point. outputs: what is in the names of the tensors
    by which attention and mlp add to the stream.

    Raises:
        UserError: ``under`` has other layers or models, or the models have too few layers.
    """

    on: LayerGroups
    under: Recipe
    outputs: tuple[str, str]

    mixes_all = has_depth_line = only_ratios = False
    redundant = 0
    scale = ("", ())

    def __post_init__(self) -> None:
        if self.on.num_layers < 2:
            raise UserError("a model of one layer has no place for another; remove genome.layers")
        if strangers := sorted(set(self.under.models) - set(self.on.genome.parents)):
            raise UserError(f"the merge is made of {', '.join(strangers)}, which is not searched")
        if stacked_layers(self.under, self.on.num_layers) is not None or self.under.merges:
            raise UserError("the merge has other layers than the models already")

    @property
    def settings(self) -> LayersConfig:
        return self.on.genome.layers or LayersConfig()

    @property
    def depth(self) -> int:
        """Of the deepest stack that a point makes."""
        return min(self.on.num_layers + self.settings.most, len(self.positions))

    @property
    def about(self) -> str:
        layers = self.on.num_layers
        what = (
            "a switch and the scale of what it adds"
            if self.settings.path
            else ("the scales of what its attention and its mlp add")
        )
        return (
            "layers beside those of the best merge of weights, which has "
            f"{layers}. A place is where one more layer may run, of the model and number that its "
            f"axes name; they are {what} to the stream. At scale 0, or within {DEAD} of it, the "
            "layer is absent and costs nothing; at 1 it adds all that it does in its own model, "
            "below 0 it takes that away; 0.1 to 0.5 is usual. Each layer that is there costs "
            f"1/{layers} more time a token. At most {self.depth} layers run: of more, the weakest "
            "are left out"
        )

    @cached_property
    def inserted(self) -> tuple[str | None, ...]:
        """Whose layers may stand beside the merge's."""
        genome, found = self.on.genome, list[str | None]()
        for name in self.settings.insert:
            groups = {"merge": [None], "experts": genome.experts, "base": [genome.base_model]}
            found += groups.get(name, [name])
        return tuple(dict.fromkeys(found))

    @cached_property
    def positions(self) -> tuple[Position, ...]:
        last = self.on.num_layers - 1
        ends = Position(None, 0, True, True), Position(None, last, True, True)
        between: list[Position] = []
        if self.settings.path:
            sources = tuple(dict.fromkeys((None, *self.inserted)))
            for turn in range(self.settings.repeats or 1):
                for model in sources:
                    for layer in range(last + 1):
                        own = model is None and not turn
                        if not (own and layer == 0):
                            between.append(Position(model, layer, own and layer < last))
        else:
            for layer in range(last + 1):
                if 0 < layer < last:
                    between.append(Position(None, layer, True, not self.settings.skip))
                between += [Position(model, layer) for model in self.inserted]
        return (ends[0], *between, ends[1])

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        low, high = self.settings.scales
        found = []
        for place, position in enumerate(self.positions):
            if position.fixed:
                continue
            whose = "merge" if position.model is None else short_name(position.model)
            name = f"place {place}: {whose}'s layer {position.layer}"
            model = position.model if position.model in self.on.models else None
            if self.settings.path:
                found.append(Axis(f"{name} runs", "runs", place, model, None, 0.0, 1.0, "bool"))
                found.append(Axis(f"{name} scale", "scale", place, model, None, low, high))
            else:
                for part, output in zip(("attention", "mlp"), self.outputs, strict=True):
                    found.append(Axis(f"{name} {part}", "scale", place, model, output, low, high))
        return tuple(found)

    def neutral(self) -> tuple[float, ...]:
        """The point at which nothing is added: the merge that lies under."""
        values = self._values(self._as_it_is)
        return tuple(axis.unit(value) for axis, value in zip(self.axes, values, strict=True))

    def end_point(self, name: str) -> tuple[float, ...] | None:
        return None

    def slices(self, values: list[float]) -> list[Slice]:
        return list(self.recipe(values).slices)

    def recipe(self, values: Sequence[float]) -> Recipe:
        """The stack at these values, one an axis."""
        strengths = self.strengths(values)
        if strengths == self._as_it_is:
            return self.under
        return self._stack((p, s) for p, s in zip(self.positions, strengths, strict=True) if any(s))

    def everything(self, values: Sequence[float]) -> Recipe:
        """The same with every place there, at a scale of 0 where it is absent: what a gradient is
        asked of, since an absent layer has a slope too. With ``path`` absent places have none."""
        places = zip(self.positions, self.strengths(values), strict=True)
        return self._stack((p, s) for p, s in places if any(s) or not self.settings.path)

    def strengths(self, values: Sequence[float]) -> list[Strength]:
        """Of every position, absent where its scales are near 0. Of more layers than are allowed
        the weakest are absent; a layer that could stand in several places is in the first."""
        given = iter(values)
        found = [AS_IT_IS if p.fixed else self._strength(given) for p in self.positions]
        most = self.on.num_layers + self.settings.most
        present = [i for i, strength in enumerate(found) if any(strength)]
        loose = [i for i in present if not self.positions[i].fixed]
        loose.sort(key=lambda i: (abs(found[i][0]) + abs(found[i][1]), -i))
        for i in loose[: max(0, len(present) - most)]:
            found[i] = ABSENT
        run = [(p.model, p.layer, s) for p, s in zip(self.positions, found, strict=True) if any(s)]
        return self._placed(run) or found

    def thinner(self, values: Sequence[float]) -> list[float] | None:
        """The values of the same stack without the weakest layer of those that are not the merge's;
        None where there is none."""
        found = self.strengths(values)
        added = [
            i
            for i, (position, strength) in enumerate(zip(self.positions, found, strict=True))
            if any(strength) and not position.home
        ]
        if not added:
            return None
        weakest = min(added, key=lambda i: (abs(found[i][0]) + abs(found[i][1]), -i))
        found[weakest] = ABSENT
        return self._values(found)

    def projected(self, values: Sequence[float]) -> list[float]:
        """The values that the stack at these has."""
        return self._values(self.strengths(values))

    def values(self, recipe: Recipe) -> list[float] | None:
        if same_merge(recipe, self.under):
            return self._values(self._as_it_is)
        run = self._run_of(recipe)
        strengths = None if run is None else self._placed(run)
        return None if strengths is None else self._values(strengths)

    def slopes(self, values: Sequence[float], gradient: Gradient) -> list[float]:
        """d loss / d value, one an axis. gradient: of ``everything(values)``."""
        strengths = self.strengths(values)
        whole = not self.settings.path
        places = [i for i, s in enumerate(strengths) if whole or any(s)]
        found = {place: [0.0, 0.0] for place in range(len(self.positions))}
        for tensor in gradient.tensors:
            if tensor.layer is None:
                continue
            place = places[tensor.layer]
            position = self.positions[place]
            for part, output in enumerate(self.outputs):
                if output in tensor.tensor:
                    unscaled = self._unscaled(position, tensor.tensor)
                    found[place][part] += sum(
                        slope * unscaled.get(model, 0.0) for model, slope in tensor.weights
                    )
                    break
        result = []
        for axis in self.axes:
            own = found[axis.group]
            if axis.parameter == "runs":
                result.append(0.0)
            else:
                result.append(sum(own) if axis.filter is None else own[self._part(axis)])
        return result

    def _part(self, axis: Axis) -> int:
        return self.outputs.index(str(axis.filter))

    @property
    def _as_it_is(self) -> list[Strength]:
        return [AS_IT_IS if p.home else ABSENT for p in self.positions]

    def _strength(self, given: Iterator[float]) -> Strength:
        """Of one position; takes its two values."""
        one, two = next(given), next(given)
        if self.settings.path:
            return (_clean(two),) * 2 if one else ABSENT
        return _clean(one), _clean(two)

    def _values(self, strengths: Sequence[Strength]) -> list[float]:
        found: list[float] = []
        for position, strength in zip(self.positions, strengths, strict=True):
            if not position.fixed:
                path = (1.0, strength[0]) if any(strength) else (0.0, 1.0)
                found += path if self.settings.path else strength
        return found

    def _placed(self, run: Sequence[Run]) -> list[Strength] | None:
        """Each layer of a stack in the first place that can be its; None where one has none."""
        *inner, last = range(len(self.positions))
        found = [ABSENT] * (last + 1)
        if len(run) < 2:
            return None
        places = iter(inner)
        for index, (model, layer, strength) in enumerate(run):
            for place in [last] if index == len(run) - 1 else places:
                position = self.positions[place]
                if (model, layer) == (position.model, position.layer):
                    found[place] = strength
                    break
                if position.fixed:
                    return None
            else:
                return None
        fixed = [s for p, s in zip(self.positions, found, strict=True) if p.fixed]
        # With path both scales are one.
        even = not self.settings.path or all(one == two for one, two in found)
        return found if even and set(fixed) == {AS_IT_IS} else None

    @cached_property
    def stage(self) -> str | None:
        """The name under which the merge is made first; None where one stage says it all."""
        method, name = RECIPE_METHODS[self.under.merge_method], NAME
        given = [
            setting.filters
            for piece in self.under.slices
            for scope in (self.under.parameters, piece.parameters, *_own(piece))
            for _, setting in scope
        ]
        own = {filters for filters in given if filters != (None,)}
        if (
            method.engine == "agentmerge"
            and [p.name for p in method.source] == ["weight"]
            and len(own) <= 1
            and all(self._tells_outputs(filters) for filters in own)
        ):
            return None
        while name in self.on.genome.parents:
            name += "_"
        return name

    def _tells_outputs(self, filters: Sequence[str | None]) -> bool:
        """Whether what is in an output's whole name is what is in the output: filters that go by
        the rest of a name weigh some tensors of it by other values than ``_at`` finds."""
        return all(
            _first(filters, name.format(layer, output)) == _first(filters, output)
            for output in self.outputs
            for layer in range(self.on.num_layers)
            for name in _NAMES
        )

    @cached_property
    def merged(self) -> tuple[tuple[tuple[str, Setting], ...], ...]:
        """Of each of the merge's layers: (model, weight) as a linear merge has them, all models';
        or of a merge that is made first, that alone.

        The first and the last layer say of what lies outside the layers too: as a line, whose first
        value that takes.
        """
        last = self.on.num_layers - 1
        if self.stage is not None:
            return (((self.stage, Setting.scalar(1.0)),),) * (last + 1)
        found = [_weights(self.under, layer, self.on.genome.parents) for layer in range(last + 1)]
        for layer in (0, last):
            outside = _weights(self.under, None, self.on.genome.parents, after=layer == last)
            found[layer] = tuple(
                (model, _line(first, second))
                for (model, first), (_, second) in zip(outside, found[layer], strict=True)
            )
        return tuple(found)

    def _stack(self, layers: Iterator[tuple[Position, Strength]]) -> Recipe:
        slices = []
        for position, strength in layers:
            span = (position.layer, position.layer + 1)
            weights = (
                self.merged[position.layer]
                if position.model is None
                else ((position.model, Setting.scalar(1.0)),)
            )
            sources = tuple(
                Source(model, span, (("weight", self._scaled(weight, strength)),))
                for model, weight in weights
            )
            slices.append(Slice(sources))
        return replace(
            self.under,
            merge_method="linear",
            slices=tuple(slices),
            base_model=None,
            parameters=(("normalize", Setting.scalar(0.0)),),
            merge_seed=None,
            notes=(),
            merges=() if self.stage is None else ((self.stage, self.under),),
        )

    def _scaled(self, weight: Setting, strength: Strength) -> Setting:
        """A weight that is another on the outputs."""
        if strength == AS_IT_IS:
            return weight
        own = tuple(
            (output, tuple(value * scale for value in _at(weight, output)))
            for output, scale in zip(self.outputs, strength, strict=True)
        )
        return Setting(own + weight.entries)

    def _unscaled(self, position: Position, tensor: str) -> dict[str, float]:
        if position.model is not None:
            return {position.model: 1.0}
        return {model: _at(w, tensor)[-1] for model, w in self.merged[position.layer]}

    def _run_of(self, recipe: Recipe) -> list[Run] | None:
        """The layers of a canonical recipe; whether it is such a stack is for its maker to see."""
        found: list[Run] = []
        merges = dict(recipe.merges)
        for piece in recipe.slices:
            spans = [source.layer_range or (0, 0) for source in piece.sources]
            for offset in range(length(piece)):
                layers = {start + offset for start, _ in spans}
                layer = layers.pop()
                if layers or layer >= self.on.num_layers:
                    return None
                single = len(piece.sources) == 1
                model = piece.sources[0].model if single else None
                model = None if model in merges else model
                own = [dict(scope).get("weight") for scope in _own(piece)]
                names = [source.model for source in piece.sources]
                strength = self._read(Position(model, layer), dict(zip(names, own, strict=True)))
                if strength is None:
                    return None
                found.append((model, layer, strength))
        return found

    def _read(self, position: Position, own: Mapping[str, Setting | None]) -> Strength | None:
        scales = []
        for output in self.outputs:
            unscaled = self._unscaled(position, output)
            model = max(unscaled, key=lambda name: abs(unscaled[name]))
            weight = own.get(model)
            if weight is None:
                return None
            value = _at(weight, output)[-1]
            scales.append(round(value / unscaled[model], DIGITS) if unscaled[model] else 1.0)
        return scales[0], scales[1]


def _own(piece: Slice) -> list[Parameters]:
    return [source.parameters for source in piece.sources]


def _clean(scale: float) -> float:
    return 0.0 if abs(scale) < DEAD else round(scale, DIGITS)


def _first(filters: Sequence[str | None], name: str) -> str | None:
    return next((part for part in filters if part is None or part in name), None)


def _at(setting: Setting, name: str) -> tuple[float, ...]:
    """The values for a tensor of that name."""
    return next(values for part, values in setting.entries if part is None or part in name)


def _line(first: Setting, second: Setting) -> Setting:
    """Two values under each filter where they differ."""
    pairs = zip(first.entries, second.entries, strict=True)
    return Setting(
        tuple((name, one if one == two else (*one, *two)) for (name, one), (_, two) in pairs)
    )


def _weights(
    recipe: Recipe, layer: int | None, models: Sequence[str], *, after: bool = False
) -> tuple[tuple[str, Setting], ...]:
    """(model, weight) of one layer of a canonical recipe, or of what lies outside (``after`` them),
    as a linear merge that divides by nothing has them: all of ``models``, filter by filter.

    Raises:
        UserError: they cancel.
    """
    given = [
        setting.filters
        for piece in recipe.slices
        for scope in (recipe.parameters, piece.parameters, *_own(piece))
        for _, setting in scope
    ]
    filters = max(given, key=len, default=(None,))
    rows: dict[str, list[tuple[str | None, tuple[float, ...]]]] = {model: [] for model in models}
    for name in filters:
        try:
            made = recipe.effective(name or "", layer, after=after)
        except RecipeRejected as error:
            raise UserError(str(error)) from error
        shared = dict(made.shared)
        own = {model: dict(values)["weight"] for model, _, values in made.sources if values}
        total = sum(own.values()) if RECIPE_METHODS[made.method].ratios_only(shared) else 1.0
        own = {model: shared.get("lambda", 1.0) * w / total for model, w in own.items()}
        if RECIPE_METHODS[made.method].sets_apart(made.base_model):
            own[str(made.base_model)] = 1.0 - sum(own.values())
        for model, row in rows.items():
            row.append((name, (round12(own.get(model, 0.0)),)))
    return tuple((model, Setting(tuple(row))) for model, row in rows.items())
