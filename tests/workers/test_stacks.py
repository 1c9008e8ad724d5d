"""Models of other layers than the parents', scored as they are exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import A

from agentmerge.contracts.worker import Fingerprint, WorkerSpec
from agentmerge.errors import CandidateFailed, RecipeRejected, RunFailed
from agentmerge.merging.export import export_checkpoint
from agentmerge.recipe import Recipe
from agentmerge.testing.worker_suite import same
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.hf import HfWorker
from agentmerge.workers.kinds import refuse_stack
from agentmerge.workers.vllm.worker import VllmWorker


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


def merged(*layers: int | tuple[str, int, float]) -> Recipe:
    """Of layers of a merge, and (model, layer, scale of the two output projections) between."""
    slices = []
    for place in layers:
        layer = place if isinstance(place, int) else place[1]
        weights: dict[str, Any] = {"base": -0.2, "b": 0.5, "c": 0.7}
        if not isinstance(place, int):
            rows = [{"filter": f, "value": place[2]} for f in ("o_proj", "down_proj")]
            weights = {place[0]: [*rows, {"value": 1}]}
        sources = [
            {"model": model, "layer_range": [layer, layer + 1], "parameters": {"weight": weight}}
            for model, weight in weights.items()
        ]
        slices.append({"sources": sources})
    body = {"merge_method": "linear", "slices": slices, "parameters": {"normalize": False}}
    return Recipe.parse(body).canonical(2)


def staged(*layers: int | tuple[str, int, float]) -> Recipe:
    """The same over a merge with random masks; a number is its own layer."""
    first = {
        "name": "merge",
        "merge_method": "dare_ties",
        "base_model": "base",
        "merge_seed": 4,
        "models": [
            {"model": m, "parameters": {"weight": w, "density": 0.5}}
            for m, w in (("b", 0.6), ("c", 0.5))
        ],
    }
    places = [("merge", place, 1.0) if isinstance(place, int) else place for place in layers]
    body = merged(*places).to_dict()
    return Recipe.parse({"merges": [first]} | body).canonical(2)


@pytest.fixture(scope="module")
def spec(parents: dict[str, Path], tasks_dir: Path) -> WorkerSpec:
    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", limit=12)
    return tiny.spec(parents, config)


#: Several depths, repeats, other orders, scales of both signs.
STACKS = {
    "deeper": stack(("b", 0, 2), ("c", 0, 2, 0.4)),
    "twice, scaled both ways": stack(("c", 1, 2, -0.3), ("b", 0, 2), ("c", 1, 2, 0.4), ("b", 0, 1)),
    "one layer": stack(("c", 1, 2)),
    "in place, scaled": stack(("b", 0, 2, 0.7)),
    "merged": merged(0, ("b", 1, -0.3), 1, 0, ("c", 0, 0.4), 1),
    "merged, shallower": merged(1),
    "in two stages": staged(0, 1, ("merge", 1, 0.6), ("c", 0, -0.3), 1),
    "in two stages, in place": staged(0, ("merge", 1, 0.6)),
    "merged, in another order": merged(1, 0),
}
ABSENT = stack(("b", 0, 1), ("c", 1, 2, 0.0), ("b", 1, 2))


#: What the disk worker scores too: a process each, and slow.
ON_DISK = ("merged", "in two stages")


def as_exported(spec: WorkerSpec, recipe: Recipe, path: Path) -> tuple[Fingerprint, Any]:
    """What a worker of the checkpoint alone answers."""
    export_checkpoint(recipe, {n: Path(p) for n, p in spec.parents}, path, template_model="b")
    fresh = HfWorker(replace(spec, parents=(("merge", str(path)),), template_model="merge"))
    depth = fresh._family.layout.num_layers
    loaded = fresh.load(Recipe.of_model("merge", depth).canonical(depth))
    found = fresh.score(fresh.tasks(spec).refs())
    fresh.close()
    return loaded, found


def test_stacks_answer_live_as_their_checkpoints_do(spec: WorkerSpec, tmp_path: Path) -> None:
    """Item for item, generation with its cache included, whatever was live before."""
    live, disk = HfWorker(spec), DiskWorker(spec)
    refs = live.tasks(spec).refs()
    merge, whole = tiny.recipe(0.4, 0.6), Recipe.of_model("b", 2).canonical(2)
    first = live.load(merge), live.score(refs)
    own = live.load(whole), live.score(refs)
    for name, recipe in STACKS.items():
        made = live.load(recipe)
        found = live.score(refs)
        exported, answers = as_exported(spec, recipe, tmp_path / name)
        assert (exported.digest, exported.tensors) == (made.digest, made.tensors)
        assert same(found, answers)
        assert not same(found, own[1])
        if name in ON_DISK:
            assert disk.load(recipe) == made
            assert same(found, disk.score(refs))
    deeper = live.load(STACKS["deeper"])
    assert deeper.tensors == own[0].tensors + 18
    absent = live.load(ABSENT)
    assert same(live.score(refs), own[1]), "a layer that adds nothing is as none"
    assert absent.tensors == own[0].tensors + 9
    back = live.load(merge)
    assert back == first[0]
    assert same(live.score(refs), first[1])
    live.close()
    disk.close()


def test_a_stack_runs_on_the_parents_own_parameters(spec: WorkerSpec) -> None:
    worker = HfWorker(spec)
    own = set(map(id, worker._model.modules()))
    worker.load(STACKS["deeper"])
    model, family = worker._model, worker._family
    copied = []
    for place, (name, layer) in enumerate((("b", 0), ("b", 1), ("c", 0), ("c", 1))):
        made = model.model.layers[place]
        assert made.self_attn.layer_idx == place
        for key, value in made.named_parameters():
            parent = family.tensor(name, f"model.layers.{layer}.{key}")
            if value.data_ptr() != parent.data_ptr():
                copied.append((place, key))
                assert torch.equal(value, parent * 0.4)
    outputs = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    assert sorted(copied) == sorted((place, key) for place in (2, 3) for key in outputs)
    assert model.config.num_hidden_layers == 4
    worker.load(tiny.recipe(0.4, 0.6))
    assert model.config.num_hidden_layers == 2
    assert set(map(id, model.modules())) == own
    worker.close()


def test_what_is_merged_takes_the_models_own_memory(spec: WorkerSpec) -> None:
    """New memory is taken for what is scaled, and for a layer that is there twice otherwise."""
    worker = HfWorker(spec)
    refs = worker.tasks(spec).refs()
    first = worker.load(tiny.recipe(0.4, 0.6)), worker.score(refs)
    own = {live.data_ptr() for live in worker._live.values()}
    nothing = [merged(0, ("b", 1, 0.0), 1, ("c", 0, 0.0), 0, 1), merged(0, 1, 0, 1)]
    for recipe, new in ((nothing[0], 2), (nothing[1], 0), (STACKS["merged"], 4)):
        worker.load(recipe)
        copies = [copy.tensor for copy in worker._stack._copies.values()]
        assert sum(copy.data_ptr() not in own for copy in copies) == new
    answers = []
    for recipe in nothing:
        worker.load(recipe)
        answers.append(worker.score(refs))
    assert same(*answers)
    assert worker.load(tiny.recipe(0.4, 0.6)) == first[0]
    assert same(worker.score(refs), first[1])
    worker.close()


def test_what_a_failed_stack_leaves_is_whole(spec: WorkerSpec) -> None:
    worker = HfWorker(spec)
    refs = worker.tasks(spec).refs()
    worker.load(A)
    right = worker.score(refs)
    with pytest.raises(CandidateFailed, match="not finite"):
        worker.load(stack(("b", 0, 2), ("c", 0, 1, 1e42)))
    with pytest.raises(RunFailed, match="load"):
        worker.score(refs)
    with pytest.raises(CandidateFailed, match="passthrough has no gradient"):
        worker.gradient(STACKS["deeper"], refs)
    worker.load(A)
    assert same(worker.score(refs), right)
    worker.load(STACKS["deeper"])
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        worker._family.tensor("b", name)[0] += 1
    with pytest.raises(RunFailed, match="weight' of 'b' was in memory"):
        worker.load(STACKS["deeper"])
    worker.close()


def test_a_worker_of_one_depth_says_so() -> None:
    deep = stack(("b", 0, 2), ("c", 0, 2))
    with pytest.raises(RecipeRejected, match="4 layers out of models of 2, and the vllm worker"):
        refuse_stack(deep, 2, "vllm", object())
    refuse_stack(stack(("b", 0, 2, 0.5)), 2, "vllm", object())  # its layers are the models' own
    with pytest.raises(RecipeRejected, match="vllm"):
        refuse_stack(stack(("b", 1, 2, 0.5), ("b", 0, 1)), 2, "vllm", object())
    with pytest.raises(RecipeRejected, match="1 layers out of models of 2"):
        refuse_stack(STACKS["merged, shallower"], 2, "vllm", object())
    refuse_stack(STACKS["merged, in another order"], 2, "vllm", object())
    refuse_stack(deep, 2, "disk", DiskWorker)


def test_an_engine_of_a_fixed_depth_runs_what_it_was_built_for() -> None:
    deep, moved = stack(("b", 0, 2), ("c", 0, 2)), stack(("b", 1, 2, 0.5), ("b", 0, 1))
    for recipe, extra, enough in ((deep, None, 2), (moved, None, 1), (deep, 1, 2)):
        with pytest.raises(RecipeRejected, match=f"genome.layers to {enough} or more, or worker"):
            refuse_stack(recipe, 2, "vllm", VllmWorker, extra)
        refuse_stack(recipe, 2, "vllm", VllmWorker, 2)
    refuse_stack(moved, 2, "vllm", VllmWorker, 0)
