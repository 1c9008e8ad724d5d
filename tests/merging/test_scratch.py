"""What merging takes, by arithmetic and by measure; and page-locked memory in slabs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmerge.merging.engines import KERNELS
from agentmerge.merging.placement import Demand, plan_memory
from agentmerge.merging.scratch import scratch_bytes, slabs
from agentmerge.merging.weights import ParentFiles, Resident
from agentmerge.methods import METHODS, RECIPE_METHODS
from agentmerge.parents.layout import Layout, TensorSpec, read_layout
from tests.merging.test_device_blocks import case, watched
from tests.merging.watched import as_on_a_device

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


def layout(*shapes: tuple[int, ...], dtype: str = "bfloat16", parents: int = 3) -> Layout:
    specs = tuple(TensorSpec(f"t{i}", shape, dtype, None, False) for i, shape in enumerate(shapes))
    return Layout(specs, 1, dtype, False, tuple("abcdefgh"[:parents]))


@pytest.mark.parametrize("method", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("experts", [2, 4])
def test_a_device_gives_no_more_than_was_forecast(
    method: str, dtype: torch.dtype, experts: int
) -> None:
    known, shape, block = RECIPE_METHODS[method], (96, 1024), 1 << 14
    base, operands, shared = case(method, shape, dtype)
    experts = max(known.least, min(experts, known.most or experts))
    operands = [replace(operands[i % len(operands)], key=str(i)) for i in range(experts)]
    with as_on_a_device(block):
        seen = watched(lambda: KERNELS[method](base, operands, shared, dtype))
        name = str(dtype).removeprefix("torch.")
        forecast = scratch_bytes(
            layout(shape, dtype=name, parents=experts + 1), None, method, on_device=True
        )
    assert seen.peak_bytes <= forecast
    # What sorting takes inside is not seen, and one figure serves all of mergekit's functions.
    if known.engine == "agentmerge" and not method.startswith("della"):
        assert forecast < 2.5 * seen.peak_bytes


def test_blocks_and_not_the_largest_tensor_decide_on_a_device() -> None:
    """A head of 128,256 x 4,096: what ties takes beside the result and three masks is a block's."""
    head = layout((128_256, 4_096), parents=4)
    size = 128_256 * 4_096
    taken = scratch_bytes(head, None, "ties", on_device=True)
    assert taken < 2 * size + 5 * size + 2**30
    assert taken > scratch_bytes(head, None, "linear", on_device=True)
    moved = scratch_bytes(head, None, "ties", on_device=True, inputs=4)
    assert moved == taken + 4 * 2 * size
    # not known: as much as any of ours
    worst = max(
        scratch_bytes(head, None, name, on_device=True)
        for name, method in METHODS.items()
        if method.engine == "agentmerge"
    )
    assert scratch_bytes(head, None, None, on_device=True) == worst


def test_every_thread_that_merges_has_a_tensor() -> None:
    model = layout((2000, 1000), (1000, 1000), (1000, 1000))

    def scratch(threads: int, placement: str, method: str = "linear") -> int:
        demand = Demand(threads=threads)
        plan = plan_memory(model, method=method, demand=demand, asked=placement)  # type: ignore[arg-type]
        return next(f.host.scratch for f in plan.forecasts if f.placement == placement)

    one, two = scratch(1, "device"), scratch(2, "device")
    assert two - one == pytest.approx(2_000_000 + 4_000_000)  # the second largest, and its blocks
    assert scratch(4, "device") > scratch(3, "device") > two
    assert scratch(4, "stream") == scratch(1, "stream")  # one at a time there
    assert scratch(4, "device", "della") == scratch(1, "device", "della")  # torch's own threads


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_slabs_are_powers_of_two_that_nothing_overlaps_in(sizes: list[int]) -> None:
    places, memory = slabs(sizes, slab_bytes=2048)
    assert all(size & (size - 1) == 0 for size in memory)
    ends: dict[int, int] = {}
    for at in sorted(range(len(sizes)), key=lambda at: places[at]):
        slab, start = places[at]
        assert start >= ends.get(slab, 0)
        assert start % 512 == 0
        ends[slab] = start + sizes[at]
        assert ends[slab] <= memory[slab]


def test_tensors_a_little_above_a_power_of_two_are_not_doubled() -> None:
    sizes = [(64 << 20) + 1024] * 150  # of which torch alone makes 128 MiB each
    assert sum(slabs(sizes)[1]) < 1.15 * sum(sizes)


def test_parents_in_slabs_are_the_parents(own_family: dict[str, Path]) -> None:
    """Where the system locks no page, in plain memory of the same form."""
    files, found = ParentFiles(own_family), read_layout(own_family)
    kept = Resident(ParentFiles(own_family), found, device="meta", home="cpu")
    for model in found.parents:
        for spec in found.tensors:
            mine = kept._weights[model][spec.name]
            assert torch.equal(mine, files.tensor(model, spec.name))
            assert mine.dtype == files.tensor(model, spec.name).dtype
            assert mine.is_contiguous()
