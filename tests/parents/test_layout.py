"""Which models make a family, and what each difference is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from agentmerge.errors import ParentError
from agentmerge.parents.layout import layout_faults, read_layout
from agentmerge.parents.naming import at_layer, layer_of
from tests.merging.merge_cases import edit_config, edit_weights, load_all


def test_the_tensors_in_order(own_family: dict[str, Path]) -> None:
    layout = read_layout(own_family, "base")
    names = [spec.name for spec in layout.tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [spec.layer for spec in layout.tensors] == [None, *[0] * 9, *[1] * 9, None, None]
    assert [spec.after for spec in layout.tensors] == [False] * 19 + [True] * 2
    assert (layout.num_layers, layout.dtype, layout.tied) == (2, "float32", False)
    assert layout.parents == ("base", "a", "b")
    assert layout.parameters == sum(x.numel() for x in load_all(own_family["a"]).values())


def test_a_tied_head_is_no_tensor(family_of: Callable[..., dict[str, Path]]) -> None:
    layout = read_layout(family_of(tied=True), "base")
    assert layout.tied
    assert layout.tensors[-1].name == "model.norm.weight"


def test_a_tied_head_that_is_written_all_the_same_is_dropped(own_family: dict[str, Path]) -> None:
    for path in own_family.values():
        edit_config(path, tie_word_embeddings=True)
        edit_weights(path, lm_head__weight=load_all(path)["model.embed_tokens.weight"])
    edit_weights(own_family["a"], lm_head__weight=None)
    layout = read_layout(own_family, "base")
    assert layout.tied
    assert "lm_head.weight" not in layout.by_name


def test_tying_is_what_the_class_means_where_no_config_says(own_family: dict[str, Path]) -> None:
    """Llama's class takes silence for false, Gemma's for true; the files must fit."""
    for path in own_family.values():
        edit_config(path, tie_word_embeddings=...)
    assert not read_layout(own_family, "base").tied
    for path in own_family.values():
        edit_weights(path, lm_head__weight=None)
    assert layout_faults(own_family, "base")[0] == (
        "base: config.json does not say otherwise than its class, which means "
        "tie_word_embeddings: false and the files hold no head; write tie_word_embeddings: true "
        "into config.json"
    )
    for path in own_family.values():
        edit_config(path, model_type="gemma", architectures=["GemmaForCausalLM"])
    assert read_layout(own_family, "base").tied


def test_masks_of_old_checkpoints_are_no_weights(own_family: dict[str, Path]) -> None:
    mask = torch.ones(1, 1, 8, 8)
    edit_weights(
        own_family["a"],
        **{"model.layers.0.attn.bias": mask, "model.layers.1.attention.bias": mask.bool()},
        **{"model.layers.0.attn.masked_bias": torch.tensor(-1e9)},
        **{"model.embeddings.position_ids": torch.arange(8)[None]},
    )
    assert len(read_layout(own_family, "base").tensors) == 21


def test_a_bias_of_attention_is_a_weight_all_the_same(own_family: dict[str, Path]) -> None:
    for path in own_family.values():
        edit_weights(path, **{"model.layers.0.attn.bias": torch.ones(8)})
    assert "model.layers.0.attn.bias" in read_layout(own_family, "base").by_name


def test_nothing_of_a_model_that_is_no_wrapper_is_carried_over(
    own_family: dict[str, Path],
) -> None:
    own = {"lm_head.bias": torch.ones(24), "v_head.summary.weight": torch.ones(1, 16)}
    for path in own_family.values():
        edit_weights(path, **own)
    layout = read_layout(own_family, "base")
    assert layout.carried == ()
    assert own.keys() <= layout.by_name.keys()


def test_rotary_buffers_of_old_checkpoints_are_no_weights(own_family: dict[str, Path]) -> None:
    edit_weights(own_family["a"], **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert len(read_layout(own_family, "base").tensors) == 21


def test_the_dtype_that_holds_all_parents_values(own_family: dict[str, Path]) -> None:
    for name, dtype in (("base", torch.bfloat16), ("a", torch.float16), ("b", torch.bfloat16)):
        weights = {k: v.to(dtype) for k, v in load_all(own_family[name]).items()}
        weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.bfloat16)
        save_file(weights, own_family[name] / "model.safetensors")
    layout = read_layout(own_family, "base")
    assert layout.by_name["model.norm.weight"].dtype == "bfloat16"
    assert layout.by_name["lm_head.weight"].dtype == layout.dtype == "float32"


QK = "model.layers.1.self_attn.q_proj.weight"

FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (
        lambda path: edit_config(path, architectures=["MistralForCausalLM"]),
        "a: architectures is ['MistralForCausalLM'], and ['LlamaForCausalLM'] in base",
    ),
    "model type": (
        lambda path: edit_config(path, model_type="mistral"),
        "a: model_type is 'mistral', and 'llama' in base",
    ),
    "layer count": (
        lambda path: edit_config(path, num_hidden_layers=3),
        "a: the number of layers is 3, and 2 in base",
    ),
    "layer count of the files": (
        lambda path: edit_config(path, num_hidden_layers=3),
        "a: config.json says 3 layers and the files hold 2",
    ),
    "heads": (
        lambda path: edit_config(path, num_attention_heads=8),
        "a: num_attention_heads is 8, and 4 in base",
    ),
    "norm": (
        lambda path: edit_config(path, rms_norm_eps=1e-5),
        "a: rms_norm_eps is 1e-05, and 1e-06 in base",
    ),
    "rope base": (
        lambda path: edit_config(path, rope_parameters=..., rope_theta=500000.0),
        "a: rope_theta is 500000.0, and 10000.0 in base",
    ),
    "rope scaling": (
        lambda path: edit_config(
            path, rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0}
        ),
        "a: rope_scaling is {'rope_type': 'linear', 'factor': 2.0}, and None in base",
    ),
    "shape": (
        lambda path: edit_weights(path, **{QK: torch.zeros(8, 16)}),
        f"a: 1 tensors have other shapes than in base, the first is {QK}: [8, 16], and [16, 16] "
        "in base",
    ),
    "missing": (
        lambda path: edit_weights(path, **{QK: None, "model.norm.weight": None}),
        f"a: 2 tensors of base are missing, the first is {QK}",
    ),
    "extra": (
        lambda path: edit_weights(path, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
        "a: 1 tensors are not in base, the first is model.layers.0.self_attn.q_proj.bias",
    ),
    "vocabulary": (
        lambda path: (
            edit_config(path, vocab_size=25),
            edit_weights(
                path,
                model__embed_tokens__weight=torch.ones(25, 16),
                lm_head__weight=torch.ones(25, 16),
            ),
        ),
        "a: the vocabulary has 25 embedding rows (vocab_size 25), and 24 (24) in base; set "
        "tokenizer_source to align them",
    ),
    "quantised": (
        lambda path: edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4}),
        "a: it is quantised (gptq); name the model at full precision",
    ),
    "integers": (
        lambda path: edit_weights(path, **{QK: torch.ones(16, 16, dtype=torch.int8)}),
        f"a: 1 tensors are not floating-point numbers that can be averaged, the first is {QK} of "
        "I8; name the model at full precision",
    ),
    "8-bit floats": (
        lambda path: edit_weights(path, **{QK: torch.ones(16, 16).to(torch.float8_e4m3fn)}),
        f"a: 1 tensors are not floating-point numbers that can be averaged, the first is {QK} of "
        "F8_E4M3; name the model at full precision",
    ),
    "tied and untied": (
        lambda path: (
            edit_config(path, tie_word_embeddings=True),
            edit_weights(path, lm_head__weight=None),
        ),
        "a: the head is tied to the embedding, and a tensor of its own in base",
    ),
    "says tied and is not": (
        lambda path: edit_config(path, tie_word_embeddings=True),
        "a: config.json says tie_word_embeddings: true and lm_head.weight differs from "
        "model.embed_tokens.weight; correct the one that is wrong",
    ),
    "says untied and has no head": (
        lambda path: edit_weights(path, lm_head__weight=None),
        "a: config.json says tie_word_embeddings: false and the files hold no head",
    ),
    "several stacks": (
        lambda path: (
            edit_config(path, num_hidden_layers=5),
            edit_weights(path, **{"vision.layers.0.weight": torch.ones(4)}),
        ),
        "a: it has several stacks of layers (model.layers, vision.layers), and it cannot be told "
        "which is the text model's",
    ),
    "encoder and decoder": (
        lambda path: edit_config(path, model_type="t5", is_encoder_decoder=True),
        "a: it is an encoder-decoder model, and only models that continue a text (decoder-only) "
        "can be merged here",
    ),
    "whole numbers": (
        lambda path: edit_weights(path, **{"model.table": torch.ones(4, dtype=torch.int64)}),
        "a: 1 tensors are not floating-point numbers that can be averaged, the first is "
        "model.table of I64",
    ),
    "no config": (
        lambda path: (path / "config.json").unlink(),
        "a: {a} has no config.json; name a model",
    ),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_each_fault_is_named(own_family: dict[str, Path], kind: str) -> None:
    spoil, sentence = FAULTS[kind]
    assert layout_faults(own_family, "base") == []
    spoil(own_family["a"])
    faults = layout_faults(own_family, "base")
    assert sentence.replace("{a}", str(own_family["a"])) in faults
    with pytest.raises(ParentError) as caught:
        read_layout(own_family, "base")
    assert str(caught.value) == "\n".join(faults)


def test_a_vocabulary_is_not_a_difference_of_shapes_too(own_family: dict[str, Path]) -> None:
    FAULTS["vocabulary"][0](own_family["a"])
    assert len(layout_faults(own_family, "base")) == 1


def test_all_faults_come_at_once(own_family: dict[str, Path]) -> None:
    for kind in ("heads", "rope base", "extra"):
        FAULTS[kind][0](own_family["a"])
    for kind in ("missing", "quantised"):
        FAULTS[kind][0](own_family["b"])
    faults = layout_faults(own_family, "base")
    assert [fault.split(":")[0] for fault in faults].count("a") == 3
    assert [fault.split(":")[0] for fault in faults].count("b") == 2


def test_equal_rope_settings_in_old_and_new_words(own_family: dict[str, Path]) -> None:
    scaling = {"factor": 8.0, "original_max_position_embeddings": 128}
    edit_config(
        own_family["a"],
        rope_parameters=...,
        rope_theta=10000.0,
        rope_scaling={"type": "yarn", **scaling},
    )
    for name in ("base", "b"):
        new = {"rope_type": "yarn", "rope_theta": 10000, **scaling}
        edit_config(own_family[name], rope_parameters=new)
    assert layout_faults(own_family, "base") == []
    edit_config(own_family["b"], rope_parameters=...)
    assert len(layout_faults(own_family, "base")) == 1


def test_one_rope_in_two_spellings_is_one(own_family: dict[str, Path]) -> None:
    """As the Hub has it, and as transformers writes what it read from there."""
    hub = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
    scaling = {"long_factor": [2.0, 3.0], "short_factor": [1.0, 1.5]}
    spellings = {
        "base": hub | {"rope_scaling": {"type": "longrope", **scaling}},
        "a": hub | {"rope_scaling": {"type": "su", "attention_factor": None, **scaling}},
        "b": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
                "partial_rotary_factor": 1.0,
                **scaling,
            },
            "original_max_position_embeddings": 32,
        },
    }
    for name, spelling in spellings.items():
        edit_config(own_family[name], rope_parameters=...)
        edit_config(own_family[name], model_type="phi3", architectures=["Phi3ForCausalLM"])
        edit_config(own_family[name], max_position_embeddings=64, **spelling)
    assert layout_faults(own_family, "base") == []
    scaling["long_factor"] = [2.0, 4.0]
    edit_config(own_family["a"], rope_scaling={"type": "su", **scaling})
    assert [fault for fault in layout_faults(own_family, "base") if "rope_scaling" in fault]


def test_a_base_that_is_not_there() -> None:
    assert layout_faults({"a": Path("/x")}, "base") == [
        "base model 'base' is not among the models 'a'"
    ]


def test_layers_in_names() -> None:
    assert layer_of("model.layers.12.mlp.experts.3.w1.weight") == 12
    assert layer_of("transformer.h.0.ln_1.weight") == 0
    assert layer_of("model.norm.weight") is None
    assert layer_of("model.norm2.weight") is None
    assert at_layer("model.layers.12.mlp.experts.3.w1", 4) == "model.layers.4.mlp.experts.3.w1"


def test_nested_text_configs_are_followed(own_family: dict[str, Path]) -> None:
    for path in own_family.values():
        edit_config(
            path,
            num_hidden_layers=...,
            vocab_size=...,
            text_config={"num_hidden_layers": 2, "vocab_size": 24, "model_type": "inner"},
        )
    assert read_layout(own_family, "base").num_layers == 2
