"""Merge methods that mergekit's own functions compute, behind the kernels' contract.

They are too rarely searched for a kernel of their own to be worth it. Values are computed in
float32 (float64 where a parent is) and rounded once, as the kernels do; mergekit is imported at the
first call. Rules of ours, where mergekit's function gives a little less, or something random:
    end points: nuslerp and multislerp with all of the weight on one model give that model bit for
        bit, sce with select_topk 0 and nearswap with t 0 the base;
    arcee_fusion estimates quantiles of large tensors on a sample: it is drawn from a fixed seed
        here, so that a merge is always the same on a kind of device.
What mergekit cannot merge (multislerp of vectors that cancel) is a failed candidate.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from agentmerge.errors import CandidateFailed
from agentmerge.merging.kernels import Kernel, Operands, Shared, copied
from agentmerge.methods import METHODS

_SAMPLE_SEED = 0
#: The parameter at whose zero nothing is added to the base.
_SHARES = {"sce": "select_topk", "nearswap": "t"}


def borrowed(
    base: torch.Tensor | None, operands: Operands, shared: Shared, out: torch.dtype, *, method: str
) -> torch.Tensor:
    """One tensor by mergekit's ``method``."""
    end = _end_point(method, base, operands, shared)
    if end is not None:
        return copied(end, out)
    from mergekit import merge_methods
    from mergekit.merge_methods.base import TensorGroup

    tensors = [*([] if base is None else [base]), *(operand.tensor for operand in operands)]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    working = torch.float64 if wide else torch.float32
    group = TensorGroup.from_tensors(
        [tensor.to(working) for tensor in tensors], base_index=None if base is None else 0
    )
    parameters: dict[str, Any] = dict(shared)
    for name, _ in METHODS[method].source_params:
        parameters[name] = [getattr(operand, name) for operand in operands]
    device = tensors[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        _generator(device).manual_seed(_SAMPLE_SEED)
        try:
            (result,) = merge_methods.get(method)([group], parameters=parameters)
        except ValueError as error:
            raise CandidateFailed(f"mergekit's {method} could not merge: {error}") from error
    return copied(result.contiguous(), out)


def _generator(device: torch.device) -> torch.Generator:
    """Of one device: ``torch.manual_seed`` also queues a call for each that is not there."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _end_point(
    method: str, base: torch.Tensor | None, operands: Operands, shared: Shared
) -> torch.Tensor | None:
    """The parent that the merge is, if it is one."""
    if not operands or operands[0].tensor.numel() == 0:
        return base if base is not None else operands[0].tensor
    if method in _SHARES and shared[_SHARES[method]] <= 0:
        return base
    if not METHODS[method].source:
        return None
    live = [operand for operand in operands if operand.weight]
    whole = METHODS[method].ratios_only(shared) or (live and live[0].weight == 1.0)
    return live[0].tensor if len(live) == 1 and whole else None


KERNELS: dict[str, Kernel] = {
    name: partial(borrowed, method=name)
    for name, method in METHODS.items()
    if method.engine == "mergekit"
}
