"""``python -m benchmarks.pool``: twelve experts, three of which are useful, at equal cost.

    python -m benchmarks.pool --seeds 20 --budgets 30,60 --out DIR

The demo's family of three skills, and beside its experts a near-duplicate of each, three that were
trained on something that nobody asks, and three damaged ones (a layer's mlp of zeros, one weight
twenty times as large, noise all over). Arms: ``all`` (one space of twelve), ``soup`` (greedy: the
best expert, then whoever makes the mean better), ``rule`` (the product's choice of three after
each was asked alone, ``agentmerge.search.models``) and ``told`` (a search that was told the right
three: the ceiling). Every arm pays for all that it asks. Writes ``DIR/runs/*.json`` and
``DIR/results.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmerge.config import GenomeConfig
from agentmerge.demo import language
from agentmerge.demo.family import cached_family
from agentmerge.demo.training import Learner, stream
from agentmerge.merging.experts import survey_experts
from agentmerge.merging.family import Family
from agentmerge.recipe import Recipe, Setting, Slice, Source
from agentmerge.search.models import OwnScore, chosen
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.auto import Auto
from agentmerge.testing.prefixes import answer_logits
from agentmerge.testing.problem import KeptAnswers
from agentmerge.testing.tiny import TinyProblem, TinySetting, read_answers
from benchmarks.running import Arm, path_of, run_search, save

SKILLS = ("shift", "reverse", "sort")
ARMS = ("all", "soup", "rule", "told")
MOST = 3
#: Part of the pool's name: raise it with any change to how it is made.
VERSION = 1
#: Steps and rate of what nobody asks.
OTHER_STEPS, OTHER_RATE = 120, 4e-4


@lru_cache(maxsize=1)
def pool() -> dict[str, Path]:
    """Name -> folder of the base and the twelve experts, in no telling order."""
    made = cached_family(SKILLS, 0)
    root = made.base.parent / f"pool-{VERSION}"
    found = {"base": made.base}
    skilled = dict(zip(SKILLS, made.experts, strict=True))
    for number, (skill, path) in enumerate(skilled.items()):
        found |= {
            f"other-{number}": root / f"other-{number}",
            skill: path,
            f"{skill}-again": root / f"{skill}-again",
            f"damaged-{number}": root / f"damaged-{number}",
        }
    if not (root / "done").is_file():
        _make(found, skilled)
        (root / "done").touch()
    return found


def _make(found: dict[str, Path], skilled: dict[str, Path]) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    start = load_file(found["base"] / "model.safetensors")
    rng = torch.Generator().manual_seed(0)

    def noise(size: float, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            n: size * v.std() * torch.randn(v.shape, generator=rng)
            for n, v in like.items()
            if v.dim() > 1
        }

    for number, (skill, path) in enumerate(skilled.items()):
        end = load_file(path / "model.safetensors")
        task = {name: end[name] - start[name] for name in start}
        jitter = noise(0.15, task)
        near = {n: start[n] + 0.95 * task[n] + jitter.get(n, 0.0) for n in start}
        hurt = dict(end)
        if number == 0:
            hurt |= {n: torch.zeros_like(v) for n, v in end.items() if "layers.1.mlp.down" in n}
        elif number == 1:
            hurt |= {n: 20 * v for n, v in end.items() if "layers.2.self_attn.q" in n}
        else:
            hurt = {n: v + noise(1.5, start).get(n, 0.0) for n, v in end.items()}
        weights = {f"{skill}-again": near, f"damaged-{number}": hurt}
        weights[f"other-{number}"] = _trained_otherwise(found["base"], number)
        for name, tensors in weights.items():
            shutil.copytree(found["base"], found[name], dirs_exist_ok=True)
            save_file(tensors, found[name] / "model.safetensors", metadata={"format": "pt"})


def _trained_otherwise(base: Path, number: int) -> dict[str, torch.Tensor]:
    """Something that nobody asks, under the tag of copying: letters turned by some places."""
    from transformers import AutoModelForCausalLM

    def turned(text: str) -> str:
        return text[number + 1 :] + text[: number + 1]

    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(base))
    mixture = {language.COPY_TAG: (0.8, turned)}
    mixture |= dict.fromkeys(language.TAGS[1:3], (0.1, str))
    learner = Learner(model, mixture, stream(0, f"other-{number}"), OTHER_RATE, 10)
    learner.learn(OTHER_STEPS)
    return learner.weights


@dataclass
class PoolProblem(KeptAnswers):
    """Merges of some of the pool's experts, on the items of a seed."""

    asks: TinyProblem
    models: tuple[str, ...]
    name: str = "pool"
    _known: dict[tuple[float, ...], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.tasks = SKILLS
        self._items, self._search = self.asks._items, self.asks._search
        genome = GenomeConfig(
            models=self.models,
            base_model="base",
            merge_method="task_arithmetic",
            layer_granularity=1,
            normalize=False,
        )
        self.space = SearchSpace(genome, self.asks._config.num_hidden_layers, "float32")

    def _ask(self, vector: Sequence[float], items: Any) -> tuple[np.ndarray, np.ndarray]:
        return ask(self.asks, self.space.recipe(vector), items)

    def sealed(self, vector: Sequence[float]) -> np.ndarray:
        values, _ = self._ask(vector, self.asks._sealed)
        return values / len(values)


@lru_cache(maxsize=1)
def _family() -> Family:
    return Family.open(pool(), base="base")


@torch.no_grad()
def ask(asks: TinyProblem, recipe: Recipe, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    weights = dict(_family().merge(recipe))
    return read_answers(answer_logits(weights, asks._config, rows), rows.gold)


def mean_of(names: Sequence[str], layers: int) -> Recipe:
    weight = (("weight", Setting.scalar(1.0 / len(names))),)
    sources = tuple(Source(name, (0, layers), weight) for name in names)
    return Recipe("linear", (Slice(sources),), dtype="float32").canonical(layers)


@dataclass
class Alone:
    """What each model of the pool shows by itself, on the search items."""

    asks: TinyProblem

    def __post_init__(self) -> None:
        self.layers = self.asks._config.num_hidden_layers
        self.values = {
            name: ask(self.asks, mean_of([name], self.layers), self.asks._search)[0]
            for name in pool()
        }

    def shown(self, name: str) -> OwnScore:
        task, values = self.asks._items.task, self.values[name]
        parts = tuple(float(values[task == i].mean()) / len(SKILLS) for i in range(len(SKILLS)))
        return OwnScore(float(values.mean()), parts)

    def picked(self) -> list[str]:
        """The product's choice (``search.models``)."""
        paths = {str(path): name for name, path in pool().items()}
        found = survey_experts([path for path, name in paths.items() if name != "base"],
                               str(pool()["base"]))  # fmt: skip
        damaged = {paths[one.model]: one.damage[0] for one in found.experts if one.damage}
        alike: dict[str, frozenset[str]] = {}
        for one, other, _ in found.duplicates:
            for a, b in ((paths[one], paths[other]), (paths[other], paths[one])):
                alike[a] = alike.get(a, frozenset()) | {b}
        shown = {name: self.shown(name) for name in pool() if name != "base"}
        best = max(shown, key=lambda name: shown[name].score)
        gaps = [self.values[best] - self.values[name] for name in shown if name != best]
        noise = float(np.median([gap.std() / np.sqrt(len(gap)) for gap in gaps]))
        return chosen(shown, self.shown("base"), MOST, damaged, alike, noise)


def soup(asks: TinyProblem, alone: Alone, budget: int) -> dict[str, Any]:
    """Greedy soup (arXiv 2203.05482), each try paid for."""
    names = sorted(
        (name for name in pool() if name != "base"), key=lambda n: -alone.values[n].mean()
    )
    spent, taken = len(pool()), names[:1]
    best = float(alone.values[names[0]].mean())
    for name in names[1:]:
        if spent >= budget:
            break
        spent += 1
        score = float(ask(asks, mean_of([*taken, name], alone.layers), asks._search)[0].mean())
        if score > best:
            best, taken = score, [*taken, name]
    sealed = float(ask(asks, mean_of(taken, alone.layers), asks._sealed)[0].mean())
    return {"models": taken, "spent": spent, "search": best, "sealed": sealed}


def search(asks: TinyProblem, models: Sequence[str], budget: int, seed: int) -> dict[str, Any]:
    problem = PoolProblem(asks, tuple(models))
    run = run_search(problem, Arm("auto", Auto), seed, budget)
    answer = run["answers"]["chosen"]
    return {
        "models": list(models),
        "spent": run["spent"],
        "search": answer["search"],
        "sealed": answer["sealed"],
    }


def run_one(arm: str, seed: int, budget: int) -> dict[str, Any]:
    asks = TinyProblem(TinySetting("pool", SKILLS), seed)
    experts = [name for name in pool() if name != "base"]
    if arm == "told":
        found = search(asks, SKILLS, budget, seed)
    elif arm == "all":
        found = search(asks, experts, budget, seed)
    else:
        alone = Alone(asks)
        if arm == "soup":
            found = soup(asks, alone, budget)
        else:
            models = alone.picked()
            # Its own parents are among those that were asked.
            left = budget - len(pool()) + len(models) + 1
            found = search(asks, models, left, seed)
            found["spent"] += len(pool()) - len(models) - 1
    useful = {name.removesuffix("-again") for name in found["models"]} & set(SKILLS)
    named = len(useful) / len(SKILLS)
    return found | {"arm": arm, "seed": seed, "budget": budget, "recall": named}


def written(runs: Sequence[dict[str, Any]]) -> str:
    lines = ["| evaluations | arm | seeds | sealed | against told (95 %) | useful three | models |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for budget in sorted({run["budget"] for run in runs}):
        told = {r["seed"]: r["sealed"] for r in runs if (r["budget"], r["arm"]) == (budget, "told")}
        for arm in ARMS:
            mine = [r for r in runs if (r["budget"], r["arm"]) == (budget, arm)]
            if not mine:
                continue
            sealed = np.array([r["sealed"] for r in mine])
            gaps = np.array([r["sealed"] - told[r["seed"]] for r in mine if r["seed"] in told])
            draws = np.random.default_rng(0).choice(gaps, (4000, len(gaps))).mean(1)
            low, high = np.quantile(draws, (0.025, 0.975))
            recall = np.mean([r["recall"] for r in mine])
            count = np.mean([len(r["models"]) for r in mine])
            lines.append(
                f"| {budget} | {arm} | {len(mine)} | {sealed.mean():.3f} | {gaps.mean():+.3f} "
                f"({low:+.3f} to {high:+.3f}) | {recall:.2f} | {count:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool", description=__doc__)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budgets", default="30,60")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results") / "pool")
    asked = parser.parse_args(arguments)
    arms, budgets = asked.arms.split(","), [int(b) for b in asked.budgets.split(",")]
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
        parser.error(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    runs = []
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        for budget in budgets:
            for arm in arms:
                path = path_of(asked.out, "pool", arm, seed, budget)
                if not path.is_file():
                    save(path, run_one(arm, seed, budget))
                runs.append(json.loads(path.read_text()))
                found = runs[-1]
                told = f"sealed {found['sealed']:.3f}, spent {found['spent']}, {found['models']}"
                print(f"{budget} {arm} seed {seed}: {told}", flush=True)
    text = written(runs)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
