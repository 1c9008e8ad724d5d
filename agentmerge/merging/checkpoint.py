"""One model as its config and headers show it: its text part, its tying, and its own faults.

It knows the names by which models call layers, embeddings and heads, and finds the text model
inside a multimodal wrapper. It knows nothing of other models, and no torch. It reads weights in
one case only: where a config says "tied" and the file has a head all the same, the head's bytes
are compared with the embedding's, when that is asked for.
"""

from __future__ import annotations

import re
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

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
_LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")
#: Computed from the config, never weights; old checkpoints carry them.
_DERIVED = ("rotary_emb.inv_freq",)


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name: its first part that is a number."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def at_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    return _LAYER.sub(str(layer), name, count=1)


def is_one_of(name: str, endings: tuple[str, ...]) -> bool:
    """Outside the layers, and called one of ``endings`` whatever its prefix."""
    return layer_of(name) is None and any(
        name == ending or name.endswith("." + ending) for ending in endings
    )


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
        return isinstance(self.config.get("text_config"), Mapping)

    @property
    def text_config(self) -> dict[str, Any]:
        return text_config(self.config)

    @cached_property
    def text(self) -> dict[str, str]:
        """The text model's tensors: name without the wrapper's and the model's prefix -> name in
        the files. Derived tensors are none; a tied head is one, if the files hold it."""
        prefix = self._prefix
        if prefix is None:
            return {}
        others = {
            stack.removeprefix(prefix).partition(".")[0]
            for stack in self._stacks
            if stack != self._text_stack and stack.startswith(prefix)
        }
        found = {}
        for name in self.tensors:
            inner = name.removeprefix(prefix)
            if name.endswith(_DERIVED):
                continue
            if is_one_of(name, HEADS):
                found[next(e for e in HEADS if name.endswith(e))] = name
            elif name.startswith(prefix) and inner.partition(".")[0] not in others:
                found[inner] = name
        return found

    @cached_property
    def carried(self) -> tuple[str, ...]:
        """The tensors outside the text model."""
        inside = set(self.text.values())
        return tuple(
            name for name in self.tensors if name not in inside and not name.endswith(_DERIVED)
        )

    @cached_property
    def _stacks(self) -> dict[str, int]:
        """Every stack of layers: what is before the layer's number -> how many there are."""
        stacks: dict[str, int] = {}
        for name in self.tensors:
            match = _LAYER.search(name)
            if match:
                stack = name[: match.start()].rstrip(".")
                stacks[stack] = max(stacks.get(stack, 0), int(match[1]) + 1)
        return stacks

    @cached_property
    def _text_stack(self) -> str | None:
        """The stack beside the token embedding; the only one, where there is one."""
        if len(self._stacks) < 2:
            return next(iter(self._stacks), None)
        if not self.wraps:
            return None
        beside = [
            stack
            for stack in self._stacks
            if any(_parent_of(stack) + ending in self.tensors for ending in EMBEDDINGS)
        ]
        return beside[0] if len(beside) == 1 else None

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
        if odd and not quantisation:
            yield (
                f"{len(odd)} tensors are not floating-point numbers that can be averaged, the "
                f"first is {odd[0]} of {self.tensors[odd[0]].dtype}; name the model at full "
                "precision"
            )
        if self._text_stack is None and self._stacks:
            yield (
                f"it has several stacks of layers ({', '.join(sorted(self._stacks))}), and it "
                "cannot be told which is the text model's"
            )
        depth = self._stacks.get(self._text_stack or "", 0)
        if depth and num_layers(self.config) != depth:
            yield f"config.json says {num_layers(self.config)} layers and the files hold {depth}"

    def tying(self, *, compare: bool) -> tuple[bool | None, list[str]]:
        """Whether the head is the embedding, decided from the files, and what contradicts it.

        compare: read the head's bytes where that decides; without, the answer is None there.
        """
        says = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        head = next((self.text[name] for name in HEADS if name in self.text), None)
        embedding = next((self.text[name] for name in EMBEDDINGS if name in self.text), None)
        if head is None:
            fault = "config.json says tie_word_embeddings: false and the files hold no head"
            return True, [fault] if says is False else []
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
                f"config.json says tie_word_embeddings: true and {head} differs from {embedding}"
            )
            return False, [f"{fault}; correct the one that is wrong"]
        return same, []


def _parent_of(stack: str) -> str:
    """What is before the last part of a stack's name: ``model.`` of ``model.layers``."""
    return stack[: len(stack) - len(stack.rpartition(".")[2])]


def checked_num_layers(config: Mapping[str, Any]) -> int | None:
    """``num_layers``, or None where the config does not say."""
    try:
        return num_layers(config)
    except ParentError:
        return None
