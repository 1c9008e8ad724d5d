"""One merge recipe: mergekit YAML in, canonical form and hash out.

Knows mergekit's precedence of parameters (source, slice, whole merge), its filters (a substring of
the tensor's name) and its gradients (values interpolated over a slice's layers). Knows no torch, no
files, and nothing of how a method is computed.

Canonical form, so that one merge has one hash and is never paid for twice: every source of every
slice carries its own parameters; a shared parameter is written once where it is the same
everywhere, else in its slices, and nowhere where it is the default; values are rounded to 12
significant digits; parameters that change nothing (``int8_mask``, a parameter of another method,
della's epsilon at density 1) are gone or zero; with ``normalize`` the weights of each filter are
divided by their largest, since only ratios matter; neighbouring slices that say the same are one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from agentmerge.errors import RecipeError, RecipeRejected
from agentmerge.methods import (
    INERT_PARAMS,
    METHODS,
    SUM_NORMALIZED,
    SWITCHES,
    Method,
    Parameter,
    method_named,
)

#: Below this share of the sum of absolute weights, a sum of weights counts as cancelled.
CANCEL_SHARE = 1e-6


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


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed merge recipe. Models are named as the user named them."""

    merge_method: str
    slices: tuple[Slice, ...]
    base_model: str | None = None
    parameters: Parameters = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    merge_seed: int | None = None

    @classmethod
    def parse(cls, text: str | Path | Mapping[str, Any]) -> Recipe:
        """Read mergekit YAML (a path, a text, or the mapping itself).

        Raises:
            RecipeError: naming the part that cannot be read.
        """
        raw = _load(text)
        method = method_named(str(raw.get("merge_method", "")))
        if raw.get("modules"):
            raise RecipeError("recipes with 'modules:' are not supported; use 'slices:'")
        if bool(raw.get("models")) == bool(raw.get("slices")):
            raise RecipeError("a recipe needs either 'models:' or 'slices:', and not both")
        for key in ("models", "slices"):
            if not isinstance(raw.get(key) or [], list):
                raise RecipeError(f"{key} must be a list, not {raw[key]!r}")
        if raw.get("slices"):
            slices = tuple(_slice(item, f"slices[{i}]") for i, item in enumerate(raw["slices"]))
        else:
            sources = tuple(_source(item, f"models[{i}]") for i, item in enumerate(raw["models"]))
            slices = (Slice(tuple(replace(source, layer_range=None) for source in sources)),)
        base = raw.get("base_model")
        seed = raw.get("merge_seed")
        if seed is not None and type(seed) is not int:
            raise RecipeError(f"merge_seed {seed!r} must be a whole number")
        tokenizer = raw.get("tokenizer_source")
        if tokenizer is None and isinstance(raw.get("tokenizer"), dict):
            tokenizer = raw["tokenizer"].get("source")
        return cls(
            merge_method=method.name,
            slices=slices,
            base_model=None if base is None else _model_name(base, "base_model"),
            parameters=_parameters(raw.get("parameters"), "parameters"),
            dtype=raw.get("dtype"),
            out_dtype=raw.get("out_dtype"),
            tokenizer_source=None if tokenizer is None else str(tokenizer),
            chat_template=raw.get("chat_template"),
            merge_seed=seed,
        )

    @classmethod
    def of_model(cls, model: str, num_layers: int, dtype: str | None = None) -> Recipe:
        """The merge that is ``model`` itself."""
        source = Source(model, (0, num_layers), (("weight", Setting.scalar(1.0)),))
        return cls("linear", (Slice((source,)),), dtype=dtype)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model the recipe reads, in order of first mention, the base last if only there."""
        names = [source.model for piece in self.slices for source in piece.sources]
        names += [piece.base_model for piece in self.slices if piece.base_model]
        names += [self.base_model] if self.base_model else []
        return tuple(dict.fromkeys(names))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as mergekit reads it (``merge_seed`` is ours; mergekit ignores it)."""
        whole = len(self.slices) == 1 and all(
            source.layer_range is None for source in self.slices[0].sources
        )
        body: dict[str, Any] = {"merge_method": self.merge_method}
        for key in ("base_model", "dtype", "out_dtype", "tokenizer_source", "chat_template"):
            if getattr(self, key) is not None:
                body[key] = getattr(self, key)
        if self.merge_seed is not None:
            body["merge_seed"] = self.merge_seed
        if self.parameters:
            body["parameters"] = _parameters_yaml(self.parameters)
        if whole:
            body["models"] = [_source_yaml(source) for source in self.slices[0].sources]
        else:
            body["slices"] = [_slice_yaml(piece) for piece in self.slices]
        return body

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def shared(self, name: str, piece: Slice, tensor: str = "", t: float = 0.0) -> float:
        """A parameter of the whole merge as it holds in ``piece``, or the method's default."""
        for scope in (piece.parameters, self.parameters):
            setting = dict(scope).get(name)
            value = None if setting is None else setting.at(tensor, t)
            if value is not None:
                return value
        default = dict(METHODS[self.merge_method].shared_params)[name]
        if default is None:
            raise RecipeRejected(f"{self.merge_method} has no {name!r} for {tensor or 'a slice'!r}")
        return default

    def canonical(self, num_layers: int) -> Recipe:
        """The one form of this merge (see the module's head); idempotent.

        Raises:
            RecipeRejected: weights that cancel under ``normalize``, or layers that do not add up.
        """
        method = METHODS[self.merge_method]
        slices = [_canonical_slice(self, piece, num_layers) for piece in self.slices]
        bases = {piece.base_model or self.base_model for piece in slices}
        base_model = self.base_model if method.sets_apart(self.base_model) else None
        if len(bases) == 1 and method.name != "slerp" and method.sets_apart(next(iter(bases))):
            base_model = bases.pop()  # said once, for the whole merge
            slices = [replace(piece, base_model=None) for piece in slices]
        merged = slices[:1]
        for piece in slices[1:]:
            joined = _joined(merged[-1], piece)
            merged[-1:] = [joined] if joined else [merged[-1], piece]
        single = all(len(piece.sources) == 1 for piece in merged)
        depth = sum(length(piece) for piece in merged)
        if depth != num_layers:
            raise RecipeRejected(
                f"the recipe's slices make {depth} layers and the models have {num_layers}; "
                "recipes that change the depth are not supported"
            )
        shared: Parameters = ()
        if method.name != "slerp":
            shared, merged = _hoisted(method, merged)
        seeded = method.random and not single
        return replace(
            self,
            slices=tuple(merged),
            base_model=base_model,
            parameters=shared,
            merge_seed=(self.merge_seed or 0) if seeded else None,
        )

    def hash(self, identities: Mapping[str, str] | None = None) -> str:
        """SHA-256 over the form, 16 hex digits; call it on the canonical form.

        identities: model name -> content fingerprint, so that a moved model stays itself.
        """
        body = self.to_dict()
        if identities:
            body = _renamed(body, identities)
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def effective(self, tensor: str, layer: int | None, *, after: bool = False) -> Effective:
        """What ``tensor`` is made from, by mergekit's rules.

        layer: the output layer the tensor belongs to, or None outside the layers; then ``after``
            tells tensors behind the layers (final norm, head: last slice) from those before them
            (embedding: first slice). Those take a gradient's first value, as in mergekit.

        Raises:
            RecipeRejected: a required parameter has no value, or weights cancel.
        """
        piece, offset = self._place(layer, after)
        span = length(piece)
        t = 0.0 if layer is None else (offset / (span - 1) if span > 1 else 1.0)
        method = METHODS[self.merge_method]
        base = piece.base_model or self.base_model
        shared = tuple(
            (name, self.shared(name, piece, tensor, t)) for name, _ in method.shared_params
        )
        sources = []
        for source in piece.sources:
            start = source.layer_range[0] if source.layer_range else 0
            own: list[tuple[str, float]] = []
            if not (method.sets_apart(base) and source.model == base):
                for name, default in method.source_params:
                    value = _first_value(
                        (source.parameters, piece.parameters, self.parameters), name, tensor, t
                    )
                    value = default if value is None else value
                    if value is None:
                        raise RecipeRejected(f"{source.model!r} has no {name!r} for {tensor!r}")
                    own.append((name, value))
            where = None if layer is None else start + offset
            sources.append((source.model, where, tuple(own)))
        result = Effective(self.merge_method, base, tuple(sources), shared)
        _refuse_cancelled(result, tensor)
        _refuse_illegal(method, result, tensor)
        return result

    def _place(self, layer: int | None, after: bool) -> tuple[Slice, int]:
        if layer is None:
            return self.slices[-1 if after else 0], 0
        start = 0
        for piece in self.slices:
            span = length(piece)
            if layer < start + span or span == 0:
                return piece, layer - start
            start += span
        raise RecipeRejected(f"the recipe has {start} layers, and layer {layer} was asked for")


