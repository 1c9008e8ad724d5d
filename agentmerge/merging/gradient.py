"""d loss / d weight from d loss / d merged tensor, as each tensor's gradient appears.

A merge's gradient in a model's weight is the gradient in every merged tensor, contracted with what
that weight adds to the tensor. Which elements reach the merge is held as it was: random and
magnitude masks, the factors that bring them back to their norm, the elected signs and who agrees
with them. With theta a parent's tensor, tau = theta - base, G = d loss / d W and l for lambda:

    linear                 W = sum w theta            d w_m = <G, theta_m>
    task_arithmetic, sums  W = base + l sum w r K tau d w_m = l <G, r K_m tau_m>
    with normalize         w / S for w, S = sum w     d w_m = l (<G, x_m> - <G, mean x>) / S
    agreeing signs         as sums, K_m only where the element's sign is the elected one
    with normalize         each element by the sum S_e of the weights that agree there:
                           d w_m = l sum_e G_e K_me (x_me - mean_e x) / S_e

(r: rescaling, K: kept, x: r K tau or theta.) Of a model whose weight is zero, elements agree as
they would just above zero; where no weight agrees at all, a normalized element counts as constant.
Merged weights that are rounded to a narrow dtype are taken as if they were not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agentmerge.contracts.worker import TensorSlope
from agentmerge.errors import CandidateFailed
from agentmerge.merging import sparse
from agentmerge.merging.device import kept
from agentmerge.merging.engines import fused_agreement, fused_slopes
from agentmerge.merging.family import operands_of
from agentmerge.merging.kernels import (
    Operands,
    Shared,
    blocks,
    magnitude_mask,
    present,
    rescalings,
    summed,
    working_dtype,
)
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.merging.plan import MergePlan, TensorPlan
from agentmerge.merging.weights import TensorSource
from agentmerge.methods import METHODS, RECIPE_METHODS, divides_by_agreeing
from agentmerge.recipe import CANCEL_SHARE

#: How each method's masks are made; others keep everything.
_MASKS: dict[str, sparse.MaskOf] = {
    "ties": lambda base, operand: magnitude_mask(base, operand.tensor, operand.density),
    "dare_ties": sparse.dropped_mask,
    **sparse.MASKS,
}


@dataclass(frozen=True, slots=True)
class Frozen:
    """What is held fixed of one tensor's merge, an entry an operand.

    kept: elements that reach the merge, one bit each; None for all. scales: what rescaling
    multiplies them by.
    """

    kept: tuple[torch.Tensor | None, ...]
    scales: tuple[float, ...]


class MergeGradient:
    """The slopes of one merge; ``add`` takes each tensor's gradient, in any number of parts.

    Masks are made at a tensor's first part and kept, an eighth of a byte an element and model.

    Raises:
        CandidateFailed: the method's weights have no slope.
    """

    def __init__(
        self, merge_plan: MergePlan, source: TensorSource, statistics: Statistics | None = None
    ) -> None:
        self._plan = merge_plan
        self._statistics = statistics or Statistics()
        self._source = source
        self._by_name = merge_plan.by_name
        self._frozen: dict[str, Frozen] = {}
        self._sums: dict[str, torch.Tensor] = {}
        method = RECIPE_METHODS[merge_plan.tensors[0].effective.method]
        if not method.differentiable:
            known = ", ".join(sorted(m.name for m in METHODS.values() if m.differentiable))
            raise CandidateFailed(f"{method.name} has no gradient; these have one: {known}")

    @torch.no_grad()
    def add(self, name: str, gradient: torch.Tensor) -> None:
        """gradient: of the merged tensor ``name``, in its shape; it is not kept."""
        item = self._by_name[name]
        base, operands = operands_of(item, self._plan.merge_seed, self._source, self._statistics)
        shared = dict(item.effective.shared)
        if name not in self._frozen:
            self._frozen[name] = frozen(
                item.effective.method, base, operands, shared, self._statistics
            )
        agreeing = divides_by_agreeing(METHODS[item.effective.method])
        contract = contract_agreeing if agreeing else contract_sum
        found = contract(base, operands, self._frozen[name], shared, gradient)
        self._sums[name] = self._sums[name] + found if name in self._sums else found

    def slopes(self) -> tuple[TensorSlope, ...]:
        """Of every tensor of the plan; zero for those that no gradient came to.

        Raises:
            CandidateFailed: one is not finite.
        """
        return tuple(self._slope(item) for item in self._plan.tensors)

    def _slope(self, item: TensorPlan) -> TensorSlope:
        spec, effective = item.spec, item.effective
        models = [model for model, _, own in effective.sources if own]
        sums = self._sums.get(spec.name)
        *weights, scale = [0.0] * (len(models) + 1) if sums is None else sums.tolist()
        if not all(map(math.isfinite, (*weights, scale))):
            raise CandidateFailed(f"the loss's gradient in {spec.name!r} is not finite")
        has_scale = "lambda" in dict(effective.shared)
        return TensorSlope(
            spec.name,
            spec.layer,
            spec.after,
            tuple(zip(models, weights, strict=True)),
            scale if has_scale else 0.0,
        )


@torch.no_grad()
def frozen(
    method: str,
    base: torch.Tensor | None,
    operands: Operands,
    shared: Shared,
    statistics: Statistics,
) -> Frozen:
    """Masks, rescaling and agreement of one tensor, as the merge at these weights has them."""
    if method not in _MASKS:
        return Frozen((None,) * len(operands), (1.0,) * len(operands))
    base = present(base)
    mask_of, agreeing = _MASKS[method], divides_by_agreeing(METHODS[method])
    if found := fused_agreement(method, base, operands, shared, statistics):
        return Frozen(tuple(found[0]), tuple(found[1]))
    ground, working = base.reshape(-1), working_dtype([base, *(o.tensor for o in operands)])
    masks = [mask_of(base, operand) for operand in operands]
    scales = (1.0,) * len(operands)
    if shared["rescale"]:
        flat = [operand.tensor.reshape(-1) for operand in operands]
        scales = tuple(rescalings(ground, flat, masks, working))
    if agreeing:
        masks = list(_agreement(ground, operands, masks, scales, working))
    return Frozen(tuple(None if mask is None else pack_bits(mask) for mask in masks), scales)


def _agreement(
    ground: torch.Tensor,
    operands: Operands,
    masks: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    working: torch.dtype,
) -> torch.Tensor:
    """(operands, elements): kept, and of the sign of the weighted sum (``sign_consensus``'s)."""
    agree = torch.zeros((len(operands), ground.numel()), dtype=torch.bool, device=ground.device)
    for block in blocks(ground.numel(), ground.device):
        origin = ground[block].to(working)
        rows = origin.new_zeros((len(operands), origin.numel()))
        for row, operand, mask, scale in zip(rows, operands, masks, scales, strict=True):
            if operand.density > 0:
                torch.sub(operand.tensor.reshape(-1)[block].to(working), origin, out=row)
                row.mul_((operand.weight or 1.0) * scale)
                if mask is not None:
                    row.mul_(mask[block])
        live = [i for i, operand in enumerate(operands) if operand.weight]
        total = summed(rows[live]) if live else torch.zeros_like(origin)
        untouched = ~rows[live].any(0)  # here the first weight above zero will elect the sign
        total[untouched] = summed(rows[:, untouched])
        sign = torch.where(total >= 0, 1, -1).to(working)
        agree[:, block] = rows.mul_(sign) > 0
    return agree


def contract_sum(
    base: torch.Tensor | None,
    operands: Operands,
    held: Frozen,
    shared: Shared,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """(operands + 1,) float64: d loss / d each weight, and last d loss / d lambda."""
    weights = torch.tensor([o.weight for o in operands], dtype=torch.float64)
    ratios = bool(shared["normalize"])
    # Ratios do not change with the origin, and near the models nothing cancels.
    ground = operands[0].tensor if base is None and ratios else base
    by_loop = fused_slopes(ground, operands, held.kept, held.scales, gradient, normalize=False)
    if by_loop is not None:
        pulls = by_loop[:-1]
    else:
        pulls = torch.zeros(len(operands), dtype=torch.float64, device=gradient.device)
        flat = gradient.reshape(-1)
        working = working_dtype([gradient, *(operand.tensor for operand in operands)])
        for block in blocks(flat.numel(), flat.device):
            rows = _added(ground, operands, held, block, working)
            pulls += (rows @ flat[block].to(working)).double()
        pulls = pulls.cpu()
    total = float(weights.sum()) if ratios else 1.0
    mean = weights @ pulls / total
    slopes = shared.get("lambda", 1.0) * (pulls - ratios * mean) / total
    return torch.cat([slopes, mean.reshape(1)])


def contract_agreeing(
    base: torch.Tensor | None,
    operands: Operands,
    held: Frozen,
    shared: Shared,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """As ``contract_sum``, where each element is normalized by the weights that agree in it."""
    ratios = bool(shared["normalize"])
    found = fused_slopes(base, operands, held.kept, held.scales, gradient, normalize=ratios)
    if found is None:
        found = _agreeing(base, operands, held, ratios, gradient)
    found[:-1] *= shared["lambda"]
    return found


def _agreeing(
    base: torch.Tensor | None,
    operands: Operands,
    held: Frozen,
    normalize: bool,
    gradient: torch.Tensor,
) -> torch.Tensor:
    flat = gradient.reshape(-1)
    working = working_dtype([gradient, *(operand.tensor for operand in operands)])
    weights = torch.tensor([o.weight for o in operands], dtype=working, device=flat.device)
    found = torch.zeros(len(operands) + 1, dtype=torch.float64, device=flat.device)
    for block in blocks(flat.numel(), flat.device):
        pull = flat[block].to(working)
        rows = _added(base, operands, held, block, working)
        mean = weights @ rows
        if normalize:
            agree = torch.stack([unpack_bits(present(bits), block, working) for bits in held.kept])
            shares = weights @ agree
            some = (shares.abs() > CANCEL_SHARE * (weights.abs() @ agree)).to(working)
            shares = shares * some + (1 - some)  # multiplied: filling a mask is ten times slower
            mean /= shares
            pull_each = pull * some / shares
            found[:-1] += (rows @ pull_each - agree @ (mean * pull_each)).double()
        else:
            found[:-1] += (rows @ pull).double()
        found[-1] += (mean @ pull).double()
    return found.cpu()


def _added(
    ground: torch.Tensor | None,
    operands: Operands,
    held: Frozen,
    block: slice,
    working: torch.dtype,
) -> torch.Tensor:
    """(operands, block): what a weight of one adds of each operand."""
    rows = []
    for operand, bits, scale in zip(operands, held.kept, held.scales, strict=True):
        row = operand.tensor.reshape(-1)[block].to(working, copy=True)
        if ground is not None:
            row -= ground.reshape(-1)[block]
        if bits is not None:
            row *= unpack_bits(bits, block, working)
        rows.append(row.mul_(scale))
    return torch.stack(rows)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A flat boolean tensor -> bytes, the first element in the lowest bit."""
    padded = torch.nn.functional.pad(mask, (0, -mask.numel() % 8)).reshape(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) << places).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, block: slice, dtype: torch.dtype) -> torch.Tensor:
    """Elements ``block`` of the mask as ones and zeros; its start is a multiple of eight."""
    span = packed[block.start // 8 : -(-block.stop // 8)]
    bits = torch.index_select(_bits_of_a_byte(dtype, packed.device), 0, span.int())
    return bits.reshape(-1)[: block.stop - block.start]


def _bits_of_a_byte(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 8): looked up, which is twice as fast as shifting."""

    def made() -> torch.Tensor:
        return ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).to(dtype)

    return kept(f"bits as {dtype}", device, made)
