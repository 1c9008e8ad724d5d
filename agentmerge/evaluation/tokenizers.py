"""The tokenizer that asks a search's questions, and how many tokens a question may have.

Knows files and transformers' tokenizers; loads no model, so that what only looks at a search does
not import what would run one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentmerge.config import FIRST
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import ConfigError, ParentError
from agentmerge.evaluation.loading import quiet
from agentmerge.parents.chat_templates import MOST, template_names, template_text
from agentmerge.parents.headers import chat_template
from agentmerge.system.bounded import read_text


def parent_path(spec: WorkerSpec, name: str) -> Path:
    return Path(dict(spec.parents)[name])


def tokenizer_of(spec: WorkerSpec) -> Any:
    """The tokenizer that asks the questions."""
    tokenizer = _tokenizer(spec, spec.template_model)
    asked = spec.tasks.chat_template
    if asked not in (None, FIRST):
        tokenizer.chat_template = _asked_template(spec, str(asked))
    return tokenizer


def asked_templates(asked: str, paths: Mapping[str, Path]) -> dict[str, str | None]:
    """The templates that a ``chat_template`` may stand for, by whose they are, in words: of a
    model, of all, a template of mergekit's or its text, or in a file.

    Raises:
        ConfigError: it stands for nothing.
    """
    if asked in paths or asked == MOST:
        names = [asked] if asked in paths else paths
        return {repr(name): chat_template(paths[name]) for name in names}
    text = template_text(asked)
    if text is None and not Path(asked).exists():
        raise ConfigError(
            f"chat_template {asked!r} is neither a model of the genome ({', '.join(paths)}), nor a "
            f"template that mergekit has ({', '.join(template_names())}), nor a file that can be "
            "read"
        )
    return {"the config": read_text(asked, ConfigError) if text is None else text}


def _asked_template(spec: WorkerSpec, asked: str) -> Any:
    """The one that most have."""
    paths = {name: Path(path) for name, path in spec.parents}
    if asked in paths:
        return _tokenizer(spec, asked).chat_template
    found = [text for text in asked_templates(asked, paths).values() if text]
    return max(found, key=found.count) if found else None


def _tokenizer(spec: WorkerSpec, model: str) -> Any:
    from transformers import AutoTokenizer

    path = parent_path(spec, model)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=spec.trust_remote_code
            )
    # transformers and tokenizers raise what they like, and Rust's panics are no Exceptions.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ParentError(
            f"{model!r} has no tokenizer that can be read ({reason[0]}); put its "
            "tokenizer files beside its weights"
        ) from error
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(
        template, dict
    ):  # several by name; none of the others is for a chat without tools
        template = tokenizer.chat_template = template.get("default")
    if not isinstance(template, str | None):
        raise ParentError(
            f"{model!r}: its chat_template is no text but {type(template).__name__}; correct its "
            "tokenizer_config.json"
        )
    return tokenizer


def context_length(spec: WorkerSpec, tokenizer: Any) -> int:
    """Tokens a prompt and its answer may have: ``worker.options.max_length``, else the model's."""
    asked = spec.options.get("max_length")
    if asked is not None:
        return int(asked)
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    path = parent_path(spec, spec.template_model)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path), trust_remote_code=spec.trust_remote_code)
        length = int(resolve_max_length(config, tokenizer))
    except Exception as error:  # a class raises what it likes at a config that it cannot use
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ParentError(f"{path}: its config cannot be used ({reason})") from error
    if length < 1:
        raise ParentError(f"{path}: by its config it reads {length} tokens; correct config.json")
    return length