def length(piece: Slice) -> int:
    """How many layers a slice makes; 0 where its sources are whole models of unknown depth."""
    spans = {
        source.layer_range[1] - source.layer_range[0] if source.layer_range else 0
        for source in piece.sources
    }
    if len(spans) != 1:
        raise RecipeRejected("the sources of a slice must all have the same number of layers")
    return spans.pop()


def _refuse_cancelled(effective: Effective, tensor: str) -> None:
    method = METHODS[effective.method]
    if method.name not in SUM_NORMALIZED or not method.ratios_only(dict(effective.shared)):
        return
    weights = [dict(own)["weight"] for _, _, own in effective.sources if own]
    size = math.fsum(abs(weight) for weight in weights)
    if abs(math.fsum(weights)) <= CANCEL_SHARE * size:
        switch = method.normalize_param
        raise RecipeRejected(
            f"the weights {weights} for {tensor!r} add up to nothing, and "
            f"{switch or method.name} divides by their sum; change a weight"
            + (f" or set {switch}: false" if switch else "")
        )


def _refuse_illegal(method: Method, effective: Effective, tensor: str) -> None:
    """What mergekit's own function would raise for."""
    for name, value in effective.shared if method.engine == "mergekit" else ():
        parameter = next(p for p in method.shared if p.name == name)
        if parameter.whole and (value < 0 or value != int(value)):
            raise RecipeRejected(
                f"{name} {value:g} for {tensor!r} is not a whole number; write one value a slice"
            )
    for model, _, own in effective.sources:
        values = dict(own)
        if "epsilon" not in values or not 0 < values["density"] < 1:
            continue
        density, epsilon = values["density"], values["epsilon"]
        if epsilon < 0 or density + epsilon >= 1 or density - epsilon <= 0:
            raise RecipeRejected(
                f"epsilon {epsilon:g} of {model!r} for {tensor!r} takes density {density:g} out of "
                f"(0, 1); use one from 0 to below {min(density, 1 - density):g}"
            )


