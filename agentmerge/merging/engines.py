"""Which function computes each method: the one place where that is decided.

Every method has a torch kernel, which takes any tensor. Where all tensors of a merge are in this
machine's memory and of a kind that the fused loops know, those serve, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from agentmerge.merging import borrowed, foreign, kernels, sparse
from agentmerge.merging.kernels import Kernel, Operands, Shared
from agentmerge.merging.loops.remembered import Statistics

try:
    from agentmerge.merging.loops import fused, machine
    from agentmerge.merging.loops import gradient as loops
except ImportError:  # no llvmlite
    _FAST = False
else:
    _FAST = machine.fits_processor()

KERNELS: dict[str, Kernel] = kernels.KERNELS | sparse.KERNELS | borrowed.KERNELS

_LOOP_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def merge_tensor(
    method: str,
    base: torch.Tensor | None,
    operands: Operands,
    shared: Shared,
    target: torch.Tensor,
    statistics: Statistics,
) -> bool:
    """Write one tensor's merge into ``target``; whether all of it is finite."""
    tensors = [target, *([] if base is None else [base]), *(o.tensor for o in operands)]
    if has_fused(method) and all(map(_suits, tensors)) and len(operands) <= fused.MOST_EXPERTS:
        return fused.FUSED[method](fused.Merge(base, operands, shared, target, statistics))
    kernel = KERNELS.get(method) or partial(foreign.foreign, method=method)
    merged = kernel(base, operands, shared, target.dtype)
    target.copy_(merged)
    return is_finite(merged)


def has_fused(method: str) -> bool:
    """Whether this machine has a fused loop for a method, for tensors that suit it."""
    return _FAST and method in fused.FUSED


def fused_agreement(
    method: str, base: torch.Tensor, operands: Operands, shared: Shared, statistics: Statistics
) -> tuple[list[torch.Tensor], list[float]] | None:
    """``loops.gradient.agreement``, where it serves."""
    tensors = [base, *(operand.tensor for operand in operands)]
    if not _FAST or method not in fused.CONSENSUS or len(operands) > fused.MOST_EXPERTS:
        return None
    if not all(map(_suits, tensors)):
        return None
    return loops.agreement(method, base, operands, shared, statistics)


def fused_slopes(
    ground: torch.Tensor | None,
    operands: Operands,
    kept: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    gradient: torch.Tensor,
    *,
    normalize: bool,
) -> torch.Tensor | None:
    """``loops.gradient.slopes``, where it serves."""
    if not _FAST or ground is None or len(operands) > fused.MOST_EXPERTS:
        return None
    if not all(map(has_loops, (gradient, ground, *(operand.tensor for operand in operands)))):
        return None
    return loops.slopes(ground, operands, kept, scales, gradient, normalize=normalize)


def has_loops(tensor: torch.Tensor) -> bool:
    """Whether loops can run on a tensor, as far as its place in memory goes."""
    return (
        _FAST
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and 0 < tensor.numel() < 1 << 32
    )


def _suits(tensor: torch.Tensor) -> bool:
    return has_loops(tensor) and tensor.dtype in _LOOP_DTYPES


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds nothing that is infinite or not a number."""
    if not tensor.numel():
        return True
    ends = torch.stack(torch.aminmax(tensor))  # one pass; both are NaN if anything is
    return bool(torch.isfinite(ends).all())
