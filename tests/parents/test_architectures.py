"""Types of models of different structure: merged right in every tensor, or refused in words.

The whole table is ``python -m benchmarks.architectures``; here are some that show one thing each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agentmerge.merging.export import export_checkpoint
from agentmerge.parents.checkpoint import Checkpoint
from agentmerge.parents.headers import TensorHeader
from agentmerge.parents.layout import layout_faults, read_layout
from agentmerge.parents.plain import make_plain
from agentmerge.parents.skeleton import skeleton
from agentmerge.parents.sources import find_parent
from agentmerge.recipe import Recipe
from agentmerge.report.explain import explain_recipe
from agentmerge.workers.hf import each_gradient
from agentmerge.workers.targets import live_targets, pairing_faults, parts_of
from benchmarks import architectures
from tests.merging.merge_cases import edit_config, edit_weights

#: type -> what is particular about it.
MERGED = {
    "phi": "a head with a bias",
    "gptj": "the same, and a stack without a prefix of its own",
    "bert": "embeddings and head outside the stack, a tied head whose bias is tied too",
    "camembert": "a tied embedding that comes second",
    "gpt_neox": "a head that transformers renames",
    "mixtral": "experts in files, one fused tensor a layer",
    "granitemoe": "experts fused in the files",
    "deepseek_v3": "a buffer that is saved",
    "gemma4_text": "another",
    "gemma3": "a wrapper",
    "longcat_flash": "two layers to transformers where the files have one",
    "mamba2": "no attention",
}
REFUSED = {
    "git": "it has several stacks of layers (git.encoder.layer, ",
    "deepseek_v4": "1 tensors are not floating-point numbers that can be averaged",
}


@pytest.mark.parametrize("model_type", MERGED)
def test_merged_in_every_tensor_and_scored_as_transformers_does(
    model_type: str, tmp_path: Path
) -> None:
    row = architectures.examine(model_type, tmp_path)
    assert row.verdict == "merged", row


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_before_anything_is_loaded(model_type: str, tmp_path: Path) -> None:
    row = architectures.examine(model_type, tmp_path)
    assert row.verdict == "refused"
    assert REFUSED[model_type] in row.detail


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of models as old as transformers
def test_the_page_is_what_the_sweep_finds() -> None:
    rows = list(architectures.survey_types(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    assert not [row for row in rows if row.verdict == "wrong"]
    assert architectures.PAGE.read_text() == architectures.page(rows)


def test_what_only_the_files_have_is_refused_by_name(tmp_path: Path) -> None:
    """A value head is merged, and no class of transformers would ever read it."""
    paths = architectures.write_family("llama", tmp_path)
    for path in paths.values():
        edit_weights(path, **{"v_head.summary.weight": torch.ones(1, 32)})
    assert layout_faults(paths, "base") == []
    assert architectures.check_faults(paths) == [
        "transformers' LlamaForCausalLM has other tensors than the files, so merges cannot be "
        "written into it: 1 only in the files (e.g. v_head.summary.weight); worker.kind: vllm, "
        "which has loaders of its own, may take them"
    ]


def test_what_only_the_class_has_is_refused_by_name(tmp_path: Path) -> None:
    paths = architectures.write_family("llama", tmp_path)
    for path in paths.values():
        edit_config(path, attention_bias=True)
    assert (
        "8 only in the model (e.g. model.layers.0.self_attn.k_proj.bias"
        in (architectures.check_faults(paths)[0])
    )


@pytest.mark.parametrize(
    ("model_type", "old", "new"),
    [("gpt_neox", "embed_out.", "lm_head."), ("bert", "LayerNorm.weight", "LayerNorm.gamma")],
)
def test_a_tensor_has_one_of_two_names_in_files(
    model_type: str, old: str, new: str, tmp_path: Path
) -> None:
    """As an old program saved it, and as a new one does: transformers reads both."""
    paths = architectures.write_family(model_type, tmp_path / "family")
    stored = architectures.load(paths["a"])
    weights = {name.replace(old, new): value for name, value in stored.items()}
    assert weights.keys() != stored.keys()
    save_file(weights, paths["a"] / "model.safetensors", metadata={"format": "pt"})
    assert architectures.check_faults(paths) == []
    parents = {name: find_parent(str(path)) for name, path in paths.items()}
    made = make_plain(parents.values(), str(paths["base"]))
    found = architectures.load(made[parents["a"].name])
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)


@pytest.mark.parametrize("model_type", ["mixtral", "bert", "phi"])
def test_gradients_come_by_the_names_of_the_files(model_type: str, tmp_path: Path) -> None:
    paths = architectures.write_family(model_type, tmp_path)
    stored = architectures.load(paths["base"])
    model = architectures.opened(paths["base"])
    targets = live_targets(model, stored, (), lambda name: stored[name])
    ids = torch.arange(4, 20).reshape(2, 8)
    found: dict[str, torch.Tensor] = {}
    with each_gradient(
        parts_of(model, targets), lambda name, value: found.update({name: value.clone()})
    ):
        model(ids).logits.square().mean().backward()
    step = 1e-3
    for name in (min(found), max(found, key=lambda n: found[n].abs().max().item())):
        place = found[name].abs().argmax()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                targets[name].view(-1)[place] += sign * step
                losses.append(model(ids).logits.double().square().mean().item())
                targets[name].view(-1)[place] -= sign * step
        slope = (losses[0] - losses[1]) / (2 * step)
        assert found[name].view(-1)[place].item() == pytest.approx(slope, rel=0.05, abs=1e-4)


def _headers(model: Any, names: dict[str, str]) -> dict[str, TensorHeader]:
    """Headers of files that hold a model's tensors, under other beginnings of their names."""
    found = {}
    for own, value in model.state_dict().items():
        name = next((n + own.removeprefix(o) for o, n in names.items() if own.startswith(o)), own)
        found[name] = TensorHeader(tuple(value.shape), "bfloat16", Path("x.bin"), 0, 0)
    return found


