"""Tiny multimodal models around the text model of ``tests/evaluation/tiny.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.evaluation import tiny


def _vision(**changes: Any) -> dict[str, Any]:
    body = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return body | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8} | changes


def llava(**text: Any) -> Any:
    settings = tiny.config(**text)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision()),
        text_config=settings,
        image_token_index=len(tiny.TOKENS) - 1,
    )
    config.tie_word_embeddings = settings.tie_word_embeddings
    return transformers.LlavaForConditionalGeneration(config)


def gemma3(**text: Any) -> Any:
    body = tiny.config().to_dict() | {"head_dim": 8, "model_type": "gemma3_text"} | text
    for key in ("architectures", "rope_parameters", "layer_types"):
        body.pop(key, None)
    vision = _vision()
    config = transformers.Gemma3Config(text_config=body, vision_config=vision)
    config.mm_tokens_per_image = 4
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen2_vl(**text: Any) -> Any:
    body = tiny.config().to_dict() | text
    for key in ("architectures", "model_type"):
        body.pop(key, None)
    body["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
    config = transformers.Qwen2VLConfig(text_config=body, vision_config=vision | {"mlp_ratio": 2})
    return transformers.Qwen2VLForConditionalGeneration(config)


MODELS = {"llava": llava, "gemma3": gemma3, "qwen2_vl": qwen2_vl}


def write_wrapper(kind: str, path: Path, seed: int, noise: float = 0.05, **text: Any) -> Path:
    """A wrapper as transformers saves it; all of one kind differ by noise, everywhere."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind](**text)
        torch.manual_seed(seed)
        for value in model.parameters():
            value.data += noise * torch.randn_like(value)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path
