"""A model's config for other layers than its own: settings of single layers follow their layer.

It knows how configs speak of layers. It reads no files and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentmerge.parents.configs import LAYER_COUNT_KEYS, class_config

#: Lists with an entry a layer.
_BY_LAYER = (
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "layer_rope_theta",
)
#: Lists of something else, however many layers there are.
_NOT_BY_LAYER = ("architectures", "full_attn_idxs", "languages", "time_step_limit")
#: Settings that tell a layer's kind by its number, and the values that say nothing.
_BY_NUMBER: Mapping[str, tuple[Any, ...]] = {
    "attention_types": (None, []),
    "attn_layer_indices": (None, []),
    "attn_layer_period": (None,),
    "block_configs": (None, []),
    "block_types": (None, []),
    "cross_attention_layers": (None, []),
    "decoder_sparse_step": (None, 1),
    "expert_layer_period": (None,),
    "first_k_dense_replace": (None, 0),
    "hidden_size_per_layer_input": (None, 0),
    "hybrid_layer_ids": (None, []),
    "hybrid_override_pattern": (None, ""),
    "interleave_moe_layer_step": (None, 1),
    "mlp_only_layers": (None, []),
    "moe_layer_end_index": (None, -1),
    "moe_layer_freq": (None, 1),
    "moe_layer_interval": (None, 1),
    "moe_layer_start_index": (None, 0),
    "moe_layers": (None, []),
    "num_dense_layers": (None, 0),
    "ple_layer_ids": (None, []),
}
#: Classes that make something of a layer's number whatever the config says, by ``model_type``.
_BY_CLASS: Mapping[str, str] = {
    "diffllama": "what its attention subtracts",
    "gpt_neox_japanese": "a bias in the last",
    "minimax": "how its linear attention decays",
    "modernbert-decoder": "no norm in the first",
    "rwkv": "a norm in the first",
    "zaya": "its router, which goes by the layer before",
}


def why_fixed(config: Mapping[str, Any], depth: int) -> str:
    """Why a model's layers cannot stand in other places, in other number; "" where they can."""
    text = class_config(config).text
    if text.get("num_kv_shared_layers"):
        return "some of its layers use the keys and values of others (num_kv_shared_layers)"
    if text.get("scale_attn_by_inverse_layer_idx"):
        return "a layer's attention depends on its number (scale_attn_by_inverse_layer_idx)"
    if why := _BY_CLASS.get(str(text.get("model_type"))):
        return f"what a layer is depends on its number ({why})"
    for key, nothing in _BY_NUMBER.items():
        if text.get(key) not in nothing:
            return f"what a layer is depends on its number ({key})"
    for key in _lists(text, depth):
        if key not in _BY_LAYER and not _even(text[key]):
            return f"what a layer is depends on its number ({key})"
    counts = set(class_config(config).layer_counts)
    return "" if counts == {depth} else "its config counts layers in several ways"


def at_layers(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The config of a model whose layer k is what layer ``layers[k]`` of this one is."""
    text = class_config(config).text
    depth = max(class_config(config).layer_counts, default=0)
    inner = config.get("text_config")
    changed = dict(inner if isinstance(inner, Mapping) else config)
    for key in {key for key in LAYER_COUNT_KEYS if key in changed} or {"num_hidden_layers"}:
        changed[key] = len(layers)
    changed |= followed(text, depth, layers)
    return {**config, "text_config": changed} if isinstance(inner, Mapping) else changed


def followed(text: Mapping[str, Any], depth: int, layers: Sequence[int]) -> dict[str, Any]:
    """Settings of single layers for a model whose layer k is layer ``layers[k]`` of this text model
    of ``depth``."""
    found: dict[str, Any] = {
        key: [text[key][layer] for layer in layers]
        for key in _lists(text, depth)
        if key in _BY_LAYER or _even(text[key])
    }
    kinds = found.get("layer_types")
    if "max_window_layers" in text and kinds:  # for whoever goes by it: how many see everything
        sliding = [k for k, kind in enumerate(kinds) if kind != "full_attention"]
        found["max_window_layers"] = sliding[0] if sliding else len(layers)
    return found


def _lists(text: Mapping[str, Any], depth: int) -> list[str]:
    """Settings of which there are as many as layers."""
    return [
        key
        for key, value in text.items()
        if isinstance(value, list | tuple) and len(value) == depth > 0
        if key not in _NOT_BY_LAYER and not key.endswith(("_token_id", "_tokens"))
    ]


def _even(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)
