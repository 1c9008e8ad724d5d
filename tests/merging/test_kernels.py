"""The kernels against the float64 formula and against mergekit, and their rules at the edges."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.merge_methods.base import TensorGroup

from agentmerge.merging.kernels import (
    BLOCK,
    KERNELS,
    Operand,
    magnitude_mask,
    random_mask,
    sign_consensus,
)
from tests.merging.formulas import float64_reference
from tests.merging.merge_cases import (
    assert_at_least_as_near,
    masks_given,
    merged,
    near_a_threshold,
    rounding_of,
)

TASK_VECTOR_METHODS = ("task_arithmetic", "ties", "dare_ties")
DTYPES = (torch.float32, torch.bfloat16)
bounded = settings(max_examples=120, deadline=None, derandomize=True)

weights = st.integers(-30, 30).map(lambda n: n / 20)
densities = st.one_of(st.sampled_from([0.0, 1.0, 0.001, 0.999]), st.floats(0.01, 0.99))


def parents(
    seed: int, count: int, elements: int, dtype: torch.dtype, spread: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and ``count`` experts, some elements of which are the base's own."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(elements, generator=generator)
    experts = []
    for _ in range(count):
        moved = torch.rand(elements, generator=generator) > 0.1
        experts.append(base + spread * moved * torch.randn(elements, generator=generator))
    return base.to(dtype), [expert.to(dtype) for expert in experts]


@st.composite
def cases(draw: st.DrawFn, methods: tuple[str, ...] = TASK_VECTOR_METHODS) -> dict[str, Any]:
    count = draw(st.integers(1, 4))
    method = draw(st.sampled_from(methods))
    dtype = draw(st.sampled_from(DTYPES))
    base, experts = parents(
        draw(st.integers(0, 10**6)),
        count,
        draw(st.sampled_from([1, 2, 3, 17, 200])),
        dtype,
        draw(st.sampled_from([0.01, 0.3, 2.0])),
    )
    return {
        "method": method,
        "dtype": dtype,
        "base": base,
        "experts": experts,
        "weights": draw(st.lists(weights, min_size=count, max_size=count)),
        "densities": draw(st.lists(densities, min_size=count, max_size=count)),
        "shared": {
            "normalize": float(draw(st.booleans())),
            "lambda": draw(st.sampled_from([1.0, 0.5, -0.3, 1.7, 0.0])),
            "rescale": float(draw(st.booleans())),
        },
        "int8_mask": draw(st.booleans()),
        "fused": draw(st.booleans()),
    }


def ours(case: dict[str, Any]) -> torch.Tensor:
    operands = [
        Operand(*values, key=str(index))
        for index, values in enumerate(
            zip(case["experts"], case["weights"], case["densities"], strict=True)
        )
    ]
    result = merged(
        case["method"],
        case["base"],
        operands,
        case["shared"],
        case["dtype"],
        fused=case.get("fused", False),
    )
    assert result.dtype == case["dtype"]
    assert result.shape == case["experts"][0].shape
    return result


def masks_of(case: dict[str, Any]) -> list[torch.Tensor]:
    """What dare_ties keeps, all of it as a mask."""
    count = case["base"].numel()
    masks = [random_mask(str(i), count, density) for i, density in enumerate(case["densities"])]
    return [torch.ones(count, dtype=torch.bool) if mask is None else mask for mask in masks]


def exact(case: dict[str, Any]) -> torch.Tensor:
    return float64_reference(
        case["method"],
        case["base"],
        case["experts"],
        weights=case["weights"],
        densities=case["densities"],
        shared=case["shared"],
        masks=masks_of(case) if case["method"] == "dare_ties" else None,
    )


def mergekits(case: dict[str, Any]) -> torch.Tensor:
    method, tensors, parameters = case["method"], list(case["experts"]), dict(case["shared"])
    if method != "linear":
        tensors = [case["base"], *tensors]
    if method in TASK_VECTOR_METHODS:
        parameters["int8_mask"] = case["int8_mask"]
        parameters["density"] = case["densities"]
    if method != "slerp":
        parameters["weight"] = case["weights"]
    group = TensorGroup.from_tensors(tensors, base_index=None if method == "linear" else 0)
    drawn = []
    if method == "dare_ties":
        masks = zip(masks_of(case), case["densities"], strict=True)
        drawn = [mask for mask, density in masks if density < 1]
    with masks_given(drawn):
        (result,) = merge_methods.get(method)([group], parameters=parameters)
    assert isinstance(result, torch.Tensor)
    return result


def amplification(case: dict[str, Any]) -> float:
    """How much dividing by sums of weights can enlarge a rounding error."""
    if not case["shared"].get("normalize"):
        return 1.0
    live = [weight for weight in case["weights"] if weight]
    if case["method"] in ("linear", "task_arithmetic"):
        subsets = [tuple(live)]
    else:
        sizes = range(1, len(live) + 1)
        subsets = [s for size in sizes for s in itertools.combinations(live, size)]
    total = sum(map(abs, live))
    sums = [abs(math.fsum(subset)) for subset in subsets]
    smallest = min((s for s in sums if s > 1e-6 * total), default=1.0)
    return 1.0 + total / smallest + 1.0 / smallest


def slack_of(case: dict[str, Any]) -> torch.Tensor:
    """Rounding of the intermediates, which are one width wider than the parents."""
    wide = 1e-6 if case["dtype"] == torch.bfloat16 else 1e-14
    size = sum(
        (abs(w) * (x.double() - case["base"].double()).abs() * (len(x) if rescaled else 1))
        for w, x, rescaled in zip(
            case["weights"],
            case["experts"],
            [case["shared"].get("rescale") and d < 1 for d in case["densities"]],
            strict=True,
        )
    )
    lam = abs(case["shared"].get("lambda", 1.0))
    return wide * (case["base"].double().abs() + lam * amplification(case) ** 2 * size)


def undecided(case: dict[str, Any]) -> torch.Tensor:
    """Elements at a threshold or with a sign that rounding decides."""
    base, rounding = case["base"], 4 * rounding_of(case["dtype"])
    result = torch.zeros(base.shape, dtype=torch.bool)
    if case["method"] == "task_arithmetic":
        return result
    masks: list[torch.Tensor] = []
    if case["method"] == "ties":
        for expert, density in zip(case["experts"], case["densities"], strict=True):
            result |= near_a_threshold(base, expert, density, rounding)
            mask = magnitude_mask(base, expert, density)
            masks.append(torch.ones(len(base), dtype=torch.bool) if mask is None else mask)
    else:
        masks = masks_of(case)
    total, size = torch.zeros(base.shape).double(), torch.zeros(base.shape).double()
    rescaled = bool(case["shared"]["rescale"])
    for expert, mask, weight in zip(case["experts"], masks, case["weights"], strict=True):
        delta = expert.double() - base.double()
        kept = float((delta * mask).abs().sum())
        scale = float(delta.abs().sum()) / kept if rescaled and kept > 1e-7 else 1.0
        total += weight * scale * mask * delta
        size += abs(weight * scale) * mask * delta.abs()
    return result | (total.abs() <= rounding * size)


@bounded
@given(cases())
def test_task_vector_methods_are_at_least_as_near_as_mergekit(case: dict[str, Any]) -> None:
    method, shared = case["method"], case["shared"]
    if method == "task_arithmetic" and shared["normalize"]:
        # refused before a kernel sees it, and mergekit divides by nearly nothing
        assume(abs(math.fsum(case["weights"])) > 0.01)
    # Where an L1 norm is next to the floor, rounding decides whether it is rescaled.
    for expert in case["experts"] if shared["rescale"] else []:
        assume(not 0 < float((expert.double() - case["base"].double()).abs().sum()) < 1e-3)
    assert_at_least_as_near(
        ours(case), mergekits(case), exact(case), slack=slack_of(case), excluded=undecided(case)
    )


@bounded
@given(
    st.lists(weights, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_linear_is_at_least_as_near_as_mergekit(
    row: list[float], normalize: bool, dtype: torch.dtype, seed: int, fused: bool
) -> None:
    assume(not normalize or abs(math.fsum(row)) > 0.01)
    base, experts = parents(seed, len(row), 100, dtype, 0.5)
    case = {
        "method": "linear",
        "dtype": dtype,
        "base": base,
        "experts": experts,
        "weights": row,
        "densities": [1.0] * len(row),
        "shared": {"normalize": float(normalize)},
        "fused": fused,
    }
    size = sum(abs(w) * x.double().abs() for w, x in zip(row, experts, strict=True))
    wide = 1e-6 if dtype == torch.bfloat16 else 1e-14
    slack = wide * amplification(case) * (size + base.double().abs())
    assert_at_least_as_near(ours(case), mergekits(case), exact(case), slack=slack)


@bounded
@given(
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
    st.sampled_from([0.001, 0.03, 1.0, 5.0]),
    st.booleans(),
)
def test_slerp_is_at_least_as_near_as_mergekit(
    t: float, dtype: torch.dtype, seed: int, spread: float, fused: bool
) -> None:
    base, experts = parents(seed, 1, 300, dtype, spread)
    a, b = base.double(), experts[0].double()
    assume(abs(float(a @ b / a.norm() / b.norm()) - 0.9995) > 1e-5)
    case = {
        "method": "slerp",
        "dtype": dtype,
        "base": base,
        "experts": experts,
        "weights": [0.0],
        "densities": [1.0],
        "shared": {"t": t},
        "fused": fused,
    }
    slack = (3e-7 if dtype == torch.bfloat16 else 1e-14) * (a.abs() + b.abs())
    assert_at_least_as_near(ours(case), mergekits(case), exact(case), slack=slack)


@bounded
@given(cases(), st.integers(0, 3))
def test_end_points_are_that_parent_bit_for_bit(case: dict[str, Any], which: int) -> None:
    which %= len(case["experts"])
    extremes = torch.tensor([1e-30, -0.0, 1e30]).to(case["dtype"])
    case["base"] = torch.cat([case["base"], torch.ones(3).to(case["dtype"])])
    case["experts"] = [torch.cat([expert, extremes]) for expert in case["experts"]]
    case["shared"]["lambda"] = 1.0
    case["weights"] = [float(index == which) for index in range(len(case["experts"]))]
    case["densities"][which] = 1.0
    assert same_bits(ours(case), case["experts"][which])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_and_slerp_end_points(dtype: torch.dtype, normalize: bool, fused: bool) -> None:
    base, experts = parents(1, 3, 50, dtype, 1.0)
    for index, tensor in enumerate((base, *experts)):
        tensor[index] = -0.0
    for which in range(3):
        operands = [Operand(x, float(i == which)) for i, x in enumerate(experts)]
        shared = {"normalize": float(normalize)}
        result = merged("linear", None, operands, shared, dtype, fused=fused)
        assert same_bits(result, experts[which])
    for t, parent in ((0.0, base), (1.0, experts[0])):
        operands = [Operand(experts[0])]
        assert same_bits(merged("slerp", base, operands, {"t": t}, dtype, fused=fused), parent)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", TASK_VECTOR_METHODS)
def test_lambda_belongs_to_the_end_point(method: str, fused: bool) -> None:
    base, experts = torch.ones(2), torch.tensor([1e-30, 5.0])
    shared = {"normalize": 0.0, "lambda": 0.5, "rescale": 0.0}
    for weight, want in ((1.0, [0.5, 3.0]), (2.0, [1e-30, 5.0])):
        operand = Operand(experts, weight)
        result = merged(method, base, [operand], shared, torch.float32, fused=fused)
        assert torch.equal(result, torch.tensor(want))


@bounded
@given(cases(), st.sampled_from(["weights", "densities", "lambda", "no operands"]))
def test_nothing_added_is_the_base_bit_for_bit(case: dict[str, Any], what: str) -> None:
    case["base"][0] = -0.0
    if what == "lambda":
        case["shared"]["lambda"] = 0.0
    elif what == "no operands":
        case["experts"], case["weights"], case["densities"] = [case["base"]], [0.0], [1.0]
    else:
        case[what] = [0.0] * len(case["experts"])
    if what == "densities" and case["method"] == "task_arithmetic":
        return  # it has none
    assert same_bits(ours(case), case["base"])


@bounded
@given(cases(("linear", "slerp", *TASK_VECTOR_METHODS)), st.sampled_from([0, 1, 5]))
def test_no_finite_input_raises_or_is_changed(case: dict[str, Any], elements: int) -> None:
    case["base"] = case["base"][:elements]
    case["experts"] = [expert[:elements] for expert in case["experts"]]
    case["shared"]["t"] = 0.3
    before = [tensor.clone() for tensor in (case["base"], *case["experts"])]
    result = ours(case)
    assert bool(result.isfinite().all())
    for tensor, old in zip((case["base"], *case["experts"]), before, strict=True):
        assert same_bits(tensor, old)
        assert not elements or tensor.data_ptr() != result.data_ptr()


@pytest.mark.parametrize("fused", [False, True])
def test_slerp_of_zero_opposite_and_equal_vectors(fused: bool) -> None:
    one = torch.tensor([1.0, -2.0, 3.0])
    for start, end in ((one, one), (one, -one), (one, 0 * one), (0 * one, 0 * one)):
        got = merged("slerp", start, [Operand(end)], {"t": 0.25}, torch.float32, fused=fused)
        want = float64_reference("slerp", start, [end], shared={"t": 0.25})
        torch.testing.assert_close(got.double(), want)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_cancel_in_ties_are_not_divided_by(fused: bool) -> None:
    base = torch.zeros(4)
    plus, minus = torch.full((4,), 0.5), torch.full((4,), -0.5)
    shared = {"normalize": 1.0, "lambda": 1.0, "rescale": 0.0}
    # 0.1 + 0.2 - 0.3 is not zero in floating point
    operands = [Operand(plus, 0.1), Operand(plus, 0.2), Operand(minus, -0.3)]
    result = merged("ties", base, operands, shared, torch.float32, fused=fused)
    torch.testing.assert_close(result, torch.full((4,), 0.3))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_sum_of_weights_that_cancels_is_not_divided_by(method: str, fused: bool) -> None:
    base, expert = torch.zeros(2), torch.ones(2)
    operands = [Operand(expert, 0.1), Operand(expert, 0.2), Operand(-expert, -0.3)]
    shared = {"normalize": 1.0, "lambda": 1.0}
    result = merged(method, base, operands, shared, torch.float32, fused=fused)
    torch.testing.assert_close(result, torch.full((2,), 0.6))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("normalize", [0.0, 1.0])
def test_a_sign_tie_counts_as_positive(normalize: float, fused: bool) -> None:
    operands = [Operand(torch.tensor([-0.5, 0.5]), 1.0), Operand(torch.tensor([0.5, -0.5]), 1.0)]
    shared = {"normalize": normalize, "lambda": 1.0, "rescale": 0.0}
    result = merged("ties", torch.zeros(2), operands, shared, torch.float32, fused=fused)
    assert result.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("fused", [False, True])
def test_a_small_weight_that_agrees_alone_is_divided_by(fused: bool) -> None:
    base = torch.zeros(2)
    operands = [Operand(torch.tensor([0.5, 0.5]), 1e-7), Operand(torch.tensor([0.0, 0.1]), 1.0)]
    shared = {"normalize": 1.0, "lambda": 1.0, "rescale": 0.0}
    result = merged("ties", base, operands, shared, torch.float32, fused=fused)
    torch.testing.assert_close(result[0], torch.tensor(0.5))


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.34, 0.5, 0.999])
def test_ties_keeps_as_many_as_mergekit(density: float) -> None:
    base = torch.zeros(10)
    kept = magnitude_mask(
        base, torch.randn(10, generator=torch.Generator().manual_seed(0)), density
    )
    assert kept is not None
    assert int(kept.sum()) == max(1, int(density * 10))


def test_equal_magnitudes_are_kept_in_memory_order() -> None:
    expert = torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0, 2.0])
    mask = magnitude_mask(torch.zeros(6), expert, 4 / 6)
    assert mask is not None
    assert mask.tolist() == [True, True, True, False, False, True]


def test_magnitudes_that_float32_cannot_tell_apart_are_ranked_exactly() -> None:
    base = torch.tensor([1.0, 1.0])
    step = 2.0**-50
    expert = torch.tensor([2.0**-30 + 1e-12, 2.0**-30])
    assert float(expert[0]) - float(expert[1]) < 2**-24 > step
    mask = magnitude_mask(base, expert, 0.5)
    assert mask is not None
    assert mask.tolist() == [False, True]  # farther from one


@pytest.mark.parametrize("name", ["lambda", "normalize", "rescale", "weight", "density"])
@pytest.mark.parametrize("method", TASK_VECTOR_METHODS)
def test_every_parameter_changes_the_result(method: str, name: str) -> None:
    if method == "task_arithmetic" and name in ("rescale", "density"):
        return  # mergekit takes them and does nothing with them
    case = {
        "method": method,
        "dtype": torch.float32,
        "weights": [0.7, 0.4],
        "densities": [0.6, 0.5],
        "shared": {"normalize": 0.0, "lambda": 1.0, "rescale": 0.0},
    }
    case["base"], case["experts"] = parents(3, 2, 100, torch.float32, 0.5)
    before = ours(case)
    if name in case["shared"]:
        case["shared"][name] = 0.5 if name == "lambda" else 1.0
    else:
        case["weights" if name == "weight" else "densities"] = [0.7, 0.9]
    assert not torch.equal(before, ours(case))


def test_blocks_leave_no_seam() -> None:
    count = 2 * BLOCK + 3
    base, experts = parents(5, 2, count, torch.bfloat16, 0.1)
    for method in KERNELS:
        case = {
            "method": method,
            "dtype": torch.float32,
            "base": base,
            "experts": experts[:1] if method == "slerp" else experts,
            "weights": [0.5, 0.3],
            "densities": [0.5, 0.3],
            "shared": {"normalize": 1.0, "lambda": 1.0, "rescale": 1.0, "t": 0.3},
        }
        if method == "slerp":
            case["weights"], case["densities"] = [0.0], [1.0]
        torch.testing.assert_close(ours(case).double(), exact(case), rtol=1e-4, atol=1e-5)


def test_strides_do_not_matter() -> None:
    base, experts = parents(6, 2, 60, torch.float32, 0.1)
    operands = [Operand(x.reshape(10, 6).t(), 0.6, 0.5, "k") for x in experts]
    shared = {"normalize": 1.0, "lambda": 1.0, "rescale": 1.0, "t": 0.3}
    for method, kernel in KERNELS.items():
        used = operands[:1] if method == "slerp" else operands
        flat = [Operand(o.tensor.contiguous(), o.weight, o.density, o.key) for o in used]
        strided = kernel(base.reshape(10, 6).t(), used, shared, torch.float32)
        plain = kernel(base.reshape(10, 6).t().contiguous(), flat, shared, torch.float32)
        assert torch.equal(strided, plain)


def test_sign_consensus_takes_any_masks() -> None:
    base, experts = parents(7, 2, 40, torch.float32, 0.1)
    masks = [torch.arange(40) % 2 == 0, torch.arange(40) % 3 == 0]
    shared = {"normalize": 0.0, "lambda": 1.0, "rescale": 1.0}
    got = sign_consensus(
        base, [Operand(x, 0.5, 0.5) for x in experts], masks, shared, torch.float32
    )
    want = float64_reference(
        "dare_ties",
        base,
        experts,
        weights=[0.5, 0.5],
        densities=[0.5, 0.5],
        shared=shared,
        masks=masks,
    )
    torch.testing.assert_close(got.double(), want)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)
    )
