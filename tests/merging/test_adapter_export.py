"""A merge as an adapter: what peft makes of it and its base is the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from agentmerge.errors import UserError
from agentmerge.merging.adapter import AdapterExport, base_of, export_adapter
from agentmerge.merging.family import Family
from agentmerge.parents.plain import make_plain
from agentmerge.parents.sources import find_parent
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import make_family
from tests.parents.adapter_cases import merged_by_peft, write_adapter

SUM = """
merge_method: task_arithmetic
base_model: {base}
dtype: float32
parameters: {{lambda: 0.9, normalize: false}}
models:
- {{model: {base}}}
- {{model: {one}, parameters: {{weight: [0.3, 0.8]}}}}
- {{model: {two}, parameters: {{weight: -0.4}}}}
"""
MEAN = """
merge_method: linear
dtype: float32
models:
- {{model: {one}, parameters: {{weight: 0.6}}}}
- {{model: {two}, parameters: {{weight: 0.2}}}}
"""
TIES = """
merge_method: ties
base_model: {base}
dtype: float32
models:
- {{model: {base}}}
- {{model: {one}, parameters: {{weight: 0.6, density: 0.5}}}}
- {{model: {two}, parameters: {{weight: 0.5, density: 0.5}}}}
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, two adapters of it, and two experts that differ everywhere."""
    root = tmp_path_factory.mktemp("adapters")
    made = make_family(root, tied=False, dtype=torch.float32)
    kinds = ("lora", "ranks, rslora")
    found = {name: str(path) for name, path in made.items()}
    for name, kind in zip(("one", "two"), kinds, strict=True):
        found[name] = f"{made['base']}+{write_adapter(made['base'], root / name, kind)}"
    found["dora"] = f"{made['base']}+{write_adapter(made['base'], root / 'dora', 'dora')}"
    return found


def written(
    text: str, pool: dict[str, str], to: Path, experts: tuple[str, str], **asked: Any
) -> tuple[AdapterExport, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(what was said, the merge, what peft makes of the base and the adapter)."""
    names = {"base": pool["base"], "one": pool[experts[0]], "two": pool[experts[1]]}
    recipe = Recipe.parse(text.format(**names))
    parents = {name: find_parent(name) for name in recipe.models}
    paths = make_plain(parents.values())
    base = base_of(parents, recipe, recipe.base_model)
    found = export_adapter(
        recipe, paths, to, parents=parents, base=base, base_path=Path(pool["base"]), **asked
    )
    family = Family.open(paths, base=recipe.base_model)
    merged = dict(family.merge(recipe.canonical(family.layout.num_layers)))
    return found, merged, merged_by_peft(Path(pool["base"]), to, torch.float32)


@pytest.mark.parametrize("text", [SUM, MEAN], ids=["sum", "mean"])
def test_a_sum_of_adapters_is_an_adapter_without_loss(
    text: str, pool: dict[str, str], tmp_path: Path
) -> None:
    found, merged, made = written(text, pool, tmp_path / "out", ("one", "two"))
    assert found.exact
    assert found.kept == pytest.approx(1.0)
    assert found.rank <= 8
    assert (found.whole, found.left) == ((), ())
    for name, tensor in merged.items():
        assert torch.allclose(tensor, made[name], atol=2e-6), name
    before = load_file(f"{pool['base']}/model.safetensors")
    assert any((merged[name] - before[name]).abs().max() > 0.01 for name in before)


def test_a_smaller_rank_says_what_it_keeps(pool: dict[str, str], tmp_path: Path) -> None:
    found, merged, made = written(SUM, pool, tmp_path / "out", ("one", "two"), rank=2)
    before = load_file(f"{pool['base']}/model.safetensors")
    kept, whole = (
        sum(float((to[n] - before[n]).square().sum()) for n in before) for to in (made, merged)
    )
    assert found.rank == 2
    assert not found.exact
    assert 0.5 < found.kept < 0.999
    assert found.kept == pytest.approx((kept / whole) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "experts"),
    [(TIES, ("one", "two")), (SUM, ("one", "dora")), (SUM, ("a", "b"))],
    ids=["ties", "dora", "full models"],
)
def test_whatever_is_no_plain_sum_is_cut_to_a_rank(
    text: str, experts: tuple[str, str], pool: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--rank"):
        written(text, pool, tmp_path / "none", experts)
    assert not (tmp_path / "none").exists()
    found, merged, made = written(text, pool, tmp_path / "all", experts, rank=16)
    norms = [name for name in merged if "norm" in name]
    for name, tensor in merged.items():
        assert torch.allclose(tensor, made[name], atol=1e-5), name
    assert found.kept == pytest.approx(1.0, abs=1e-5)
    whole = {"model.embed_tokens", *(name.removesuffix(".weight") for name in norms)}
    assert set(found.whole) == (whole if experts == ("a", "b") else set())


def test_factors_alone_leave_norms_and_the_embedding(pool: dict[str, str], tmp_path: Path) -> None:
    before = load_file(f"{pool['base']}/model.safetensors")
    found, merged, made = written(
        SUM, pool, tmp_path / "out", ("a", "b"), rank=16, factors_only=True
    )
    left = {name for name in merged if "norm" in name or "embed_tokens" in name}
    assert (set(found.left), found.whole) == (left, ())
    assert 0.5 < found.kept < 0.99
    for name, tensor in made.items():
        assert torch.allclose(tensor, (before if name in left else merged)[name], atol=1e-5), name


def test_a_tied_embedding_is_left_and_counted(tmp_path: Path) -> None:
    made = make_family(tmp_path / "tied", tied=True, dtype=torch.float32)
    names = {name: str(path) for name, path in made.items()}
    found, merged, applied = written(SUM, names, tmp_path / "out", ("a", "b"), rank=16)
    assert found.left == ("model.embed_tokens.weight",)
    assert 0.5 < found.kept < 0.99
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(merged[name], applied[name], atol=1e-5)


def test_layers_that_are_stored_the_other_way_around(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
        settings = peft.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        for name in ("one", "two"):
            bare = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
            adapted = peft.get_peft_model(bare, settings)
            for part, value in adapted.named_parameters():
                value.data += 0.1 * torch.randn_like(value) * ("lora_" in part)
            adapted.save_pretrained(tmp_path / name)
    pool = {name: f"{tmp_path / 'base'}+{tmp_path / name}" for name in ("one", "two")}
    pool["base"] = str(tmp_path / "base")
    found, merged, made = written(MEAN, pool, tmp_path / "out", ("one", "two"))
    assert found.exact
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"]
    for name, tensor in merged.items():
        own = next(value for other, value in made.items() if other.endswith(name))
        assert torch.allclose(tensor, own, atol=2e-6), name


def test_a_merge_without_a_base_is_refused(pool: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of one base"):
        written(MEAN, pool, tmp_path / "out", ("a", "one"))
