"""The tokenizer that asks a search's questions, and how many tokens a question may have.

Knows files and transformers' tokenizers; loads no model, so that what only looks at a search does
not import what would run one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentmerge.config import FIRST
from agentmerge.errors import ConfigError, ParentError
from agentmerge.evaluation.loading import quiet
from agentmerge.merging.chat_templates import template_names, template_text
from agentmerge.merging.headers import chat_template
from agentmerge.workers.base import WorkerSpec


def parent_path(spec: WorkerSpec, name: str) -> Path:
    return Path(dict(spec.parents)[name])


def tokenizer_of(spec: WorkerSpec) -> Any:
    """The tokenizer that asks the questions."""
    tokenizer = _tokenizer(spec, spec.template_model)
    asked = spec.tasks.chat_template
    if asked not in (None, FIRST):
        tokenizer.chat_template = _asked_template(spec, str(asked))
    return tokenizer


def _asked_template(spec: WorkerSpec, asked: str) -> Any:
    """The template that ``chat_template`` names: of a model, a template of mergekit's or its text,
    or in a file; "auto" is mergekit's word for the one that most models have."""
    names = list(dict(spec.parents))
    if asked in names:
        return _tokenizer(spec, asked).chat_template
    if asked == "auto":
        found = [text for name in names if (text := chat_template(parent_path(spec, name)))]
        return max(found, key=found.count) if found else None
    text = template_text(asked)
    if text is not None:
        return text
    try:
        return Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        raise ConfigError(
            f"chat_template {asked!r} is neither a model of the genome ({', '.join(names)}), nor a "
            f"template that mergekit has ({', '.join(template_names())}), nor a file that can be "
            "read"
        ) from None


def _tokenizer(spec: WorkerSpec, model: str) -> Any:
    from transformers import AutoTokenizer

    path = parent_path(spec, model)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=spec.trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ParentError(
            f"{model!r} has no tokenizer that can be read ({reason[0]}); put its "
            "tokenizer files beside its weights"
        ) from error


def context_length(spec: WorkerSpec, tokenizer: Any) -> int:
    """Tokens a prompt and its answer may have: ``worker.options.max_length``, else the model's."""
    asked = spec.options.get("max_length")
    if asked is not None:
        return int(asked)
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        str(parent_path(spec, spec.template_model)), trust_remote_code=spec.trust_remote_code
    )
    return int(resolve_max_length(config, tokenizer))
