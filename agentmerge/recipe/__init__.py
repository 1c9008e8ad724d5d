"""One merge recipe: mergekit YAML in, canonical form and hash out.

Knows mergekit's precedence of parameters (source, slice, whole merge), its filters (a substring of
the tensor's name) and its gradients (values interpolated over a slice's layers). Knows no torch, no
files, and nothing of how a method is computed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentmerge.errors import RecipeError, RecipeRejected
from agentmerge.methods import (
    PASSTHROUGH,
    RECIPE_METHODS,
    SUM_NORMALIZED,
    Method,
    method_named,
)
from agentmerge.parents.naming import at_layer
from agentmerge.recipe.canonical import canonical
from agentmerge.recipe.copying import one_source_a_slice
from agentmerge.recipe.parts import (
    MOST_LAYERS,
    Body,
    Effective,
    Parameters,
    Setting,
    Slice,
    Source,
    length,
    round12,
)
from agentmerge.recipe.stages import (
    MERGES,
    as_documents,
    named,
    one_form,
    over,
    read_merges,
    with_names,
)
from agentmerge.recipe.text import (
    load_yaml,
    one_module,
    parameters_yaml,
    read_body,
    read_model_name,
    read_parameters,
    slice_yaml,
    source_yaml,
)
from agentmerge.recipe.unread import unread_keys
from agentmerge.system.yaml_text import dump_yaml

__all__ = [
    "CANCEL_SHARE",
    "MOST_LAYERS",
    "Effective",
    "Parameters",
    "Recipe",
    "Setting",
    "Slice",
    "Source",
    "length",
    "renamed",
    "round12",
]

#: Below this share of the sum of absolute weights, a sum of weights counts as cancelled.
CANCEL_SHARE = 1e-6


@dataclass(frozen=True, slots=True)
class Recipe(Body):
    """A parsed merge recipe. Models are named as the user named them.

    notes: what its author should know of the text, such as keys that do nothing.
    """

    @classmethod
    def parse(cls, text: str | Path | Mapping[str, Any]) -> Recipe:
        """Read mergekit YAML (a path, a text, or the mapping itself).

        Raises:
            RecipeError: naming the part that cannot be read.
        """
        raw, notes = load_yaml(text)
        merges = read_merges(raw.get(MERGES) or (), cls.parse)
        name = str(raw.get("merge_method", ""))
        method = method_named(name)
        body, module = one_module(raw)
        slices = read_body(body, "modules.default." if module else "")
        notes += unread_keys(raw, body, method)
        base = None
        if raw.get("base_model") is not None:
            base = read_model_name(raw["base_model"], "base_model")
        if body.get("models"):
            slices = _with_base(slices, base, method)
        seed = raw.get("merge_seed")
        if seed is not None and type(seed) is not int:
            raise RecipeError(f"merge_seed {seed!r} must be a whole number")
        tokenizer = raw.get("tokenizer_source")
        if tokenizer is None and isinstance(raw.get("tokenizer"), dict):
            tokenizer = raw["tokenizer"].get("source", "union")
            if more := sorted(set(raw["tokenizer"]) - {"source"}):
                raise RecipeError(
                    f"tokenizer.{more[0]} is not supported; write tokenizer_source alone"
                )
        recipe = cls(
            merge_method=method.name,
            slices=slices,
            base_model=base,
            parameters=_filled(
                read_parameters(module.get("parameters"), "modules.default.parameters"),
                read_parameters(raw.get("parameters"), "parameters"),
            ),
            dtype=raw.get("dtype"),
            out_dtype=raw.get("out_dtype"),
            tokenizer_source=None if tokenizer is None else str(tokenizer),
            chat_template=_text(raw, "chat_template"),
            merge_seed=seed,
            notes=tuple(notes),
        )
        recipe = one_source_a_slice(recipe) if method is PASSTHROUGH else recipe
        return over(recipe, merges) if merges else recipe

    @classmethod
    def of_model(cls, model: str, num_layers: int, dtype: str | None = None) -> Recipe:
        """The merge that is ``model`` itself."""
        source = Source(model, (0, num_layers), (("weight", Setting.scalar(1.0)),))
        return cls("linear", (Slice((source,)),), dtype=dtype)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model the recipe reads, in order of first mention, the base last if only there;
        those of what is merged first in its place."""
        first = dict(self.merges)
        every = [first[name].models if name in first else (name,) for name in named(self)]
        return tuple(dict.fromkeys(name for names in every for name in names))

    def renamed(self, new: Callable[[str], str]) -> Recipe:
        """The same merge of models under other names."""
        first = dict(self.merges)
        moved = with_names(self, lambda name: name if name in first else new(name))
        source = self.tokenizer_source
        return replace(
            moved,
            tokenizer_source=source if source in (None, "union", "base") else new(source),
            merges=tuple((name, merge.renamed(new)) for name, merge in self.merges),
        )

    def at(self, dtype: str) -> Recipe:
        """The same; where it names no dtype, at the one that a search's own merges have."""
        merges = tuple((name, merge.at(dtype)) for name, merge in self.merges)
        return replace(self, dtype=self.dtype or dtype, merges=merges)

    def written_at(self, dtype: str) -> Recipe:
        """The same, merged at the parents' own precision; where it names no dtype, kept at this."""
        merges = tuple((name, merge.written_at(dtype)) for name, merge in self.merges)
        kept = self.out_dtype or (None if self.dtype else dtype)
        return replace(self, out_dtype=kept, merges=merges)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as mergekit reads it (``merge_seed`` is ours; mergekit ignores it), but that
        what is merged first is a list under ``merges``, and no document of its own."""
        whole = len(self.slices) == 1 and all(
            source.layer_range is None for source in self.slices[0].sources
        )
        body: dict[str, Any] = {"merge_method": self.merge_method}
        if self.merges:
            first = [{"name": name} | merge.to_dict() for name, merge in self.merges]
            body = {MERGES: first} | body
        for key in ("base_model", "dtype", "out_dtype", "tokenizer_source", "chat_template"):
            if getattr(self, key) is not None:
                body[key] = getattr(self, key)
        if self.merge_seed is not None:
            body["merge_seed"] = self.merge_seed
        if self.parameters:
            body["parameters"] = parameters_yaml(self.parameters)
        if whole:
            body["models"] = [source_yaml(source) for source in self.slices[0].sources]
        else:
            body["slices"] = [slice_yaml(piece) for piece in self.slices]
        return body

    def to_yaml(self) -> str:
        """mergekit's text; of two stages as ``mergekit-multi`` reads it."""
        return dump_yaml(as_documents(self.to_dict()))

    def shared(self, name: str, piece: Slice, tensor: str = "", t: float = 0.0) -> float:
        """A parameter of the whole merge as it holds in ``piece``, or the method's default."""
        for scope in (piece.parameters, self.parameters):
            setting = dict(scope).get(name)
            value = None if setting is None else setting.at(tensor, t)
            if value is not None:
                return value
        default = dict(RECIPE_METHODS[self.merge_method].shared_params)[name]
        if default is None:
            raise RecipeRejected(f"{self.merge_method} has no {name!r} for {tensor or 'a slice'!r}")
        return default

    def canonical(self, num_layers: int) -> Recipe:
        """The one form of this merge (see the module's head); idempotent.

        Raises:
            RecipeRejected: weights that cancel under ``normalize``, or layers that do not add up.
        """
        made = canonical(self, num_layers)
        return (
            one_form(made, lambda r: r.canonical(num_layers), num_layers) if made.merges else made
        )

    def hash(self, identities: Mapping[str, str] | None = None) -> str:
        """SHA-256 over the form, 16 hex digits; call it on the canonical form.

        identities: model name -> content fingerprint, so that a moved model stays itself. The chat
        template is left out: it changes what is asked, which is the protocol's, and no weight.
        """
        body, merges = self.to_dict(), [merge for _, merge in self.merges]
        body.pop("chat_template", None)
        if identities:
            body = renamed(body, identities)
        for made, method in [(body, self), *zip(body.get(MERGES, ()), merges, strict=True)]:
            if code := RECIPE_METHODS[method.merge_method].digest:
                made["method_code"] = code
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def effective(self, tensor: str, layer: int | None, *, after: bool = False) -> Effective:
        """What ``tensor`` is made from, by mergekit's rules: filters of a source's own parameters
        look at the name in the layer that is taken.

        layer: the output layer the tensor belongs to, or None outside the layers; then ``after``
            tells tensors behind the layers (final norm, head: last slice) from those before them
            (embedding: first slice). Those take a gradient's first value, as in mergekit.

        Raises:
            RecipeRejected: a required parameter has no value, or weights cancel.
        """
        piece, offset = self._place(layer, after)
        span = length(piece)
        t = 0.0 if layer is None else (offset / (span - 1) if span > 1 else 1.0)
        method = RECIPE_METHODS[self.merge_method]
        base = piece.base_model or self.base_model
        shared = tuple(
            (name, self.shared(name, piece, tensor, t)) for name, _ in method.shared_params
        )
        sources = []
        for source in piece.sources:
            start = source.layer_range[0] if source.layer_range else 0
            own: list[tuple[str, float]] = []
            if not (method.sets_apart(base) and source.model == base):
                given = tensor if layer is None else at_layer(tensor, start + offset)
                for name, default in method.source_params:
                    value = _first_value(
                        (source.parameters, piece.parameters, self.parameters), name, given, t
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


def _with_base(slices: tuple[Slice, ...], base: str | None, method: Method) -> tuple[Slice, ...]:
    """mergekit adds a base that ``models`` does not name; where it is set apart, ``canonical``
    does."""
    sources = slices[0].sources
    beside = base is not None and base not in {source.model for source in sources}
    if not beside or base is None or method is PASSTHROUGH or method.sets_apart(base):
        return slices
    return (Slice((*sources, Source(base))),)


def _filled(first: Parameters, then: Parameters) -> Parameters:
    """Two scopes in one: the second serves what the first leaves out."""
    second = dict(then)
    own = {name: setting.then(second.get(name)) for name, setting in first}
    return tuple((second | own).items())


def _text(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise RecipeError(f"{key} {value!r} must be a text")
    return value


def _refuse_cancelled(effective: Effective, tensor: str) -> None:
    method = RECIPE_METHODS[effective.method]
    if method.name not in SUM_NORMALIZED or not method.ratios_only(dict(effective.shared)):
        return
    weights = [dict(own)["weight"] for _, _, own in effective.sources if own]
    size = math.fsum(abs(weight) for weight in weights)
    if weights and abs(math.fsum(weights)) <= CANCEL_SHARE * size:  # without any it is the base
        switch = method.normalize_param
        raise RecipeRejected(
            f"the weights {weights} for {tensor!r} add up to nothing, and "
            f"{switch or method.name} divides by their sum; change a weight"
            + (f" or set {switch}: false" if switch else "")
        )


def _refuse_illegal(method: Method, effective: Effective, tensor: str) -> None:
    """What mergekit's own function would raise for."""
    for name, value in effective.shared if method.engine != "agentmerge" else ():
        parameter = next(p for p in method.shared if p.name == name)
        if parameter.whole and (value < 0 or value != int(value)):
            raise RecipeRejected(
                f"{name} {value:g} for {tensor!r} is not a whole number; write one value a slice"
            )
    for model, _, own in effective.sources:
        values = dict(own)
        shares = any(p.kind == "share" for p in method.source)
        if not (shares and own) or not 0 < values["density"] < 1:
            continue
        density, epsilon = values["density"], values["epsilon"]
        if epsilon < 0 or density + epsilon >= 1 or density - epsilon <= 0:
            raise RecipeRejected(
                f"epsilon {epsilon:g} of {model!r} for {tensor!r} takes density {density:g} out of "
                f"(0, 1); use one from 0 to below {min(density, 1 - density):g}"
            )


def _first_value(scopes: Iterable[Parameters], name: str, tensor: str, t: float) -> float | None:
    for scope in scopes:
        setting = dict(scope).get(name)
        value = None if setting is None else setting.at(tensor, t)
        if value is not None:
            return value
    return None


def renamed(value: Any, identities: Mapping[str, str]) -> Any:
    """A recipe's tree with other names for its models, of those that are known."""
    if isinstance(value, dict):
        return {
            key: identities.get(item, item)
            if key in ("model", "base_model") and isinstance(item, str)
            else renamed(item, identities)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [renamed(item, identities) for item in value]
    return value
