"""Stacks of a tiny family's layers as a benchmark problem: the weight answer, and layers between.

A point is scored by ``testing.prefixes`` on the deep model that its positions make, absent ones
left out, in float32 on one thread; a test compares it with the recipe's own checkpoint. Slopes are
those of the mean log(1 + exp(-margin)) in every position's two scales, absent ones included, from
one pass over the stack that has them all. Items, and what each seed asks, are the family's.
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

#: The outputs of a Llama's layer: what its attention adds to the stream, and its mlp.
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")
#: (model or None for the merge, layer, (attention's scale, mlp's)).
Run = tuple[str | None, int, tuple[float, float]]


class Stacks:
    """A weight answer and its family's layers, asked what any stack of them shows."""

    def __init__(self, problem: TinyProblem, answer: Sequence[float]) -> None:
        self._config = problem._config
        merged = dict(problem._family.merge(problem.space.recipe(answer)))
        self._weights: dict[str | None, Mapping[str, torch.Tensor]] = {None: merged}
        for model in ("base", *problem.setting.models):
            self._weights[model] = {name: problem._family.tensor(model, name) for name in merged}
        first = "model.layers.0."
        self._inner = [name.removeprefix(first) for name in merged if name.startswith(first)]
        self._outer = {n: t for n, t in merged.items() if not n.startswith("model.layers.")}

    @torch.no_grad()
    def ask(self, stack: Sequence[Run], rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(exact match, margin) of each row; what has no strength is left out."""
        present = [run for run in stack if any(run[2])]
        return read_answers(self._logits(present, rows), rows.gold)

    def slopes(
        self, stack: Sequence[Run], rows: Rows
    ) -> tuple[float, np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """(loss, its slopes (positions, 2) in the scales, what ``ask`` says) of a whole stack.

        A layer of strength 0 adds zeros, so that the answers are those of the stack without it.
        """
        scales = torch.tensor([run[2] for run in stack], requires_grad=True)
        logits = self._logits(stack, rows, scales)
        loss = torch.nn.functional.softplus(-margins_of(logits, rows.gold)).mean()
        (found,) = torch.autograd.grad(loss, scales)
        answers = read_answers(logits.detach(), rows.gold)
        return float(loss.detach()), found.double().numpy(), answers

    def _logits(
        self, stack: Sequence[Run], rows: Rows, scales: torch.Tensor | None = None
    ) -> torch.Tensor:
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
        return answer_logits(weights, config, rows)


@dataclass
class StackProblem(KeptAnswers):
    """See ``testing.problem.Problem``. answer: the weight answer, a point of the family's space."""

    weights: TinyProblem
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
        self._items, self._search = self.weights._items, self.weights._search

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
        values, _ = self._ask(vector, self.weights.sealed_rows())
        return values / len(values)

    def _ask(self, vector: Sequence[float], items: Any) -> tuple[np.ndarray, np.ndarray]:
        return self.stacks.ask(self.runs(vector), items)
