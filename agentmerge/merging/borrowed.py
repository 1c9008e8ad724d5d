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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    tensors = [*([] if base is None else [base]), *(operand.tensor for operand in operands)]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    working = torch.float64 if wide else torch.float32
    given = [tensor.to(working) for tensor in tensors]
    names = [name for name, _ in METHODS[method].source_params]
    own = [{name: getattr(operand, name) for name in names} for operand in operands]
    with seeded(tensors[0].device, _SAMPLE_SEED):
        try:
            result = by_mergekit(merge_methods.get(method), given, base is not None, own, shared)
        except ValueError as error:
            raise CandidateFailed(f"mergekit's {method} could not merge: {error}") from error
    return copied(result.contiguous(), out)


def by_mergekit(
    function: Any,
    tensors: Sequence[torch.Tensor],
    has_base: bool,
    own: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
) -> torch.Tensor:
    """One of mergekit's merge methods on tensors, the base first where there is one."""
    from mergekit.merge_methods.base import TensorGroup

    group = TensorGroup.from_tensors(tensors, base_index=0 if has_base else None)
    parameters: dict[str, Any] = dict(shared)
    for name in own[0]:
        parameters[name] = [values[name] for values in own]
    (result,) = function([group], parameters=parameters)
    merged: torch.Tensor = result
    return merged


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, torch's generators have a seed; after it they go on as if nothing had been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues calls for devices
        if device.type == "cuda":  # that are not there
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        yield


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
