"""A worker without a model: item results as a smooth function of a recipe's weights.

Supported API, for tests, strategies and plugins, who find it in ``agentmerge.testing``: a search on
it takes milliseconds a candidate and is deterministic everywhere. It knows recipes and items; it
imports no torch.

Every task has its own optimum, different by depth; parents take sides in turn, so that a uniform
merge is never the best. The nearer a merge is to the optimum, the more items it answers; an item's
margin also leans its own way, as real ones do. A task's metric says what an item is worth, as it
does in lm-eval: right or wrong with a margin (``acc`` and any other name), right or wrong without
one (``exact_match``), a loss whose mean should be low (``mse``), or the log-likelihood of a text
(``perplexity``, ``word_perplexity``), which is no mean over items and should be low. What is
generated (``exact_match``, ``mse``) is the longer, the more there is of the parents that a good
merge has much of.
To a judged task's turns it answers "level 0.7", how sure of itself it is, for a scripted judge.

A stack of layers (a linear recipe of other layers than the parents' own, in their places) has the
merge's own layer k where most models first make it; what else takes layer k adds to every margin
as a parent's layer is strong there, best at a strength of its own by task, which may be below 0.
What is left out has no weights. So weights alone never say what a stack can.

Options (``worker.options``):
    base: the parent that counts as nobody's expert (no optimum of its own).
    delay_s: how long a score takes.
    num_layers: how deep the parents are, 4 by default.
    documents: items a task has before limits and sealing.
    groups: task -> of how many leaves it is the group, each with fewer items than the one before.
    scales: what margins are multiplied by: an item has one of these, as its key says.
    fail_when: recipe hashes, or "max_weight>0.95" (also min_weight, mean_weight, and "<"): these
        candidates fail.
    fail_items, fail_items_when: numbers of documents that have no finite answer, on all merges or
        on those that ``fail_items_when`` (as ``fail_when``) names.
    die_when: these candidates lose the worker at load(), every time. die_at: it is lost at its n-th
        load(). With ``die_hard``, the whole process is.
    hang_when: these candidates' scores never come.
    no_gradient: "failed", or "lost" with the worker, as where memory runs out.
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import (
    EngineInfo,
    Fingerprint,
    Gradient,
    ItemRef,
    ItemResult,
    Loss,
    TensorSlope,
    WorkerSpec,
)
from agentmerge.errors import CandidateFailed, RunFailed, WorkerLost
from agentmerge.evaluation.judged import judged_task
from agentmerge.evaluation.playing import JudgedTask
from agentmerge.evaluation.splitting import numbered, stand_in
from agentmerge.evaluation.tasks import Objective, ScoredTask, TaskSet
from agentmerge.methods import PASSTHROUGH, RECIPE_METHODS
from agentmerge.recipe import Recipe, length
from agentmerge.recipe.copying import layers_read
from agentmerge.workers.options import FakeOptions, Where

_KINDS = ("self_attn", "mlp")
_WIDTH, _GAIN, _LEAN = 0.35, 8.0, 1.5
#: What one added output is worth at its best strength of 1.
_ADDED = 0.3


@dataclass(frozen=True, slots=True)
class _Metric:
    """What lm-eval would say of a metric's task."""

    output_type: str = "multiple_choice"
    margin_kind: Literal["choice"] | None = "choice"
    rebuild: Literal["plain", "weighted"] = "plain"
    higher_is_better: bool = True


_METRICS = {
    "exact_match": _Metric("generate_until", None),
    "mse": _Metric("generate_until", None, higher_is_better=False),
    "perplexity": _Metric("loglikelihood", None, "weighted", False),
    "word_perplexity": _Metric("loglikelihood_rolling", None, "weighted", False),
}


