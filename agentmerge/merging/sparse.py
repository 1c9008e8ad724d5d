"""Task vectors made sparse in other ways than ties': DARE, Model Breadcrumbs and DELLA.

Kernels as in ``kernels.py``, with its precision, its rules at the edges and its hash. Besides:
    breadcrumbs: of n elements the int(gamma * n) largest are dropped, then the next
        int(density * n) kept (which may be none); fewer are dropped at the top where the density
        needs them. Equal magnitudes count as in ties: the first in memory is the larger;
    della: an element is kept where its hash is below a probability of its own times 2**32. In each
        row (a vector is one row) it runs from density - epsilon at the smallest magnitude to
        density + epsilon at the largest, by rank; among equal magnitudes the first in memory ranks
        lower. A row of one element has the density itself (mergekit divides by zero).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from agentmerge.merging.kernels import (
    Kernel,
    Operand,
    Operands,
    Shared,
    block_size,
    blocks,
    copied,
    empty_as,
    hashes,
    largest_mask,
    present,
    random_mask,
    rescalings,
    scaled,
    sign_consensus,
    working_dtype,
)
from agentmerge.methods import METHODS, divides_by_agreeing

#: Where an operand's task vector is kept: flat, None for all of it.
MaskOf = Callable[[torch.Tensor, Operand], torch.Tensor | None]


def dropped_mask(base: torch.Tensor, operand: Operand) -> torch.Tensor | None:
    return random_mask(operand.key, base.numel(), operand.density, base.device)


def crumbs_mask(base: torch.Tensor, operand: Operand) -> torch.Tensor | None:
    """All but the smallest elements and the outliers."""
    count = base.numel()
    if operand.density >= 1 or count == 0:
        return None
    outer, inner = crumbs_window(operand, count)
    mask = largest_mask(base, operand.tensor, outer)
    return mask & ~largest_mask(base, operand.tensor, inner)


def crumbs_window(operand: Operand, count: int) -> tuple[int, int]:
    """breadcrumbs keeps what is among the first number of largest elements, not the second."""
    keep = int(max(0.0, operand.density) * count)
    below = max(0, count - keep - int(operand.gamma * count))
    return count - below, count - below - keep


def della_mask(base: torch.Tensor, operand: Operand) -> torch.Tensor | None:
    """Hashes below each element's own probability."""
    if operand.density >= 1 or base.numel() == 0:
        return None
    mask = torch.zeros(base.numel(), dtype=torch.bool, device=base.device)
    if operand.density <= 0:
        return mask
    rows = base.shape[0] if base.ndim > 1 else 1
    inner = base.numel() // rows
    step = max(1, block_size(base.device) // inner)  # whole rows, whose ranks are their own
    for first in range(0, rows, step):
        part = slice(first, first + step) if rows > 1 else slice(None)
        some = replace(operand, tensor=operand.tensor[part])
        limits = della_probabilities(base[part], some).mul_(2**32).ceil_().sub_(2**31).reshape(-1)
        start, stop = first * inner, first * inner + limits.numel()
        for block, h in hashes(operand.key, stop, base.device, start):
            torch.lt(h, limits[block.start - start : block.stop - start], out=mask[block])
    return mask


def della_probabilities(base: torch.Tensor, operand: Operand) -> torch.Tensor:
    """That an element is kept, by its rank in its row; float64, of the tensor's shape."""
    shape, working = base.shape, working_dtype([base, operand.tensor])
    size = operand.tensor.to(working).sub(base.to(working)).abs_()
    size = size.reshape(1, -1) if size.ndim < 2 else size.transpose(1, -1)
    order, last = size.argsort(dim=-1, stable=True), size.shape[-1] - 1
    steps = torch.arange(last + 1, dtype=torch.float64, device=size.device).expand(order.shape)
    ranks = torch.empty(order.shape, dtype=torch.float64, device=size.device)
    ranks.scatter_(-1, order, steps)
    place = ranks.div_(last) if last else torch.full_like(ranks, 0.5)
    spread = place.mul_(2 * operand.epsilon).add_(operand.density - operand.epsilon)
    return (spread if len(shape) < 2 else spread.transpose(1, -1)).reshape(shape)


def masked_sum(
    base: torch.Tensor,
    operands: Operands,
    masks: Sequence[torch.Tensor | None],
    shared: Shared,
    out: torch.dtype,
) -> torch.Tensor:
    """The base plus the masked, weighted task vectors; masks as in ``sign_consensus``."""
    live, factors = scaled(operands, shared)
    weights = {id(operand): factor for operand, factor in zip(live, factors, strict=True)}
    pairs = [
        (operand, mask, weights[id(operand)] * shared["lambda"])
        for operand, mask in zip(operands, masks, strict=True)
        if operand.weight and operand.density > 0
    ]
    if not any(factor for _, _, factor in pairs):
        return copied(base, out)
    if len(pairs) == 1 and pairs[0][1] is None and pairs[0][2] == 1.0:
        return copied(pairs[0][0].tensor, out)
    result, ground = empty_as(base, out), base.reshape(-1)
    working = working_dtype([base, *(operand.tensor for operand, _, _ in pairs)])
    flat, kept = [o.tensor.reshape(-1) for o, _, _ in pairs], [mask for _, mask, _ in pairs]
    scales = rescalings(ground, flat, kept, working) if shared["rescale"] else [1.0] * len(pairs)
    factors = [factor * scale for (_, _, factor), scale in zip(pairs, scales, strict=True)]
    rows = [*zip(flat, kept, factors, strict=True)]
    for block in blocks(result.numel(), result.device):
        origin = ground[block].to(working)
        total = torch.zeros_like(origin)
        for tensor, mask, factor in rows:
            delta = tensor[block].to(working).sub(origin)
            total.add_(delta if mask is None else delta.mul_(mask[block]), alpha=factor)
        result.view(-1)[block] = total.add_(origin)
    return result


def _kernel(mask_of: MaskOf, combine: Callable[..., torch.Tensor]) -> Kernel:
    def kernel(
        base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype
    ) -> torch.Tensor:
        base = present(base)
        masks = [mask_of(base, operand) for operand in operands]
        return combine(base, operands, masks, shared, out)

    return kernel


#: How each method's masks are made.
MASKS: dict[str, MaskOf] = {
    "dare_linear": dropped_mask,
    "breadcrumbs": crumbs_mask,
    "breadcrumbs_ties": crumbs_mask,
    "della": della_mask,
    "della_linear": della_mask,
}

KERNELS: dict[str, Kernel] = {
    name: _kernel(mask_of, sign_consensus if divides_by_agreeing(METHODS[name]) else masked_sum)
    for name, mask_of in MASKS.items()
}
