"""What a family of parents has in common: the tensors that a merge of them must make.

It reads configs and safetensors headers, and finds every reason why the models cannot be merged
with each other. The tensor list comes from the files, never from a table of architectures. It
reads weights in one case only: where a config says "tied" and the file has a head all the same,
the head's bytes are compared with the embedding's. It knows no recipe and no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentmerge.errors import ParentError
from agentmerge.merging.headers import (
    DTYPES,
    TensorHeader,
    num_layers,
    read_config,
    read_headers,
    same_bytes,
    text_config,
)

_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_BEFORE_LAYERS = ("embed", "wte", "wpe")
#: Computed from the config, never weights; old checkpoints carry them.
_DERIVED = ("rotary_emb.inv_freq",)
#: Settings that change what the weights mean; where both models state them, they must agree.
_MEANING = ("num_attention_heads", "num_key_value_heads", "hidden_act", "partial_rotary_factor")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the merged model.

    layer: the output layer, None outside the layers; there ``after`` tells the final norm and the
        head from the embeddings. dtype: torch's name of the stored one, the widest if parents
        differ.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    after: bool


@dataclass(frozen=True)
class Layout:
    """What every merge of a family is made of.

    tensors: in order, embeddings first, head last. dtype: the one that holds most elements.
    tied: the head is the embedding and so is not in ``tensors``.
    parents: the names that a recipe may use.
    """

    tensors: tuple[TensorSpec, ...]
    num_layers: int
    dtype: str
    tied: bool
    parents: tuple[str, ...]

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.tensors}

    @property
    def parameters(self) -> int:
        """How many numbers a merged model has."""
        return sum(math.prod(spec.shape) for spec in self.tensors)


def read_layout(parents: Mapping[str, Path], base: str | None = None) -> Layout:
    """The layout of a family.

    parents: the user's model name -> local directory. base: the one the others are compared with,
        by default the first.

    Raises:
        ParentError: every reason why these models cannot be merged, one a line.
    """
    found, faults = _survey(parents, base)
    if faults:
        raise ParentError("\n".join(faults))
    first = found[0]
    specs = []
    for name, header in first.tensors.items():
        dtype = header.dtype
        for other in found[1:]:
            dtype = _wider(dtype, other.tensors[name].dtype)
        index = layer_of(name)
        specs.append(TensorSpec(name, header.shape, dtype, index, _is_after(name, index)))
    sizes: Counter[str] = Counter()
    for spec in specs:
        sizes[spec.dtype] += math.prod(spec.shape)
    return Layout(
        tensors=tuple(sorted(specs, key=_position)),
        num_layers=num_layers(first.config),
        dtype=sizes.most_common(1)[0][0],
        tied=first.tied,
        parents=tuple(parents),
    )


def layout_faults(parents: Mapping[str, Path], base: str | None = None) -> list[str]:
    """Every reason why these models cannot be merged, one sentence each; empty if there is none."""
    return _survey(parents, base)[1]


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name: its first part that is a number."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def at_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    return _LAYER.sub(str(layer), name, count=1)


@dataclass(frozen=True, slots=True)
class _Parent:
    name: str
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]  # without a tied head and without derived ones
    tied: bool


def _survey(parents: Mapping[str, Path], base: str | None) -> tuple[list[_Parent], list[str]]:
    """The parents, the base or else the first in front, and every fault."""
    if not parents or (base is not None and base not in parents):
        return [], [f"base model {base!r} is not among the models {', '.join(map(repr, parents))}"]
    names = sorted(parents, key=lambda name: name != (base or next(iter(parents))))
    found, faults = [], []
    for name in names:
        try:
            config, headers = read_config(parents[name]), read_headers(parents[name])
            faults += [f"{name}: {fault}" for fault in _own_faults(config, headers)]
            tied, tying_faults = _tying(config, headers)
        except ParentError as error:
            faults.append(f"{name}: {error}")
            continue
        faults += [f"{name}: {fault}" for fault in tying_faults]
        kept = {
            key: header
            for key, header in headers.items()
            if not key.endswith(_DERIVED) and not (tied and _is_one_of(key, _HEADS))
        }
        found.append(_Parent(name, config, kept, tied))
    for other in found[1:]:
        faults += _differences(found[0], other)
    return found, faults


def _own_faults(config: Mapping[str, Any], headers: Mapping[str, TensorHeader]) -> Iterator[str]:
    quantisation = config.get("quantization_config") or text_config(config).get(
        "quantization_config"
    )
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        yield (
            f"it is quantised ({method or 'quantization_config is set'}); name the model at full "
            "precision"
        )
    odd = [name for name, header in headers.items() if header.dtype not in DTYPES.values()]
    if odd and not quantisation:
        yield (
            f"{len(odd)} tensors are not floating-point numbers that can be averaged, the first "
            f"is {odd[0]} of {headers[odd[0]].dtype}; name the model at full precision"
        )
    stacks = sorted({_stack(name) for name in headers if layer_of(name) is not None})
    if len(stacks) > 1:
        yield (
            f"it has several stacks of layers ({', '.join(stacks)}); only a text model by itself "
            "can be merged"
        )
    depth = 1 + max((layer_of(name) or 0 for name in headers), default=0)
    if len(stacks) == 1 and num_layers(config) != depth:
        yield f"config.json says {num_layers(config)} layers and the files hold {depth}"


def _tying(
    config: Mapping[str, Any], headers: Mapping[str, TensorHeader]
) -> tuple[bool, list[str]]:
    """Whether the head is the embedding, decided from the files, and what contradicts it."""
    says = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    head = next((name for name in headers if _is_one_of(name, _HEADS)), None)
    embedding = next((name for name in headers if _is_one_of(name, _EMBEDDINGS)), None)
    if head is None:
        fault = "config.json says tie_word_embeddings: false and the files hold no head"
        return True, [fault] if says is False else []
    if says is False or embedding is None:
        return False, []
    same = same_bytes(headers[head], headers[embedding])
    if says and not same:
        fault = f"config.json says tie_word_embeddings: true and {head} differs from {embedding}"
        return False, [f"{fault}; correct the one that is wrong"]
    return same, []


def _differences(first: _Parent, other: _Parent) -> Iterator[str]:
    """The first difference of each kind, as sentences that name both models."""
    one, two = text_config(first.config), text_config(other.config)

    def differ(what: str, theirs: Any, ours: Any) -> str:
        return f"{other.name}: {what} is {theirs!r}, and {ours!r} in {first.name}"

    if first.config.get("architectures") != other.config.get("architectures"):
        yield differ(
            "architectures", other.config.get("architectures"), first.config.get("architectures")
        )
    elif one.get("model_type") != two.get("model_type"):
        yield differ("model_type", two.get("model_type"), one.get("model_type"))
    if num_layers(one) != num_layers(two):
        yield differ("the number of layers", num_layers(two), num_layers(one))
    for key in _MEANING:
        if None not in (one.get(key), two.get(key)) and one[key] != two[key]:
            yield differ(key, two[key], one[key])
    ours, theirs = _rope(one), _rope(two)
    for key in sorted(ours.keys() & theirs.keys()):
        if ours[key] != theirs[key]:
            yield differ(key, theirs[key], ours[key])
    yield from _vocabulary_differences(first, other)
    if first.tied != other.tied:
        words = {True: "tied to the embedding", False: "a tensor of its own"}
        yield (
            f"{other.name}: the head is {words[other.tied]}, and {words[first.tied]} in "
            f"{first.name}"
        )
    yield from _tensor_differences(first, other)


def _vocabulary_differences(first: _Parent, other: _Parent) -> Iterator[str]:
    counts = []
    for parent in (first, other):
        embedding = next((n for n in parent.tensors if _is_one_of(n, _EMBEDDINGS)), None)
        rows = parent.tensors[embedding].shape[0] if embedding else None
        counts.append((rows, text_config(parent.config).get("vocab_size")))
    if counts[0] != counts[1]:
        (our_rows, our_size), (rows, size) = counts
        yield (
            f"{other.name}: the vocabulary has {rows} embedding rows (vocab_size {size}), and "
            f"{our_rows} ({our_size}) in {first.name}; models must share one vocabulary"
        )


def _tensor_differences(first: _Parent, other: _Parent) -> Iterator[str]:
    missing = sorted(first.tensors.keys() - other.tensors.keys(), key=_name_position)
    extra = sorted(other.tensors.keys() - first.tensors.keys(), key=_name_position)
    if first.tied != other.tied:  # said already, as a difference in tying
        missing = [name for name in missing if not _is_one_of(name, _HEADS)]
        extra = [name for name in extra if not _is_one_of(name, _HEADS)]
    if missing:
        yield (
            f"{other.name}: {len(missing)} tensors of {first.name} are missing, the first is "
            f"{missing[0]}"
        )
    if extra:
        yield f"{other.name}: {len(extra)} tensors are not in {first.name}, the first is {extra[0]}"
    shapes = [
        name
        for name, header in first.tensors.items()
        if name in other.tensors and other.tensors[name].shape != header.shape
        if not _differs_in_rows_only(name, header.shape, other.tensors[name].shape)
    ]
    if shapes:
        name = min(shapes, key=_name_position)
        yield (
            f"{other.name}: {len(shapes)} tensors have other shapes than in {first.name}, the "
            f"first is {name}: {list(other.tensors[name].shape)}, and "
            f"{list(first.tensors[name].shape)} in {first.name}"
        )


def _differs_in_rows_only(name: str, one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """A difference in vocabulary, which is said by itself."""
    return _is_one_of(name, _EMBEDDINGS + _HEADS) and one[1:] == two[1:]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings in one form for old and new configs; empty where they vary by layer type."""
    now = config.get("rope_parameters")
    if isinstance(now, Mapping) and any(isinstance(value, Mapping) for value in now.values()):
        return {}
    scaling = dict(now or config.get("rope_scaling") or {})
    # 10000 is what every architecture with rope means by saying nothing.
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    scaling.pop("partial_rotary_factor", None)
    return {
        "rope_theta": float(theta),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **scaling},
    }


def _wider(one: str, two: str) -> str:
    """The narrowest dtype that holds both exactly."""
    if one == two:
        return one
    if {one, two} == {"float16", "bfloat16"}:
        return "float32"
    return max(one, two, key=("bfloat16", "float16", "float32", "float64").index)


def _is_one_of(name: str, endings: tuple[str, ...]) -> bool:
    """Outside the layers, and called one of ``endings`` whatever its prefix."""
    return layer_of(name) is None and any(
        name == ending or name.endswith("." + ending) for ending in endings
    )


def _is_after(name: str, layer: int | None) -> bool:
    if layer is not None:
        return False
    return _is_one_of(name, _HEADS) or not any(word in name for word in _BEFORE_LAYERS)


def _stack(name: str) -> str:
    match = _LAYER.search(name)
    return name[: match.start()].rstrip(".") if match else ""


def _position(spec: TensorSpec) -> tuple[int, int, str]:
    return _name_position(spec.name)


def _name_position(name: str) -> tuple[int, int, str]:
    index = layer_of(name)
    if index is not None:
        return 1, index, name
    if not _is_after(name, None):
        return 0, 0, name
    return (3 if _is_one_of(name, _HEADS) else 2), 0, name
