"""The demo's families as benchmark problems: real merges of real models, 0.4 million parameters.

A candidate is merged by the product's own kernels and asked by one teacher-forced pass in float32
on one thread. Greedy decoding of the one gold answer is right exactly where every token of that
pass is, so exact match needs no generation (a test compares both). Each seed asks other items.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Items
from agentmerge.contracts.worker import Gradient, TensorSlope
from agentmerge.demo import language
from agentmerge.demo.family import cached_family
from agentmerge.demo.tasks import skill_inputs
from agentmerge.demo.training import BOS, EOS, VOCABULARY, Weights
from agentmerge.merging.family import Family
from agentmerge.space.chain_rule import unit_gradient
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.prefixes import Rows, answer_logits
from agentmerge.testing.problem import KeptAnswers, Shown

SEARCH_ITEMS, SEALED_ITEMS = 200, 400
#: What the expert of a damaged family is left with at the best weight of its task vector.
DAMAGED = (0.75, 0.9)
#: Where that weight is looked for; then nearer.
STRETCHES = tuple(0.7 * 1.3**i for i in range(7))
NEARER = (0.82, 0.88, 0.94, 1.0, 1.06, 1.12, 1.18)
FEW, MANY = 200, 800  # items that measure it
#: Part of these families' names: raise it with any change to how they are made.
TWIST_VERSION = 4
_NUMBER = {token: i for i, token in enumerate(VOCABULARY)}
_ENDS = (_NUMBER[EOS], _NUMBER["\n"])


@dataclass(frozen=True, slots=True)
class TinySetting:
    """One problem of the suite. skills: what is asked, and whose experts are merged.

    experts: "own"; "spare" (and one that nothing is asked of); or, where nothing can be gained,
    "useless" (the one expert, and noise of the same size) or "halves" (its task vector in two
    random halves, doubled: their mean is it).
    damaged: base and experts of these two share noise, as much as leaves the expert `DAMAGED` of
    its answers, so that no merge answers everything. granularity: 0 is one group of all layers.
    family: the seed of the family's weights.
    """

    name: str
    skills: tuple[str, ...]
    method: str = "task_arithmetic"
    filters: tuple[str, ...] = ()
    experts: Literal["own", "spare", "useless", "halves"] = "own"
    damaged: bool = False
    granularity: int = 1
    family: int = 0

    @property
    def models(self) -> tuple[str, ...]:
        own = {"own": self.skills, "spare": (self.skills[0], SPARE_SKILL, *self.skills[1:])}
        return own.get(self.experts, ("first", "second"))


#: The expert that families have besides those that are asked.
SPARE_SKILL = "reverse"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: Written down before anything was run.
TINY = {
    setting.name: setting
    for setting in (
        TinySetting("tiny-so-8", ("shift", "sort")),
        TinySetting("tiny-so-24", ("shift", "sort"), filters=("self_attn", "mlp")),
        TinySetting("tiny-so-16-ties", ("shift", "sort"), "ties"),
        TinySetting("tiny-sro-12", ("shift", "reverse", "sort")),
        # What was found on the family above, on one of other skills and weights.
        TinySetting("tiny-rs-8", ("reverse", "sort"), family=1),
        TinySetting("tiny-rs-24", ("reverse", "sort"), filters=("self_attn", "mlp"), family=1),
        # Merges are poor until the third expert is found to be of no use.
        TinySetting("tiny-so-12-spare", ("shift", "sort"), experts="spare"),
        # Finer than the suite: how far the search reaches, and what gradients are worth there.
        TinySetting("tiny-so-64", ("shift", "sort"), filters=PROJECTIONS),
        TinySetting("tiny-useless", ("shift",), experts="useless"),
        TinySetting("tiny-halves", ("shift",), experts="halves"),
        # Below the ceiling, where luck can pass for a gain. One group: layer by layer, a merge can
        # make up for some of the damage.
        TinySetting("tiny-useless-2", ("shift",), experts="useless", damaged=True, granularity=0),
        TinySetting("tiny-halves-2", ("shift",), experts="halves", damaged=True, granularity=0),
    )
}
NO_HEADROOM = ("tiny-useless", "tiny-halves", "tiny-useless-2", "tiny-halves-2")
SUITES = {
    "tiny": ("tiny-so-8", "tiny-so-24", "tiny-so-16-ties", "tiny-sro-12"),
    "second": ("tiny-rs-8", "tiny-rs-24"),
    "no-headroom": NO_HEADROOM,
    "spare": ("tiny-so-12-spare",),
    "fine": ("tiny-so-64",),
}


@dataclass
class TinyProblem(KeptAnswers):
    """See ``problem.Problem``."""

    setting: TinySetting
    seed: int
    _known: dict[tuple[float, ...], Shown] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.name = self.setting.name
        self.tasks = self.setting.skills
        self._family, self._config = _opened(self.setting)
        genome = GenomeConfig(
            models=self.setting.models,
            base_model="base",
            merge_method=self.setting.method,
            layer_granularity=self.setting.granularity,
            filters=self.setting.filters,
            normalize=False,
        )
        self.space = SearchSpace(genome, self._config.num_hidden_layers, "float32")
        self._search, self._sealed = _rows(self.setting.skills, self.seed)
        count = len(self._search.gold)
        self._items = Items(
            np.repeat(np.arange(len(self.setting.skills)), SEARCH_ITEMS),
            np.full(count, 1.0 / count),
            np.ones(count, bool),
        )

    def gradient(self, vector: Sequence[float]) -> Shown:
        """As ``evaluate``, with the slope of the mean log(1 + exp(-margin)) in the unit box."""
        known = self.evaluate(vector)
        method = self.space.method
        if not method.needs_base or [p.name for p in method.source] != ["weight"]:
            return known  # the slope below is that of a sum of whole task vectors
        loss, unit, _ = self.descent(vector, self._search)
        return Shown(known.score, known.evidence, unit, loss)

    def descent(
        self, vector: Sequence[float], rows: Rows
    ) -> tuple[float, tuple[float, ...], np.ndarray]:
        """(mean log(1 + exp(-margin)) of some rows, its slope in the unit box, exact matches)."""
        weights = {
            name: tensor.requires_grad_()
            for name, tensor in self._family.merge(self.space.recipe(vector))
        }
        logits = answer_logits(weights, self._config, rows)
        loss = torch.nn.functional.softplus(-margins_of(logits, rows.gold)).mean()
        slopes = torch.autograd.grad(loss, list(weights.values()))
        tensors = tuple(
            self._slope(name, slope) for name, slope in zip(weights, slopes, strict=True)
        )
        gradient = Gradient(float(loss.detach()), len(rows.gold), tensors)
        right, _ = read_answers(logits.detach(), rows.gold)
        return gradient.loss, unit_gradient(self.space, vector, gradient), right

    def _slope(self, name: str, slope: torch.Tensor) -> TensorSlope:
        layer = re.search(r"layers\.(\d+)\.", name)
        base = self._family.tensor("base", name)
        found = tuple(
            (skill, float((slope * (self._family.tensor(skill, name) - base)).sum()))
            for skill in self.setting.models
        )
        return TensorSlope(
            name, int(layer[1]) if layer else None, name == "model.norm.weight", found
        )

    def sealed_rows(self) -> Rows:
        """What ``sealed`` asks; for a look at what could be had, no search sees it."""
        return self._sealed

    def sealed(self, vector: Sequence[float]) -> np.ndarray:
        values, _ = self._ask(vector, self._sealed)
        return values / len(values)

    @torch.no_grad()
    def _ask(self, vector: Sequence[float], rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """(exact match, margin) of each row."""
        weights = dict(self._family.merge(self.space.recipe(vector)))
        logits = answer_logits(weights, self._config, rows)
        return read_answers(logits, rows.gold)


def read_answers(logits: torch.Tensor, gold: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(exact match of greedy decoding, least margin over the answer's letters in nats).

    The last position is the end of the line, which belongs to the match and not to the margin.
    """
    said = logits.argmax(-1)
    ended = torch.isin(said[:, -1], torch.tensor(_ENDS))
    right = (said[:, :-1] == gold[:, :-1]).all(-1) & ended
    return right.double().numpy(), margins_of(logits, gold).double().numpy()