def fake_tasks(
    config: TasksConfig, documents: int = 400, groups: Mapping[str, int] | None = None
) -> TaskSet:
    """A task set of invented items under the names of ``config``; nothing is loaded.

    groups: task -> of how many leaves it is the group; by default none is one.
    """
    tasks, objectives, notes = [], [], []
    judged: dict[str, JudgedTask] = {}
    for entry in config.tasks:
        if entry.judge is not None:
            scored, judged[entry.name], _, note = judged_task(entry, config)
            tasks.append(scored)
            notes += [note] if note else []
            objectives.append(
                Objective(entry.name, entry.weight, scored.higher_is_better, (entry.name,))
            )
            continue
        count = (groups or {}).get(entry.name, 1)
        leaves = [entry.name] if count == 1 else [f"{entry.name}_{n}" for n in range(count)]
        for n, leaf in enumerate(leaves):
            size = max(1, documents // (n + 1))
            items, search, sealed, note = numbered(leaf, size, config, partial(_key, "item", leaf))
            notes += [note] if note else []
            metric, _, filter_name = entry.metric.partition(",")
            kind = _METRICS.get(metric, _Metric())
            words = [float(_words(ref.key, metric)) for ref in items]
            tasks.append(
                ScoredTask(
                    name=leaf,
                    weight=entry.weight,
                    metric=metric,
                    filter=filter_name or "none",
                    higher_is_better=kind.higher_is_better,
                    output_type=kind.output_type,
                    margin_kind=kind.margin_kind,
                    protocol_hash=_key("protocol", leaf, entry.metric),
                    items=items,
                    search=search,
                    sealed=sealed,
                    rebuild=kind.rebuild,
                    statics=tuple(words) if kind.rebuild == "weighted" else (),
                    objective=entry.name,
                )
            )
        objectives.append(
            Objective(
                entry.name, entry.weight, tasks[-1].higher_is_better, tuple(leaves), count > 1
            )
        )
    tasks, more = stand_in(tasks)
    texts = {task.name: _perplexity for task in tasks if task.rebuild == "weighted"}
    return TaskSet(tuple(tasks), tuple(objectives), (*notes, *more), texts, judged=judged)


def _words(key: str, metric: str) -> int:
    """How many a text has; lm-eval's "perplexity" counts each text as one."""
    return 1 if metric == "perplexity" else 4 + int(key, 16) % 13


def _perplexity(values: Sequence[tuple[float, int]]) -> float:
    total, words = (sum(column) for column in zip(*values, strict=True))
    return math.exp(-total / words)


class FakeWorker:
    """See the module's head; the contract is ``contracts/worker.py``."""

    reads_models = False
    runs_stacks = True
    #: By which tensors a layer adds to the stream: all that there are.
    outputs = _KINDS

    def __init__(self, spec: WorkerSpec, taskset: TaskSet | None = None) -> None:
        options = FakeOptions.of(spec.options)
        self._parents = [name for name, _ in spec.parents if name != options.base]
        self._depth = self.num_layers(spec)
        self._delay_s = options.delay_s or 0.0
        taskset = taskset or self.tasks(spec)
        self._metrics = {task.name: task.metric for task in taskset.tasks}
        self._judged = taskset.judged
        self._scales = tuple(options.scales or (1.0,))
        self._fails = _predicate(options.fail_when)
        self._bad_items = frozenset(options.fail_items or ())
        bad_on = options.fail_items_when
        self._bad_on = _predicate(bad_on) if bad_on is not None else lambda *_: True
        self._no_gradient = options.no_gradient
        self._dies = _predicate(options.die_when)
        self._hangs = _predicate(options.hang_when)
        self._hanging = False
        self._die_at = options.die_at
        self._die_hard = options.die_hard
        self._loads = 0
        self._live: np.ndarray | None = None
        self._places: tuple[_Place, ...] | None = None
        self._on_bad_merge = False
        self._info = self.describe(spec)

    @staticmethod
    def tasks(spec: WorkerSpec) -> TaskSet:
        options = FakeOptions.of(spec.options)
        return fake_tasks(spec.tasks, options.documents or 400, options.groups)

    @staticmethod
    def num_layers(spec: WorkerSpec) -> int:
        return FakeOptions.of(spec.options).num_layers or 4

    @staticmethod
    def describe(spec: WorkerSpec) -> EngineInfo:
        scales = spec.options.get("scales")
        scoring = f"fake, scales {scales}" if scales else "fake"
        return EngineInfo("fake", "1", "cpu", spec.dtype, str(spec.batch_size), scoring=scoring)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def load(self, recipe: Recipe) -> Fingerprint:
        self._live = None
        self._loads += 1
        point = _point(recipe, self._parents)
        if self._loads == self._die_at or self._dies(recipe, point):
            if self._die_hard:
                os._exit(9)
            raise WorkerLost(f"the fake worker died at load {self._loads}, as it was told to")
        if self._fails(recipe, point):
            raise CandidateFailed("the fake worker fails this candidate, as it was told to")
        if not (np.abs(point) < np.finfo(np.float32).max).all():
            raise CandidateFailed("the merge is not finite; the weights are too large")
        self._live, self._places = point, _places(recipe, self._depth)
        self._hanging = self._hangs(recipe, point)
        self._on_bad_merge = bool(self._bad_items) and self._bad_on(recipe, point)
        digest = hashlib.sha256(point.tobytes()).hexdigest()[:16]
        return Fingerprint(recipe.hash(), digest, point.size)

    def score(self, items: Sequence[ItemRef]) -> list[ItemResult]:
        point = _live(self._live)
        if self._delay_s:
            time.sleep(self._delay_s)
        while self._hanging:
            time.sleep(1)
        if self._on_bad_merge:
            for item in items:
                if item.index in self._bad_items:
                    raise CandidateFailed(
                        f"log-likelihood nan for document {item.index} of task {item.task!r}"
                    )
        return [self._result(item, point) for item in items]

    def _result(self, item: ItemRef, point: np.ndarray) -> ItemResult:
        margin, _ = self._margin(item, point)
        likelihood, metric = -float(np.logaddexp(0.0, -margin)), self._metrics[item.task]
        if item.task in self._judged:
            turns = self._judged[item.task].conversations[item.index].turns
            level = 1 / (1 + math.exp(-margin))
            said = tuple(f"level {level:.6f}" for _ in turns)
            return ItemResult(math.nan, tokens=_length(item.key, point), answers=said)
        if metric == "exact_match":
            return ItemResult(float(margin > 0), tokens=_length(item.key, point))
        if metric == "mse":
            return ItemResult(-likelihood, tokens=_length(item.key, point))
        if _METRICS.get(metric, _Metric()).rebuild == "weighted":
            text = _words(item.key, metric) * (likelihood - 0.5)
            return ItemResult(text, text, tokens=0)
        return ItemResult(float(margin > 0), likelihood, margin, tokens=0)

    def _margin(self, item: ItemRef, point: np.ndarray) -> tuple[float, np.ndarray]:
        parents = tuple(self._parents)
        if self._places is None:
            margin, lean = _margin(item, point, parents)
        else:
            margin, lean = _stacked_margin(item, point, parents, self._places, self._depth)
        scale = self._scales[int(item.key, 16) % len(self._scales)]
        return scale * margin, scale * lean

    def gradient(
        self,
        recipe: Recipe,
        items: Sequence[ItemRef],
        loss: Loss = "margin",
        weights: Sequence[float] | None = None,
    ) -> Gradient:
        """Both losses are the same here: a gold answer's log-likelihood is that of its margin."""
        self.load(recipe)
        if not RECIPE_METHODS[recipe.merge_method].differentiable:
            raise CandidateFailed(f"{recipe.merge_method} has no weights to take a gradient of")
        if self._no_gradient:
            kind = WorkerLost if self._no_gradient == "lost" else CandidateFailed
            raise kind("the fake worker has no gradient, as it was told to")
        if not items:
            raise CandidateFailed("no item has a gold answer to take a gradient of")
        if self._delay_s:
            time.sleep(self._delay_s)
        point = _live(self._live)
        shares = np.ones(len(items)) if weights is None else np.asarray(weights, dtype=float)
        shares = shares / np.abs(shares).sum()
        total, slope = 0.0, np.zeros_like(point)
        for item, share in zip(items, shares, strict=True):
            margin, lean = self._margin(item, point)
            total += share * float(np.logaddexp(0.0, -margin))
            slope -= share * lean / (1.0 + math.exp(min(margin, 700.0)))
        return Gradient(total, len(items), tuple(_slopes(recipe, slope, self._parents)))

    def close(self) -> None:
        self._live = None


def _length(key: str, point: np.ndarray) -> int:
    """Tokens of an answer."""
    wordy = float(np.clip(point[..., ::2].mean(), 0.0, 2.0))
    return round((0.75 + 0.5 * (int(key[:4], 16) / 0xFFFF)) * (20 + 100 * wordy))


def _live(point: np.ndarray | None) -> np.ndarray:
    if point is None:
        raise RunFailed("nothing is loaded: load() a recipe before score()")
    return point


def _point(recipe: Recipe, parents: Sequence[str]) -> np.ndarray:
    """Effective weights, shape (layers, kinds, parents).

    Raises:
        RecipeRejected: by the recipe's own rules.
    """
    layers = layers_read(recipe)
    place = {name: i for i, name in enumerate(parents)}
    point = np.zeros((len(layers), len(_KINDS), len(parents)))
    method = RECIPE_METHODS[recipe.merge_method]
    merges = {name: _point(merge, parents) for name, merge in recipe.merges}
    for layer, read in enumerate(layers):
        for k, kind in enumerate(_KINDS):
            effective = recipe.effective(_tensor(layer, kind), layer)
            shared, base = dict(effective.shared), effective.base_model
            weights = {}
            for model, _, own in effective.sources:
                if method.pairwise:
                    share = shared["t"]
                    weights[model] = 1 - share if model == base else share
                elif not (method.sets_apart(base) and model == base):
                    values = dict(own)
                    weight = values.get("weight", _evenly(shared) / len(effective.sources))
                    weights[model] = weight * math.sqrt(values.get("density", 1.0))
            total = sum(weights.values())
            if method.ratios_only(shared) and total:
                weights = {model: weight / total for model, weight in weights.items()}
            for model, weight in weights.items():
                if model in merges:
                    point[layer, k] += weight * merges[model][read, k]
                if model in place:
                    point[layer, k, place[model]] += weight * shared.get("lambda", 1.0)
    return point


def _slopes(recipe: Recipe, slope: np.ndarray, parents: Sequence[str]) -> Iterator[TensorSlope]:
    """The slope in effective weights (as ``_point`` has them) -> in the recipe's own."""
    place = {name: i for i, name in enumerate(parents)}
    merges = {name: _point(merge, parents) for name, merge in recipe.merges}
    for layer, read in enumerate(layers_read(recipe)):
        for k, kind in enumerate(_KINDS):
            tensor = _tensor(layer, kind)
            effective = recipe.effective(tensor, layer)
            shared = dict(effective.shared)
            scale = shared.get("lambda", 1.0)
            kept, own, pull = {}, {}, {}
            for model, _, values in effective.sources:
                if values:
                    kept[model] = math.sqrt(dict(values).get("density", 1.0))
                    own[model] = dict(values)["weight"] * kept[model]
                    own_slope = slope[layer, k, place[model]] if model in place else 0.0
                    if model in merges:
                        own_slope = float(slope[layer, k] @ merges[model][read, k])
                    pull[model] = own_slope
            total = sum(own.values())
            ratios = RECIPE_METHODS[recipe.merge_method].ratios_only(shared) and bool(total)
            divisor = total if ratios else 1.0
            mean = sum(own[model] * pull[model] for model in own) / divisor
            weights = tuple(
                (model, float(scale * kept[model] * (pull[model] - ratios * mean) / divisor))
                for model in own
            )
            yield TensorSlope(
                tensor, layer, False, weights, float(mean) if "lambda" in shared else 0.0
            )


def _tensor(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.{kind}.weight"


def _evenly(shared: Mapping[str, float]) -> float:
    """How much of the models goes in where they have no weights: by a made-up rule."""
    if "t" in shared:
        return min(max(1 + math.log10(max(shared["t"], 1e-9)) / 6, 0.0), 1.0)
    return shared.get("select_topk", 1.0) * (1.0 - 0.2 * shared.get("filter_wise", 0.0))


#: Of each layer of a stack: (which of the parents' layers it is, whether it is the merge's own).
_Place = tuple[int, bool]


def _places(recipe: Recipe, depth: int) -> tuple[_Place, ...] | None:
    """None of a recipe that makes layers in their places, or none by weights."""
    if RECIPE_METHODS[recipe.merge_method] is PASSTHROUGH:
        return None
    rows = [
        ((piece.sources[0].layer_range or (0, 0))[0] + offset, len(piece.sources))
        for piece in recipe.slices
        for offset in range(length(piece))
    ]
    if len(rows) >= depth and [layer for layer, _ in rows] == list(range(len(rows))):
        return None
    most = {layer: max(n for k, n in rows if k == layer) for layer, _ in rows}
    own = {layer: rows.index((layer, n)) for layer, n in most.items()}
    return tuple((layer, own[layer] == place) for place, (layer, _) in enumerate(rows))


def _stacked_margin(
    item: ItemRef,
    point: np.ndarray,
    parents: tuple[str, ...],
    places: Sequence[_Place],
    depth: int,
) -> tuple[float, np.ndarray]:
    """As ``_margin``, of a stack."""
    depth = max(depth, 1 + max(layer for layer, _ in places))
    merge = np.zeros((depth, *point.shape[1:]))
    for row, (layer, own) in zip(point, places, strict=True):
        if own:
            merge[layer] = row
    margin, lean = _margin(item, merge, parents)
    best = 1.5 * _optimum(f"{item.task} added", parents, depth, len(_KINDS)) - 0.3
    slope = np.empty_like(point)
    for place, (layer, own) in enumerate(places):
        slope[place] = lean[layer] if own else 2 * _ADDED * (best[layer] - point[place])
        if not own:
            margin += _ADDED * float((point[place] * (2 * best[layer] - point[place])).sum())
    return margin, slope


def _margin(item: ItemRef, point: np.ndarray, parents: tuple[str, ...]) -> tuple[float, np.ndarray]:
    """An item's margin and its slope in the point."""
    away = point - _optimum(item.task, parents, *point.shape[:2])
    quality = math.exp(-float((away**2).mean()) / (2 * _WIDTH**2))
    threshold, lean = _item(item.key, point.shape)
    margin = _GAIN * (quality - threshold) + _LEAN * float((lean * away).mean())
    return margin, (_LEAN * lean - _GAIN * quality / _WIDTH**2 * away) / away.size


@lru_cache(maxsize=64)
def _optimum(task: str, parents: tuple[str, ...], layers: int, kinds: int) -> np.ndarray:
    best = np.empty((layers, kinds, len(parents)))
    depth = np.linspace(0, 1, layers) if layers > 1 else np.zeros(1)
    for p, parent in enumerate(parents):
        for k in range(kinds):
            rng = _rng(_key("optimum", task, parent, k))
            # Parents take sides in turn, so that no uniform merge is ever near the best.
            level = rng.uniform(0.05, 0.4) if p % 2 else rng.uniform(0.6, 0.95)
            swing = rng.uniform(-0.25, 0.25)
            best[:, k, p] = np.clip(level + swing * (depth - 0.5), 0.05, 0.95)
    return best


@lru_cache(maxsize=100_000)
def _item(key: str, shape: tuple[int, ...]) -> tuple[float, np.ndarray]:
    rng = _rng(key)
    return float(rng.uniform(0.0, 1.02)), rng.normal(size=shape)


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _rng(key: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int(key, 16)))


_FIGURES: dict[str, Callable[[np.ndarray], Any]] = {
    "max_weight": np.max,
    "min_weight": np.min,
    "mean_weight": np.mean,
}


def _predicate(where: Where | None) -> Callable[[Recipe, np.ndarray], bool]:
    """Whether a recipe, with its weights, is one of those."""
    if where is None:
        return lambda *_: False
    if not where.figure:
        return lambda recipe, _: bool(where.hashes) and recipe.hash() in where.hashes
    figure, compare = _FIGURES[where.figure], operator.gt if where.above else operator.lt
    return lambda _, point: bool(compare(figure(point), where.bound))
