"""What was asked, and how, as a plain record and its hash: everything but the items themselves.

Items (and with them the dataset, its path and its order) are named by their own content, so that
subsets, rungs and limits share results; a model's name is not part of it either.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentmerge.evaluation.loading import FEWSHOT_SEED
from agentmerge.parents.headers import file_digest
from agentmerge.system.code import described_code

#: Names and places of documents, and labels that no model sees.
_NOT_ASKED = frozenset(("task", "task_alias", "tag", "metadata", "custom_dataset", "split"))
_NOT_ASKED |= {"dataset_path", "dataset_name", "dataset_kwargs"}
_NOT_ASKED |= {"training_split", "validation_split", "test_split", "fewshot_split"}


#: What a tokenizer does to text besides its tables, on the way in or out.
_TEXT_FLAGS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy",
    "split_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip


def protocol(
    task: Any,
    metric: str,
    filter_name: str,
    *,
    template: str | None,
    as_multiturn: bool,
    tokenizer: str,
    context: int | None,
    companion: bool,
    day: date | None = None,
) -> dict[str, Any]:
    """The record of one task.

    template: the chat template's text, or None where none is applied.
    tokenizer: ``tokenizer_identity``.
    context: tokens that the models can read.
    companion: whether generation items carry a teacher-forced margin.
    day: the date that the template prints, None where it prints none.
    """
    shots = task.get_config("num_fewshot") or 0
    record: dict[str, Any] = {
        "task": task.task_name,
        "class": _described(type(task)) if type(task).__name__ != "ConfigurableTask" else None,
        "config": _described(task.config),
        "metric": metric,
        "filter": filter_name,
        "fewshot": [shots, FEWSHOT_SEED] if shots else [0],
        "template": template,
        "multiturn": as_multiturn if template is not None and shots else None,
        "tokenizer": tokenizer,
        "context": context,
        "companion": companion,
        "lm_eval": version("lm_eval"),
    }
    if day is not None:
        record["day"] = day.isoformat()
    return record


def protocol_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, 16 hex digits."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of how a tokenizer cuts text; padding and truncation, which users set, are left out.

    The padding token is left out too: lm-eval sets one where there is none.
    """
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if k != "pad_token"}
    flags = {k: getattr(tokenizer, k, None) for k in _TEXT_FLAGS}
    body: Any
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        body = json.loads(tokenizer.backend_tokenizer.to_str())
        body.pop("padding", None)
        body.pop("truncation", None)
    else:
        body = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), _files(tokenizer)]
    text = json.dumps([body, special, flags], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _described(value: Any) -> Any:
    """JSON for any part of a task's config, the same in every process."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        body = {field.name: getattr(value, field.name) for field in fields(value)}
        return _described({k: v for k, v in body.items() if v is not None and k not in _NOT_ASKED})
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_described(item) for item in items]
    if isinstance(value, functools.partial):
        return [_described(value.func), _described(value.args), _described(value.keywords)]
    if callable(value):
        return described_code(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _files(tokenizer: Any) -> dict[str, str]:
    """The tables of a tokenizer that is Python only, by content: its vocabulary alone does not say
    how it cuts."""
    found = {}
    for key in getattr(tokenizer, "vocab_files_names", {}):
        place = getattr(tokenizer, key, None) or tokenizer.init_kwargs.get(key)
        if isinstance(place, str) and Path(place).is_file():
            found[key] = file_digest(Path(place))
    return found
