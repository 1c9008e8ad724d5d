"""What a computation asks of a device, without one: operator calls, values read back, and memory.

On a device each call is a launch of some microseconds, and each value that Python reads waits for
all of them. ``as_on_a_device`` makes the kernels work on tensors of the CPU as they do on a device.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agentmerge.merging import kernels


class Watched(TorchDispatchMode):
    """calls: operators run, but for views. reads: how often values were given to Python.
    peak_bytes: the most that tensors made in between held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.reads = self.peak_bytes = 0
        self._bytes = 0
        self._holders: Counter[int] = Counter()

    def __enter__(self) -> Self:
        self._lists = _Lists(self)
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._lists.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        self.calls += not func.is_view
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and (_storage(leaf) not in given or self._holders[_storage(leaf)]):
                self._hold(leaf)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        key, size = _storage(tensor), tensor.untyped_storage().nbytes()
        if not self._holders[key]:
            self._bytes += size
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        self._holders[key] += 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self._bytes -= size


class _Lists(TorchFunctionMode):
    """``tolist`` is no operator on a CPU."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._watched = watched

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._watched.reads += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def as_on_a_device(block: int = kernels.DEVICE_BLOCK) -> Iterator[None]:
    """block: elements that a device works on at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "is_host", lambda device: False)
        patch.setattr(kernels, "DEVICE_BLOCK", block)
        yield
