"""A task's files as they are written, before lm-eval reads them: within bounds, and what code they
name. It runs nothing of them, and knows nothing of documents, metrics or models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from agentmerge.errors import TaskError
from agentmerge.system.bounded import MOST_TEXT, read_bytes, refuse_odd_file
from agentmerge.system.yaml_text import compose_yaml

_MOST_INCLUDES = 20  # one in another


class NotYaml(TaskError):
    """lm-eval passes such a file over."""


def refuse_unbounded(path: Path) -> None:
    """Raises TaskError where a task's file, or one that it includes, is no regular file, or stands
    for more than anybody writes."""
    for _ in _written(path):
        pass


def refuse_odd_documents(name: str, config: Mapping[str, Any]) -> None:
    """Raises TaskError where what a task names as its documents would be read for ever."""
    given = [config.get("dataset_path"), config.get("dataset_kwargs")]
    while given:
        value = given.pop()
        if isinstance(value, Mapping):
            given += value.values()
        elif isinstance(value, list):
            given += value
        elif isinstance(value, str) and "://" not in value and not os.path.isdir(value):
            try:
                refuse_odd_file(Path(value), TaskError)
            except TaskError as error:
                raise TaskError(f"task {name!r}: {error}") from None


def named_code(path: Path) -> str:
    """The first code of its author's that a task's files name; empty where there is none.

    That is a ``!function``, and a metric that is not lm-eval's, which the library evaluate loads as
    Python. Files of lm-eval itself are installed code, as it is.
    """
    for file, node in _written(path):
        if file.is_relative_to(_own_folder()):
            continue
        for found in _nodes(node):
            if isinstance(found, yaml.ScalarNode) and found.tag == "!function":
                return f"!function {found.value} in {file}"
            if isinstance(found, yaml.MappingNode) and (metric := _foreign_metric(found)):
                return f"metric {metric} in {file}"
    return ""


@contextmanager
def without_code() -> Iterator[None]:
    """What a task's templates say cannot reach Python: a template of lm-eval's can."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    boxed = SandboxedEnvironment(undefined=plain.undefined, keep_trailing_newline=True)
    boxed.filters.update(plain.filters)
    utils.env = boxed
    try:
        yield
    finally:
        utils.env = plain


def _written(path: Path, above: Sequence[Path] = ()) -> Iterator[tuple[Path, yaml.Node]]:
    """A file's nodes, and of all that it includes."""
    path = path.expanduser().resolve()
    if path in above:
        raise NotYaml(f"{path} includes itself")
    if len(above) > _MOST_INCLUDES:
        raise TaskError(
            f"{above[0]} includes files in one another, {len(above)} deep; write it out"
        )
    content = read_bytes(path, TaskError, most=MOST_TEXT)
    node = compose_yaml(content, str(path), TaskError, broken=NotYaml)
    if node is None:
        return
    yield path, node
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "include":
            for named in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(named, yaml.ScalarNode) and (path.parent / named.value).exists():
                    yield from _written(path.parent / named.value, (*above, path))


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    """A node and all below it, each once."""
    seen: set[int] = set()
    todo = [node]
    while todo:
        found = todo.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, yaml.MappingNode):
            todo += [part for pair in reversed(found.value) for part in reversed(pair)]
        elif isinstance(found, yaml.SequenceNode):
            todo += reversed(found.value)


def _foreign_metric(node: yaml.MappingNode) -> str:
    """The metric of an entry that is not one of lm-eval's own."""
    entry = {key.value: value.value for key, value in node.value}
    metric = entry.get("metric")
    if not isinstance(metric, str):
        return ""
    elsewhere = str(entry.get("hf_evaluate", "")).lower() in ("true", "yes", "on")
    return metric if elsewhere or metric not in _own_metrics() else ""


@cache
def _own_metrics() -> frozenset[str]:
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    return frozenset(metric_registry.keys())


@cache
def _own_folder() -> Path:
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).resolve().parent
