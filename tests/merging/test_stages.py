"""Merges in two stages: mergekit-multi makes the same of what we export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from agentmerge.merging.digests import digest
from agentmerge.merging.export import export_checkpoint
from agentmerge.merging.family import Family
from agentmerge.merging.reference import mergekit_merge
from agentmerge.recipe import Recipe, length
from tests.merging.merge_cases import load_all
from tests.merging.stack_cases import MERGED, STACK, write_family

# said when mergekit is imported, of its own imports
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")

FIRST: dict[str, dict[str, Any]] = {
    "task vectors": {"merge_method": "task_arithmetic", "base_model": "base"},
    "ties": {"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.6}},
    "linear": {"merge_method": "linear"},
}


def staged(method: str, last: dict[str, Any], old: str) -> dict[str, Any]:
    """A merge of a and b in the place of one of the models of ``last``."""
    models = [{"model": m, "parameters": {"weight": w}} for m, w in (("a", 0.6), ("b", 0.3))]

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: "both" if k == "model" and v == old else moved(v) for k, v in value.items()}
        return [moved(item) for item in value] if isinstance(value, list) else value

    body: dict[str, Any] = moved(last)
    return {"merges": [{"name": "both", "models": models} | FIRST[method]]} | body


def by_multi(text: str, root: Path) -> dict[str, torch.Tensor]:
    """What mergekit's own command makes of a file."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.multimerge import main

    (root / "recipe.yml").write_text(text)
    out = root / "theirs"
    paths = [str(root / "recipe.yml"), "--out-path", str(out), "-I", str(root / "between")]
    try:
        main([*paths, "--no-copy-tokenizer", "--quiet"], standalone_mode=False)
    finally:
        LoaderCache().flush_all()
        LoaderCache().loaders.clear()
    return load_all(out)


@pytest.mark.parametrize(
    ("method", "dtype", "last", "old"),
    [
        ("ties", "float32", STACK, "b"),  # in bfloat16 the two elect other signs at ties
        ("task vectors", "float32", MERGED, "base"),
        ("task vectors", "bfloat16", MERGED, "base"),
        ("linear", "bfloat16", STACK, "a"),
    ],
)
def test_mergekit_multi_makes_the_same_of_what_we_export(
    tmp_path: Path, method: str, dtype: str, last: dict[str, Any], old: str
) -> None:
    """Within a rounding of each stage; what the last only copies or scales is as the first is."""
    paths = write_family(tmp_path, "llama", dtype, ("base", "a", "b"))
    recipe = Recipe.parse(staged(method, last, old)).canonical(3)
    assert recipe.merges
    family = Family.open(paths)
    merged = dict(family.merge(recipe))
    done = export_checkpoint(recipe, paths, tmp_path / "ours", template_model="a")
    assert done.digest == digest(merged.items())
    written = Recipe.parse(tmp_path / "ours" / "mergekit_config.yml")
    assert written.canonical(3) == recipe
    first = dict(family.merge(dict(recipe.merges)["merge"]))
    for item in family.plan(recipe).tensors:
        if item.effective.method != "passthrough" or not item.first:
            continue
        scale = dict(item.effective.sources[0][2])["scale"]
        assert torch.equal(merged[item.spec.name], first[item.inputs[0][1]] * scale)
    placed = written.renamed(lambda name: str(paths[name]))
    folder = tmp_path / "by_reference"
    mergekit_merge(written, paths, folder, template_model="a")
    for theirs in (by_multi(placed.to_yaml(), tmp_path), load_all(folder)):
        assert theirs.keys() == merged.keys()
        for name, tensor in merged.items():
            assert theirs[name].dtype == tensor.dtype
            largest = max(tensor.abs().max(), 1.0)
            atol = float(4 * torch.finfo(tensor.dtype).eps * largest)
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert len(model.model.layers) == sum(length(piece) for piece in recipe.slices)


def test_a_change_of_the_first_stage_changes_the_plan(tmp_path: Path) -> None:
    family = Family.open(write_family(tmp_path, "llama", names=("base", "a", "b")))
    body = staged("ties", STACK, "b")
    one = family.plan(Recipe.parse(body).canonical(3))
    body["merges"][0]["models"][0]["parameters"]["weight"] = 0.7
    other = family.plan(Recipe.parse(body).canonical(3))
    assert one.digest != other.digest
    name = "model.layers.2.mlp.up_proj.weight"
    assert one.by_name[name] != other.by_name[name]
    assert one.by_name["model.embed_tokens.weight"] == other.by_name["model.embed_tokens.weight"]
