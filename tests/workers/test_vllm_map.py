"""The map of a model's own loader: recorded without a tensor in memory, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from agentmerge.workers.vllm.map import Unmappable, record

Named = Iterator[tuple[str, torch.Tensor]]
SPECS = {
    "q": ((4, 6), torch.bfloat16),
    "k": ((2, 6), torch.bfloat16),
    "norm": ((6,), torch.bfloat16),
    "head": ((5, 6), torch.bfloat16),
}


class Fused(torch.nn.Module):
    """q and k are rows of one parameter; the head is the second rank's half, padded to three."""

    def __init__(self, load: Callable[[Any, str, torch.Tensor], None] | None = None) -> None:
        super().__init__()
        self.qk = torch.nn.Parameter(torch.zeros(6, 6))
        self.norm = torch.nn.Parameter(torch.zeros(6))
        self.head = torch.nn.Parameter(torch.zeros(3, 6))
        self._load = load or Fused.load

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name in ("q", "k"):
            start = 0 if name == "q" else 4
            self.qk.data[start : start + len(tensor)].copy_(tensor)
        elif name == "norm":
            self.norm.data.copy_(tensor)
        else:
            part = tensor.narrow(0, 3, 2)
            self.head.data[:2].copy_(part)
            self.head.data[2:].fill_(0)

    def load_weights(self, weights: Named) -> None:
        for name, tensor in weights:
            self._load(self, name, tensor)


def test_the_pieces_are_where_the_loader_puts_them() -> None:
    model = Fused()
    before = [parameter.clone() for parameter in model.parameters()]
    found = record(model, SPECS)
    assert all(map(torch.equal, before, model.parameters()))  # nothing was written
    assert found.is_whole("q")
    assert not found.is_whole("head")
    live = dict(model.named_parameters())
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in SPECS.items()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            found.write(name, tensor, live)
    assert torch.equal(live["qk"], torch.cat([tensors["q"], tensors["k"]]).float())
    assert torch.equal(live["head"][:2], tensors["head"][3:].float())


def test_a_model_that_fills_the_memory_is_recorded() -> None:
    """A tensor of 2 TB: nothing is held while a loader is watched, on whatever device."""
    shape = (1 << 20, 1 << 20)

    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1 << 20, 1))

        def load_weights(self, weights: Named) -> None:
            for _, tensor in weights:
                self.weight.data.copy_(tensor.narrow(1, 7, 1))

    found = record(Large(), {"weight": (shape, torch.bfloat16)})
    (piece,) = found.pieces["weight"]
    assert piece.source.offset == 7
    assert piece.source.stride == (1 << 20, 1)


def test_a_tensor_that_is_only_moved_is_the_same_tensor() -> None:
    def moves(model: Fused, name: str, tensor: torch.Tensor) -> None:
        Fused.load(model, name, tensor.to(model.qk.device))

    assert record(Fused(moves), SPECS) == record(Fused(), SPECS)


def changes(model: Fused, name: str, tensor: torch.Tensor) -> None:
    Fused.load(model, name, tensor + 1 if name == "norm" else tensor)


def looks(model: Fused, name: str, tensor: torch.Tensor) -> None:
    if tensor.sum().item() > 0:
        Fused.load(model, name, tensor)


def leaves_out(model: Fused, name: str, tensor: torch.Tensor) -> None:
    if name != "k":
        Fused.load(model, name, tensor)


@pytest.mark.parametrize(
    ("load", "said"),
    [(changes, "changes what it copies"), (looks, "cannot be run again"), (leaves_out, "'k'")],
)
def test_what_is_more_than_copying_is_refused(load: Any, said: str) -> None:
    with pytest.raises(Unmappable, match=said):
        record(Fused(load), SPECS)
