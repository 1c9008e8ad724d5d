"""A model as transformers builds it from a directory: its class, and itself without weights.

It knows transformers' classes. It loads no weights and knows no merging.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from agentmerge.errors import ParentError
from agentmerge.parents.configs import quiet_logs


def auto_class(config: Any) -> Any:
    """transformers' auto class for text: of causal models, else of models of text and images."""
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return transformers.AutoModelForCausalLM
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def skeleton(
    directory: Path, *, trust_remote_code: bool = False, attn_implementation: str | None = None
) -> Any:
    """The model of a directory in float32 on the meta device: names and shapes, no memory.

    Raises:
        ParentError: transformers cannot build it.
    """
    try:
        with quiet_logs():
            config = transformers.AutoConfig.from_pretrained(
                str(directory), trust_remote_code=trust_remote_code
            )
            with torch.device("meta"):
                return auto_class(config).from_config(
                    config,
                    dtype=torch.float32,
                    trust_remote_code=trust_remote_code,
                    attn_implementation=attn_implementation,
                )
    except Exception as error:  # a class raises what it likes at a config that it cannot use
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ParentError(f"{directory}: transformers cannot build this model: {reason}") from error
