"""Which function computes each method of the table: all of them, by name."""

from __future__ import annotations

from agentmerge.merging import borrowed, kernels, sparse
from agentmerge.merging.kernels import Kernel

KERNELS: dict[str, Kernel] = kernels.KERNELS | sparse.KERNELS | borrowed.KERNELS
