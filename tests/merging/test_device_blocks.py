"""Merging on a device: as few operator calls for a large tensor as for a small one, the same bits.

The kernels run here on tensors of the CPU, in blocks as on a device; ``test_devices.py`` runs them
on the devices that there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmerge.merging import digests, kernels
from agentmerge.merging.engines import KERNELS, is_finite
from agentmerge.merging.gradient import contract_agreeing, contract_sum, frozen
from agentmerge.merging.kernels import BLOCK, Operand, blocks, largest_mask
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.merging.sparse import MASKS
from agentmerge.methods import METHODS, RECIPE_METHODS, divides_by_agreeing
from tests.merging.watched import Watched, as_on_a_device

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")

SMALL, LARGE = (3, BLOCK), (12, BLOCK)
#: What is asked of every method that has such a parameter; the rest are its defaults.
ASKED = {"normalize": 1.0, "lambda": 0.9, "t": 0.3, "select_topk": 0.4, "max_iter": 2.0, "tol": 0.0}


def case(
    method: str, shape: tuple[int, ...], dtype: torch.dtype, rescale: float = 1.0
) -> tuple[torch.Tensor | None, list[Operand], dict[str, float]]:
    """A base, two experts (or as many as the method takes), and all that it is told."""
    known = RECIPE_METHODS[method]
    draw = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=draw).to(dtype)
    experts = [(base + 0.1 * torch.randn(shape, generator=draw)).to(dtype) for _ in range(2)]
    operands = [
        Operand(
            expert,
            weight,
            density,
            f"key {weight}",
            gamma=0.05,
            epsilon=0.1,
            pair=str(weight),
            scale=0.7,
        )
        for expert, weight, density in zip(experts, (0.7, 0.6), (0.5, 0.8), strict=True)
    ]
    own = {parameter.name: parameter.default or 0.0 for parameter in known.shared}
    asked = ASKED | {"rescale": rescale}
    shared = own | {name: value for name, value in asked.items() if name in own}
    apart = method == "slerp" or known.sets_apart("base")
    return base if apart else None, operands[: known.most or 2], shared


def watched(work: Callable[[], Any]) -> Watched:
    work()  # what is made once and kept
    with Watched() as seen:
        work()
    return seen


@pytest.mark.parametrize("method", sorted(KERNELS))
def test_a_larger_tensor_takes_no_more_calls(method: str) -> None:
    def merged(shape: tuple[int, int]) -> None:
        base, operands, shared = case(method, shape, torch.bfloat16)
        KERNELS[method](base, operands, shared, torch.bfloat16)

    with as_on_a_device():
        small, large = (watched(partial(merged, shape)) for shape in (SMALL, LARGE))
    assert (small.calls, small.reads) == (large.calls, large.reads)
    assert small.reads <= 20
    if method in MASKS or method in kernels.KERNELS:  # in blocks of the host they would
        assert watched(partial(merged, SMALL)).calls < watched(partial(merged, LARGE)).calls


@pytest.mark.parametrize("method", sorted(KERNELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_blocks_of_any_size_give_the_same_bits(method: str, dtype: torch.dtype) -> None:
    shape = (37, 50)
    for rescale in (0.0, 1.0):
        base, operands, shared = case(method, shape, dtype, rescale)
        want = KERNELS[method](base, operands, shared, dtype)
        for block in (128, 1 << 20):
            with as_on_a_device(block):
                found = KERNELS[method](base, operands, shared, dtype)
            if method == "slerp" or (rescale and "rescale" in shared):
                # sums over the tensor, in another order
                torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-2)
            else:
                assert torch.equal(found, want)


sizes = st.lists(st.sampled_from([0.0, 0.5, -0.5, 1.0, 1.0 + 2**-40, 2.0, -3.0]), min_size=1)


@given(sizes, st.integers(0, 12), st.sampled_from([torch.float16, torch.float32, torch.float64]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_largest_are_the_same_elements(
    values: list[float], keep: int, dtype: torch.dtype
) -> None:
    """Among equals in float32, by float64; then the first in memory."""
    base = torch.linspace(0, 1e-9, len(values), dtype=torch.float64).to(dtype)
    tensor = torch.tensor(values, dtype=dtype)
    want = largest_mask(base, tensor, keep)
    exact = (tensor.double() - base.double()).abs()
    order = sorted(range(len(values)), key=lambda i: -float(exact[i]))
    assert set(torch.nonzero(want).reshape(-1).tolist()) == {
        i for i in order[:keep] if exact[i] > 0
    }
    with as_on_a_device(4):
        assert torch.equal(largest_mask(base, tensor, keep), want)


@pytest.mark.parametrize("elements", [1, 2, 3, 65_536, 2 * 65_536, 200_001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_digest_is_the_same_in_any_blocks(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(elements, generator=torch.Generator().manual_seed(elements)).to(dtype)
    want = digests.checksum(tensor)
    monkeypatch.setattr(digests.engines, "has_loops", lambda tensor: False)
    assert digests.checksum(tensor) == want
    for block in (1 << 16, 1 << 17, 1 << 24):
        with as_on_a_device(block):
            assert digests.checksum(tensor) == want


def test_a_digest_takes_no_more_calls_for_a_larger_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests.engines, "has_loops", lambda tensor: False)

    def looked_at(shape: tuple[int, int]) -> None:
        tensor = torch.ones(shape)
        digests.checksum(tensor)
        is_finite(tensor)

    with as_on_a_device():
        small, large = (watched(partial(looked_at, shape)) for shape in (SMALL, LARGE))
    assert (small.calls, small.reads) == (large.calls, large.reads)
    assert small.reads == 2  # one each


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", *sorted(MASKS)])
def test_gradients_take_no_more_calls_for_a_larger_tensor(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmerge.merging.engines._FAST", False)  # as on a device
    agreeing = divides_by_agreeing(METHODS[method])

    def contracted(shape: tuple[int, int]) -> None:
        base, operands, shared = case(method, shape, torch.bfloat16)
        held = frozen(method, base, operands, shared, Statistics())
        contract = contract_agreeing if agreeing else contract_sum
        contract(base, operands, held, shared, torch.ones(shape, dtype=torch.bfloat16))

    with as_on_a_device():
        small, large = (watched(partial(contracted, shape)) for shape in (SMALL, LARGE))
    assert (small.calls, small.reads) == (large.calls, large.reads)
    assert small.reads <= 24


def test_blocks_never_cross_where_the_hash_changes_its_key() -> None:
    count = (1 << 33) + 5
    for start in (0, (1 << 32) - 3):
        with as_on_a_device():
            spans = [*blocks(count, "cpu", start)]
        assert spans[0].start == start
        assert spans[-1].stop == count
        assert all(a.stop == b.start for a, b in pairwise(spans))
        assert all((span.stop - 1) >> 32 == span.start >> 32 for span in spans)
