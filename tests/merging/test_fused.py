"""The fused loops against the torch kernels: the same bits, whatever the size, dtype and values."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmerge.errors import RunFailed
from agentmerge.merging import digests
from agentmerge.merging.engines import KERNELS, has_fused, merge_tensor
from agentmerge.merging.kernels import Operand, largest_mask
from agentmerge.merging.loops import bodies
from agentmerge.merging.loops.fused import FUSED, MOST_EXPERTS
from agentmerge.merging.loops.orders import KEPT, Bracket, Cut, Order, cuts, order_bytes
from agentmerge.merging.loops.remembered import Statistics
from tests.merging.merge_cases import merged

bounded = settings(max_examples=150, deadline=None, derandomize=True)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 2, 7, 15, 16, 17, 63, 65, 257, 4097)
#: Signed zeros, subnormals, and numbers whose differences are huge but finite in float32.
ODD = (0.0, -0.0, 1e-40, -1e-40, 1e-7, -6e4, 6e4, 1.0, -1.0)


def operands_of(draw: st.DrawFn, method: str, size: int, dtype: torch.dtype) -> list[Operand]:
    count = 1 if method == "slerp" else draw(st.integers(1, 5))
    return [
        Operand(
            task_vector(draw, size).to(dtype),
            draw(st.sampled_from([0.0, 1.0, 0.3, -0.4, 1.2, 1e-7])),
            draw(st.sampled_from([0.0, 1.0, 1e-6, 0.5, 0.33, 0.999])),
            str(index),
            gamma=draw(st.sampled_from([0.0, 0.01, 0.1, 0.5])),
            pair=str(index),
        )
        for index in range(count)
    ]


def task_vector(draw: st.DrawFn, size: int) -> torch.Tensor:
    """Continuous, or of few different magnitudes, with odd values here and there."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.normal(size=size) * draw(st.sampled_from([1e-3, 0.1, 3.0]))
    grain = draw(st.sampled_from([0.0, 0.05, 1.0]))
    if grain:
        values = np.round(values / grain) * grain
    places = generator.integers(0, size, draw(st.integers(0, 3)))
    values[places] = generator.choice(ODD, len(places))
    return torch.from_numpy(values)


@st.composite
def merges(draw: st.DrawFn) -> dict[str, Any]:
    method = draw(st.sampled_from(sorted(FUSED)))
    size, dtype = draw(st.sampled_from(SIZES)), draw(st.sampled_from(DTYPES))
    base = task_vector(draw, size).to(dtype)
    return {
        "method": method,
        "base": base,
        "operands": operands_of(draw, method, size, dtype),
        "shared": {
            "normalize": float(draw(st.booleans())),
            "lambda": draw(st.sampled_from([1.0, 0.5, -0.3, 1.7, 0.0])),
            "rescale": float(draw(st.booleans())),
            "t": draw(st.sampled_from([0.0, 0.3, 0.77, 1.0])),
        },
        "dtype": draw(st.sampled_from([dtype, dtype, *DTYPES])),
    }


@bounded
@given(merges())
def test_the_same_bits_as_the_torch_kernel(case: dict[str, Any]) -> None:
    got, want = merged(**case, fused=True), merged(**case, fused=False)
    if case["shared"]["rescale"]:
        # the L1 norms are summed in another order
        wide = 1e-14 if case["base"].dtype == torch.float32 else 1e-6
        size = max(float(o.tensor.double().abs().max()) for o in case["operands"])
        rounding = 2 * float(torch.finfo(case["dtype"]).eps)
        torch.testing.assert_close(got, want, rtol=rounding, atol=wide * size, equal_nan=True)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", sorted(FUSED))
def test_parents_of_several_dtypes(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1001, generator=generator).bfloat16()
    experts = [(base + torch.randn(1001, generator=generator)).to(dtype) for dtype in DTYPES]
    operands = [Operand(e, 0.6, 0.4, str(i), gamma=0.02) for i, e in enumerate(experts)]
    shared = {"normalize": 1.0, "lambda": 0.9, "rescale": 0.0, "t": 0.4}
    used = operands[:1] if method == "slerp" else operands
    for dtype in DTYPES:
        got = merged(method, base, used, shared, dtype, fused=True)
        assert torch.equal(got, merged(method, base, used, shared, dtype, fused=False))


@pytest.mark.parametrize("method", sorted(FUSED))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found(method: str, value: float) -> None:
    for place in (0, 20, 39):
        base, expert = torch.zeros(40), torch.ones(40)
        expert[place] = value
        operands = [Operand(expert, 0.5, 1.0), Operand(torch.ones(40), 0.5, 1.0)]
        used = operands[:1] if method == "slerp" else operands
        shared = {"normalize": 0.0, "lambda": 1.0, "rescale": 0.0, "t": 0.5}
        target = torch.empty(40)
        assert not merge_tensor(method, base, used, shared, target, Statistics())


