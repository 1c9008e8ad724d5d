"""Contractions by loops against those by torch: the same masks, the same sums but for rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentmerge.merging.engines import KERNELS, fused_agreement, fused_slopes
from agentmerge.merging.gradient import contract_agreeing, contract_sum, frozen
from agentmerge.merging.kernels import Operand
from agentmerge.merging.loops.fused import CONSENSUS
from agentmerge.merging.loops.remembered import Statistics

SHAPES = ((1, 3), (5, 13), (40, 101))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory that loops do not take."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def by_torch(operands: list[Operand]) -> list[Operand]:
    return [replace(operand, tensor=strided(operand.tensor)) for operand in operands]


def family(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, list[Operand]]:
    draw = torch.Generator().manual_seed(shape[1])
    base = torch.randn(shape, generator=draw).to(dtype)
    numbers = ((0.7, 0.5), (-0.4, 1.0), (0.0, 0.3), (0.5, 0.0), (0.9, 0.8))
    operands = [
        Operand(
            (base + 0.1 * torch.randn(shape, generator=draw)).to(dtype),
            weight,
            density,
            f"key {index}",
            gamma=0.05,
            pair=str(index),
        )
        for index, (weight, density) in enumerate(numbers)
    ]
    return base, operands


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("method", sorted(CONSENSUS))
def test_the_same_as_by_torch(method: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    base, operands = family(shape, dtype)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for few in (operands, operands[:1], operands[2:4]):
        for rescale in (0.0, 1.0):
            shared = {"rescale": rescale, "lambda": 0.8, "normalize": 0.0}
            known = Statistics()
            assert fused_agreement(method, base, few, shared, known) is not None
            held = frozen(method, base, few, shared, known)
            want = frozen(method, strided(base), by_torch(few), shared, known)
            assert held.scales == pytest.approx(want.scales, rel=1e-5)
            for mine, theirs in zip(held.kept, want.kept, strict=True):
                assert mine is not None
                assert theirs is not None
                assert torch.equal(mine, theirs)
            for normalize in (0.0, 1.0):
                shared["normalize"] = normalize
                found = contract_agreeing(base, few, held, shared, gradient)
                other = contract_agreeing(
                    strided(base), by_torch(few), held, shared, strided(gradient)
                )
                torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "breadcrumbs", "linear"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_sums_are_the_same_as_by_torch(method: str, dtype: torch.dtype) -> None:
    base, operands = family((40, 101), dtype)
    gradient = torch.randn(40, 101, generator=torch.Generator().manual_seed(1)).to(dtype)
    ground = None if method == "linear" else base
    for normalize in (0.0, 1.0):
        shared = {"rescale": 1.0, "lambda": 0.8, "normalize": normalize}
        held = frozen(method, ground, operands, shared, Statistics())
        used = fused_slopes(base, operands, held.kept, held.scales, gradient, normalize=False)
        assert used is not None
        found = contract_sum(ground, operands, held, shared, gradient)
        other = contract_sum(
            None if ground is None else strided(base),
            by_torch(operands),
            held,
            shared,
            strided(gradient),
        )
        rounding = 1e-12 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found, other, rtol=rounding, atol=rounding / 10)


def tied_in_single(seed: int, elements: int) -> tuple[torch.Tensor, list[Operand]]:
    """Task vectors of three magnitudes in float32 and of more in float64, in no order."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randint(-3, 4, (elements,), generator=draw) * 2.0**-40
    steps = torch.tensor([2.0**-12, -(2.0**-11), 2.0**-10])
    weights, densities = (0.7, 0.4), (0.4, 0.55)
    return base, [
        Operand(
            steps[torch.randint(0, 3, (elements,), generator=draw)],
            weight,
            density,
            gamma=0.1,
            pair=str(weight),
        )
        for weight, density in zip(weights, densities, strict=True)
    ]


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties"])
def test_cuts_that_flip_between_float32_and_float64(method: str) -> None:
    """They begin and end anywhere, not where a loop's bytes do: masks are torch's nevertheless, and
    slopes are the merge's own, by finite differences in float64."""
    flips = 0
    for seed in range(20):
        base, operands = tied_in_single(seed, 1000 + seed)
        known, shared = Statistics(), {"rescale": 1.0, "lambda": 0.8, "normalize": 0.0}
        masks = CONSENSUS[method](base, operands, known)
        flips += sum(flip % 32 > 0 for mask in masks for flip in mask.flips)
        held = frozen(method, base, operands, shared, known)
        want = frozen(method, strided(base), by_torch(operands), shared, known)
        assert held.scales == pytest.approx(want.scales, rel=1e-5)
        assert all(map(torch.equal, held.kept, want.kept))
        gradient = torch.randn(len(base), generator=torch.Generator().manual_seed(seed))
        found = contract_agreeing(base, operands, held, shared, gradient)
        for at in range(2):
            assert float(found[at]) == pytest.approx(
                slope(method, base, operands, shared, gradient, at), rel=1e-4, abs=1e-6
            )
    assert flips > 100


def slope(
    method: str,
    base: torch.Tensor,
    operands: list[Operand],
    shared: dict[str, float],
    gradient: torch.Tensor,
    at: int,
    step: float = 1e-5,
) -> float:
    """Of <gradient, merge> in one weight."""

    def pull(change: float) -> float:
        moved = [*operands]
        moved[at] = replace(operands[at], weight=operands[at].weight + change)
        merged = KERNELS[method](base, moved, shared, torch.float64)
        return float(merged @ gradient.double())

    return (pull(step) - pull(-step)) / (2 * step)
