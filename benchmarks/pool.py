"""``python -m benchmarks.pool``: twelve experts, three of which are useful, at equal cost.

    python -m benchmarks.pool --seeds 20 --budgets 30,60 --out DIR
    python -m benchmarks.pool --arms rule,curator,curator_shuffled,curator_blank,told --seeds 10 \\
        --base-url http://localhost:8000/v1 --model qwen --out DIR

The demo's family of three skills, and beside its experts a near-duplicate of each, three that were
trained on something that nobody asks, and three damaged ones (a layer's mlp of zeros, one weight
twenty times as large, noise all over). Arms: ``all`` (one space of twelve), ``soup`` (greedy: the
best expert, then whoever makes the mean better), ``rule`` (the product's choice of three after
each was asked alone, ``agentmerge.search.models``), ``told`` (a search that was told the right
three: the ceiling), ``sparse`` (``benchmarks.sparse``) and curators (``benchmarks.curators``):
``curator`` with honest cards, ``curator_shuffled``, ``curator_blank`` and ``curator_scripted``, who
always names the right three. What a curator names is tried beside the rule's choice as the product
does it. Every arm pays for all that it asks. Writes ``DIR/runs/*.json``, ``DIR/results.md`` and
``DIR/replies/*.json``, in which a curator that asks the same again finds its reply.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmerge.agents.curator import PoolView
from agentmerge.agents.models import AgentModel
from agentmerge.agents.view import HistoryView, TaskView
from agentmerge.config import GenomeConfig
from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.strategy import Observation
from agentmerge.demo import language
from agentmerge.demo.family import cached_family
from agentmerge.demo.training import Learner, stream
from agentmerge.merging.experts import ExpertSurvey, survey_experts
from agentmerge.merging.family import Family
from agentmerge.recipe import Recipe, Setting, Slice, Source
from agentmerge.search.curating import weight_facts
from agentmerge.search.models import OwnScore, chosen
from agentmerge.search.trials import TRIAL_OF_MODELS
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.auto import Auto
from agentmerge.strategies.llm_evo import SIGMA_HIGH, SIGMA_LOW
from agentmerge.testing.prefixes import answer_logits
from agentmerge.testing.problem import KeptAnswers
from agentmerge.testing.scripted import scripted_chat_model
from agentmerge.testing.tiny import TinyProblem, TinySetting, read_answers
from benchmarks.curators import Named, model_of
from benchmarks.curators import ask as ask_curator
from benchmarks.running import Arm, path_of, run_search, save
from benchmarks.sparse import choose

SKILLS = ("shift", "reverse", "sort")
PLAIN = ("all", "soup", "rule", "sparse", "curator_scripted", "told")
ASKING = ("curator", "curator_shuffled", "curator_blank")
ARMS = (*PLAIN, *ASKING)
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
    granularity: int = 1
    name: str = "pool"
    _known: dict[tuple[float, ...], Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.tasks = SKILLS
        self._items, self._search = self.asks._items, self.asks._search
        genome = GenomeConfig(
            models=self.models,
            base_model="base",
            merge_method="task_arithmetic",
            layer_granularity=self.granularity,
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


@lru_cache(maxsize=1)
def surveyed() -> ExpertSurvey:
    experts = [str(path) for name, path in pool().items() if name != "base"]
    return survey_experts(experts, str(pool()["base"]))


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

    def by_task(self, name: str) -> tuple[tuple[str, float], ...]:
        parts = self.shown(name).parts
        return tuple((skill, part * len(SKILLS)) for skill, part in zip(SKILLS, parts, strict=True))

    def shown(self, name: str) -> OwnScore:
        task, values = self.asks._items.task, self.values[name]
        parts = tuple(float(values[task == i].mean()) / len(SKILLS) for i in range(len(SKILLS)))
        return OwnScore(float(values.mean()), parts)

    def noise(self, one: Observation, other: Observation) -> float:
        gap = self.values[one.label] - self.values[other.label]
        return float(gap.std() / np.sqrt(len(gap)))

    def picked(self) -> list[str]:
        """The product's choice (``search.models``)."""
        paths, found = {str(path): name for name, path in pool().items()}, surveyed()
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


