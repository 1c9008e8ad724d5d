"""Stacks of copied layers: mergekit's tensors, and checkpoints that are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from agentmerge.errors import RecipeRejected
from agentmerge.merging.digests import digest
from agentmerge.merging.export import export_checkpoint
from agentmerge.merging.family import Family
from agentmerge.merging.reference import mergekit_merge
from agentmerge.parents.depth import at_layers, why_fixed
from agentmerge.parents.layout import read_layout
from agentmerge.recipe import Recipe, length
from tests.merging.merge_cases import edit_config, load_all
from tests.merging.stack_cases import MERGED, STACK, pieces, stack, write_family

# said when mergekit is imported, of its own imports
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


@pytest.mark.parametrize(
    ("kind", "dtype", "recipe_dtype"),
    [
        ("llama", "float32", None),
        ("llama", "bfloat16", "bfloat16"),
        ("qwen2", "float32", None),
        ("qwen2", "float16", None),
    ],
)
def test_mergekit_makes_the_same_of_what_we_export(
    tmp_path: Path, kind: str, dtype: str, recipe_dtype: str | None
) -> None:
    paths = write_family(tmp_path, kind, dtype, tie_word_embeddings=kind == "qwen2")
    recipe = stack(STACK, **({"dtype": recipe_dtype} if recipe_dtype else {}))
    merged = dict(Family.open(paths).merge(recipe))
    done = export_checkpoint(recipe, paths, tmp_path / "ours", template_model="a")
    assert done.digest == digest(merged.items())
    written = Recipe.parse(tmp_path / "ours" / "mergekit_config.yml").canonical(3)
    assert written == recipe
    mergekit_merge(written, paths, tmp_path / "theirs", template_model="a")
    ours, theirs = load_all(tmp_path / "ours"), load_all(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == merged.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
        assert torch.equal(ours[name], merged[name]), name
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    for folder in ("ours", "theirs"):
        model, said = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(said[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert len(model.model.layers) == 6
    again = read_layout({"stack": tmp_path / "ours"})
    assert again.num_layers == 6
    assert again.by_name.keys() == ours.keys()


MORE: dict[str, dict[str, Any]] = {
    "only ratios": {"merge_method": "linear"},
    "task vectors": {"merge_method": "task_arithmetic", "base_model": "base"},
    "slerp": {"merge_method": "slerp", "base_model": "b", "parameters": {"t": [0.1, 0.9]}},
}


def more(name: str) -> dict[str, Any]:
    """A merge of two models with a block of its layers once more."""
    weights = {"parameters": {"weight": [0.2, 0.9]}} if name != "slerp" else {}
    models = (*["base"] * (name == "task vectors"), "a", "b")
    slices = [
        {"sources": [{"model": m, "layer_range": layers} | weights for m in models]}
        for layers in ([0, 2], [1, 3], [2, 3])
    ]
    return {"slices": slices} | MORE[name]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "float32"), ("qwen2", "float16")],
)
@pytest.mark.parametrize("body", [MERGED, *map(more, MORE)], ids=["MERGED", *MORE])
def test_merged_layers_are_mergekits(
    tmp_path: Path, body: dict[str, Any], kind: str, dtype: str
) -> None:
    """mergekit rounds weights to float32, and (of task vectors) after every step: copies are the
    same bits, sums within a rounding of what is summed."""
    names = ("base", "a", "b")
    paths = write_family(tmp_path, kind, dtype, names, tie_word_embeddings=kind == "qwen2")
    recipe = stack(body)
    family = Family.open(paths)
    merged = dict(family.merge(recipe))
    done = export_checkpoint(recipe, paths, tmp_path / "ours", template_model="a")
    assert done.digest == digest(merged.items())
    written = Recipe.parse(tmp_path / "ours" / "mergekit_config.yml").canonical(3)
    assert written == recipe
    for text, folder in ((Recipe.parse(body), "as_written"), (written, "as_exported")):
        mergekit_merge(text, paths, tmp_path / folder, template_model="a")
        theirs = load_all(tmp_path / folder)
        assert theirs.keys() == merged.keys()
        for item in family.plan(recipe).tensors:
            name = item.spec.name
            assert merged[name].dtype == theirs[name].dtype
            if len(item.inputs) == 1 and dict(item.effective.sources[0][2])["weight"] == 1:
                assert torch.equal(merged[name], theirs[name]), name
            inputs = [family.tensor(*given).abs().max() for given in item.inputs]
            rounding = float(torch.finfo(merged[name].dtype).eps * sum(inputs))
            torch.testing.assert_close(merged[name], theirs[name], rtol=0, atol=rounding)
    own = read_layout({"stack": tmp_path / "ours"})
    assert own.num_layers == sum(length(piece) for piece in recipe.slices)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert len(model.model.layers) == own.num_layers


def test_scales_are_of_the_layer_that_they_are_written_for(tmp_path: Path) -> None:
    paths = write_family(tmp_path, "llama")
    own = {name: load_all(path) for name, path in paths.items()}
    made = dict(Family.open(paths).merge(stack()))
    up, down, o = (f"model.layers.{{}}.{n}.weight" for n in ("mlp.up_proj", "mlp.down_proj",
                                                             "self_attn.o_proj"))  # fmt: skip
    for place, (model, layer, at_o, at_down, at_up) in enumerate(
        [
            ("a", 0, 1, 1, 1),
            ("a", 1, 1, 1, 1),
            ("b", 1, 0.3, 0.5, 1),
            ("b", 2, 0.3, -0.1, 1),
            ("a", 0, 1, 0.7, 0.7),
            ("b", 2, 1, 1, 1),
        ]
    ):
        for name, scale in ((o, at_o), (down, at_down), (up, at_up)):
            assert torch.equal(made[name.format(place)], own[model][name.format(layer)] * scale)
    assert torch.equal(made["model.embed_tokens.weight"], own["a"]["model.embed_tokens.weight"])
    assert torch.equal(made["model.norm.weight"], own["b"]["model.norm.weight"])


WINDOWS = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_settings_of_single_layers_follow_them(tmp_path: Path, kind: str) -> None:
    paths = write_family(tmp_path, kind, **WINDOWS[kind])
    kinds = transformers.AutoConfig.from_pretrained(paths["a"]).layer_types
    assert len(set(kinds)) == 2
    layers = (0, 0, 1, 2, 1)
    recipe = pieces(("a", 0, 1), ("a", 0, 3), ("b", 1, 2))
    export_checkpoint(recipe, paths, tmp_path / "out", template_model="a")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [kinds[layer] for layer in layers]
    if kind == "qwen2":
        assert config["max_window_layers"] == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = transformers.AutoModelForCausalLM.from_pretrained(paths["a"])
    for place, layer in enumerate(layers):
        made, from_ = model.model.layers[place].self_attn, own.model.layers[layer].self_attn
        assert made.sliding_window == from_.sliding_window


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"num_kv_shared_layers": 1}, "keys and values of others"),
        ("llama", {"first_k_dense_replace": 1}, "first_k_dense_replace"),
    ],
)
def test_layers_that_hang_on_their_place_are_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    own = {"n_embd": 16, "n_head": 2, "n_layer": 3} if kind == "gpt2" else {}
    paths = write_family(tmp_path, kind, **own)
    for path in paths.values():
        edit_config(path, **changes)
    layout = read_layout(paths)
    assert words in layout.fixed
    with pytest.raises(RecipeRejected, match=words):
        Family.open(paths).plan(pieces(("a", 0, 3), ("b", 0, 1)))
    Family.open(paths).plan(Recipe.of_model("b", 3).canonical(3))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("bamba", {"attn_layer_indices": [1]}, "attn_layer_indices"),
        ("recurrent_gemma", {}, "block_types"),
        ("ernie4_5_moe", {}, "moe_layer_end_index"),
        ("afmoe", {}, "num_dense_layers"),
        ("lfm2_moe", {}, "num_dense_layers"),
        ("zamba2", {"layers_block_type": ["mamba", "hybrid", "mamba"]}, "hybrid_layer_ids"),
        ("diffllama", {}, "what its attention subtracts"),
        ("hy_v4", {"indexer_types": ["full", "shared", "full"]}, "indexer_types"),
        ("a kind of its own", {"some_kinds": [0, 1, 1]}, "some_kinds"),
        ("a kind of its own", {"some_kinds": [1, 1, 1], "eos_token_id": [2, 3, 4]}, ""),
        ("gemma3n_text", {"num_kv_shared_layers": 0}, "hidden_size_per_layer_input"),
        (
            "gemma3n_text",
            {
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 0,
                "intermediate_size": [8, 8, 16],
            },
            "intermediate_size",
        ),
        ("gemma4_text", {}, "hidden_size_per_layer_input"),
        ("gemma4_text", {"hidden_size_per_layer_input": 0}, ""),
        ("lfm2_moe", {"num_dense_layers": 0}, ""),
        ("bamba", {}, ""),
        ("qwen3_moe", {}, ""),
    ],
)
def test_settings_by_number_are_known(kind: str, changes: dict[str, Any], words: str) -> None:
    layers = {"num_hidden_layers": 3}
    why = why_fixed({"model_type": kind, **layers, **changes}, 3)
    assert words in why
    assert bool(why) == bool(words), why


def test_lists_by_layer_follow_their_layers() -> None:
    own = {"model_type": "granite_swa", "num_hidden_layers": 3, "layer_rope_theta": [1e4, 0.0, 1e5]}
    made = at_layers(own, (0, 2, 1, 2))
    assert made["layer_rope_theta"] == [1e4, 1e5, 0.0, 1e5]
    config = transformers.AutoConfig.for_model(**made)
    assert config.num_hidden_layers == len(config.layer_types) == 4
    even = {"model_type": "hunyuan_v1_moe", "num_hidden_layers": 2, "moe_topk": [8, 8]}
    assert at_layers(even, (0, 1, 1))["moe_topk"] == [8, 8, 8]


def test_a_layout_at_another_depth(tmp_path: Path) -> None:
    layout = read_layout(write_family(tmp_path, "llama"))
    deeper = layout.at_depth((2, 0, 0, 1))
    assert deeper.num_layers == 4
    assert len(deeper.tensors) == len(layout.tensors) + 9
    assert [t.layer for t in deeper.tensors if "q_proj" in t.name] == [0, 1, 2, 3]
    assert layout.at_depth(range(3)) == layout


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    family = Family.open(write_family(tmp_path, "llama"))
    with pytest.raises(RecipeRejected, match="reads layers 2 to 4 of 'a', which has 3"):
        family.plan(pieces(("a", 0, 3), ("a", 2, 4)))
