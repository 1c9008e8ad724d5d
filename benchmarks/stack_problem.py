"""Stacks of a family's layers as a benchmark problem: the weight answer, and layers between.

A point is scored by ``testing.prefixes`` on the deep model that its positions make, absent ones
left out, on one thread, in float32 (SmolLM2: bfloat16); a test compares it with the recipe's own
checkpoint. Slopes are those of the mean log(1 + exp(-margin)) in every position's two scales,
absent ones included, from one pass over the stack that has them all. Items, and what each seed
asks, are the family's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from agentmerge.config import LayersConfig
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.prefixes import Rows, answer_logits
from agentmerge.testing.problem import KeptAnswers, Shown
from agentmerge.testing.tiny import TinyProblem, margins_of, read_answers
from benchmarks.smollm2 import SmolLM2Problem

#: The outputs of a Llama's layer: what its attention adds to the stream, and its mlp.
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
#: (model or None for the merge, layer, (attention's scale, mlp's)).
Run = tuple[str | None, int, tuple[float, float]]


@dataclass(frozen=True)
class _Sheet:
    """A tiny family's items, as ``smollm2.Sheet`` has those of one skill."""

    rows: Rows

    def read(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        right, _ = read_answers(logits.detach(), self.rows.gold)
        return torch.from_numpy(right), margins_of(logits, self.rows.gold)


class Stacks:
    """A weight answer and its family's layers, asked what any stack of them shows."""

    def __init__(self, problem: TinyProblem | SmolLM2Problem, answer: Sequence[float]) -> None:
        self._config = problem._config
        genome = problem.space.genome
        merged = dict(problem._family.merge(problem.space.recipe(answer)))
        self._weights: dict[str | None, Mapping[str, torch.Tensor]] = {None: merged}
        for model in (genome.base_model or "", *genome.models):
            self._weights[model] = {
                name: problem._family.tensor(model, name).to(tensor.dtype)
                for name, tensor in merged.items()
            }
        first = "model.layers.0."
        self._inner = [name.removeprefix(first) for name in merged if name.startswith(first)]
        self._outer = {n: t for n, t in merged.items() if not n.startswith("model.layers.")}

    @torch.no_grad()
    def ask(self, stack: Sequence[Run], asked: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """(exact match, margin) of each item; what has no strength is left out."""
        present = [run for run in stack if any(run[2])]
        return as_arrays([sheet.read(self.logits(present, sheet.rows)) for sheet in asked])

    def slopes(
        self, stack: Sequence[Run], asked: Sequence[Any]
    ) -> tuple[float, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """(loss, its slopes (positions, 2) in the scales, what ``ask`` says) of a whole stack.

        A layer of strength 0 adds zeros, so that the answers are those of the stack without it.
        """
        scales = torch.tensor([run[2] for run in stack], requires_grad=True)
        found, losses, slopes = [], [], []
        for sheet in asked:
            right, margins = sheet.read(self.logits(stack, sheet.rows, scales))
            loss = torch.nn.functional.softplus(-margins).mean()
            slopes += torch.autograd.grad(loss, scales)
            losses.append(float(loss.detach()))
            found.append((right, margins.detach()))
        # Every sheet has as many items.
        mean = np.mean([slope.double().numpy() for slope in slopes], axis=0)
        return float(np.mean(losses)), mean, as_arrays(found)

    def logits(
        self,
        stack: Sequence[Run],
        rows: Rows,
        scales: torch.Tensor | None = None,
        **stream: Any,
    ) -> torch.Tensor:
        """Of a stack, layer by layer; scales: in place of its strengths. stream: as
        ``answer_logits`` has it."""
        weights = dict(self._outer)
        for place, (model, layer, strength) in enumerate(stack):
            own = self._weights[model]
            for name in self._inner:
                tensor = own[f"model.layers.{layer}.{name}"]
                for part, output in enumerate(OUTPUTS):
                    if name.startswith(output):
                        scale: Any = strength[part] if scales is None else scales[place, part]
                        tensor = tensor * scale
                weights[f"model.layers.{place}.{name}"] = tensor
        config = copy.copy(self._config)
        config.num_hidden_layers = len(stack)
        return answer_logits(weights, config, rows, **stream)


def as_arrays(found: Sequence[tuple[torch.Tensor, ...]]) -> tuple[np.ndarray, np.ndarray]:
    right, margins = (torch.cat(part).double().numpy() for part in zip(*found, strict=True))
    return right, margins


@dataclass
class StackProblem(KeptAnswers):
    """See ``testing.problem.Problem``. answer: the weight answer, a point of the family's space."""

    weights: TinyProblem | SmolLM2Problem
    answer: tuple[float, ...]
    layers: LayersConfig
    _known: dict[tuple[float, ...], Shown] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        own = self.weights.space
        self.name = f"{self.weights.name}+{self.layers.most}"
        self.tasks = self.weights.tasks
        self.stacks = Stacks(self.weights, self.answer)
        genome = own.genome.model_copy(update={"layers": self.layers})
        under = own.recipe(self.answer)
        self.space: SearchSpace = replace(own, genome=genome, outputs=OUTPUTS, under=under)
        self._items = self.weights._items
        self._search, self._sealed = map(sheets, (self.weights._search, self.weights._sealed))

    def first_points(self) -> list[tuple[str, str, tuple[float, ...]]]:
        return [("uniform", "weights", self.neutral())]

    def neutral(self) -> tuple[float, ...]:
        point = self.space.uniform()[1]
        assert point is not None
        return point

    def gradient(self, vector: Sequence[float]) -> Shown:
        if self.layers.path:
            return self.evaluate(vector)
        loss, found, answers = self.stacks.slopes(self.runs(vector), self._search)
        known = self.known(vector, *answers)
        unit = [
            float(found[axis.group, OUTPUTS.index(str(axis.filter))]) * (axis.high - axis.low)
            for axis in self.space.axes
        ]
        return Shown(known.score, known.evidence, tuple(unit), loss)

    def runs(self, vector: Sequence[float]) -> list[Run]:
        """Every position at a point, with its strength."""
        form = self.space.stacks
        assert form is not None
        values = [axis.value(float(x)) for axis, x in zip(self.space.axes, vector, strict=True)]
        strengths = form.strengths(values)
        return [(p.model, p.layer, s) for p, s in zip(form.positions, strengths, strict=True)]

    def depth(self, vector: Sequence[float]) -> int:
        return sum(any(strength) for *_, strength in self.runs(vector))

    def sealed(self, vector: Sequence[float]) -> np.ndarray:
        values, _ = self._ask(vector, self._sealed)
        return values / len(values)

    def _ask(self, vector: Sequence[float], items: Any) -> tuple[np.ndarray, np.ndarray]:
        return self.stacks.ask(self.runs(vector), items)


def sheets(items: Any) -> Sequence[Any]:
    return [_Sheet(items)] if isinstance(items, Rows) else items
