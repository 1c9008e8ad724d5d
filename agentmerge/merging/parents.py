"""A family of parents kept in memory, and the merges of it.

It knows weights: it loads every parent once, changes none of them, and makes a merge tensor by
tensor. It knows nothing of live models, tasks or scores, and it writes no files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open

from agentmerge.errors import CandidateFailed, ParentError
from agentmerge.merging.engines import KERNELS
from agentmerge.merging.headers import content_fingerprint, read_headers
from agentmerge.merging.kernels import Operand
from agentmerge.merging.plan import Layout, MergePlan, TensorPlan, plan, read_layout
from agentmerge.methods import METHODS
from agentmerge.recipe import Recipe

_DIGEST_BLOCK = 1 << 16


class TensorSource(Protocol):
    """Where a merge reads its parents from: memory here, files in ``export``.

    ``identities`` maps each model's name to its content fingerprint.
    """

    @property
    def identities(self) -> Mapping[str, str]: ...

    def tensor(self, model: str, name: str) -> torch.Tensor:
        """A parent's tensor, as stored; the caller must not change it."""
        ...


class Family:
    """Parents resident on one device. Built by ``open``."""

    def __init__(
        self,
        layout: Layout,
        identities: Mapping[str, str],
        weights: Mapping[str, Mapping[str, torch.Tensor]],
        dtype: str | None,
    ) -> None:
        self.layout = layout
        self.identities = dict(identities)
        self._weights = weights
        self._dtype = dtype

    @classmethod
    def open(
        cls,
        paths: Mapping[str, Path],
        *,
        base: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> Family:
        """Load every parent once, at its stored dtype.

        paths: the name that recipes use -> local directory. base: the one the others are compared
            with. dtype: of merged tensors where a recipe names none; by default as stored.

        Raises:
            ParentError: the models cannot be merged with each other (every reason), or a model
                holds a number that is not finite.
        """
        layout = read_layout(paths, base)
        identities = {name: content_fingerprint(path) for name, path in paths.items()}
        weights = {name: _load(name, path, layout, device) for name, path in paths.items()}
        return cls(layout, identities, weights, dtype)

    def tensor(self, model: str, name: str) -> torch.Tensor:
        """A parent's own tensor, as stored; it must not be changed."""
        return self._weights[model][name]

    def plan(self, recipe: Recipe) -> MergePlan:
        """How ``recipe`` (canonical) makes each tensor; errors are ``merging.plan.plan``'s."""
        return plan(recipe, self.layout, dtype=self._dtype)

    def merge(self, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the merge once, in the layout's order, each a fresh tensor.

        Raises:
            RecipeRejected: at the call, before anything is merged.
            CandidateFailed: at the tensor that holds a number that is not finite.
        """
        return merged_tensors(self.plan(recipe), self)


def merged_tensors(
    merge_plan: MergePlan, source: TensorSource
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a plan, merged from ``source``."""
    for item in merge_plan.tensors:
        yield item.spec.name, merged_tensor(item, merge_plan.merge_seed, source)


@torch.no_grad()
def merged_tensor(item: TensorPlan, merge_seed: int | None, source: TensorSource) -> torch.Tensor:
    """One tensor of a plan, fresh and contiguous.

    Raises:
        CandidateFailed: it holds a number that is not finite.
    """
    effective = item.effective
    random = METHODS[effective.method].random
    base: torch.Tensor | None = None
    operands = []
    for (model, name), (_, _, own) in zip(item.inputs, effective.sources, strict=True):
        tensor = source.tensor(model, name)
        if model == effective.base_model:
            base = tensor
            continue
        values = dict(own)
        key = mask_key(merge_seed or 0, source.identities[model], name) if random else ""
        operands.append(Operand(tensor, key=key, **values))
    out = getattr(torch, item.dtype)
    result = KERNELS[effective.method](base, operands, dict(effective.shared), out)
    if not _is_finite(result):
        raise CandidateFailed(
            f"merging {item.spec.name!r} by {effective.method} gave numbers that are not finite "
            f"in {item.dtype}; the weights are too large"
        )
    return result


def mask_key(merge_seed: int, fingerprint: str, tensor: str) -> str:
    """What a random mask depends on: nothing of the recipe but its seed.

    tensor: the name under which the parent has it, whatever layer it goes to.
    """
    return f"{merge_seed}\n{fingerprint}\n{tensor}"


@torch.no_grad()
def digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of names, dtypes, shapes and every bit, in whatever order they come; 16 hex digits.

    Made to prove a swap, many times a search: equal on every device, about as fast as reading the
    weights, and no protection against someone who forges them.
    """
    lines = sorted(
        f"{name} {tensor.dtype} {list(tensor.shape)} {_checksum(tensor)}"
        for name, tensor in named_tensors
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _checksum(tensor: torch.Tensor) -> int:
    """The sum over 32-bit words of word times a fixed odd number of its place, modulo 2**64."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if left := -data.numel() % 4:
        data = torch.cat([data, data.new_zeros(left)])
    elif data.storage_offset() % 4:
        data = data.clone()
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    factors = _place_factors(str(data.device))
    for index, start in enumerate(range(0, words.numel(), _DIGEST_BLOCK)):
        block = words[start : start + _DIGEST_BLOCK]
        total += (factors[: block.numel()] * block).sum() * (2 * index + 1)
    return int(total)


@lru_cache(maxsize=8)
def _place_factors(device: str) -> torch.Tensor:
    noise = hashlib.shake_256(b"agentmerge").digest(8 * _DIGEST_BLOCK)
    return torch.from_numpy(np.frombuffer(noise, dtype="<i8") | 1).to(device)


def _load(name: str, path: Path, layout: Layout, device: str) -> dict[str, torch.Tensor]:
    wanted = set(layout.by_name)
    by_file: dict[Path, list[str]] = {}
    for tensor, header in read_headers(path).items():
        if tensor in wanted:
            by_file.setdefault(header.file, []).append(tensor)
    weights = {}
    for file, tensors in by_file.items():
        with safe_open(file, framework="pt") as stream:
            for tensor in tensors:
                # Copied out of the mapped file: what happens to the file later changes nothing.
                weights[tensor] = stream.get_tensor(tensor).to(device, copy=True)
    broken = sorted(tensor for tensor, value in weights.items() if not _is_finite(value))
    if broken:
        raise ParentError(
            f"{name}: {len(broken)} tensors hold numbers that are not finite, the first is "
            f"{broken[0]}; the model is broken"
        )
    return weights


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # one pass; both are NaN if anything is
    return math.isfinite(low) and math.isfinite(high)