def _canonical_slice(recipe: Recipe, piece: Slice, num_layers: int) -> Slice:
    method = METHODS[recipe.merge_method]
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
        sources.append(Source(source.model, layers, tuple(_without_unread(own))))
    if apart and base is not None and base not in {s.model for s in sources}:
        sources.append(Source(base, sources[0].layer_range))
    if method.name == "slerp":
        t = Setting.scalar(0.5)
        for scope in (recipe.parameters, piece.parameters):
            if "t" in dict(scope):
                t = dict(scope)["t"].then(t)
        return Slice(tuple(sources), base, (("t", _round_setting(t)),))
    shared = _shared_settings(recipe, piece)
    if _always_ratios(method, shared):
        sources = _scaled(sources, signed=method.name in SUM_NORMALIZED)
    return Slice(
        tuple(replace(s, parameters=_rounded(s.parameters)) for s in sources),
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


def _pushed_down(recipe: Recipe, piece: Slice, source: Source, parameter: Parameter) -> Setting:
    scopes = (source.parameters, piece.parameters, recipe.parameters)
    setting = _resolved(scopes, parameter, repr(source.model))
    if parameter.name in ("density", "gamma"):
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
    if density is None or any(v not in ((0.0,), (1.0,)) for _, v in density.entries):
        return own
    return [
        (name, Setting.scalar(0.0) if name in ("gamma", "epsilon") else setting)
        for name, setting in own
    ]


def _shared_settings(recipe: Recipe, piece: Slice) -> Parameters:
    """Every shared parameter as it holds in a slice, sorted by name."""
    method = METHODS[recipe.merge_method]
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
    weights = [
        _collapsed(dict(source.parameters)["weight"]) for source in sources if source.parameters
    ]
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


def _first_value(scopes: Iterable[Parameters], name: str, tensor: str, t: float) -> float | None:
    for scope in scopes:
        setting = dict(scope).get(name)
        value = None if setting is None else setting.at(tensor, t)
        if value is not None:
            return value
    return None


def _round_setting(setting: Setting) -> Setting:
    entries = []
    for name, values in setting.entries:
        rounded = tuple(round12(value) for value in values)
        entries.append((name, rounded[:1] if len(set(rounded)) == 1 else rounded))
        if name is None:
            break
    return _collapsed(Setting(tuple(entries)))


def _collapsed(setting: Setting) -> Setting:
    """One value where every filter says the same."""
    last = setting.entries[-1]
    if last[0] is None and all(values == last[1] for _, values in setting.entries):
        return Setting((last,))
    return setting


def _renamed(value: Any, identities: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {
            key: identities.get(item, item)
            if key in ("model", "base_model") and isinstance(item, str)
            else _renamed(item, identities)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_renamed(item, identities) for item in value]
    return value


def _load(text: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(text, Mapping):
        return text
    source = str(text) if isinstance(text, Path) else "the recipe"
    try:
        raw = yaml.safe_load(text.read_text() if isinstance(text, Path) else text)
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {source}") from None
    except OSError as error:
        raise RecipeError(f"{source} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{source} must be a mapping with 'merge_method', not {type(raw).__name__}"
        )
    return raw


def _slice(raw: Any, where: str) -> Slice:
    if not isinstance(raw, dict) or not isinstance(raw.get("sources"), list) or not raw["sources"]:
        raise RecipeError(f"{where} needs a list of 'sources'")
    sources = tuple(
        _source(item, f"{where}.sources[{i}]", ranged=True) for i, item in enumerate(raw["sources"])
    )
    base = raw.get("base_model")
    return Slice(
        sources,
        None if base is None else _model_name(base, f"{where}.base_model"),
        _parameters(raw.get("parameters"), f"{where}.parameters"),
    )


def _source(raw: Any, where: str, ranged: bool = False) -> Source:
    if not isinstance(raw, dict) or "model" not in raw:
        raise RecipeError(f"{where} needs a 'model'")
    layers = raw.get("layer_range")
    if ranged and layers is None:
        raise RecipeError(f"{where} needs a 'layer_range' [start, end]")
    if layers is not None:
        whole = isinstance(layers, (list, tuple)) and [type(x) for x in layers] == [int, int]
        if not whole or not 0 <= layers[0] < layers[1]:
            raise RecipeError(f"{where}.layer_range {layers} must be [start, end], start < end")
        layers = (layers[0], layers[1])
    return Source(
        _model_name(raw["model"], f"{where}.model"),
        layers,
        _parameters(raw.get("parameters"), f"{where}.parameters"),
    )


def _model_name(raw: Any, where: str) -> str:
    if isinstance(raw, dict):  # mergekit's long form: {model: {path, revision}, lora, ...}
        inner = raw.get("model")
        path = inner.get("path") if isinstance(inner, dict) else inner
        if path and not raw.get("lora") and not raw.get("override_architecture"):
            return str(path)
        raise RecipeError(f"{where} {raw!r} is not supported; name the model by path or hub id")
    return str(raw)


def _parameters(raw: Any, where: str) -> Parameters:
    if raw is None:
        return ()
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} must be a mapping, not {raw!r}")
    return tuple(
        (str(name), Setting.parse(value, f"{where}.{name}"))
        for name, value in raw.items()
        if name not in INERT_PARAMS
    )


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


def _parameters_yaml(parameters: Parameters) -> dict[str, Any]:
    return {
        name: bool(setting.entries[0][1][0])
        if name in SWITCHES and setting.is_scalar
        else setting.to_yaml()
        for name, setting in parameters
    }


def _source_yaml(source: Source) -> dict[str, Any]:
    body: dict[str, Any] = {"model": source.model}
    if source.layer_range is not None:
        body["layer_range"] = list(source.layer_range)
    if source.parameters:
        body["parameters"] = _parameters_yaml(source.parameters)
    return body


def _slice_yaml(piece: Slice) -> dict[str, Any]:
    body: dict[str, Any] = {"sources": [_source_yaml(source) for source in piece.sources]}
    if piece.base_model is not None:
        body["base_model"] = piece.base_model
    if piece.parameters:
        body["parameters"] = _parameters_yaml(piece.parameters)
    return body
