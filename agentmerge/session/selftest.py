"""Whether a device of this machine computes what the CPU does: merges, proofs, slopes, answers.

The short form of what ``make test-gpu`` runs, in seconds, on made-up tensors: no model, task or
search. What is compared with is the plain kernels on the CPU, which the tests hold against the
formulas. It knows devices and merging; it prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from agentmerge.errors import UserError
from agentmerge.merging.device import current, release
from agentmerge.merging.digests import checksum
from agentmerge.merging.engines import KERNELS, merge_tensor
from agentmerge.merging.gradient import contract_agreeing, contract_sum, frozen
from agentmerge.merging.kernels import Operand
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.merging.memory import cuda_devices
from agentmerge.merging.weights import Resident
from agentmerge.methods import RECIPE_METHODS, divides_by_agreeing
from agentmerge.parents.layout import Layout, TensorSpec

#: More than a block of the digests, not a multiple of anything.
SHAPE = (67, 4099)
_ASKED = {"normalize": 1.0, "lambda": 0.9, "t": 0.3, "select_topk": 0.4}
_DTYPES = (torch.bfloat16, torch.float32)
#: Of sums taken in another order, in relation to the largest number.
_NEAR = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was tried on a device, and whether it may be trusted there."""

    device: str
    what: str
    ok: bool
    detail: str


def devices() -> list[str]:
    """The CPU, and every CUDA device that there is."""
    return ["cpu", *(f"cuda:{index}" for index in range(cuda_devices()))]


def try_device(device: str) -> list[Finding]:
    """Everything on one device; a fault of the device is a finding, not an exception.

    Raises:
        UserError: there is no such device.
    """
    if device not in devices():
        raise UserError(f"there is no {device!r} here; there are {', '.join(devices())}")
    trials: dict[str, Callable[[str], Iterator[str]]] = {
        "merging": merges,
        "digests": _digests,
        "resident parents": _parents,
        "gradients of merges": slopes,
        "answers and their gradients": _answers,
    }
    found = []
    with current(device):
        for what, trial in trials.items():
            try:
                wrong = list(trial(device))
            except Exception as error:  # whatever a driver raises
                wrong = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
            detail = "; ".join(wrong) or "as the plain kernels on the CPU"
            found.append(Finding(device, what, not wrong, detail))
    release(device)
    return found


def case(
    method: str, dtype: torch.dtype, shape: tuple[int, ...] = SHAPE
) -> tuple[torch.Tensor | None, list[Operand], dict[str, float]]:
    """A base, as many experts as a method takes (two, if it may), and all parameters."""
    known = RECIPE_METHODS[method]
    draw = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=draw).to(dtype)
    operands = [
        Operand(
            (base + 0.1 * torch.randn(shape, generator=draw)).to(dtype),
            weight,
            density,
            f"key {weight}",
            gamma=0.05,
            epsilon=0.1,
        )
        for weight, density in ((0.7, 0.5), (0.6, 0.8), (0.4, 0.6))
    ]
    own = {parameter.name: parameter.default or 0.0 for parameter in known.shared}
    shared = own | {name: value for name, value in _ASKED.items() if name in own}
    apart = known.pairwise or known.sets_apart("base")
    count = known.most or max(2, known.least)
    return base if apart else None, operands[:count], shared


def merges(device: str) -> Iterator[str]:
    """Every method, as a worker computes it there: bit for bit, where nothing is summed over the
    tensor; yields what differs."""
    for method in KERNELS:
        for dtype in _DTYPES:
            base, operands, shared = case(method, dtype)
            want = KERNELS[method](base, operands, shared, dtype)
            target = torch.empty_like(want, device=device)
            there = _moved(base, device), [_there(operand, device) for operand in operands]
            finite = merge_tensor(method, *there, shared, target, Statistics())
            known = RECIPE_METHODS[method]
            exact = known.engine == "agentmerge" and not known.pairwise
            exact = exact and not shared.get("rescale")
            if not finite or not _same(target.cpu(), want, exact):
                yield f"{method} of {dtype} differs"


def slopes(device: str) -> Iterator[str]:
    """What a gradient of a merge is made of, where the method has one; yields what differs."""
    for method, known in RECIPE_METHODS.items():
        if not known.differentiable:
            continue
        base, operands, shared = case(method, torch.float32)
        shared |= {"normalize": 0.0} if "normalize" in shared else {}
        given = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        sums: dict[str, torch.Tensor] = {}
        for place in ("cpu", device):
            own, others = _moved(base, place), [_there(operand, place) for operand in operands]
            held = frozen(method, own, others, shared, Statistics())
            contract = contract_agreeing if divides_by_agreeing(known) else contract_sum
            sums[place] = contract(own, others, held, shared, given.to(place)).cpu()
        if not torch.allclose(sums[device], sums["cpu"], rtol=1e-3, atol=1e-2):
            yield f"{method} differs"


def _digests(device: str) -> Iterator[str]:
    for elements in (1, 65_537, 1_000_003):
        for dtype in _DTYPES:
            tensor = torch.randn(elements, generator=torch.Generator().manual_seed(3)).to(dtype)
            if checksum(tensor.to(device)) != checksum(tensor):
                yield f"the digest of {elements} numbers of {dtype} differs"


class _MadeUp:
    """Two parents of a few tensors of any size."""

    identities: Mapping[str, str] = {"a": "a", "b": "b"}
    layout = Layout(
        tuple(
            TensorSpec(str(size), (size, 3), "bfloat16", None, False) for size in (1, 700, 90_001)
        ),
        1,
        "bfloat16",
        False,
        ("a", "b"),
    )

    def tensor(self, model: str, name: str) -> torch.Tensor:
        draw = torch.Generator().manual_seed(ord(model))
        return torch.randn(int(name), 3, generator=draw).bfloat16()

    def verify(self) -> None:
        """Nothing is read from files."""


def _parents(device: str) -> Iterator[str]:
    made = _MadeUp()
    for home in dict.fromkeys((device, "cpu")):
        kept = Resident(made, made.layout, device=device, home=home)
        for model in made.layout.parents:
            for spec in made.layout.tensors:
                there = kept.tensor(model, spec.name)
                if not torch.equal(there.cpu(), made.tensor(model, spec.name)):
                    yield f"a tensor kept on {home} is another one on {device}"


def _answers(device: str) -> Iterator[str]:
    """A small model with random weights, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(60).reshape(3, 20)
    said, pulled = [], []
    for place in dict.fromkeys(("cpu", device)):
        model.to(place).zero_grad()
        logits = model(tokens.to(place), use_cache=False).logits.log_softmax(-1)
        logits[..., 0].sum().backward()
        said.append(logits.detach().cpu())
        pulled.append(model.lm_head.weight.grad.cpu().clone())
    if not _same(said[-1], said[0], exact=False):
        yield "log-probabilities differ"
    if not _same(pulled[-1], pulled[0], exact=False):
        yield "gradients differ"


def _moved(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def _there(operand: Operand, device: str) -> Operand:
    return replace(operand, tensor=operand.tensor.to(device))


def _same(found: torch.Tensor, want: torch.Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(found, want)
    apart: Any = (found.double() - want.double()).abs().max()
    return bool(apart <= _NEAR[found.dtype] * max(1.0, float(want.double().abs().max())))
