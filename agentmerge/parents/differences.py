"""Why two models cannot be merged with each other: the first difference of each kind.

It compares configs and headers. It knows no files and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agentmerge.parents.checkpoint import EMBEDDINGS, HEADS, Checkpoint, is_one_of
from agentmerge.parents.configs import class_config, rope_of, turns_alike
from agentmerge.parents.headers import TensorHeader
from agentmerge.parents.naming import layer_of

#: Settings that change what the weights mean; where both models state them, they must agree.
MEANING = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "partial_rotary_factor",
    "num_experts_per_tok",
    "norm_topk_prob",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
)
_BEFORE_LAYERS = ("embed", "wte", "wpe")


@dataclass(frozen=True, slots=True)
class Member:
    """A model of a family. tensors: of its text model, by their names in the first model's files
    where that has them, without a tied head. tied: None where the head's bytes must tell."""

    name: str
    checkpoint: Checkpoint
    tensors: Mapping[str, TensorHeader]
    tied: bool | None


def differences(first: Member, other: Member) -> Iterator[str]:
    """The first difference of each kind, as sentences that name both models."""
    one, two = first.checkpoint.text_config, other.checkpoint.text_config

    def differ(what: str, theirs: Any, ours: Any) -> str:
        return f"{other.name}: {what} is {theirs!r}, and {ours!r} in {first.name}"

    yield from _architecture_differences(first, other)
    ours, theirs = (class_config(m.checkpoint.config).layer_counts for m in (first, other))
    if ours and theirs and ours != theirs:
        yield differ("the number of layers", theirs[0], ours[0])
    for key in MEANING:
        if None not in (one.get(key), two.get(key)) and one[key] != two[key]:
            yield differ(key, two[key], one[key])
    turns, others = rope_of(one), rope_of(two)
    if turns != others and not turns_alike(one, two):
        for key in sorted(turns.keys() | others.keys()):
            if turns.get(key) != others.get(key):
                yield differ(key, others.get(key), turns.get(key))
    yield from _vocabulary_differences(first, other)
    if None not in (first.tied, other.tied) and first.tied != other.tied:
        its, base = (
            "tied to the embedding" if member.tied else "a tensor of its own"
            for member in (other, first)
        )
        yield f"{other.name}: the head is {its}, and {base} in {first.name}"
    yield from _tensor_differences(first, other)


def is_after(name: str, layer: int | None) -> bool:
    """Behind the layers: the final norm and the head."""
    if layer is not None:
        return False
    return is_one_of(name, HEADS) or not any(word in name for word in _BEFORE_LAYERS)


def name_position(name: str) -> tuple[int, int, str]:
    """Where a tensor is in the order of a model: embeddings, layers, final norm, head."""
    index = layer_of(name)
    if index is not None:
        return 1, index, name
    if not is_after(name, None):
        return 0, 0, name
    return (3 if is_one_of(name, HEADS) else 2), 0, name


def _architecture_differences(first: Member, other: Member) -> Iterator[str]:
    """Of two whole models their architectures; of a text model and a wrapper the text model's."""
    one, two = first.checkpoint, other.checkpoint
    keys = ("architectures", "model_type") if one.wraps == two.wraps else ("model_type",)
    for key in keys:
        if key == "architectures":
            ours, theirs = one.config.get(key), two.config.get(key)
        else:
            ours, theirs = (config.text_config.get(key) for config in (one, two))
            if one.wraps != two.wraps:
                ours, theirs = (str(kind or "").removesuffix("_text") for kind in (ours, theirs))
        if ours != theirs:
            yield f"{other.name}: {key} is {theirs!r}, and {ours!r} in {first.name}"
            return


def _vocabulary_differences(first: Member, other: Member) -> Iterator[str]:
    counts = []
    for member in (first, other):
        embedding = next((n for n in member.tensors if is_one_of(n, EMBEDDINGS)), None)
        rows = member.tensors[embedding].shape[0] if embedding else None
        counts.append((rows, _written(member, "vocab_size")))
    (our_rows, our_size), (rows, size) = counts
    if rows != our_rows or (size != our_size and None not in (size, our_size)):
        yield (
            f"{other.name}: the vocabulary has {rows} embedding rows (vocab_size {size}), and "
            f"{our_rows} ({our_size}) in {first.name}; set tokenizer_source to align them"
        )


def _written(member: Member, key: str) -> Any:
    """What a config itself says of its text model, without its class."""
    config = member.checkpoint.config
    inner = config.get("text_config")
    return (inner if isinstance(inner, Mapping) else config).get(key)


def _tensor_differences(first: Member, other: Member) -> Iterator[str]:
    missing = sorted(first.tensors.keys() - other.tensors.keys(), key=name_position)
    extra = sorted(other.tensors.keys() - first.tensors.keys(), key=name_position)
    if first.tied != other.tied:  # said already, as a difference in tying
        missing = [name for name in missing if not is_one_of(name, HEADS)]
        extra = [name for name in extra if not is_one_of(name, HEADS)]
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
        name = min(shapes, key=name_position)
        yield (
            f"{other.name}: {len(shapes)} tensors have other shapes than in {first.name}, the "
            f"first is {name}: {list(other.tensors[name].shape)}, and "
            f"{list(first.tensors[name].shape)} in {first.name}"
        )


def _differs_in_rows_only(name: str, one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """A difference in vocabulary, which is said by itself."""
    return is_one_of(name, EMBEDDINGS + HEADS) and one[1:] == two[1:]
