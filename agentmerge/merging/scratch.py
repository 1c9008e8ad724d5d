"""What merging takes beside the parents and the model: arithmetic, by method and place.

It knows shapes and dtypes; it reads no weights. The figures are of ``kernels.py``, ``fused.py`` and
mergekit's functions; tests hold them against what those allocate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import nlargest

from agentmerge.methods import RECIPE_METHODS, divides_by_agreeing
from agentmerge.parents.layout import Layout, TensorSpec

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

#: Blocks in flight of kernels and digests in the host's memory, whatever the tensor's size.
_BLOCKS_BYTES = 4_000_000
#: What torch and mergekit take beside inputs and result: bytes an element, and those for each
#: expert. Upper bounds: selecting takes more where many magnitudes are equal.
_BLOCKWISE = ("passthrough", "linear", "slerp", "task_arithmetic")
_MASKING, _MASKING_METHODS = (1.0, 1.2), ("dare_ties", "dare_linear")
_SORTING = (34.0, 0.0)
_MERGEKIT = (20.0, 20.0)
_STACKING, _STACKING_METHODS = (20.0, 28.0), ("ram", "ramplus_tl")
#: The same of the fused loops: magnitudes in float32 while an order is made, or a bit an element.
_RANKING, RANKING_METHODS = (4.0, 0.0), ("ties", "breadcrumbs", "breadcrumbs_ties")
_RANKING_BLOCKS_BYTES = 12_000_000
_FUSED_MASKING = (0.0, 0.125)

#: On a device whole are the result and a mask an expert (and two more while one is made); bytes an
#: element of a block come beside: arrays of the working type, an expert more where signs are
#: elected, and what finding the largest, or ranking rows, takes at least.
_DEVICE_MASKING = (2.0, 1.0)
_DEVICE_ARRAYS, _ELECTING_ARRAYS = 6, 3
_COPYING_ARRAYS, _COPYING_METHODS = 2, ("passthrough",)
_DEVICE_RANKING, _DEVICE_SORTING = 48, 96

#: Of page-locked memory; a power of two.
SLAB_BYTES = 1 << 30
_ALIGNED = 512


def scratch_bytes(
    layout: Layout,
    dtype: str | None,
    method: str | None,
    *,
    fused: bool = False,
    on_device: bool = False,
    inputs: int = 0,
    threads: int = 1,
) -> int:
    """The most that merging tensors takes at once.

    dtype: of the result, by default as stored. method: where it is not known, the one of ours that
        takes most on a device, and nothing beside the result in the host's memory. fused: by
        loops. inputs: parents' tensors that come and go with each merged one. threads: tensors
        merged at a time.
    """
    need = _on_device if on_device else _in_host
    experts = max(1, len(layout.parents) - 1)
    each = (
        need(spec, method, experts, fused) + inputs * size_bytes(spec) + size_bytes(spec, dtype)
        for spec in layout.tensors
    )
    blocks = 0
    if not on_device:
        ranks = fused and method in RANKING_METHODS
        blocks = (_RANKING_BLOCKS_BYTES if ranks else _BLOCKS_BYTES) * threads
    return sum(map(int, nlargest(threads, each))) + blocks


def size_bytes(spec: TensorSpec, dtype: str | None = None) -> int:
    """A tensor, in ``dtype`` or as stored."""
    return math.prod(spec.shape) * WIDTHS[dtype or spec.dtype]


def _in_host(spec: TensorSpec, method: str | None, experts: int, fused: bool) -> float:
    fixed, each = 0.0, 0.0
    if method is None or method in _BLOCKWISE:
        pass
    elif fused:
        fixed, each = _RANKING if method in RANKING_METHODS else _FUSED_MASKING
    elif RECIPE_METHODS[method].engine != "agentmerge":
        fixed, each = _theirs(method)
    else:
        fixed, each = _MASKING if method in _MASKING_METHODS else _SORTING
    return math.prod(spec.shape) * (fixed + each * experts)


def _on_device(spec: TensorSpec, method: str | None, experts: int, fused: bool) -> float:
    from agentmerge.merging.kernels import DEVICE_BLOCK

    count = math.prod(spec.shape)
    method = method or "della"
    if RECIPE_METHODS[method].engine != "agentmerge":
        fixed, each = _theirs(method)
        return count * (fixed + each * experts)
    fixed, each = (0.0, 0.0) if method in _BLOCKWISE else _DEVICE_MASKING
    arrays = _COPYING_ARRAYS if method in _COPYING_METHODS else _DEVICE_ARRAYS
    arrays += _ELECTING_ARRAYS * experts * divides_by_agreeing(RECIPE_METHODS[method])
    block = arrays * (4 if WIDTHS[spec.dtype] == 2 else 8)
    if method in RANKING_METHODS:
        block = max(block, _DEVICE_RANKING)
    elif "epsilon" in dict(RECIPE_METHODS[method].source_params):
        block = max(block, _DEVICE_SORTING)
    return count * (fixed + each * experts) + block * min(count, DEVICE_BLOCK)


def _theirs(method: str) -> tuple[float, float]:
    """Of a foreign method no more is known than that it is written as most of mergekit's are."""
    stacks = method in _STACKING_METHODS or RECIPE_METHODS[method].engine == "foreign"
    return _STACKING if stacks else _MERGEKIT


def slabs(
    sizes: Sequence[int], slab_bytes: int = SLAB_BYTES
) -> tuple[list[tuple[int, int]], list[int]]:
    """Where each of several tensors lies in slabs of page-locked memory: (slab, offset in bytes)
    each; and the slabs' sizes.

    torch rounds every page-locked allocation up to a power of two, up to twice the tensor. Slabs
    are such powers, shared by tensors of any size; a larger tensor has one of its own.
    """
    places: dict[int, tuple[int, int]] = {}
    used: list[int] = []
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        room = -(-sizes[at] // _ALIGNED) * _ALIGNED
        fits = (i for i, taken in enumerate(used) if taken + room <= slab_bytes)
        slab = next(fits, len(used))
        if slab == len(used):
            used.append(0)
        places[at] = slab, used[slab]
        used[slab] += room
    rounded = [1 << max(0, taken - 1).bit_length() for taken in used]
    return [places[at] for at in range(len(sizes))], rounded
