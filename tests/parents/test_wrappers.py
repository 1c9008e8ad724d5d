"""Text models inside multimodal wrappers: merged, scored, exported; the rest is carried over."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from agentmerge.merging.export import export_checkpoint
from agentmerge.parents.layout import layout_faults, read_layout
from agentmerge.parents.plain import make_plain, survey
from agentmerge.parents.sources import find_parent
from agentmerge.recipe import Recipe
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.hf import HfWorker
from tests.evaluation import tiny
from tests.merging.merge_cases import load_all
from tests.parents.wrapper_cases import MODELS, write_wrapper

RECIPE = Recipe.parse(
    "merge_method: task_arithmetic\nbase_model: base\n"
    "models: [{model: b, parameters: {weight: 0.6}}, {model: c, parameters: {weight: 0.3}}]"
).canonical(2)
Family = dict[str, Path]


@pytest.fixture(scope="module", params=[*MODELS, "text in llava"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """base, b and c; in the last case b is a text model by itself."""
    root = tmp_path_factory.mktemp("wrappers")
    kind = "llava" if request.param == "text in llava" else request.param
    found = {
        name: write_wrapper(kind, root / name, seed)
        for name, seed in (("base", 1), ("b", 2), ("c", 3))
    }
    if kind != request.param:
        found["b"] = tiny.write_model(root / "text", seed=5)
    return found


def plain(family: Family) -> Family:
    parents = [find_parent(str(path)) for path in family.values()]
    made = make_plain(parents)
    return {name: made[str(path)] for name, path in family.items()}


def test_only_the_text_model_is_merged(family: Family) -> None:
    layout = read_layout(family, "base")
    assert layout.num_layers == 2
    assert all("vision" not in name and "visual" not in name for name in layout.by_name)
    assert set(layout.by_name) | set(layout.carried) == set(load_all(family["base"]))
    assert any("visi" in name or "visual" in name for name in layout.carried)
    assert any("embed_tokens" in name for name in layout.by_name)
    notes = survey([find_parent(str(path)) for path in family.values()]).notes
    head, _, parts = notes[0].rpartition(": ")
    assert head == (
        f"{len(layout.carried)} tensors outside the text model are taken over from {family['base']}"
    )
    counted = re.findall(r"(\S+) \((\d+)\)", parts)
    assert sum(int(count) for _, count in counted) == len(layout.carried)
    assert all("visi" in part or "visual" in part or "projector" in part for part, _ in counted)


def test_what_is_carried_over_is_the_bases_bit_for_bit(family: Family, tmp_path: Path) -> None:
    paths = plain(family)
    export_checkpoint(RECIPE, paths, tmp_path / "out", template_model="b", base="base")
    layout = read_layout(paths, "base")
    before, after = load_all(family["base"]), load_all(tmp_path / "out")
    assert after.keys() == before.keys()
    for name in layout.carried:
        assert torch.equal(after[name], before[name]), name
    for name in layout.by_name:
        assert not torch.equal(after[name], before[name]), name
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == model.config.architectures[0]
    values = sorted(float(value.detach().double().sum()) for value in model.parameters())
    assert values == pytest.approx(sorted(float(v.double().sum()) for v in after.values()))


@pytest.mark.parametrize("build", [HfWorker, pytest.param(DiskWorker, marks=pytest.mark.slow)])
def test_the_search_scores_what_the_export_holds(
    family: Family, tmp_path: Path, build: Callable[..., Any]
) -> None:
    paths = plain(family)
    tasks = tiny.write_tasks(tmp_path / "tasks", tiny.write_model(tmp_path / "any", 9))
    config = tiny.tasks_config(tasks, "tiny_choice", limit=12)
    worker = build(tiny.spec(paths, config, template_model="base", options={"base": "base"}))
    refs = worker.tasks(worker._spec).refs()
    worker.load(RECIPE)
    found = worker.score(refs)
    worker.load(Recipe.of_model("base", 2).canonical(2))
    assert [r.log_likelihood for r in worker.score(refs)] != [r.log_likelihood for r in found]
    worker.close()
    out = export_checkpoint(RECIPE, paths, tmp_path / "out", template_model="base", base="base")
    alone = tiny.spec({"x": out.path}, config, template_model="x")
    worker = HfWorker(alone)
    worker.load(Recipe.of_model("x", 2).canonical(2))
    assert worker.score(refs) == found
    worker.close()


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_on_the_text_model_inside_a_wrapper(tmp_path: Path, kind: str) -> None:
    base, adapter = write_wrapper(kind, tmp_path / "base", 1), tmp_path / "adapter"
    opened = transformers.AutoModelForImageTextToText
    model = opened.from_pretrained(base)
    inside = [n for n, _ in model.named_modules() if n.endswith("q_proj") and "language" in n]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=inside))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data += 0.1 * torch.ones_like(value)
    adapted.save_pretrained(adapter)
    whole = peft.PeftModel.from_pretrained(opened.from_pretrained(base), adapter)
    whole.merge_and_unload().save_pretrained(tmp_path / "want")
    parent = find_parent(f"{base}+{adapter}")
    assert survey([parent]).faults == []
    found = load_all(make_plain([parent])[parent.name])
    want, before = load_all(tmp_path / "want"), load_all(base)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert sum(not torch.equal(found[name], before[name]) for name in want) == len(inside) == 2


def test_a_text_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    base = write_wrapper("gemma3", tmp_path / "base", 1)
    text = tiny.write_model(tmp_path / "text", seed=5)
    faults = layout_faults({"base": base, "a": text}, "base")
    assert "a: model_type is 'llama', and 'gemma3' in base" in faults
