"""The one form of a merge: what ``Recipe.canonical`` does, slice by slice.

It is there so that one merge has one hash and is never paid for twice: every source of every
slice carries its own parameters; a shared parameter is written once where it is the same
everywhere, else in its slices, and nowhere where it is the default; values are rounded to 12
significant digits; parameters that change nothing (``int8_mask``, a parameter of another method,
della's epsilon at density 1) are gone or zero; with ``normalize`` the weights of each filter are
divided by their largest, since only ratios matter; neighbouring slices that say the same are one.
A recipe may make more or fewer layers than the models have; where passthrough does not, and scales
nothing, its form is linear's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from agentmerge.errors import RecipeRejected
from agentmerge.methods import PASSTHROUGH, RECIPE_METHODS, SUM_NORMALIZED, Method, Parameter
from agentmerge.recipe.copying import as_linear
from agentmerge.recipe.parts import (
    MOST_LAYERS,
    Body,
    Parameters,
    Setting,
    Slice,
    Source,
    length,
    round12,
)

B = TypeVar("B", bound=Body)


def canonical(recipe: B, num_layers: int) -> B:
    """See the module's head; errors are ``Recipe.canonical``'s."""
    method = RECIPE_METHODS[recipe.merge_method]
    slices = [_canonical_slice(recipe, piece, num_layers) for piece in recipe.slices]
    bases = {piece.base_model or recipe.base_model for piece in slices}
    base_model = recipe.base_model if method.sets_apart(recipe.base_model) else None
    if len(bases) == 1 and not method.pairwise and method.sets_apart(next(iter(bases))):
        base_model = bases.pop()  # said once, for the whole merge
        slices = [replace(piece, base_model=None) for piece in slices]
    merged = slices[:1]
    for piece in slices[1:]:
        joined = _joined(merged[-1], piece)
        merged[-1:] = [joined] if joined else [merged[-1], piece]
    single = all(len(piece.sources) == 1 for piece in merged)
    depth = sum(length(piece) for piece in merged)
    if depth > MOST_LAYERS:
        raise RecipeRejected(
            f"the recipe's slices make {depth:,} layers, more than any model has ({MOST_LAYERS:,})"
        )
    scales = any(piece.sources[0].parameters for piece in merged)
    if method is PASSTHROUGH and depth == num_layers and not scales:
        return canonical(as_linear(recipe), num_layers)
    shared: Parameters = ()
    if not method.pairwise:
        shared, merged = _hoisted(method, merged)
    seeded = method.random and not single
    return replace(
        recipe,
        slices=tuple(merged),
        base_model=base_model,
        parameters=shared,
        merge_seed=(recipe.merge_seed or 0) if seeded else None,
    )


def _canonical_slice(recipe: Body, piece: Slice, num_layers: int) -> Slice:
    method = RECIPE_METHODS[recipe.merge_method]
    base = piece.base_model or recipe.base_model
    if method.needs_base and base is None:
        raise RecipeRejected(f"{method.name} needs a base_model")
    apart = method.sets_apart(base)
    sources = []
    for source in piece.sources:
        own: list[tuple[str, Setting]] = []
        if not (apart and source.model == base):
            for parameter in method.source:
                own.append((parameter.name, _pushed_down(recipe, piece, source, parameter)))
        layers = source.layer_range or (0, num_layers)
        if layers[1] > num_layers:
            raise RecipeRejected(
                f"the recipe reads layers {layers[0]} to {layers[1]} of {source.model!r}, which "
                f"has {num_layers}"
            )
        read = own if method.engine == "foreign" else _without_unread(own)
        sources.append(Source(source.model, layers, tuple(read)))
    if apart and base is not None and base not in {s.model for s in sources}:
        sources.append(Source(base, sources[0].layer_range))
    if method.pairwise:
        t = Setting.scalar(0.5)
        for scope in (recipe.parameters, piece.parameters):
            if "t" in dict(scope):
                t = dict(scope)["t"].then(t)
        sources.sort(key=lambda source: source.model != base)  # the base first: one form
        return Slice(tuple(sources), base, (("t", _round_setting(t)),))
    shared = _shared_settings(recipe, piece)
    if any(source.parameters for source in sources) and _always_ratios(method, shared):
        sources = _scaled(sources, signed=method.name in SUM_NORMALIZED)
    sources = [replace(s, parameters=_rounded(s.parameters)) for s in sources]
    if method is PASSTHROUGH:  # a scale of 1 is what a layer has without one
        plain = (("scale", Setting.scalar(1.0)),)
        sources = [replace(s, parameters=()) if s.parameters == plain else s for s in sources]
    return Slice(
        tuple(sources),
        piece.base_model if apart else None,
        shared,
    )


def _always_ratios(method: Method, shared: Parameters) -> bool:
    """Whether only ratios of weights matter, for every tensor of the slice."""
    switch = method.normalize_param
    if switch is None:
        return method.ratios_only({})
    setting = dict(shared)[switch]
    return setting.is_scalar and bool(setting.entries[0][1][0])


def _rounded(parameters: Parameters) -> Parameters:
    return tuple((name, _round_setting(setting)) for name, setting in parameters)


def _pushed_down(recipe: Body, piece: Slice, source: Source, parameter: Parameter) -> Setting:
    scopes = (source.parameters, piece.parameters, recipe.parameters)
    setting = _resolved(scopes, parameter, repr(source.model))
    ours = RECIPE_METHODS[recipe.merge_method].engine != "foreign"
    if ours and parameter.name in ("density", "gamma"):
        setting = setting.map(lambda v: min(max(v, 0.0), 1.0))
    return setting


def _resolved(scopes: Iterable[Parameters], parameter: Parameter, where: str) -> Setting:
    """A parameter's setting, each scope filling in for the tensors that those before leave out."""
    setting: Setting | None = None
    for scope in scopes:
        found = dict(scope).get(parameter.name)
        if found is not None:
            setting = found if setting is None else setting.then(found)
    if parameter.default is not None:
        default = Setting.scalar(parameter.default)
        return default if setting is None else setting.then(default)
    if setting is None:
        raise RecipeRejected(f"{where} has no {parameter.name!r}")
    return setting


