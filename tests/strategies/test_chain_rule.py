"""A gradient in the coordinates of a space equals finite differences in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agentmerge.config import GenomeConfig, TasksConfig
from agentmerge.contracts.worker import ItemRef, WorkerSpec
from agentmerge.space.chain_rule import differentiable_axes, unit_gradient
from agentmerge.space.grouped import SearchSpace
from agentmerge.workers.fake import FakeWorker, fake_tasks

LAYERS = 6


def space_of(**genome: Any) -> SearchSpace:
    body = {
        "models": ["north", "south", "west"],
        "base_model": "base",
        "merge_method": "task_arithmetic",
    }
    return SearchSpace(GenomeConfig(**(body | genome)), LAYERS, "float32")


def worker_and_items() -> tuple[FakeWorker, tuple[ItemRef, ...]]:
    tasks = TasksConfig(tasks=[{"name": "one", "metric": "acc,none"}], limit=24)
    parents = tuple((name, name) for name in ("base", "north", "south", "west"))
    spec = WorkerSpec("fake", parents, "base", tasks, "float32", 1, options={"base": "base"})
    return FakeWorker(spec), fake_tasks(tasks).refs()


@pytest.mark.parametrize(
    "genome",
    [
        {},
        {"layer_granularity": 2, "filters": ["self_attn"]},
        {"layer_granularity": 3, "normalize": True, "filters": ["mlp"]},
        {"layer_granularity": 2, "smooth": True, "allow_negative_weights": True},
        {"layer_granularity": 2, "smooth": True, "normalize": True, "filters": ["mlp"]},
        {"layer_granularity": 3, "evolve": ["lambda"]},
        {"merge_method": "linear", "base_model": None, "layer_granularity": 2},
        {"merge_method": "linear", "normalize": False, "layer_granularity": 2},
        {"merge_method": "ties", "layer_granularity": 3, "filters": ["self_attn"]},
        {"merge_method": "dare_ties", "evolve": ["lambda"]},
    ],
    ids=lambda genome: " ".join(map(str, genome.values())) or "whole",
)
def test_it_equals_finite_differences(genome: dict[str, Any]) -> None:
    space = space_of(**genome)
    worker, items = worker_and_items()

    def loss(vector: np.ndarray) -> float:
        return worker.gradient(space.recipe(vector), items).loss

    vector = np.random.default_rng(3).uniform(0.2, 0.9, space.dimensions)
    found = np.array(unit_gradient(space, vector, worker.gradient(space.recipe(vector), items)))
    step, slopes = 1e-5, np.array(differentiable_axes(space))
    expected = np.zeros(space.dimensions)
    for i in np.flatnonzero(slopes):
        away = np.eye(space.dimensions)[i] * step
        expected[i] = (loss(vector + away) - loss(vector - away)) / (2 * step)
    assert np.linalg.norm(expected) > 1e-3
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_densities_have_no_slope() -> None:
    space = space_of(merge_method="ties")
    assert differentiable_axes(space) == (True, False) * 3
    assert not any(differentiable_axes(space_of(models=["a", "b"], merge_method="slerp")))


def test_one_gradient_serves_every_finer_space() -> None:
    """The sum over the axes of a fine space is the slope along the coarse one's."""
    coarse, fine = space_of(), space_of(layer_granularity=1, filters=["mlp"])
    worker, items = worker_and_items()
    gradient = worker.gradient(coarse.recipe((0.3, 0.5, 0.7)), items)
    models = [axis.model for axis in fine.axes]
    point = [{"north": 0.3, "south": 0.5, "west": 0.7}[model] for model in models]
    found = unit_gradient(fine, point, gradient)
    sums = [sum(g for g, m in zip(found, models, strict=True) if m == n) for n in coarse.models]
    assert sums == pytest.approx(unit_gradient(coarse, (0.3, 0.5, 0.7), gradient))