#: What the Hub's config.json of a wrapper holds (abridged) -> how its files name the parts.
HUB: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "Gemma 3 4B": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {
                "hidden_size": 1152,
                "image_size": 896,
                "intermediate_size": 4304,
                "model_type": "siglip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        {
            "model.language_model.": "language_model.model.",
            "model.vision_tower.": "vision_tower.vision_model.",
            "model.": "",
        },
    ),
    "Qwen2-VL 2B": (
        {
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "model_type": "qwen2_vl",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": True,
            "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536},
        },
        {"model.language_model.": "model.", "model.visual.": "visual."},
    ),
    "LLaVA 1.5 7B": (
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {
                "model_type": "llama",
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-05,
                "vocab_size": 32064,
            },
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "vocab_size": 32000,
            },
        },
        {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "",
        },
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_wrappers_with_the_configs_of_the_hub(name: str, tmp_path: Path) -> None:
    """What their short configs leave out comes from their classes; no weight is there at all."""
    config, names = HUB[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = skeleton(tmp_path)
    model.tie_weights()
    tensors = _headers(model, names)
    if model.config.tie_word_embeddings:
        tensors = {
            key: value for key, value in tensors.items() if not key.endswith("lm_head.weight")
        }
    family = {label: Checkpoint(config, tensors) for label in ("base", "a")}
    assert layout_faults(family, "base") == []
    layout = read_layout(family, "base")
    assert layout.num_layers == model.config.get_text_config().num_hidden_layers
    assert all("vis" in key or "projector" in key for key in layout.carried)
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    assert pairing_faults(model, shapes, layout.carried) == []


def test_lists_of_a_text_model_inside_a_wrapper_are_its_own_and_no_layers(tmp_path: Path) -> None:
    """Gemma 3n: three projections beside its layers are the text model's, towers are not."""
    text = {"num_hidden_layers": 2, "hidden_size": 8, "num_kv_shared_layers": 0}
    config = {"model_type": "gemma3n", "text_config": text}
    inner = "model.language_model."
    shapes = {
        f"{inner}embed_tokens.weight": (16, 8),
        f"{inner}norm.weight": (8,),
        "model.embed_audio.embedding.weight": (4, 8),
    }
    shapes |= {f"{inner}layers.{n}.mlp.up_proj.weight": (8, 8) for n in range(2)}
    shapes |= {f"{inner}altup_projections.{n}.weight": (8, 8) for n in range(3)}
    shapes |= {f"model.vision_tower.timm_model.blocks.{n}.0.conv.weight": (4,) for n in range(4)}
    shapes |= {f"model.audio_tower.conformer.{n}.norm.weight": (4,) for n in range(2)}
    headers = {
        name: TensorHeader(shape, "bfloat16", Path("x.bin"), 0, 0) for name, shape in shapes.items()
    }
    layout = read_layout({name: Checkpoint(config, headers) for name in ("base", "a")}, "base")
    assert {name for name in shapes if not name.startswith(inner)} == set(layout.carried)
    layers = {spec.name: spec.layer for spec in layout.tensors}
    assert layers.pop(f"{inner}layers.1.mlp.up_proj.weight") == 1
    assert [layers[f"{inner}altup_projections.{n}.weight"] for n in range(3)] == [None] * 3


def test_what_is_carried_over_is_listed_by_explain(tmp_path: Path) -> None:
    paths = architectures.write_family("gemma3", tmp_path)
    base = str(paths["base"])
    recipe = Recipe.parse(
        f"merge_method: linear\nbase_model: {base}\nparameters: {{weight: 0.5}}\n"
        f"models: [{{model: {base}}}, {{model: {paths['a']}}}]"
    )
    *_, last = explain_recipe(recipe, paths["base"], None)["rows"]
    assert last[0] == "outside the text model"
    assert "vision_tower (" in last[1]
    assert "multi_modal_projector (" in last[1]
    assert last[2:] == ["base", "as it is there"]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_merged_as_mergekit_merges_them(model_type: str, tmp_path: Path) -> None:
    """mergekit writes transformers' fused names, so the opened models are compared."""
    paths = architectures.write_family(model_type, tmp_path / "family")
    text = (
        "merge_method: task_arithmetic\nbase_model: base\ndtype: float32\n"
        "models: [{model: a, parameters: {weight: 0.6}}, {model: b, parameters: {weight: 0.3}}]"
    )
    export_checkpoint(
        Recipe.parse(text).canonical(2), paths, tmp_path / "o", template_model="a", base="base"
    )
    body = yaml.safe_load(text)
    body["base_model"] = str(paths["base"])
    for entry in body["models"]:
        entry["model"] = str(paths[entry["model"]])
    config = MergeConfiguration.model_validate(body)
    run_merge(config, str(tmp_path / "t"), MergeOptions(copy_tokenizer=False, quiet=True))
    assert any(".experts.3." in name for name in architectures.load(tmp_path / "o"))
    ours, theirs = (architectures.opened(tmp_path / x).state_dict() for x in ("o", "t"))
    assert any(name.endswith("experts.gate_up_proj") for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
