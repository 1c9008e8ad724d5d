"""Models of other layers than the parents', scored as they are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import RecipeRejected
from agentmerge.recipe import Recipe
from agentmerge.testing.worker_suite import same
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.pool import refuse_stack


def stack(*layers: tuple[Any, ...]) -> Recipe:
    """Of (model, start, end, scale of the two output projections, if any)."""
    slices = []
    for model, start, end, *scale in layers:
        piece: dict[str, Any] = {"sources": [{"model": model, "layer_range": [start, end]}]}
        if scale:
            filters = ("o_proj", "down_proj")
            rows = [{"filter": f, "value": scale[0]} for f in filters]
            piece["parameters"] = {"scale": rows}
        slices.append(piece)
    return Recipe.parse({"merge_method": "passthrough", "slices": slices}).canonical(2)


@pytest.fixture(scope="module")
def spec(parents: dict[str, Path], tasks_dir: Path) -> WorkerSpec:
    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", limit=12)
    return tiny.spec(parents, config)


def test_the_disk_worker_scores_a_stack(spec: WorkerSpec) -> None:
    worker = DiskWorker(spec)
    refs = worker.tasks(spec).refs()
    whole = worker.load(Recipe.of_model("b", 2).canonical(2))
    plain = worker.score(refs)
    absent = worker.load(stack(("b", 0, 1), ("c", 1, 2, 0.0), ("b", 1, 2)))  # adds nothing
    assert absent.tensors == whole.tensors + 9
    assert absent.digest != whole.digest
    assert same(worker.score(refs), plain)
    worker.load(stack(("b", 0, 2), ("c", 1, 2)))
    assert not same(worker.score(refs), plain)
    worker.close()


def test_a_worker_of_one_depth_says_so() -> None:
    deep = stack(("b", 0, 2), ("c", 0, 2))
    with pytest.raises(RecipeRejected, match="4 layers out of models of 2, and the vllm worker"):
        refuse_stack(deep, 2, "vllm", object())
    refuse_stack(stack(("b", 0, 2, 0.5)), 2, "vllm", object())  # its layers are the models' own
    with pytest.raises(RecipeRejected, match="vllm"):
        refuse_stack(stack(("b", 1, 2, 0.5), ("b", 0, 1)), 2, "vllm", object())
    refuse_stack(deep, 2, "disk", DiskWorker)