def _without_unread(own: list[tuple[str, Setting]]) -> list[tuple[str, Setting]]:
    """gamma and epsilon as zero where the density keeps all or nothing, and they are not read."""
    density = dict(own).get("density")
    if density is None:
        return own
    if any(v not in ((0.0,), (1.0,)) for _, v in _round_setting(density).entries):
        return own
    return [
        (name, Setting.scalar(0.0) if name in ("gamma", "epsilon") else setting)
        for name, setting in own
    ]


def _shared_settings(recipe: Body, piece: Slice) -> Parameters:
    """Every shared parameter as it holds in a slice, sorted by name."""
    method = RECIPE_METHODS[recipe.merge_method]
    found: dict[str, Setting] = {}
    for parameter in method.shared:
        setting = _resolved((piece.parameters, recipe.parameters), parameter, method.name)
        if parameter.kind == "bool":
            setting = setting.map(lambda v: float(bool(v)))
        found[parameter.name] = _round_setting(setting)
    if found.get("nuslerp_flatten") == Setting.scalar(1.0):
        found["nuslerp_row_wise"] = Setting.scalar(0.0)  # not read then
    return tuple(sorted(found.items()))


def _hoisted(method: Method, slices: list[Slice]) -> tuple[Parameters, list[Slice]]:
    """Shared parameters that all slices agree on, written once; defaults only for ``normalize``."""
    spoken = [
        {
            name: setting
            for name, setting in piece.parameters
            if name == "normalize" or setting != _default(method, name)
        }
        for piece in slices
    ]
    common = {n: s for n, s in spoken[0].items() if all(row.get(n) == s for row in spoken)}
    own = [tuple((n, s) for n, s in row.items() if n not in common) for row in spoken]
    pairs = zip(slices, own, strict=True)
    return tuple(common.items()), [replace(piece, parameters=rest) for piece, rest in pairs]


def _default(method: Method, name: str) -> Setting | None:
    value = dict(method.shared_params)[name]
    return None if value is None else Setting.scalar(value)


def _scaled(sources: list[Source], signed: bool) -> list[Source]:
    """Divide weights by their largest: filter by filter where sources filter alike, else all by
    one. ``signed``: by its sign too, where sums are divided by."""
    weights = [_plain(dict(source.parameters)["weight"]) for source in sources if source.parameters]
    filters = max((weight.filters for weight in weights), key=len)
    alike = all(weight.filters in (filters, (None,)) for weight in weights)
    if alike:  # one value for everything stands for the same value under each filter
        weights = [w if w.filters == filters else _spread(w, filters) for w in weights]
        columns = [[v for w in weights for v in w.entries[i][1]] for i in range(len(filters))]
    else:
        columns = [[v for w in weights for _, values in w.entries for v in values]] * max(
            len(w.entries) for w in weights
        )
    scales = [_scale(column, signed) for column in columns]
    divided = iter(
        Setting(
            tuple(
                (name, tuple(v / scale for v in values))
                for (name, values), scale in zip(weight.entries, scales, strict=False)
            )
        )
        for weight in weights
    )
    return [
        replace(
            source,
            parameters=tuple(
                (name, next(divided) if name == "weight" else setting)
                for name, setting in source.parameters
            ),
        )
        for source in sources
    ]


def _spread(setting: Setting, filters: tuple[str | None, ...]) -> Setting:
    return Setting(tuple((name, setting.entries[0][1]) for name in filters))


def _scale(values: list[float], signed: bool) -> float:
    largest = max(values, key=abs)
    return (largest if signed else abs(largest)) or 1.0


def _joined(first: Slice, second: Slice) -> Slice | None:
    """One slice for two neighbours that say the same, or None."""
    if (first.base_model, first.parameters) != (second.base_model, second.parameters):
        return None
    if len(first.sources) != len(second.sources):
        return None
    sources = []
    for a, b in zip(first.sources, second.sources, strict=True):
        same = (a.model, a.parameters) == (b.model, b.parameters)
        gradient = any(len(v) > 1 for _, s in a.parameters for _, v in s.entries)
        if not same or gradient or a.layer_range is None or b.layer_range is None:
            return None
        if a.layer_range[1] != b.layer_range[0]:
            return None
        sources.append(replace(a, layer_range=(a.layer_range[0], b.layer_range[1])))
    if any(len(v) > 1 for _, s in first.parameters for _, v in s.entries):
        return None
    return replace(first, sources=tuple(sources))


def _round_setting(setting: Setting) -> Setting:
    return _plain(setting).map(round12)


def _plain(setting: Setting) -> Setting:
    """The same in the fewest entries that say it, where what is rounded alike is alike."""
    entries = []
    for name, values in setting.entries:
        entries.append((name, values[:1] if len(set(map(round12, values))) == 1 else values))
        if name is None:
            break
    last = entries[-1]
    said = {tuple(map(round12, values)) for _, values in entries}
    return Setting((last,) if last[0] is None and len(said) == 1 else tuple(entries))
