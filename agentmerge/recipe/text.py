"""A recipe's parts from mergekit YAML and back. Knows the form, not what the values mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentmerge.errors import RecipeError
from agentmerge.methods import INERT_PARAMS, SWITCHES
from agentmerge.recipe.parts import MOST_LAYERS, Parameters, Setting, Slice, Source
from agentmerge.recipe.stages import as_mapping
from agentmerge.system.bounded import read_text
from agentmerge.system.yaml_text import read_documents, twice_text


def load_yaml(text: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """What a recipe says, of several documents as one mapping (``stages``), and a note on each key
    that is written twice."""
    if isinstance(text, Mapping):
        return text, []
    source = str(text) if isinstance(text, Path) else "the recipe"
    if isinstance(text, Path):
        text = read_text(text, RecipeError, missing=f"no recipe at {source}")
    documents = read_documents(text, source, RecipeError)
    for written in documents:
        if not isinstance(written.value, dict):
            kind = type(written.value).__name__
            raise RecipeError(f"{source} must be a mapping with 'merge_method', not {kind}")
    notes = [twice_text(key, at) for written in documents for key, at in written.twice.items()]
    return as_mapping([written.value for written in documents]), notes


def one_module(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The mapping that holds ``models`` or ``slices``, and the module's own ``parameters``.

    mergekit writes them under ``modules: {default: ...}``, the one module of a language model.
    """
    modules = raw.get("modules")
    if not modules:
        return raw, {}
    if raw.get("models") or raw.get("slices"):
        raise RecipeError("a recipe needs one of 'models:', 'slices:' and 'modules:', not two")
    if not isinstance(modules, dict) or list(modules) != ["default"]:
        named = ", ".join(map(str, modules)) if isinstance(modules, dict) else repr(modules)
        raise RecipeError(
            f"modules {named} is not supported: a language model has one module, 'default'; write "
            "modules: {default: {slices: ...}}, or slices: alone"
        )
    module = modules["default"]
    if not isinstance(module, dict):
        raise RecipeError(f"modules.default must be a mapping, not {module!r}")
    return module, {"parameters": module.get("parameters")}


def read_body(body: Mapping[str, Any], where: str) -> tuple[Slice, ...]:
    """``models`` or ``slices``; ``models`` are one slice of whole models."""
    for key in ("models", "slices"):
        if not isinstance(body.get(key) or [], list):
            raise RecipeError(f"{where}{key} must be a list, not {body[key]!r}")
    if bool(body.get("models")) == bool(body.get("slices")):
        what = where.rstrip(".") or "a recipe"
        raise RecipeError(f"{what} needs either 'models:' or 'slices:', and not both")
    if body.get("slices"):
        rows = enumerate(body["slices"])
        return tuple(read_slice(item, f"{where}slices[{i}]") for i, item in rows)
    sources = (read_source(item, f"{where}models[{i}]") for i, item in enumerate(body["models"]))
    return (Slice(tuple(replace(source, layer_range=None) for source in sources)),)


def read_slice(raw: Any, where: str) -> Slice:
    if not isinstance(raw, dict) or not isinstance(raw.get("sources"), list) or not raw["sources"]:
        raise RecipeError(f"{where} needs a list of 'sources'")
    sources = tuple(
        read_source(item, f"{where}.sources[{i}]", ranged=True)
        for i, item in enumerate(raw["sources"])
    )
    base = raw.get("base_model")
    return Slice(
        sources,
        None if base is None else read_model_name(base, f"{where}.base_model"),
        read_parameters(raw.get("parameters"), f"{where}.parameters"),
    )


def read_source(raw: Any, where: str, ranged: bool = False) -> Source:
    if not isinstance(raw, dict) or "model" not in raw:
        raise RecipeError(f"{where} needs a 'model'")
    layers = raw.get("layer_range")
    if ranged and layers is None:
        raise RecipeError(f"{where} needs a 'layer_range' [start, end]")
    if layers is not None:
        whole = isinstance(layers, (list, tuple)) and [type(x) for x in layers] == [int, int]
        if not whole or not 0 <= layers[0] < layers[1]:
            raise RecipeError(f"{where}.layer_range {layers} must be [start, end], start < end")
        if layers[1] > MOST_LAYERS:
            raise RecipeError(
                f"{where}.layer_range {layers} is deeper than any model ({MOST_LAYERS:,} layers); "
                "correct it"
            )
        layers = (layers[0], layers[1])
    return Source(
        read_model_name(raw["model"], f"{where}.model"),
        layers,
        read_parameters(raw.get("parameters"), f"{where}.parameters"),
    )


def read_model_name(raw: Any, where: str) -> str:
    if isinstance(raw, dict):  # mergekit's long form: {model: {path, revision}, lora, ...}
        inner = raw.get("model")
        path = inner.get("path") if isinstance(inner, dict) else inner
        if path and not raw.get("lora") and not raw.get("override_architecture"):
            return str(path)
        raise RecipeError(f"{where} {raw!r} is not supported; name the model by path or hub id")
    return str(raw)


def read_parameters(raw: Any, where: str) -> Parameters:
    if raw is None:
        return ()
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} must be a mapping, not {raw!r}")
    return tuple(
        (str(name), Setting.parse(value, f"{where}.{name}"))
        for name, value in raw.items()
        if name not in INERT_PARAMS
    )


def parameters_yaml(parameters: Parameters) -> dict[str, Any]:
    return {
        name: bool(setting.entries[0][1][0])
        if name in SWITCHES and setting.is_scalar
        else setting.to_yaml()
        for name, setting in parameters
    }


def source_yaml(source: Source) -> dict[str, Any]:
    body: dict[str, Any] = {"model": source.model}
    if source.layer_range is not None:
        body["layer_range"] = list(source.layer_range)
    if source.parameters:
        body["parameters"] = parameters_yaml(source.parameters)
    return body


def slice_yaml(piece: Slice) -> dict[str, Any]:
    body: dict[str, Any] = {"sources": [source_yaml(source) for source in piece.sources]}
    if piece.base_model is not None:
        body["base_model"] = piece.base_model
    if piece.parameters:
        body["parameters"] = parameters_yaml(piece.parameters)
    return body
