"""What an adapter adds to a model's weights, in its own factors: kept beside the checkpoint that
was made of the two, so that a merge can do with the model and the factors.

It knows tensors of one model and the folders that ``made.py`` makes; it knows no merges, and not
what else an adapter changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from agentmerge.parents.headers import made_from

#: In a folder of its own: beside the weights it would be read as one of their shards.
_FILE = Path("low_rank") / "factors.safetensors"
#: Elements worked on at a time: the wide intermediates stay in the cache.
_BLOCK = 1 << 17


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of matrices in float32 are that, whatever precision this process works at: what is
    made of an adapter depends on it. Not for two threads at once."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added to a weight: ``scale * (b @ a)``, seen from its module (out by in).

    turned: the file stores that weight the other way around.
    """

    b: torch.Tensor
    a: torch.Tensor
    scale: float
    turned: bool = False

    @property
    def size_bytes(self) -> int:
        return self.b.nbytes + self.a.nbytes

    def to(self, device: str) -> Factors:
        return Factors(self.b.to(device), self.a.to(device), self.scale, self.turned)

    @torch.no_grad()
    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """A fresh tensor, as peft merges it: in float32, rounded once to the weight's dtype."""
        left, right = (self.a.T, self.b.T) if self.turned else (self.b, self.a)
        made = torch.empty_like(weight, memory_format=torch.contiguous_format)
        step = max(1, _BLOCK // max(1, weight.shape[1]))
        with exact_products():
            for start in range(0, weight.shape[0], step):
                rows = slice(start, start + step)
                made[rows] = (left[rows] @ right).mul_(self.scale).add_(weight[rows].float())
        return made


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How a made checkpoint comes from a model. model: where that was; identity: its content
    fingerprint."""

    model: Path
    identity: str
    factors: Mapping[str, Factors]


def write_factors(directory: Path, model: Path, factors: Mapping[str, Factors]) -> None:
    """Into the folder of a checkpoint that is made of ``model``.

    Raises:
        OSError: it cannot be written.
    """
    if not factors:
        return
    tensors: dict[str, torch.Tensor] = {}
    how = {}
    for name, own in factors.items():
        tensors |= {f"{name}.A": own.a.contiguous(), f"{name}.B": own.b.contiguous()}
        how[name] = [own.scale, own.turned]
    (directory / _FILE).parent.mkdir()
    said = {"model": str(model), "factors": json.dumps(how)}
    try:
        save_file(tensors, directory / _FILE, said)
    except SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from None


def adaptation_of(directory: Path) -> Adaptation | None:
    """None of a checkpoint that was not made by an adapter, or whose factors cannot be read: its
    weights say all."""
    made = made_from(directory)
    if made is None or made.get("kind") != "adapter" or not (directory / _FILE).is_file():
        return None
    try:
        with safe_open(directory / _FILE, framework="pt") as stream:
            said = stream.metadata()
            factors = {
                name: Factors(
                    stream.get_tensor(f"{name}.B"), stream.get_tensor(f"{name}.A"), scale, turned
                )
                for name, (scale, turned) in json.loads(said["factors"]).items()
            }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    return Adaptation(Path(said["model"]), str(made["made_from"][0]), factors)
