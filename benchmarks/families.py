"""Model families to measure on: Llama checkpoints of a given size with random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = 10
_BASE = "base"


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama model with a tied head and ten layers."""

    hidden: int
    intermediate: int
    vocabulary: int

    @classmethod
    def near(cls, parameters: int) -> Shape:
        """About so many parameters, a fifth of them in the embedding as in small Llamas."""
        hidden = max(64, 64 * round(12 * (parameters / 115.6e6) ** (1 / 3)))
        vocabulary = 32 * max(8, round(0.2126 * parameters / hidden / 32))
        left = parameters - vocabulary * hidden - 4 * LAYERS * hidden**2
        return cls(hidden, max(64, 16 * round(left / (3 * LAYERS * hidden) / 16)), vocabulary)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}{name}.weight"] = (self.hidden,)
            for name in "qkvo":
                shapes[f"{prefix}self_attn.{name}_proj.weight"] = (self.hidden, self.hidden)
            for name in ("gate", "up"):
                shapes[f"{prefix}mlp.{name}_proj.weight"] = (self.intermediate, self.hidden)
            shapes[f"{prefix}mlp.down_proj.weight"] = (self.hidden, self.intermediate)
        return shapes


def write_family(root: Path, shape: Shape, experts: int, dtype: torch.dtype) -> dict[str, Path]:
    """A base and its experts, which differ from it everywhere; name -> directory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": shape.hidden // 64,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    paths = {}
    for index, name in enumerate([_BASE, *(f"expert-{i}" for i in range(experts))]):
        path = root / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        weights = {}
        for place, (tensor, size) in enumerate(shape.tensors.items()):
            value = 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(place))
            if index:
                seeded = torch.Generator().manual_seed(1000 * index + place)
                value += 0.002 * torch.randn(size, generator=seeded)
            weights[tensor] = value.to(dtype)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        paths[name] = path
    return paths


def recipe(method: str, models: list[str], groups: int, draw: torch.Generator) -> dict[str, object]:
    """A recipe of equal layer groups with numbers of their own; ``models`` begins with the base."""
    base, *experts = models

    def number(low: float, high: float) -> float:
        return round(low + (high - low) * float(torch.rand((), generator=draw)), 6)

    used = experts if method == "linear" else models
    if method == "slerp":
        used = models[:2]
    slices = []
    for group in range(groups):
        rows = [group * LAYERS // groups, (group + 1) * LAYERS // groups]
        sources = []
        for model in used:
            source: dict[str, object] = {"model": model, "layer_range": rows}
            if method != "slerp" and model != base:
                own = {"weight": number(0.1, 0.9)}
                if method not in ("linear", "task_arithmetic"):
                    own["density"] = number(0.2, 0.9)
                if method == "della":
                    own["epsilon"] = 0.05
                source["parameters"] = own
            sources.append(source)
        part: dict[str, object] = {"sources": sources}
        if method == "slerp":
            part["parameters"] = {"t": number(0.1, 0.9)}
        slices.append(part)
    body: dict[str, object] = {"merge_method": method, "slices": slices, "dtype": "bfloat16"}
    if method != "linear":
        body["base_model"] = base
    return body
