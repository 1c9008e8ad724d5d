"""What every merge method of a plugin promises (``contracts/method.py``), as tests.

    class TestMine(MethodSuite):
        name = "mine"

``name`` is the entry point's. A method is computed as a search computes it, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from agentmerge.merging.engines import merge_tensor
from agentmerge.merging.kernels import Operand
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.methods import METHODS, Method, Parameter

SHAPES = ((1,), (7,), (6, 10), (3, 4, 5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usual(parameter: Parameter, at: int = 0) -> float:
    """A legal value: a weight of its own for each model, else the default, or the middle."""
    if parameter.name == "weight":
        return min(max(0.4 + 0.3 * at, parameter.low), parameter.high)
    if parameter.default is not None:
        return parameter.default
    if parameter.kind == "log":
        return float((parameter.low * parameter.high) ** 0.5)
    middle = 0.5 * (parameter.low + parameter.high)
    return float(round(middle)) if parameter.whole else middle


class MethodSuite:
    """name: the method's. spread: how far the models are from the base, of values about 1."""

    name = ""
    spread = 0.1

    @pytest.fixture
    def method(self) -> Method:
        return METHODS[self.name]

    def sources(
        self, method: Method, shape: tuple[int, ...] = (24, 24), dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor | None, list[Operand]]:
        """A base, where the method sets one apart, and as many models as it takes, up to three."""
        draw = torch.Generator().manual_seed(5)
        base = torch.randn(shape, generator=draw)
        operands = []
        for at in range(max(method.least, min(3, method.most or 3))):
            tensor = base + self.spread * torch.randn(shape, generator=draw)
            values = tuple((p.name, usual(p, at)) for p in method.source)
            operands.append(Operand(tensor.to(dtype), key=f"{at}", values=values))
        return None if method.base == "ignored" else base.to(dtype), operands

    def shared(self, method: Method) -> dict[str, float]:
        return {p.name: usual(p) for p in method.shared}

    def merged(
        self,
        method: Method,
        base: torch.Tensor | None,
        operands: list[Operand],
        shared: Mapping[str, float],
    ) -> torch.Tensor:
        target = torch.full_like(operands[0].tensor, torch.nan)
        finite = merge_tensor(method.name, base, operands, shared, target, Statistics())
        assert finite, "the result is not finite"
        return target

    def at(self, method: Method, parameter: Parameter, value: float) -> torch.Tensor:
        """The merge with one parameter at a value: of the first model, or of the whole merge."""
        base, (first, *rest) = self.sources(method)
        shared = self.shared(method)
        if parameter in method.shared:
            shared[parameter.name] = value
        else:
            values = dict(first.values) | {parameter.name: value}
            first = replace(first, values=tuple(values.items()))
        return self.merged(method, base, [first, *rest], shared)

    def test_every_parameter_says_what_it_is(self, method: Method) -> None:
        assert method.doc
        assert all(p.doc and p.low < p.high for p in (*method.source, *method.shared))

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_gives_finite_tensors_of_every_shape(
        self, method: Method, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        base, operands = self.sources(method, shape, dtype)
        before = [operand.tensor.clone() for operand in operands]
        found = self.merged(method, base, operands, self.shared(method))
        assert (found.dtype, found.shape) == (dtype, shape)
        for operand, was in zip(operands, before, strict=True):
            assert torch.equal(operand.tensor, was), "it changed an input"

    def test_every_parameter_changes_the_result_and_is_finite_at_its_bounds(
        self, method: Method
    ) -> None:
        for parameter in (*method.source, *method.shared):
            low = self.at(method, parameter, parameter.low)
            high = self.at(method, parameter, parameter.high)
            assert not torch.equal(low, high), f"{parameter.name} does nothing"

    def test_it_gives_the_same_again_and_leaves_the_generator_alone(self, method: Method) -> None:
        base, operands = self.sources(method)
        torch.manual_seed(1)
        wanted = torch.rand(1)
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(self.merged(method, base, operands, self.shared(method)))
            assert seed == 2 or torch.equal(torch.rand(1), wanted)
        assert torch.equal(*found)

    def test_one_model_alone_is_itself_where_it_says_so(self, method: Method) -> None:
        base, operands = self.sources(method, dtype=torch.bfloat16)
        for which in range(-1 if base is not None else 0, len(operands) if method.identity else -1):
            alone = [
                replace(o, values=tuple((dict(o.values) | {"weight": float(at == which)}).items()))
                for at, o in enumerate(operands)
            ]
            want = base if which < 0 else operands[which].tensor
            assert want is not None
            assert torch.equal(self.merged(method, base, alone, self.shared(method)), want)
