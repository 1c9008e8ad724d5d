"""What was asked, and how, as a plain record and its hash: everything but the items themselves.

Items (and with them the dataset, its path and its order) are named by their own content, so that
subsets, rungs and limits share results; a model's name is not part of it either.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentmerge.evaluation.loading import FEWSHOT_SEED

#: Names and places of documents, and labels that no model sees.
_NOT_ASKED = frozenset(("task", "task_alias", "tag", "metadata", "custom_dataset", "split"))
_NOT_ASKED |= {"dataset_path", "dataset_name", "dataset_kwargs"}
_NOT_ASKED |= {"training_split", "validation_split", "test_split", "fewshot_split"}


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
) -> dict[str, Any]:
    """The record of one task.

    template: the chat template's text, or None where none is applied.
    tokenizer: ``tokenizer_identity``.
    context: tokens that the models can read.
    companion: whether generation items carry a teacher-forced margin.
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
    flags = {k: getattr(tokenizer, k, None) for k in ("add_bos_token", "add_eos_token")}
    body: Any
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        body = json.loads(tokenizer.backend_tokenizer.to_str())
        body.pop("padding", None)
        body.pop("truncation", None)
    else:
        body = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
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
        return _code(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _code(function: Any) -> list[str]:
    """A function by its source, and by all of its file's where that is a user's: it may call what
    stands beside it. Installed packages are known by their version."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    try:
        source = inspect.getsource(function)
        file = inspect.getsourcefile(function)
    except (TypeError, OSError):
        code = getattr(function, "__code__", None)
        return [name, code.co_code.hex() if code else ""]
    if file is None or "site-packages" in file:
        return [name.rpartition(".")[2], source]
    return [name.rpartition(".")[2], source, hashlib.sha256(Path(file).read_bytes()).hexdigest()]
