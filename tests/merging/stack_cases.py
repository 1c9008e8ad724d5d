"""Tiny random families of transformers' own classes, with layers that can be told apart."""

from __future__ import annotations

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


def write_family(root: Path, kind: str, dtype: str = "float32", **changes: Any) -> dict[str, Path]:
    """Two unlike models, a and b."""
    paths = {}
    for seed, name in enumerate("ab"):
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
