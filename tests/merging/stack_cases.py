"""Tiny random families of transformers' own classes, with layers that can be told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from agentmerge.recipe import Recipe

SHAPE: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: As published recipes have them: repeats, another order, both models, several scales.
STACK: dict[str, Any] = {
    "merge_method": "passthrough",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {
            "sources": [
                {
                    "model": "b",
                    "layer_range": [1, 3],
                    "parameters": {
                        "scale": [
                            {"filter": "o_proj", "value": 0.3},
                            {"filter": "down_proj", "value": [0.5, -0.1]},
                            {"value": 1.0},
                        ]
                    },
                }
            ]
        },
        {
            "sources": [{"model": "a", "layer_range": [0, 1]}],
            "parameters": {"scale": [{"filter": "layers.0.mlp", "value": 0.7}]},
        },
        {"sources": [{"model": "b", "layer_range": [2, 3]}]},
    ],
}


_WEIGHTS = {"base": -0.25, "a": 0.5, "b": 0.75}
_DAMPED = [
    {"filter": "o_proj", "value": 0.31},
    {"filter": "down_proj", "value": -0.2},
    {"value": 1.0},
]


def _sources(layers: tuple[int, int], weights: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {"model": model, "layer_range": [*layers], "parameters": {"weight": weight}}
        for model, weight in weights.items()
    ]
    return {"sources": rows}


#: As a search of layers has them: a merge of task vectors (the base has what they leave), with its
#: own layers once more and out of order, and one model's, damped, between.
MERGED: dict[str, Any] = {
    "merge_method": "linear",
    "parameters": {"normalize": False},
    "slices": [
        _sources((0, 1), _WEIGHTS),
        _sources((0, 1), {"a": _DAMPED}),
        _sources((1, 3), _WEIGHTS),
        _sources((1, 2), _WEIGHTS),
        _sources((2, 3), {"b": _DAMPED}),
        _sources((2, 3), {"base": 1.0}),
        _sources((2, 3), {"base": 0.1, "a": 0.2, "b": 0.3}),
    ],
}


def random_model(kind: str, seed: int, **changes: Any) -> Any:
    """A causal model of a ``model_type``, every parameter random, norms and biases too."""
    config = transformers.AutoConfig.for_model(kind, **(SHAPE | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def write_family(
    root: Path, kind: str, dtype: str = "float32", names: Sequence[str] = "ab", **changes: Any
) -> dict[str, Path]:
    """Unlike models, a and b."""
    paths = {}
    for seed, name in enumerate(names):
        paths[name] = root / name
        model = random_model(kind, seed, **changes).to(getattr(torch, dtype))
        model.save_pretrained(paths[name])
    return paths


def stack(body: dict[str, Any] = STACK, num_layers: int = 3, **changes: Any) -> Recipe:
    return Recipe.parse(body | changes).canonical(num_layers)


def pieces(*layers: tuple[str, int, int], **changes: Any) -> Recipe:
    """A plain stack of (model, start, end)."""
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in layers]
    return stack({"merge_method": "passthrough", "slices": slices}, **changes)
