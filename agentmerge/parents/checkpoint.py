"""One model as its config and headers show it: its text part, its tying, and its own faults.

It knows the names by which models call layers, embeddings and heads, and finds the text model
inside a multimodal wrapper. It knows nothing of other models, and no torch. It reads weights in
one case only: where a config says "tied" and the file has a head all the same, the head's bytes
are compared with the embedding's, when that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentmerge.parents.configs import class_config, live_name
from agentmerge.parents.headers import (
    DTYPES,
    TensorHeader,
    num_layers,
    read_config,
    read_headers,
    same_bytes,
    text_config,
)
from agentmerge.parents.naming import LAYER, layer_of

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "lm_loss.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "word_embedding.weight",
    "tok_embeddings.weight",
    "tokens_embed.weight",
    "embeddings.weight",
)
#: Of tables, not of weights at low precision.
_WHOLE_NUMBERS = ("I64", "I32", "I16", "U64", "U32", "U16", "BOOL")
_HEAD_BIASES = tuple(head.replace("weight", "bias") for head in HEADS)
#: Computed from the config, never weights; old checkpoints carry them.
_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attn\.masked_bias"
    r"|attention\.masked_bias|position_ids)$"
)
#: Causal masks that old checkpoints carry: 1s and 0s of shape [1, 1, n, n] beside the attention.
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|causal_mask|mask)$")


def is_one_of(name: str, endings: tuple[str, ...]) -> bool:
    """Outside the layers, and called one of ``endings`` whatever its prefix."""
    return layer_of(name) is None and any(
        name == ending or name.endswith("." + ending) for ending in endings
    )


def is_derived(name: str, header: TensorHeader) -> bool:
    """Whether a tensor is no weight but something that the class computes by itself."""
    if _DERIVED.search(name):
        return True
    *ones, rows, columns = (0, 0, *header.shape)[-4:] if len(header.shape) > 1 else (0, 0, 1)
    is_square = rows == columns > 0 and set(ones) <= {0, 1}
    return is_square and _MASK.search(name) is not None


@dataclass(frozen=True)
class Checkpoint:
    """A model's config and every tensor of its files."""

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]

    @classmethod
    def read(cls, directory: Path) -> Checkpoint:
        """Raises ParentError where the directory holds no whole model."""
        return cls(read_config(directory), read_headers(directory))

    @property
    def wraps(self) -> bool:
        """A text model is one part of it."""
        return class_config(self.config).wraps

    @property
    def text_config(self) -> dict[str, Any]:
        return text_config(self.config)

    @cached_property
    def text(self) -> dict[str, str]:
        """The text model's tensors: name without the wrapper's and the model's prefix -> name in
        the files. Derived tensors are none; a tied head is one, if the files hold it. All tensors
        of a model that is no wrapper are its text model's."""
        prefix = self._prefix
        if prefix is None:
            return {}
        found: dict[str, str] = {}
        for name, header in self.tensors.items():
            inner = self._inner_name(name, prefix)
            if inner is None or is_derived(name, header):
                continue
            inner = live_name(self.config, inner)
            found[name if inner in found else inner] = name
        return found

    def _inner_name(self, name: str, prefix: str) -> str | None:
        """What a tensor of the text model is called in any other model; None of one outside it."""
        inner = name.removeprefix(prefix)
        if is_one_of(name, HEADS):
            return next(ending for ending in HEADS if name.endswith(ending))
        if not self.wraps:
            return inner
        if is_one_of(name, _HEAD_BIASES):
            return next(ending for ending in _HEAD_BIASES if name.endswith(ending))
        if name.startswith(prefix) and inner.partition(".")[0] not in self._towers:
            return inner
        return None

    @cached_property
    def _towers(self) -> set[str]:
        """What is beside the text model's layers and has layers of its own, further down."""
        prefix = self._prefix or ""
        beside = {stack.removeprefix(prefix) for stack in self._stacks if stack.startswith(prefix)}
        beside.discard((self._text_stack or "").removeprefix(prefix))
        return {stack.partition(".")[0] for stack in beside if "." in stack}

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """The tensors outside the text model of a wrapper."""
        inside = set(self.text.values())
        return tuple(
            name
            for name, header in self.tensors.items()
            if self.wraps and name not in inside and not is_derived(name, header)
        )

    def layer_of(self, name: str) -> int | None:
        """The layer of a tensor of the text model; None where its number counts something else."""
        layer = layer_of(name)
        if layer is None or self._depth_of(name) != self.depth:
            return None
        return layer

    def _depth_of(self, name: str) -> int | None:
        match = LAYER.search(name)
        return None if match is None else self._stacks.get(name[: match.start()].rstrip("."))

    @property
    def depth(self) -> int:
        """How many layers the text model has: in the files, or as the config says without any."""
        return self._stacks.get(self._text_stack or "") or num_layers(self.config)

    @cached_property
    def _stacks(self) -> dict[str, int]:
        """Every stack of layers: what is before the layer's number -> how many there are."""
        stacks: dict[str, int] = {}
        for name in self.tensors:
            match = LAYER.search(name)
            if match:
                stack = name[: match.start()].rstrip(".")
                stacks[stack] = max(stacks.get(stack, 0), int(match[1]) + 1)
        return stacks

    @cached_property
    def _text_stack(self) -> str | None:
        """The stack of as many layers as the config says and, of several, the one beside the token
        embedding, or else with most tensors; the only one, where there is one."""
        if len(self._stacks) < 2:
            return next(iter(self._stacks), None)
        stacks = list(self._stacks)
        beside = [
            stack
            for stack in stacks
            if any(_parent_of(stack) + ending in self.tensors for ending in EMBEDDINGS)
        ]
        if self.wraps:
            stacks = beside
        counts = class_config(self.config).layer_counts
        deep = [stack for stack in stacks if self._stacks[stack] in counts]
        if self.wraps or len(deep) < 2:
            return _only(deep) or _only(stacks)
        return max(deep, key=lambda stack: (stack in beside, self._tensors_in(stack)))

    def _tensors_in(self, stack: str) -> int:
        return sum(name.startswith(stack + ".") for name in self.tensors)

    @property
    def _prefix(self) -> str | None:
        if self._text_stack is None:
            return None if self._stacks else ""
        return _parent_of(self._text_stack)

    def faults(self) -> Iterator[str]:
        """What makes this model unfit for any merge."""
        quantisation = self.config.get("quantization_config") or self.text_config.get(
            "quantization_config"
        )
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            yield (
                f"it is quantised ({method or 'quantization_config is set'}); name the model at "
                "full precision"
            )
        odd = [
            name for name in self.text.values() if self.tensors[name].dtype not in DTYPES.values()
        ]
        whole = bool(odd) and self.tensors[odd[0]].dtype in _WHOLE_NUMBERS
        if odd and not quantisation:
            yield (
                f"{len(odd)} tensors are not floating-point numbers that can be averaged, the "
                f"first is {odd[0]} of {self.tensors[odd[0]].dtype}"
                + ("" if whole else "; name the model at full precision")
            )
        if class_config(self.config).encodes:
            yield (
                "it is an encoder-decoder model, and only models that continue a text "
                "(decoder-only) can be merged here"
            )
        elif self._text_stack is None and self._stacks:
            yield (
                f"it has several stacks of layers ({', '.join(sorted(self._stacks))}), and it "
                "cannot be told which is the text model's"
            )
        counts = class_config(self.config).layer_counts
        if not counts:
            yield "config.json does not say how many layers it has, nor does its class"
        elif self.depth not in counts:
            yield f"config.json says {counts[0]} layers and the files hold {self.depth}"

    def tying(self, *, compare: bool) -> tuple[bool | None, list[str]]:
        """Whether the head is the embedding, decided from the files, and what contradicts it.

        compare: read the head's bytes where that decides; without, the answer is None there.
        """
        means = class_config(self.config)
        says = means.tied
        written = any("tie_word_embeddings" in part for part in (self.config, self._written_text))
        word = "says" if written else "does not say otherwise than its class, which means"
        head = next((own for own in self.text.values() if is_one_of(own, HEADS)), None)
        embedding = next((own for own in self.text.values() if is_one_of(own, EMBEDDINGS)), None)
        if head is None:
            # Of a class whose head has a name of its own nothing can be said from here.
            lacks = says is False and embedding is not None and not self._has_other_head(embedding)
            fault = f"config.json {word} tie_word_embeddings: false and the files hold no head"
            fault += "" if written else "; write tie_word_embeddings: true into config.json"
            return says is not False or lacks, [fault] if lacks else []
        if says is False or embedding is None:
            return False, []
        one, two = self.tensors[head], self.tensors[embedding]
        same = (one.shape, one.dtype) == (two.shape, two.dtype)
        if same and one.file.suffix == ".safetensors":
            if not compare:
                return None, []
            same = same_bytes(one, two)
        if says and not same:
            fault = (
                f"config.json {word} tie_word_embeddings: true and {head} differs from {embedding}"
            )
            return False, [f"{fault}; correct the one that is wrong"]
        return same, []

    @property
    def _written_text(self) -> Mapping[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, Mapping) else {}

    def _has_other_head(self, embedding: str) -> bool:
        """Whether another matrix outside the layers has a row a token."""
        rows = self.tensors[embedding].shape[0]
        shapes = {
            own: self.tensors[own].shape for own in self.text.values() if self.layer_of(own) is None
        }
        return any(
            len(shape) == 2 and shape[0] == rows and own != embedding
            for own, shape in shapes.items()
        )


def _only(stacks: list[str]) -> str | None:
    return stacks[0] if len(stacks) == 1 else None


def parts_of(names: Iterable[str]) -> str:
    """The modules that tensors belong to, with how many are in each: ``vision_tower (38)``."""
    counts: dict[str, int] = {}
    for name in names:
        module, _, rest = name.removeprefix("model.").partition(".")
        counts[module if rest else name] = counts.get(module if rest else name, 0) + 1
    return ", ".join(f"{module} ({count})" for module, count in counts.items())


def _parent_of(stack: str) -> str:
    """What is before the last part of a stack's name: ``model.`` of ``model.layers``."""
    return stack[: len(stack) - len(stack.rpartition(".")[2])]