def margins_of(logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    letters, golds = logits[:, :-1], gold[:, :-1].unsqueeze(-1)
    own = letters.gather(-1, golds).squeeze(-1)
    others = letters.scatter(-1, golds, -torch.inf).amax(-1)
    return (own - others).amin(-1)


@lru_cache(maxsize=2)
def _opened(setting: TinySetting) -> tuple[Family, Any]:
    from transformers import AutoConfig

    own = setting.experts in ("own", "spare")
    found = cached_family(setting.models if own else ("shift", "sort"), setting.family)
    paths: dict[str, Path] = {"base": found.base}
    if own:
        paths |= dict(zip(setting.models, found.experts, strict=True))
    else:
        paths = _twisted(found.base, found.experts[0], setting)
    return Family.open(paths, base="base"), AutoConfig.from_pretrained(str(found.base))


def _twisted(base: Path, expert: Path, setting: TinySetting) -> dict[str, Path]:
    """A base and two experts made of one, beside the family.

    That nothing can be gained is so by construction, whatever the family: what training decides
    (how much noise the expert bears, at which weight it is best, on which side of it the useless
    one does harm) is measured, on items that no search asks, and chosen so.
    """
    from safetensors.torch import save_file

    paths = {
        model: base.parent / f"{setting.name}-{TWIST_VERSION}-{model}"
        for model in ("base", "first", "second")
    }
    if not all((path / "model.safetensors").is_file() for path in paths.values()):
        made = _made_of_one(base, expert, setting)
        for model, path in paths.items():
            shutil.copytree(base, path, dirs_exist_ok=True)
            save_file(made[model], path / "model.safetensors", metadata={"format": "pt"})
    return paths


def _made_of_one(base: Path, expert: Path, setting: TinySetting) -> dict[str, Weights]:
    from safetensors.torch import load_file
    from transformers import AutoConfig

    start, end = (load_file(path / "model.safetensors") for path in (base, expert))
    task = {name: end[name] - weight for name, weight in start.items()}
    left = _Left(AutoConfig.from_pretrained(str(base)), setting.skills[0])
    if setting.damaged:
        start, task = _damaged(start, task, left)
    rng = torch.Generator().manual_seed(0)
    if setting.experts == "useless":
        drawn = {name: torch.randn(weight.shape, generator=rng) for name, weight in start.items()}
        noise = {name: other * task[name].norm() / other.norm() for name, other in drawn.items()}
        sides = [
            {name: weight + task[name] + side * noise[name] for name, weight in start.items()}
            for side in (0.5, -0.5)
        ]
        side = 1.0 if left.loss(sides[0]) > left.loss(sides[1]) else -1.0
        parts = [(task[name], side * noise[name]) for name in start]
    else:
        masks = [torch.rand(weight.shape, generator=rng) < 0.5 for weight in start.values()]
        parts = [
            (2 * part * mask, 2 * part * ~mask)
            for part, mask in zip(task.values(), masks, strict=True)
        ]
    first, second = (
        {name: start[name] + part[side] for name, part in zip(start, parts, strict=True)}
        for side in (0, 1)
    )
    return {"base": start, "first": first, "second": second}


def _damaged(start: Weights, task: Weights, left: _Left) -> tuple[Weights, Weights]:
    """(base, task vector): noise that leaves the expert `DAMAGED`, at the best of its weights."""
    rng = torch.Generator().manual_seed(1)
    noise = {
        name: weight.std() * torch.randn(weight.shape, generator=rng) * (weight.dim() > 1)
        for name, weight in start.items()
    }
    low, high = 0.0, 3.0
    for _ in range(12):
        size = (low + high) / 2
        hurt = {name: weight + size * noise[name] for name, weight in start.items()}
        share, best = max((left.share(plus(hurt, task, c), FEW), c) for c in STRETCHES)
        if DAMAGED[0] <= share <= DAMAGED[1]:
            break
        low, high = (size, high) if share > DAMAGED[1] else (low, size)
    _, best = max((left.share(plus(hurt, task, best * c)), best * c) for c in NEARER)
    return hurt, {name: best * value for name, value in task.items()}


def plus(start: Weights, task: Weights, weight: float) -> Weights:
    return {name: value + weight * task[name] for name, value in start.items()}


class _Left:
    """What weights still have of a skill, on inputs that no search asks."""

    def __init__(self, config: Any, skill: str) -> None:
        self._config, self._rows = config, {}
        for count in (FEW, MANY):
            texts = language.inputs(held_out=False)
            rows = [_encoded(skill, text) for text in texts[:: len(texts) // count]]
            self._rows[count] = Rows.of([row for row, _ in rows], [gold for _, gold in rows])

    def share(self, weights: Weights, count: int = MANY) -> float:
        found = read_answers(self._logits(weights, count), self._rows[count].gold)
        return float(found[0].mean())

    def loss(self, weights: Weights) -> float:
        margins = margins_of(self._logits(weights, MANY), self._rows[MANY].gold)
        return float(torch.nn.functional.softplus(-margins).mean())

    @torch.no_grad()
    def _logits(self, weights: Weights, count: int) -> torch.Tensor:
        return answer_logits(weights, self._config, self._rows[count])


def _rows(skills: tuple[str, ...], seed: int) -> tuple[Rows, Rows]:
    """Search and sealed items, skill by skill."""
    search: list[tuple[list[int], list[int]]] = []
    sealed: list[tuple[list[int], list[int]]] = []
    for skill in skills:
        texts = skill_inputs(skill, SEARCH_ITEMS + SEALED_ITEMS, seed)
        rows = [_encoded(skill, text) for text in texts]
        search += rows[:SEARCH_ITEMS]
        sealed += rows[SEARCH_ITEMS:]
    return tuple(  # type: ignore[return-value]
        Rows.of([row for row, _ in part], [gold for _, gold in part]) for part in (search, sealed)
    )


def _encoded(skill: str, text: str) -> tuple[list[int], list[int]]:
    known = language.SKILLS[skill]
    prompt, answer = language.prompt(known.tag, text), known.apply(text)
    row = [_NUMBER[BOS], *(_NUMBER[c] for c in prompt + answer)]
    return row, [*(_NUMBER[c] for c in answer), _NUMBER[EOS]]