def sparse(asks: TinyProblem, budget: int, seed: int) -> dict[str, Any]:
    """The choice of the items' model with a sparsity prior over experts."""
    experts = tuple(name for name in pool() if name != "base")
    problem = PoolProblem(asks, experts, granularity=0)
    models, asked = choose(problem.space, problem.evaluate, MOST)
    # What it asked of those, and its own parents, the search need not ask again.
    known = len(models) + 1 + asked.count(models)
    spent = len(pool()) + len(asked)
    found = search(asks, models, budget - spent + known, seed)
    found["spent"] += spent - known
    return found


def curated(
    asks: TinyProblem, alone: Alone, budget: int, seed: int, subsets: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """What a curator named beside the rule's choice, each with as many evaluations as the product
    gives it, and the search goes on in the better one."""
    leader, tried = alone.picked(), set[frozenset[str]]()
    best, cost = cheap(asks, leader, None)
    # A trial has to beat all that was asked before it.
    best = max(best, *(float(values.mean()) for values in alone.values.values()))
    spent, known = len(pool()) + cost, cost
    for models in subsets:
        new = frozenset(models) not in {frozenset(leader), *tried}
        if new and budget - spent >= TRIAL_OF_MODELS:
            tried.add(frozenset(models))
            score, cost = cheap(asks, models, TRIAL_OF_MODELS)
            spent += cost
            if score > best:
                best, leader, known = score, list(models), cost
    known += len(leader) + 1
    found = search(asks, leader, budget - spent + known, seed)
    found["spent"] += spent - known
    return found


def cheap(asks: TinyProblem, models: Sequence[str], most: int | None) -> tuple[float, int]:
    """(the best of some experts' uniform merges, how many were asked)."""
    problem = PoolProblem(asks, tuple(models))
    points = [point for operator, _, point in problem.first_points() if operator != PARENT][:most]
    return max(problem.evaluate(point).score for point in points), len(points)


def word(kind: str, alone: Alone, seed: int, model: AgentModel, folder: Path) -> dict[str, Any]:
    """What a curator says of the pool. kind: of its cards."""
    experts = [name for name in pool() if name != "base"]
    named = Named.of(experts, seed)
    places = {str(path): name for name, path in pool().items()}
    weights = weight_facts(surveyed(), places)
    facts = named.facts(kind, seed, weights)
    entries = tuple(
        Observation(0, slot, None, PARENT, shown.score, tasks=alone.by_task(name), label=name)
        for slot, (name, shown) in enumerate((name, alone.shown(name)) for name in experts)
    )
    history = HistoryView(
        space=PoolProblem(alone.asks, tuple(experts)).space,
        tasks=tuple(TaskView(skill, 1.0, "exact_match", True) for skill in SKILLS),
        entries=tuple(replace(entry, label=named.names[entry.label]) for entry in entries),
        sigma=None,
        sigma_low=SIGMA_LOW,
        sigma_high=SIGMA_HIGH,
        improved_last=False,
        budget_left=0,
        noise=lambda a, b: alone.noise(entries[a.slot], entries[b.slot]),
    )
    found = ask_curator(PoolView(history, facts, MOST), model, folder)
    known = {name: expert for expert, name in named.names.items()}
    return found | {"subsets": [[known[name] for name in s] for s in found["subsets"]]}


def scripted(seed: int) -> AgentModel:
    """Always names the right three: the ceiling of curators."""
    names = Named.of([name for name in pool() if name != "base"], seed).names
    right = {"models": [names[skill] for skill in SKILLS], "why": "", "expected_score": None}
    reply = {"thought": "", "subsets": [right]}
    return AgentModel.from_spec(scripted_chat_model(lambda _: reply))


def run_one(
    arm: str, seed: int, budget: int, model: AgentModel | None, folder: Path
) -> dict[str, Any]:
    asks = TinyProblem(TinySetting("pool", SKILLS), seed)
    experts = [name for name in pool() if name != "base"]
    kind = arm.partition("_")[2]
    said: dict[str, Any] = {}
    if arm == "told":
        found = search(asks, SKILLS, budget, seed)
    elif arm == "all":
        found = search(asks, experts, budget, seed)
    elif arm == "sparse":
        found = sparse(asks, budget, seed)
    elif arm.startswith("curator"):
        alone = Alone(asks)
        if kind == "scripted":
            model, folder = scripted(seed), folder / f"scripted-{seed}"
        assert model is not None, "main asks for one"
        said = word(kind, alone, seed, model, folder)
        found = curated(asks, alone, budget, seed, said["subsets"])
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
    return found | said | {"arm": arm, "seed": seed, "budget": budget, "recall": named}


def written(runs: Sequence[dict[str, Any]]) -> str:
    lines = ["| evaluations | arm | seeds | sealed | against told (95 %) | useful three | models "
             "| tokens | seconds of asking |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for budget in sorted({run["budget"] for run in runs}):
        told = {r["seed"]: r["sealed"] for r in runs if (r["budget"], r["arm"]) == (budget, "told")}
        for arm in ARMS:
            mine = [r for r in runs if (r["budget"], r["arm"]) == (budget, arm)]
            if not mine:
                continue
            sealed = np.array([r["sealed"] for r in mine])
            gaps = [r["sealed"] - told[r["seed"]] for r in mine if r["seed"] in told]
            recall = np.mean([r["recall"] for r in mine])
            count = np.mean([len(r["models"]) for r in mine])
            tokens, seconds = (
                np.mean([r.get(key, 0) for r in mine]) for key in ("tokens", "seconds")
            )
            lines.append(
                f"| {budget} | {arm} | {len(mine)} | {sealed.mean():.3f} | {interval(gaps)} "
                f"| {recall:.2f} | {count:.1f} | {tokens:.0f} | {seconds:.1f} |"
            )
    return "\n".join([*lines, "", *compared(runs)]) + "\n"


def compared(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What cards, and a curator, are worth: the same seeds, one arm less another."""
    known = {(r["budget"], r["arm"], r["seed"]): r["sealed"] for r in runs}
    for budget in sorted({run["budget"] for run in runs}):
        for one, other in (
            ("curator", "curator_shuffled"), ("curator", "curator_blank"), ("curator", "rule"),
            ("curator_scripted", "rule"), ("sparse", "rule"),
        ):  # fmt: skip
            gaps = [
                sealed - known[budget, other, seed]
                for (at, arm, seed), sealed in known.items()
                if (at, arm) == (budget, one) and (budget, other, seed) in known
            ]
            if gaps:
                yield f"- {budget} evaluations, {one} less {other}: {interval(gaps)}"


def interval(gaps: Sequence[float]) -> str:
    """A mean over seeds with its bootstrapped interval of 95 %."""
    if not gaps:
        return "-"
    draws = np.random.default_rng(0).choice(gaps, (4000, len(gaps))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{np.mean(gaps):+.3f} ({low:+.3f} to {high:+.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pool", description=__doc__)
    parser.add_argument("--arms", default=",".join(PLAIN))
    parser.add_argument("--base-url", help="a server that speaks the OpenAI protocol")
    parser.add_argument("--model", help="the model that curators are asked of")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budgets", default="30,60")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results") / "pool")
    asked = parser.parse_args(arguments)
    arms, budgets = asked.arms.split(","), [int(b) for b in asked.budgets.split(",")]
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
        parser.error(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    asking = sorted(set(arms) & set(ASKING))
    if asking and not asked.model:
        parser.error(f"{asking[0]} asks a model: name it with --model, and its --base-url")
    model = model_of(asked.model, asked.base_url) if asking else None
    runs = []
    for seed in range(asked.first_seed, asked.first_seed + asked.seeds):
        for budget in budgets:
            for arm in arms:
                path = path_of(asked.out, "pool", arm, seed, budget)
                if not path.is_file():
                    save(path, run_one(arm, seed, budget, model, asked.out / "replies"))
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
