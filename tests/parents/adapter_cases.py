"""Real adapters of peft on the tests' tiny models: trained no step, and not zero."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
    "ranks, rslora": (
        peft.LoraConfig,
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"q_proj": 3},
            "target_modules": "all-linear",
        },
    ),
    "dora": (peft.LoraConfig, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj"]}),
    "embedding": (peft.LoraConfig, {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "whole modules": (
        peft.LoraConfig,
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "loha": (peft.LoHaConfig, {"r": 4, "target_modules": ["q_proj", "up_proj"]}),
    "lokr": (peft.LoKrConfig, {"r": 4, "target_modules": ["q_proj", "up_proj"]}),
    "ia3": (
        peft.IA3Config,
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "oft": (peft.OFTConfig, {"oft_block_size": 4, "r": 0, "target_modules": ["q_proj"]}),
}
_TRAINED = ("lora_", "hada_", "lokr_", "ia3_", "oft_", "modules_to_save.")


def write_adapter(model: Path, directory: Path, kind: str = "lora", seed: int = 1) -> Path:
    """An adapter of ``model`` with random numbers in every matrix, as peft saves it."""
    build, settings = CONFIGS[kind]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        bare = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        adapted = peft.get_peft_model(bare, build(task_type="CAUSAL_LM", **settings))
        for name, value in adapted.named_parameters():
            if any(part in name for part in _TRAINED):
                value.data += 0.1 * torch.randn_like(value)
        adapted.save_pretrained(directory)
    return directory


def merged_by_peft(model: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """peft's own merge in float32, rounded once to ``dtype``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        whole = peft.PeftModel.from_pretrained(bare, adapter).merge_and_unload()
    return {name: value.detach().to(dtype) for name, value in whole.named_parameters()}
