"""A family of parents, and the merges of it.

It knows weights: it reads every parent, changes none of them, and makes a merge tensor by tensor.
It knows nothing of live models, tasks or scores, and it writes no files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from agentmerge.errors import CandidateFailed, ParentError
from agentmerge.merging.engines import KERNELS
from agentmerge.merging.kernels import Operand
from agentmerge.merging.placement import Placement, plan_memory
from agentmerge.merging.plan import Layout, MergePlan, TensorPlan, plan, read_layout
from agentmerge.merging.weights import ParentFiles, ParentSource, Resident, TensorSource
from agentmerge.methods import METHODS
from agentmerge.recipe import Recipe

_DIGEST_BLOCK = 1 << 16


class Family:
    """Parents that can be merged with each other, and where their weights are. Built by ``open``.

    placement: "device" or "host" (all in memory, on the device or copied there tensor by tensor),
        or "stream" (read from the files for every merge). The bits of a merge are the same in all.
    """

    def __init__(
        self, layout: Layout, source: ParentSource, placement: Placement, dtype: str | None
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.identities = dict(source.identities)
        self._source = source
        self._dtype = dtype

    @classmethod
    def open(
        cls,
        paths: Mapping[str, Path],
        *,
        base: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        placement: Placement | Literal["auto"] = "auto",
    ) -> Family:
        """Read every parent once; keep them in memory unless they are to be streamed.

        paths: the name that recipes use -> local directory. base: the one the others are compared
            with. dtype: of merged tensors where a recipe names none; by default as stored.
        placement: "auto" takes the first of device, host and stream that fits beside one live
            model in the memory that is free now.

        Raises:
            ParentError: the models cannot be merged with each other (every reason), or a model
                holds a number that is not finite.
            RunFailed: they do not fit, with how much is needed.
        """
        layout = read_layout(paths, base)
        if placement == "auto":
            placement = plan_memory(layout, dtype=dtype, device=device).placement
        source: ParentSource = ParentFiles(paths, device)
        if placement != "stream":
            home = device if placement == "device" else "cpu"
            source = Resident(ParentFiles(paths), layout, device=device, home=home)
        for model in layout.parents:
            _refuse_broken(model, layout, source)
        return cls(layout, source, placement, dtype)

    def tensor(self, model: str, name: str) -> torch.Tensor:
        """A parent's own tensor, as stored; it must not be changed."""
        return self._source.tensor(model, name)

    def plan(self, recipe: Recipe) -> MergePlan:
        """How ``recipe`` (canonical) makes each tensor; errors are ``merging.plan.plan``'s."""
        return plan(recipe, self.layout, dtype=self._dtype)

    def merge(self, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the merge once, in the layout's order, each a fresh tensor.

        Raises:
            RecipeRejected: at the call, before anything is merged.
            CandidateFailed: at the tensor that holds a number that is not finite.
            RunFailed: a file that the parents are streamed from is gone, or was changed.
        """
        return self._verified(merged_tensors(self.plan(recipe), self))

    def _verified(
        self, tensors: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors
        self._source.verify()


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


def _refuse_broken(model: str, layout: Layout, source: TensorSource) -> None:
    broken = sorted(
        spec.name for spec in layout.tensors if not _is_finite(source.tensor(model, spec.name))
    )
    if broken:
        raise ParentError(
            f"{model}: {len(broken)} tensors hold numbers that are not finite, the first is "
            f"{broken[0]}; the model is broken"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # one pass; both are NaN if anything is
    return math.isfinite(low) and math.isfinite(high)
