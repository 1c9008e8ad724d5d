"""What ``contraction.py`` computes with masks and gradients, by loops: the same in less time.

For tensors in memory of the CPU; ``engines.py`` says when these serve.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from agentmerge.merging.kernels import Operands, Shared
from agentmerge.merging.loops.bodies import loop_for
from agentmerge.merging.loops.fused import CONSENSUS, AnyMask, Bits, Merge, rescaling, run
from agentmerge.merging.loops.orders import dtype_names, working_name
from agentmerge.merging.loops.remembered import Statistics


def agreement(
    method: str, base: torch.Tensor, operands: Operands, shared: Shared, statistics: Statistics
) -> tuple[list[torch.Tensor], list[float]]:
    """Of a method in ``CONSENSUS``: where each operand is kept and of the elected sign, a bit an
    element (as ``contraction.pack_bits`` has them), and what rescaling multiplies it by."""
    size = -(-base.numel() // 8)
    packed = [torch.zeros(size, dtype=torch.uint8) for _ in operands]
    scales = [1.0] * len(operands)
    some = [at for at, operand in enumerate(operands) if operand.density > 0]
    if not some:
        return packed, scales
    live = [operands[at] for at in some]
    masks: list[AnyMask] = CONSENSUS[method](base, live, statistics)
    if shared["rescale"]:
        found, masks = rescaling(Merge(base, live, shared, base, statistics), live, masks)
        for at, scale in zip(some, found, strict=True):
            scales[at] = scale
    tensors = [operand.tensor for operand in live]
    loop = loop_for(
        "agreement",
        dtype_names(base, base, *tensors),
        working_name(base, *tensors),
        tuple(mask.kind for mask in masks),
        tuple(operand.weight != 0 for operand in live),
    )
    addresses = [0, base.data_ptr(), *(tensor.data_ptr() for tensor in tensors)]
    addresses += [mask.bits.ctypes.data if isinstance(mask, Bits) else 0 for mask in masks]
    addresses += [packed[at].data_ptr() for at in some]
    reals = [(operands[at].weight or 1.0) * scales[at] for at in some]
    run(loop, base.numel(), masks, addresses, reals, writes_bits=True)
    return packed, scales


def slopes(
    ground: torch.Tensor,
    operands: Operands,
    kept: Sequence[torch.Tensor | None],
    scales: Sequence[float],
    gradient: torch.Tensor,
    *,
    normalize: bool,
) -> torch.Tensor:
    """(operands + 1,) float64: the gradient times what each weight adds, and all of them.

    normalize: as ``contraction.contract_agreeing`` does for each element.
    """
    tensors = [operand.tensor for operand in operands]
    loop = loop_for(
        "slopes",
        dtype_names(gradient, ground, *tensors),
        working_name(gradient, ground, *tensors),
        tuple(bits is not None for bits in kept),
        normalize,
    )
    addresses = [gradient.data_ptr(), ground.data_ptr(), *(t.data_ptr() for t in tensors)]
    addresses += [0 if bits is None else bits.data_ptr() for bits in kept]
    reals = [*(operand.weight for operand in operands), *scales]
    sums, _ = loop(0, gradient.numel(), addresses, reals, sums=len(operands) + 1)
    return torch.from_numpy(np.array(sums))