def test_an_overflow_of_the_results_dtype_is_found() -> None:
    operands = [Operand(torch.full((33,), 60000.0), 2.0)]
    for dtype, finite in ((torch.float16, False), (torch.bfloat16, True)):
        target = torch.empty(33, dtype=dtype)
        shared = {"normalize": 0.0}
        assert merge_tensor("linear", None, operands, shared, target, Statistics()) == finite
        whole = [Operand(torch.full((33,), 70000.0), 1.0)]
        assert merge_tensor("linear", None, whole, shared, target, Statistics()) == finite


@pytest.mark.parametrize("method", sorted(FUSED))
def test_some_rows_of_a_larger_tensor_are_a_target(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    base, expert = torch.randn(3, 7, generator=generator), torch.randn(3, 7, generator=generator)
    operands = [Operand(expert, 0.4, 0.5, "key")]
    shared = {"normalize": 0.0, "lambda": 1.0, "rescale": 1.0, "t": 0.3}
    parameter = torch.full((9, 7), 5.0)
    assert merge_tensor(method, base, operands, shared, parameter[2:5], Statistics())
    want = merged(method, base, operands, shared, torch.float32, fused=True)
    assert torch.equal(parameter[2:5], want)
    assert bool((parameter[:2] == 5).all() and (parameter[5:] == 5).all())
    sideways = torch.full((3, 20), 5.0)
    assert merge_tensor(method, base, operands, shared, sideways[:, 4:11], Statistics())
    torch.testing.assert_close(sideways[:, 4:11], want)
    assert bool((sideways[:, :4] == 5).all() and (sideways[:, 11:] == 5).all())


@pytest.mark.parametrize(
    ("method", "count"),
    [
        *((method, 17) for method in ("linear", "ties", "dare_ties", "dare_linear")),
        ("dare_linear", 33),
        ("linear", MOST_EXPERTS),
        *(
            pytest.param(method, count, marks=pytest.mark.slow)  # compiling takes seconds
            for method in ("ties", "dare_ties", "breadcrumbs_ties")
            for count in (33, MOST_EXPERTS)
        ),
    ],
)
def test_as_many_experts_as_a_pool_has(
    method: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(count)
    base = torch.randn(301, generator=draw).bfloat16()
    operands = [
        Operand((base + 0.1 * torch.randn(301, generator=draw)).bfloat16(), w, 0.5, str(k))
        for k, w in enumerate(torch.randn(count, generator=draw).tolist())
    ]
    shared = {"normalize": 1.0, "lambda": 0.8, "rescale": 0.0}
    called = []
    for name, loop in FUSED.items():
        monkeypatch.setitem(FUSED, name, lambda merge, loop=loop: called.append(1) or loop(merge))
    got = merged(method, base, operands, shared, torch.bfloat16, fused=True)
    assert torch.equal(got, merged(method, base, operands, shared, torch.bfloat16, fused=False))
    assert called


def test_tensors_that_loops_do_not_take_are_merged_all_the_same() -> None:
    shared = {"normalize": 1.0, "lambda": 1.0, "rescale": 0.0}
    base = torch.randn(5, 4)
    many = [Operand(base + index, 0.5, 0.5) for index in range(MOST_EXPERTS + 1)]
    strided = [Operand(torch.randn(4, 5).t(), 0.5, 0.5)]
    wide = [Operand(torch.randn(5, 4).double(), 0.5, 0.5)]
    for operands in (many, strided, wide):
        target = torch.empty(5, 4)
        assert merge_tensor("ties", base, operands, shared, target, Statistics())
        assert torch.equal(target, KERNELS["ties"](base, operands, shared, torch.float32))
    empty = torch.empty(0, 4)
    assert merge_tensor("ties", empty, [Operand(empty, 1.0, 0.5)], shared, empty, Statistics())


def test_without_llvmlite_the_torch_kernels_serve() -> None:
    script = """if True:
        import sys
        sys.modules["llvmlite"] = None
        import torch
        from agentmerge.merging.digests import checksum
        from agentmerge.merging.engines import has_fused, merge_tensor
        from agentmerge.merging.kernels import Operand
        from agentmerge.merging.loops.remembered import Statistics
        assert not has_fused("ties")
        base, target = torch.zeros(50), torch.empty(50)
        operands = [Operand(torch.arange(50.0) - 20, 0.5, 0.3)]
        shared = {"normalize": 0.0, "lambda": 1.0, "rescale": 0.0}
        assert merge_tensor("ties", base, operands, shared, target, Statistics())
        print(checksum(target))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert has_fused("ties")
    target, operands = torch.empty(50), [Operand(torch.arange(50.0) - 20, 0.5, 0.3)]
    shared = {"normalize": 0.0, "lambda": 1.0, "rescale": 0.0}
    assert merge_tensor("ties", torch.zeros(50), operands, shared, target, Statistics())
    assert int(done.stdout) == digests.checksum(target)


@bounded
@given(st.integers(0, 99), st.sampled_from([1, 3, 4, 6, 1000, 4 * 65536 + 2, 9 * 65536 + 3]))
def test_checksums_by_loop_and_by_torch_are_equal(seed: int, size: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, size + 2, np.uint8)
    tensor = torch.from_numpy(data)[2:]  # not aligned to a word
    assert (digests.checksum(tensor) - digests._by_torch(tensor)) % 2**64 == 0


def kept_by(cut: Cut, base: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The mask that a cut means, by its definition."""
    bits = (tensor.float() - base.float()).abs().view(torch.int32).long()
    equal = bits == cut.bits
    flips = torch.tensor(cut.flips)
    off = torch.tensor([int((flips <= element).sum()) % 2 for element in range(len(bits))])
    return (bits > cut.bits) | (equal & (off == 0) & (equal.cumsum(0) <= cut.first))


class TestOrders:
    @pytest.mark.slow
    @bounded
    @given(st.data())
    def test_cuts_keep_what_selecting_keeps(self, data: st.DataObject) -> None:
        size = data.draw(st.sampled_from([*SIZES, KEPT + 1, 3 * KEPT + 7]))
        dtype = data.draw(st.sampled_from(DTYPES))
        base = task_vector(data.draw, size).to(dtype)
        tensors = [task_vector(data.draw, size).to(dtype) for _ in range(2)]
        orders = [Order.of(base, tensor) for tensor in tensors]
        for _ in range(4):
            keeps = [data.draw(st.integers(0, size)) for _ in tensors]
            found = cuts(base, tensors, orders, keeps)
            for tensor, keep, cut in zip(tensors, keeps, found, strict=True):
                assert torch.equal(kept_by(cut, base, tensor), largest_mask(base, tensor, keep))

    def test_magnitudes_that_only_float64_tells_apart(self) -> None:
        """A great many, of which some are a little larger than float32 shows."""
        base = torch.full((100_000,), 2.0**-30)
        tensor = torch.ones(100_000)
        base[70_000] = base[90_000] = 2.0**-31  # farther from one, and the same in float32
        for keep in (1, 2, 3, 50_000):
            (cut,) = cuts(base, [tensor], [Order.of(base, tensor)], [keep])
            assert torch.equal(kept_by(cut, base, tensor), largest_mask(base, tensor, keep))

    @pytest.mark.parametrize("size", [1, 100, KEPT, 5 * KEPT])
    def test_an_order_takes_no_more_than_it_says(self, size: int) -> None:
        order = Order.of(torch.zeros(size), torch.randn(size))
        assert order.size_bytes <= order_bytes(size)


def test_what_is_remembered_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(5000, generator=generator).bfloat16()
    experts = [(base + 0.1 * torch.randn(5000, generator=generator)).bfloat16() for _ in "ab"]
    known = Statistics()
    for method in sorted(FUSED):
        for density in (0.5, 0.5, 0.2, 0.7, 0.31, 0.4, 0.5):
            operands = [Operand(e, 0.5, density, "k", pair=f"{i}") for i, e in enumerate(experts)]
            used = operands[:1] if method == "slerp" else operands
            shared = {"normalize": 1.0, "lambda": 1.0, "rescale": 1.0, "t": density}
            target = torch.empty_like(base)
            assert merge_tensor(method, base, used, shared, target, known)
            want = merged(method, base, used, shared, torch.bfloat16, fused=True)
            assert torch.equal(target, want)
    assert 0 < known.size_bytes <= 2 * order_bytes(5000)


@pytest.mark.parametrize("all_inside", [True, False])
def test_a_tensor_that_was_overwritten_after_it_was_ranked(all_inside: bool) -> None:
    """A file may be, while it is mapped: what is noted keeps to its room, and the run ends."""
    tensor = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    base = torch.zeros_like(tensor)
    order = Order.of(base, tensor)
    keeps = [k for k in range(1000, 200_000, 777) if isinstance(order.bracket(k), Bracket)]
    bracket = order.bracket(keeps[0])
    assert isinstance(bracket, Bracket)
    inside = torch.tensor([bracket.low], dtype=torch.int32).view(torch.float32)
    tensor.copy_(inside.expand(300_000) if all_inside else torch.zeros(300_000))
    with pytest.raises(RunFailed, match="overwritten while merges were read from it"):
        cuts(base, [tensor], [order], [keeps[0]])


def test_threads_that_want_one_loop_compile_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_it, seen = bodies.compiled, []

    def count(*given: Any) -> Any:
        seen.append(given)
        return compile_it(*given)

    monkeypatch.setattr(bodies, "compiled", count)
    how = ("added", ("float32",) * 5, "float32", ("rank", "all", "hash"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: bodies.loop_for(*how), range(4)))
    assert len(seen) == 1
    assert found == found[:1] * 4
