"""Digests of weights, made to prove a swap many times a search.

Equal on every device, as fast as reading the weights, and no protection against someone who forges
them. It knows tensors and their names, and nothing of where they come from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch

from agentmerge.merging import engines
from agentmerge.merging.device import kept
from agentmerge.merging.kernels import blocks

_PERIOD = 1 << 16


def digest(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of names, dtypes, shapes and every bit, in whatever order they come; 16 hex digits."""
    return digest_of_lines([tensor_line(name, tensor) for name, tensor in named_tensors])


def digest_of_lines(lines: Iterable[str]) -> str:
    """The digest of tensors whose lines are known."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def tensor_line(name: str, tensor: torch.Tensor) -> str:
    """What a digest takes of one tensor; equal where name, dtype, shape and every bit are."""
    return f"{name} {tensor.dtype} {list(tensor.shape)} {checksum(tensor)}"


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """The sum over 32-bit words of word times a fixed odd number of its place, as a signed 64-bit
    number."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = _by_loop(data) if engines.has_loops(data) else _by_torch(data)
    return (total + 2**63) % 2**64 - 2**63


def _by_torch(data: torch.Tensor) -> int:
    if left := -data.numel() % 4:
        data = torch.cat([data, data.new_zeros(left)])
    elif data.storage_offset() % 4:
        data = data.clone()
    words = data.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    factors = _place_factors(data.device)
    for block in blocks(words.numel(), data.device):  # whole periods, but for the last
        whole = (block.stop - block.start) // _PERIOD * _PERIOD
        first = block.start // _PERIOD
        if whole:
            periods = words[block.start : block.start + whole].view(-1, _PERIOD)
            odd = torch.arange(first, first + len(periods), device=data.device).mul_(2).add_(1)
            total += (factors * periods).sum(1).mul_(odd).sum()
        rest = words[block.start + whole : block.stop]
        if rest.numel():
            odd_one = 2 * (first + whole // _PERIOD) + 1
            total += (factors[: rest.numel()] * rest).sum() * odd_one
    return int(total)


def _by_loop(data: torch.Tensor) -> int:
    from agentmerge.merging.loops.bodies import CHECKSUM_PERIOD, loop_for

    assert CHECKSUM_PERIOD == _PERIOD
    words, rest = divmod(data.numel(), 4)
    factors = _place_factors(data.device)
    loop = loop_for("checksum", ("int32", "int64"), "float32")
    _, (total,) = loop(0, words, [data.data_ptr(), factors.data_ptr()])
    if rest:
        last = bytes(data[4 * words :].numpy()).ljust(4, b"\0")
        factor = int(factors[words % _PERIOD]) * (2 * (words // _PERIOD) + 1)
        total += int.from_bytes(last, "little", signed=True) * factor
    return total


def _place_factors(device: torch.device) -> torch.Tensor:
    def made() -> torch.Tensor:
        noise = hashlib.shake_256(b"agentmerge").digest(8 * _PERIOD)
        return torch.from_numpy(np.frombuffer(noise, dtype="<i8") | 1)

    return kept("place factors", device, made)
