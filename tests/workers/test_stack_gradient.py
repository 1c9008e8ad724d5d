"""The gradient of a stack: every place its own slopes, of layers that are absent too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from agentmerge.contracts.worker import ItemRef, WorkerSpec
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.losses import item_loss
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker
from tests.merging.stack_cases import random_model

#: What the weights of a place are of.
KINDS = ("o_proj", "down_proj", "")


@dataclass(frozen=True)
class Place:
    """A layer of a stack: whose layers it merges, and the scales of what it adds."""

    layer: int
    weights: dict[str, float]
    attention: float = 1.0
    mlp: float = 1.0
    moved: dict[tuple[str, str], float] = field(default_factory=dict)

    def source(self, model: str) -> dict[str, Any]:
        rows = []
        for kind, scale in zip(KINDS, (self.attention, self.mlp, 1.0), strict=True):
            value = self.weights[model] * scale + self.moved.get((model, kind), 0.0)
            rows.append({"filter": kind, "value": value} if kind else {"value": value})
        layers = [self.layer, self.layer + 1]
        return {"model": model, "layer_range": layers, "parameters": {"weight": rows}}


OWN = {"base": -0.2, "b": 0.5, "c": 0.7}
#: A merge's own layers, one of them again and one damped, a model's own, and two that are absent:
#: of one model, and of several of which only one weighs.
PLACES = (
    Place(0, OWN),
    Place(0, {"b": 1.0}, 0.0, 0.0),
    Place(1, OWN),
    Place(0, {"c": 1.0}, -0.2, 0.31),
    Place(1, {"base": 0.0, "b": 0.0, "c": 1.0}, 0.0, 0.0),
    Place(0, OWN, 0.6, 0.0),
    Place(1, OWN),
)


#: The same over a merge that has no weights of its own.
MERGE = {
    "name": "merge",
    "merge_method": "slerp",
    "base_model": "b",
    "models": [{"model": "b"}, {"model": "c"}],
}
STAGED = tuple(replace(p, weights={"merge": 1.0}) if p.weights == OWN else p for p in PLACES)


def stack(places: Any = PLACES) -> Recipe:
    slices = [{"sources": [place.source(model) for model in place.weights]} for place in places]
    body = {"merge_method": "linear", "slices": slices, "parameters": {"normalize": False}}
    return Recipe.parse({"merges": [MERGE], **body}).canonical(2)


@pytest.fixture(scope="module", params=["llama, tied", "qwen2"])
def spec(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tasks_dir: Path,
    double: None,
) -> WorkerSpec:
    """Three float64 models of two layers; qwen2 has biases."""
    root, kind = tmp_path_factory.mktemp("double"), request.param.split(",")[0]
    parents = {}
    for seed, name in enumerate(("base", "b", "c")):
        model = random_model(
            kind,
            seed,
            vocab_size=len(tiny.TOKENS),
            num_hidden_layers=2,
            max_position_embeddings=tiny.CONTEXT,
            tie_word_embeddings="tied" in request.param,
        )
        parents[name] = root / name
        model.double().save_pretrained(parents[name])
        tiny.tokenizer().save_pretrained(parents[name])
    tasks = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", limit=3)
    return tiny.spec(parents, tasks, dtype="float64")


@pytest.fixture(scope="module")
def worker(spec: WorkerSpec) -> Iterator[HfWorker]:
    made = HfWorker(spec)
    yield made
    made.close()


@pytest.fixture(scope="module")
def refs(spec: WorkerSpec) -> tuple[ItemRef, ...]:
    return tasks_for(spec).refs()


def loss_of(worker: HfWorker, refs: tuple[ItemRef, ...], recipe: Recipe) -> float:
    """Forward only."""
    worker.load(recipe)
    with torch.no_grad():
        asked = item_loss(worker._scorer, worker._lm, refs, "margin")
        return sum(float(part) for part in asked.parts(worker._lm, 16))


@pytest.mark.parametrize("places", [PLACES, STAGED], ids=["in one stage", "in two"])
def test_it_equals_finite_differences_at_every_place(
    worker: HfWorker, refs: tuple[ItemRef, ...], places: tuple[Place, ...]
) -> None:
    gradient = worker.gradient(stack(places), refs, "margin")
    assert gradient.loss == pytest.approx(loss_of(worker, refs, stack(places)), rel=1e-12)
    slopes: dict[tuple[int, str, str], float] = {}
    for tensor in gradient.tensors:
        outside = len(places) - 1 if tensor.after else 0
        place = outside if tensor.layer is None else tensor.layer
        kind = next(kind for kind in KINDS if kind in tensor.tensor)
        for model, slope in tensor.weights:
            at = place, model, kind
            slopes[at] = slopes.get(at, 0.0) + slope
    found, expected = [], []
    for place, layer in enumerate(places):
        for model in layer.weights:
            for kind in KINDS:
                values = []
                for step in (1e-5, -1e-5):
                    moved = replace(layer, moved={(model, kind): step})
                    others = places[:place], places[place + 1 :]
                    values.append(loss_of(worker, refs, stack((*others[0], moved, *others[1]))))
                expected.append((values[0] - values[1]) / 2e-5)
                found.append(slopes[place, model, kind])
    outputs = [slope for (_, _, kind), slope in slopes.items() if kind]
    assert min(map(abs, outputs)) > 0, "of absent layers and of models that weigh nothing too"
    error = np.linalg.norm(np.subtract(found, expected)) / np.linalg.norm(expected)
    assert error < 1e-5
    again = worker.gradient(stack(places), refs, "margin")
    assert again == gradient, "whatever was loaded between"


def test_places_share_what_is_merged_and_not_their_gradients(
    worker: HfWorker, refs: tuple[ItemRef, ...]
) -> None:
    gradient = worker.gradient(stack(), refs, "margin")
    layers = worker._model.model.layers
    one, other = (dict(layers[place].named_parameters()) for place in (2, 6))
    for name, value in one.items():
        assert value.data_ptr() == other[name].data_ptr()
        assert value.grad is None
        assert not value.requires_grad
    at = {
        place: {
            tensor.tensor.split(f"layers.{place}.")[-1]: tensor.weights
            for tensor in gradient.tensors
            if tensor.layer == place
        }
        for place in (2, 6)
    }
    assert at[2].keys() == at[6].keys() == one.keys()
    assert at[2] != at[6]


def test_what_is_absent_changes_nothing(worker: HfWorker, refs: tuple[ItemRef, ...]) -> None:
    """Left out or at scale 0: the same numbers, not only nearly."""
    present = tuple(place for place in PLACES if place.attention or place.mlp)
    assert len(present) == len(PLACES) - 2
    worker.load(stack(present))
    shorter = worker.score(refs)
    assert len(worker._model.model.layers) == len(present)
    worker.load(stack())
    assert worker.score(refs) == shorter
    assert loss_of(worker, refs, stack(present)) == loss_of(worker, refs, stack())
