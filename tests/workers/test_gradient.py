"""The HF worker's gradient: equal to finite differences, and leaving nothing behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import recipe

from agentmerge.config import GenomeConfig
from agentmerge.contracts.worker import Differentiator, Gradient, ItemRef, Loss, WorkerSpec
from agentmerge.errors import CandidateFailed
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.losses import item_loss
from agentmerge.merging.family import mask_key
from agentmerge.merging.kernels import magnitude_mask, random_mask
from agentmerge.recipe import Recipe
from agentmerge.space.chain_rule import differentiable_axes, unit_gradient
from agentmerge.space.grouped import SearchSpace
from agentmerge.workers.hf import HfWorker

LAYERS = 3
TASKS = ["tiny_choice", "tiny_cloze=acc,none", "tiny_text", "tiny_answer"]


@pytest.fixture(scope="module", params=["tied", "untied"])
def spec(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tasks_dir: Path,
    double: None,
) -> WorkerSpec:
    """Three float64 models of three layers."""
    root = tmp_path_factory.mktemp("double")
    shape: dict[str, Any] = {
        "dtype": "float64",
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": request.param == "tied",
    }
    base = tiny.write_model(root / "base", seed=1, **shape)
    parents = {"base": base}
    for seed, name in enumerate(("b", "c", "d"), 2):
        parents[name] = tiny.write_model(root / name, seed=seed, near=base, **shape)
    tasks = tiny.tasks_config(tasks_dir, *TASKS, limit=4)
    return tiny.spec(parents, tasks, dtype="float64", options={"base": "base"})


@pytest.fixture(scope="module")
def worker(spec: WorkerSpec) -> Iterator[HfWorker]:
    made = HfWorker(spec)
    yield made
    made.close()


@pytest.fixture(scope="module")
def refs(spec: WorkerSpec) -> tuple[ItemRef, ...]:
    return tasks_for(spec).refs()


def relative(found: Any, expected: Any) -> float:
    error = np.linalg.norm(np.asarray(found) - np.asarray(expected))
    return float(error / np.linalg.norm(expected))


# --- through the merge itself: nothing is chosen, or what is chosen does not move -----------------


MERGES: list[tuple[Loss, dict[str, Any]]] = [
    ("log_likelihood", {"merge_method": "linear", "normalize": False}),
    ("margin", {"merge_method": "linear", "normalize": True, "filters": ["mlp"]}),
    (
        "margin",
        {"merge_method": "task_arithmetic", "layer_granularity": 1, "filters": ["self_attn"]},
    ),
    (
        "log_likelihood",
        {"merge_method": "task_arithmetic", "normalize": True, "evolve": ["lambda"]},
    ),
    (
        "log_likelihood",
        {"merge_method": "task_arithmetic", "layer_granularity": 1, "smooth": True},
    ),
    ("margin", {"merge_method": "dare_linear", "evolve": ["lambda"], "filters": ["mlp"]}),
    ("margin", {"merge_method": "breadcrumbs", "normalize": True}),
    ("log_likelihood", {"merge_method": "della_linear", "evolve": ["lambda"]}),
]


@pytest.mark.parametrize(
    ("loss", "genome"), MERGES, ids=[" ".join(map(str, g.values())) for _, g in MERGES]
)
def test_it_equals_finite_differences_of_the_merge(
    worker: HfWorker, refs: tuple[ItemRef, ...], genome: dict[str, Any], loss: Loss
) -> None:
    body = {"models": ["b", "c", "d"], "base_model": "base"} | genome
    space = SearchSpace(GenomeConfig(**body), LAYERS, "float64", merge_seed=5)

    def value(vector: np.ndarray) -> float:
        worker.load(space.recipe(vector))
        return loss_of(worker, refs, loss)

    vector = np.random.default_rng(3).uniform(0.3, 0.8, space.dimensions)
    gradient = worker.gradient(space.recipe(vector), refs, loss)
    assert gradient.loss == pytest.approx(value(vector), rel=1e-12)
    found = np.array(unit_gradient(space, vector, gradient))
    slopes = np.array(differentiable_axes(space))
    expected = np.zeros(space.dimensions)
    for i in np.flatnonzero(slopes):
        away = np.eye(space.dimensions)[i] * 1e-5
        expected[i] = (value(vector + away) - value(vector - away)) / 2e-5
    assert np.abs(expected).max() > 1e-3
    assert relative(found, expected) < 1e-5


def loss_of(worker: HfWorker, refs: tuple[ItemRef, ...], loss: Loss) -> float:
    """The loss of what is live, forward only."""
    with torch.no_grad():
        asked = item_loss(worker._scorer, worker._lm, refs, loss)
        return sum(float(part) for part in asked.parts(worker._lm, 16))


# --- frozen masks and signs: a merge of its own, written down once more ---------------------------


class Held:
    """W = base + lambda * sum w r K tau, over the sum of w K where normalized; K and r as found at
    the recipe, from masks that are given and signs elected there."""

    def __init__(self, worker: HfWorker, asked: Recipe, models: tuple[str, ...]) -> None:
        self.worker, self.recipe, self.models = worker, asked, models
        self.shared = dict(worker._family.plan(asked).tensors[0].effective.shared)
        self.tensors: dict[str, tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]] = {}
        for item in worker._family.plan(asked).tensors:
            name = item.spec.name
            base = worker._family.tensor("base", name).reshape(-1)
            own = {model: dict(values) for model, _, values in item.effective.sources}
            added = [self._kept(name, model, own[model], base) for model in models]
            weighed = [own[m]["weight"] * a for m, a in zip(models, added, strict=True)]
            sign = torch.where(sum(weighed) < 0, -1.0, 1.0)  # type: ignore[arg-type]
            agree = [w * sign > 0 for w in weighed]
            self.tensors[name] = base, added, agree

    def _kept(
        self, name: str, model: str, own: dict[str, float], base: torch.Tensor
    ) -> torch.Tensor:
        tau = self.worker._family.tensor(model, name).reshape(-1) - base
        if self.recipe.merge_method == "ties":
            mask = magnitude_mask(base, tau + base, own["density"])
        else:
            fingerprint = self.worker._family.identities[model]
            key = mask_key(self.recipe.merge_seed or 0, fingerprint, name)
            mask = random_mask(key, base.numel(), own["density"])
        if mask is None:
            return tau
        kept = tau * mask
        before, after = tau.abs().sum(), kept.abs().sum()
        rescaled = self.shared["rescale"] and before > 1e-7 and after > 1e-7
        return kept * (before / after) if rescaled else kept

    def write_back(self) -> None:
        """The merge of the recipe, bit for bit: others rely on it."""
        for name, tensor in self.worker._family.merge(self.recipe):
            self.worker._live[name].data.copy_(tensor)

    def write(self, weights: dict[tuple[str, str], float], scale: float) -> None:
        """The merge at other weights, into the live model."""
        for name, (base, added, agree) in self.tensors.items():
            own = [weights[name, model] for model in self.models]
            total = sum(w * a * k for w, a, k in zip(own, added, agree, strict=True))
            if self.shared["normalize"]:
                shares = sum(w * k.double() for w, k in zip(own, agree, strict=True))
                total = total / torch.where(torch.as_tensor(shares) == 0, 1.0, shares)
            live = self.worker._live[name]
            live.data.copy_((base + scale * total).reshape(live.shape))


@pytest.mark.parametrize(
    ("method", "normalize", "loss"),
    [
        ("ties", True, "log_likelihood"),
        ("ties", False, "margin"),
        ("dare_ties", True, "margin"),
        ("dare_ties", False, "log_likelihood"),
    ],
)
def test_it_equals_finite_differences_on_the_same_masks(
    worker: HfWorker, refs: tuple[ItemRef, ...], method: str, normalize: bool, loss: Loss
) -> None:
    weight = [{"filter": "mlp", "value": [0.9, 0.4]}, {"value": 0.7}]
    body = {
        "merge_method": method,
        "base_model": "base",
        "parameters": {"normalize": normalize, "lambda": 0.8},
        "merge_seed": 7,
        "models": [
            {"model": "b", "parameters": {"weight": weight, "density": 0.5}},
            {"model": "c", "parameters": {"weight": 0.6, "density": 1.0}},
            {"model": "d", "parameters": {"weight": 1.1, "density": 0.3}},
        ],
    }
    asked = Recipe.parse(body).canonical(LAYERS)
    refs = refs[::2]
    gradient = worker.gradient(asked, refs, loss)
    models = ("b", "c", "d")
    held = Held(worker, asked, models)
    weights = {
        (item.spec.name, model): dict(own)["weight"]
        for item in worker._family.plan(asked).tensors
        for model, _, own in item.effective.sources
        if own
    }
    merged = dict(worker._family.merge(asked))
    held.write(weights, 0.8)
    for name, tensor in merged.items():
        torch.testing.assert_close(worker._live[name].data, tensor, rtol=1e-12, atol=1e-14)

    def value(scale: float = 0.8, **moved: Any) -> float:
        held.write(weights | moved.get("to", {}), scale)
        return loss_of(worker, refs, loss)

    step, found, expected = 1e-5, [], []
    for slope in gradient.tensors:
        for model, amount in slope.weights:
            at = (slope.tensor, model)
            up, down = ({at: weights[at] + s} for s in (step, -step))
            found.append(amount)
            expected.append((value(to=up) - value(to=down)) / (2 * step))
    assert relative(found, expected) < 1e-5
    by_scale = (value(0.8 + step) - value(0.8 - step)) / (2 * step)
    assert sum(t.scale for t in gradient.tensors) == pytest.approx(by_scale, rel=1e-5)
    held.write_back()


def recipe_of(method: str, *weights: float, **more: Any) -> Recipe:
    models = [
        {"model": m, "parameters": {"weight": w, **more}}
        for m, w in zip("bcd", weights or (0.9, 0.6, 0.2), strict=True)
    ]
    body = {"merge_method": method, "models": models, "parameters": {"normalize": False}}
    if method != "linear":
        body["base_model"] = "base"
    return Recipe.parse(body).canonical(LAYERS)


# --- what it leaves behind ---------------------------------------------------------------------


def flat(gradient: Gradient) -> np.ndarray:
    return np.array([[*dict(t.weights).values(), t.scale] for t in gradient.tensors])


def test_it_changes_nothing(worker: HfWorker, spec: WorkerSpec, refs: tuple[ItemRef, ...]) -> None:
    asked = recipe_of("ties", density=0.5)
    proof = worker.load(asked)
    scores = worker.score(refs)
    weights = {name: value.clone() for name, value in worker._live.items()}
    first = worker.gradient(asked, refs)
    for name, value in worker._live.items():
        assert torch.equal(value, weights[name]), name
        assert value.grad is None
        assert not value.requires_grad
        assert not value._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    assert worker.score(refs) == scores
    assert worker.load(asked) == proof
    assert np.array_equal(flat(worker.gradient(asked, refs)), flat(first))
    other = HfWorker(spec)  # one that never took a gradient, and one that takes it unloaded
    assert np.array_equal(flat(other.gradient(asked, refs)), flat(first))
    assert other.score(refs) == scores
    other.close()


def test_several_micro_batches_are_one(
    worker: HfWorker, spec: WorkerSpec, refs: tuple[ItemRef, ...]
) -> None:
    asked = recipe_of("dare_ties", density=0.6)
    whole = HfWorker(replace(spec, batch_size=500)).gradient(asked, refs)
    for size in (1, 5):
        parts = HfWorker(replace(spec, batch_size=size)).gradient(asked, refs)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
        assert relative(flat(parts), flat(whole)) < 1e-12


def test_where_memory_runs_out_fewer_sequences_go_through_at_a_time(
    spec: WorkerSpec, worker: HfWorker, refs: tuple[ItemRef, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worker.gradient(recipe_of("dare_ties", density=0.6), refs)
    scores = worker.score(refs)
    batches, most, forward = [], [4], worker._lm.differentiable

    def small(pairs: Any) -> Any:
        batches.append(len(pairs))
        if len(pairs) > most[0]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 128.00 GiB")
        return forward(pairs)

    monkeypatch.setattr(worker._lm, "differentiable", small)
    monkeypatch.setattr(worker, "_sequences", 0)
    found = worker.gradient(recipe_of("dare_ties", density=0.6), refs)
    assert found.loss == pytest.approx(whole.loss)
    assert batches[0] > 4 >= max(batches[-3:])
    most[0] = 0
    with pytest.raises(CandidateFailed, match="no memory on cpu for the gradient of one item"):
        worker.gradient(recipe_of("dare_ties", density=0.6), refs)
    assert repr(worker.score(refs)) == repr(scores), "the worker is as good as before"


def test_items_count_as_they_are_weighted(worker: HfWorker, refs: tuple[ItemRef, ...]) -> None:
    asked = recipe_of("task_arithmetic")
    one, other = (worker.gradient(asked, [ref]) for ref in (refs[0], refs[-1]))
    both = worker.gradient(asked, [refs[0], refs[-1]], weights=[3.0, -1.0])
    assert both.loss == pytest.approx(0.75 * one.loss - 0.25 * other.loss)
    assert relative(flat(both), 0.75 * flat(one) - 0.25 * flat(other)) < 1e-10


def test_the_loss_is_that_of_the_scores(worker: HfWorker, refs: tuple[ItemRef, ...]) -> None:
    asked = recipe_of("task_arithmetic")
    worker.load(asked)
    results = worker.score(refs)
    golds = [(ref, r) for ref, r in zip(refs, results, strict=True) if r.log_likelihood is not None]
    assert {ref.task for ref, _ in golds} == {name.partition("=")[0] for name in TASKS}
    mean = -sum(float(r.log_likelihood or 0) for _, r in golds) / len(golds)
    found = worker.gradient(asked, refs, "log_likelihood")
    assert (found.items, found.loss) == (len(golds), pytest.approx(mean, rel=1e-5))
    ahead = [(ref, r.margin) for ref, r in golds if r.margin is not None]
    mean = sum(math.log1p(math.exp(-margin)) for _, margin in ahead) / len(ahead)
    found = worker.gradient(asked, [ref for ref, _ in ahead], "margin")
    assert {ref.task for ref, _ in ahead} == {"tiny_choice", "tiny_answer"}
    assert found.loss == pytest.approx(mean, rel=1e-5)


def test_a_model_with_no_weight_has_a_slope(worker: HfWorker, refs: tuple[ItemRef, ...]) -> None:
    """Where a search must learn that a model left out should come in."""
    for method, more in (("task_arithmetic", {}), ("ties", {"density": 0.5})):
        zero = worker.gradient(recipe_of(method, 0.8, 0.5, 0.0, **more), refs)
        near = worker.gradient(recipe_of(method, 0.8, 0.5, 1e-7, **more), refs)
        assert np.abs(flat(zero)[:, 2]).max() > 1e-3
        assert relative(flat(zero), flat(near)) < 1e-3


# --- what cannot be had ------------------------------------------------------------------------


def test_what_has_no_gradient_says_so(worker: HfWorker, refs: tuple[ItemRef, ...]) -> None:
    assert isinstance(worker, Differentiator)
    slerp = {"merge_method": "slerp", "base_model": "b", "models": [{"model": "b"}, {"model": "c"}]}
    with pytest.raises(CandidateFailed, match=r"slerp has no gradient; these have one: .*ties"):
        worker.gradient(Recipe.parse(slerp).canonical(LAYERS), refs)
    with pytest.raises(CandidateFailed, match="no item has a gold answer"):
        worker.gradient(recipe_of("linear"), [])


def test_a_loss_that_is_no_number_fails_the_candidate(
    parents: dict[str, Path], tasks_dir: Path
) -> None:
    spec = tiny.spec(parents, tiny.tasks_config(tasks_dir, "tiny_cloze", limit=4))
    worker = HfWorker(spec)
    refs = tasks_for(spec).refs()
    right = worker.gradient(recipe(0.5, 0.5), refs)
    huge: Any = [{"filter": "self_attn", "value": 1e22}, {"value": 0.5}]
    with pytest.raises(CandidateFailed, match="not finite"):
        worker.gradient(recipe(huge, huge), refs)
    assert not any(p.requires_grad or p.grad is not None for p in worker._live.values())
    assert np.array_equal(flat(worker.gradient(recipe(0.5, 0.5), refs)), flat(right))
    worker.close()


def test_bfloat16_points_the_same_way(tmp_path: Path, tasks_dir: Path) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        family = {"base": tiny.write_model(tmp_path / dtype / "base", seed=1, dtype=dtype)}
        for name, seed in (("b", 2), ("c", 3)):
            family[name] = tiny.write_model(
                tmp_path / dtype / name, seed=seed, near=family["base"], dtype=dtype
            )
        spec = tiny.spec(family, tiny.tasks_config(tasks_dir, "tiny_choice", limit=20), dtype=dtype)
        gradient = HfWorker(spec).gradient(recipe(0.9, 0.4), tasks_for(spec).refs())
        found.append(flat(gradient)[:, :2].sum(0))
    cosine = found[0] @ found[1] / np.linalg.norm(found[0]) / np.linalg.norm(found[1])
    assert cosine > 0.95
