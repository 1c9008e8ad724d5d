"""What is kept in a device's memory between merges, and how it is given back; which device is
current.

It knows devices and tensors, and nothing of merges.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

_kept: dict[tuple[str, str], torch.Tensor] = {}


def kept(name: str, device: torch.device, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A constant on a device, made at its first use there; until ``release``."""
    key = name, str(device)
    if key not in _kept:
        _kept[key] = make().to(device)
    return _kept[key]


def release(device: str) -> None:
    """Give back what a worker that has ended still holds of a device: constants that were kept
    there, and what torch's allocator keeps for later."""
    kind = torch.device(device).type
    if kind == "cpu":
        return
    for key in [key for key in _kept if torch.device(key[1]).type == kind]:
        del _kept[key]
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def current(device: str) -> AbstractContextManager[object]:
    """Within: ``device`` is this thread's current one. It is each thread's own setting, and what
    launches by itself (Triton's kernels, cuBLAS) goes there and not to where its tensors are."""
    return torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
