"""Keys of a recipe that do nothing: mergekit passes over them in silence, and the merge is another
than its author meant. Knows the form and the methods' parameters, not what the values mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agentmerge.methods import INERT_PARAMS, Method

_WHOLE = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype",
    "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "merge_seed", "merges",
)  # fmt: skip
_MODULE = ("models", "slices", "parameters")
_SLICE = ("sources", "base_model", "parameters")
_RANGED = ("model", "layer_range", "parameters")
_SOURCE = ("model", "parameters")

#: (where, key, why it does nothing)
_Found = tuple[str, str, str]


def unread_keys(raw: Mapping[str, Any], body: Mapping[str, Any], method: Method) -> list[str]:
    """One sentence for each kind of key that no merge would notice.

    body: what holds ``models`` or ``slices``: the recipe itself, or its one module.
    """
    shared = [parameter.name for parameter in method.shared]
    every = [*(parameter.name for parameter in method.source), *shared]
    places: dict[tuple[str, str], list[str]] = {}
    for where, key, why in _all(raw, body, method, every, shared):
        places.setdefault((key, why), []).append(where)
    return [
        f"{where[0]}{key} does nothing{why}" + (f" (and {len(where) - 1} more)" * (len(where) > 1))
        for (key, why), where in places.items()
    ]


def _all(
    raw: Mapping[str, Any],
    body: Mapping[str, Any],
    method: Method,
    every: Sequence[str],
    shared: Sequence[str],
) -> Iterator[_Found]:
    yield from _strange(raw, "", _WHOLE, every)
    yield from _parameters(raw, "", every, (), method)
    at = ""
    if body is not raw:
        at = "modules.default."
        yield from _strange(body, at, _MODULE, every)
        yield from _parameters(body, at, every, (), method)
    base = raw.get("base_model")
    for index, source in enumerate(_list(body.get("models"))):
        yield from _source(source, f"{at}models[{index}].", _SOURCE, base, every, shared, method)
    for index, piece in enumerate(_list(body.get("slices"))):
        where = f"{at}slices[{index}]."
        yield from _strange(piece, where, _SLICE, every)
        yield from _parameters(piece, where, every, (), method)
        own = piece.get("base_model", base) if isinstance(piece, dict) else base
        sources = piece.get("sources") if isinstance(piece, dict) else ()
        for number, source in enumerate(_list(sources)):
            inner = f"{where}sources[{number}]."
            yield from _source(source, inner, _RANGED, own, every, shared, method)


def _source(
    source: Any,
    where: str,
    known: Sequence[str],
    base: Any,
    every: Sequence[str],
    shared: Sequence[str],
    method: Method,
) -> Iterator[_Found]:
    yield from _strange(source, where, known, every)
    if not isinstance(source, dict):
        return
    if method.sets_apart(base) and source.get("model") == base:
        if _named(source):
            yield where, "parameters", ": the base_model has none of its own"
        return
    yield from _parameters(source, where, every, shared, method)


def _strange(raw: Any, where: str, known: Sequence[str], every: Sequence[str]) -> Iterator[_Found]:
    """Keys beside ``parameters`` that nothing reads."""
    for key in raw if isinstance(raw, dict) else ():
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, 1, 0.75)
        if key in every:
            why = "; write it under parameters:"
        elif near:
            why = f"; did you mean {near[0]!r}?"
        else:
            why = f"; what is read here: {', '.join(known)}"
        yield where, str(key), why


def _parameters(
    raw: Any, where: str, every: Sequence[str], misplaced: Sequence[str], method: Method
) -> Iterator[_Found]:
    """Names under ``parameters`` that the method does not read there."""
    for key in _named(raw):
        if key in misplaced:
            why = ": it is a parameter of the whole merge or of a slice, not of one model"
        elif key in every or key in INERT_PARAMS:
            continue
        else:
            near = difflib.get_close_matches(key, every, 1, 0.75)
            reads = f"{method.name} reads {', '.join(every) or 'no parameters'}"
            why = f"; did you mean {near[0]!r}?" if near else f": {reads}"
        yield f"{where}parameters.", key, why


def _named(raw: Any) -> list[str]:
    parameters = raw.get("parameters") if isinstance(raw, dict) else None
    return [str(key) for key in parameters] if isinstance(parameters, dict) else []


def _list(raw: Any) -> Sequence[Any]:
    return raw if isinstance(raw, list) else ()
