"""What a LangGraph server's client may say of a search, and what is the server's own.

Knows configs and the file that ``$AGENTMERGE_SERVER_CONFIG`` names; opens no search.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from agentmerge.config import FIRST, BudgetSettings, ScorerCommand, SearchConfig, TaskConfig
from agentmerge.errors import ConfigError, UserError
from agentmerge.parents.chat_templates import UNSAID, template_text
from agentmerge.system.bounded import read_text
from agentmerge.system.yaml_text import read_yaml

#: The file with the sections of a search that are a server's own.
SERVER_CONFIG_VARIABLE = "AGENTMERGE_SERVER_CONFIG"
#: What a server's client may set, sections whole or key by key.
CLIENT_KEYS = (
    "genome", "tasks", "limit", "num_fewshot", "shuffle", "apply_chat_template",
    "fewshot_as_multiturn", "random_init", "search", "budget",
)  # fmt: skip
#: Most models that a client may have merged: a search space grows with each.
MOST_MODELS = 64
#: And what of these sections it may not: files that are read, code that is run, what tokens cost.
_SERVERS_OWN = frozenset({"search.graph", "search.init", "budget.prices"})


def client_config(text: str) -> SearchConfig:
    """The config of a new search: a client's, with the rest from the server's own file.

    Raises:
        ConfigError: a fault in either.
        UserError: the client's sets what is the server's.
    """
    asked = _mapping(text, "the config")
    _refuse_foreign(_dotted(asked))
    own = _servers_own()
    whole = own | asked
    for section in ("search", "budget"):  # key by key
        parts = [said[section] for said in (own, asked) if said.get(section) is not None]
        if all(isinstance(part, dict) for part in parts):
            whole[section] = {key: value for part in parts for key, value in part.items()}
    config = SearchConfig.from_text(yaml.safe_dump(whole), "the config")
    _refuse_models(config, own)
    if "tasks" in asked:
        _refuse_code(config, ())
    return config.model_copy(update={"budget": _tighter(config.budget, own)})


def client_changes(overrides: Mapping[str, Any], parent: SearchConfig) -> dict[str, Any]:
    """The settings of a branch of ``parent``: a client's, within the server's budget.

    Raises:
        ConfigError: they are no legal config.
        UserError: one of them is the server's.
    """
    if not isinstance(overrides, Mapping):
        raise UserError("overrides must be a mapping of dotted settings, as in search.seed: 1")
    _refuse_foreign(_dotted(overrides))
    own = _servers_own()
    config = SearchConfig.from_text(parent.to_yaml(), "the branch", overrides)
    if config.genome != parent.genome:
        _refuse_models(config, own)
    _refuse_code(config, parent.tasks.tasks)
    budget = _tighter(config.budget, own).model_dump(include=_own_limits(own))
    return dict(overrides) | {f"budget.{key}": value for key, value in budget.items()}


def _refuse_code(config: SearchConfig, known: Sequence[TaskConfig]) -> None:
    """A task that a client says is judged by a plugin, if anything: files and programs are code."""
    for task in config.tasks.tasks:
        if task not in known and (task.scorer_file or isinstance(task.scorer, ScorerCommand)):
            raise UserError(
                f"the scorer of task {task.name[:80]!r} is code, and the server's own to set; a "
                "client may name a plugin's"
            )


def _mapping(text: str, source: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise ConfigError(f"{source} must be YAML text, not {type(text).__name__}")
    found = read_yaml(text, source, ConfigError).value
    if not isinstance(found, dict):
        raise ConfigError(f"{source} must be a mapping, not {type(found).__name__}")
    return found


def _servers_own() -> dict[str, Any]:
    path = os.environ.get(SERVER_CONFIG_VARIABLE)
    if not path:
        return {}
    missing = f"${SERVER_CONFIG_VARIABLE}: {path} is missing"
    return _mapping(read_text(path, ConfigError, missing=missing), path)


def _refuse_foreign(dotted: Iterable[str]) -> None:
    for key in dotted:
        section = str(key).partition(".")[0]
        if section not in CLIENT_KEYS or key in _SERVERS_OWN:
            raise UserError(
                f"{key} is the server's own to set, in the file that ${SERVER_CONFIG_VARIABLE} "
                f"names; a client may set {', '.join(CLIENT_KEYS)}"
            )


def _dotted(config: Mapping[str, Any]) -> Iterator[str]:
    for section, body in config.items():
        yield section
        if isinstance(body, dict):
            yield from (f"{section}.{key}" for key in body)


def _own_limits(own: Mapping[str, Any]) -> set[str]:
    return set(own.get("budget") or {}) - {"prices"}


def _tighter(asked: BudgetSettings, own: Mapping[str, Any]) -> BudgetSettings:
    """A client's budget within the server's: of two limits the lower one."""
    limits = BudgetSettings(**(own.get("budget") or {}))
    found = {}
    for key in _own_limits(own):
        both = [getattr(limits, key), getattr(asked, key)]
        found[key] = min((value for value in both if value is not None), default=None)
    return asked.model_copy(update=found)


def _refuse_models(config: SearchConfig, own: Mapping[str, Any]) -> None:
    """No more than a server can hold. Where its file lists ``genome.models``, a client names no
    other; where it lets models bring code or pickles, it has to."""
    if (many := len(config.genome.models)) > MOST_MODELS:
        raise UserError(
            f"genome.models has {many} entries; from a client {MOST_MODELS} are the most"
        )
    listed = (own.get("genome") or {}).get("models")
    named = [*config.genome.models, config.genome.base_model, config.genome.tokenizer_source]
    if listed is not None:
        for name in named:
            if name not in (*listed, None, "union", "base"):
                raise UserError(
                    f"{str(name)[:80]!r} is not one of this server's models: {', '.join(listed)}"
                )
    elif config.worker.trust_remote_code or config.worker.allow_pickle:
        raise ConfigError(
            f"${SERVER_CONFIG_VARIABLE}: with worker.trust_remote_code or allow_pickle, "
            "genome.models must list what clients may name"
        )
    template = config.genome.chat_template
    if template not in (*UNSAID, FIRST, *named) and template_text(str(template)) is None:
        raise UserError(
            f"genome.chat_template {str(template)[:80]!r} is a file, and no file is read for a "
            "client: give the template's text, its name in mergekit, or one of the models"
        )
