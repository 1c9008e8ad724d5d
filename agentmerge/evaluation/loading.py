"""Finds lm-eval tasks by name and loads them: task, group, tag, the user's own files.

It settles which file a name means, and refuses where two files claim it. It knows nothing of
metrics, items or models.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmerge.config import TasksConfig
from agentmerge.errors import TaskError
from agentmerge.evaluation.definitions import (
    NotYaml,
    named_code,
    refuse_odd_documents,
    refuse_unbounded,
)
from agentmerge.system.code import forget_changed

#: The seed of lm-eval's few-shot sampler, as ``simple_evaluate`` has it.
FEWSHOT_SEED = 1234

_INCLUDE = re.compile(rb"^include:[ \t]*(.*)$", re.MULTILINE)
_MOST_INCLUDES = 8  # one in another; more is a circle


@dataclass(frozen=True, slots=True)
class LoadedTasks:
    """What one entry of the config names: one task, or a group and its leaf tasks.

    code: what of its author's would run, where it was not to be and so nothing was loaded.
    """

    name: str
    tasks: tuple[Any, ...]
    group: Any = None
    code: str = ""


def load_tasks(
    config: TasksConfig, *, check_built_ins: bool = True, run_code: bool = True
) -> list[LoadedTasks]:
    """The lm-eval tasks of every objective, few-shot counts and seeds set.

    run_code: False leaves out what names code of its author's.

    Raises:
        TaskError: unknown, claimed by two files, not loadable, or of a kind that cannot be scored.
    """
    names = [task.name for task in config.tasks]
    forget_changed()
    with quiet():
        index = _CustomFiles(config.task_search_path)
        manager = index.manager(names)
        index.refuse_collisions(_reached(names, manager.task_index), check_built_ins)
        codes = ["" if run_code else _code_of(name, manager.task_index) for name in names]
        loaded = [
            LoadedTasks(name, (), code=code) if code else _load(name, manager, index)
            for name, code in zip(names, codes, strict=True)
        ]
    owner: dict[str, str] = {}
    for item in loaded:
        for task in item.tasks:
            _set_fewshot(task, config.num_fewshot)
            first = owner.setdefault(task.task_name, item.name)
            if first != item.name:
                raise TaskError(
                    f"task {task.task_name!r} is part of both {first!r} and {item.name!r}; "
                    "leave one of them out"
                )
    return loaded


def _code_of(name: str, index: Any) -> str:
    files = [entry.yaml_path for each in _reached([name], index) if (entry := index.get(each))]
    return next((code for file in files if file and (code := named_code(Path(file)))), "")


def load_index(config: TasksConfig) -> Mapping[str, Any]:
    """Every task, group and tag by name: the user's own, and lm-eval's unless the config's names
    are all among the user's. Entries have ``kind``, ``cfg``, ``tags``."""
    names = [task.name for task in config.tasks]
    with _silenced("lm_eval"):  # reads files alone: what loads data and models stays unimported
        index: Mapping[str, Any] = _CustomFiles(config.task_search_path).manager(names).task_index
    return index


def mentioning(word: str, task_search_path: Sequence[str]) -> Mapping[str, Any]:
    """Of lm-eval's own tasks, groups and tags and the user's, those whose files say ``word``, as
    ``load_index`` has them. Bytes are searched first: parsing all 14,000 files takes five seconds.

    Raises:
        TaskError: a search path that is no directory.
    """
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    built_in = Path(lm_eval.tasks.__file__).parent
    index: dict[str, Any] = {}
    with _silenced("lm_eval"):
        for root in (built_in, *_CustomFiles(task_search_path).roots):
            found: dict[str, Any] = {}
            for path in TaskIndex._iter_yaml_files(root):
                if not _says(path, word.lower().encode()):
                    continue
                try:
                    TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, found)
                except Exception:  # lm-eval cannot use this file either
                    continue
            index.update(found)
    return index


def _says(path: Path, word: bytes, depth: int = 0) -> bool:
    """Whether a file, or one that it includes, has the word in it."""
    try:
        text = path.read_bytes()
    except OSError:
        return False
    if word in text.lower():
        return True
    included = _INCLUDE.search(text)
    if included is None:
        return False
    named = included[1].decode(errors="replace").strip().strip("\"'")
    if not named or named[0] in "[#":
        return True  # perhaps a list of files: lm-eval reads it
    return depth < _MOST_INCLUDES and _says(path.parent / named, word, depth + 1)


class _CustomFiles:
    """The YAML files of the user's own search paths: which names each defines."""

    def __init__(self, roots: Sequence[str]) -> None:
        from lm_eval.tasks._index import TaskIndex
        from lm_eval.tasks._yaml_loader import load_yaml

        self.roots = [Path(root).expanduser().resolve() for root in roots]
        self.files: dict[str, list[Path]] = {}
        self.unreadable: list[str] = []
        for root in self.roots:
            if not root.is_dir():
                raise TaskError(f"task_search_path {str(root)!r} is not a directory")
            for path in TaskIndex._iter_yaml_files(root):
                try:
                    refuse_unbounded(path)
                    cfg = load_yaml(path, resolve_func=False)
                except TaskError as error:
                    if not isinstance(error, NotYaml):
                        raise
                    self.unreadable.append(str(error))
                    continue
                except Exception as error:
                    self.unreadable.append(f"{path} ({' '.join(str(error).split())})")
                    continue
                name = cfg.get("group") or cfg.get("task")
                if isinstance(name, str) and path not in self.files.setdefault(name, []):
                    self.files[name].append(path)

    def manager(self, names: Sequence[str]) -> Any:
        """A TaskManager that knows every name; lm-eval's own tasks only if one needs them, since
        scanning those 14,000 files takes five seconds."""
        from lm_eval.tasks import TaskManager

        roots = [str(root) for root in self.roots]
        if roots:
            manager = TaskManager(include_path=roots, include_defaults=False)
            if not _missing(names, manager.task_index):
                return manager
        return TaskManager(include_path=roots or None)

    def refuse_collisions(self, names: Sequence[str], check_built_ins: bool) -> None:
        own = {name: self.files[name] for name in names if name in self.files}
        for name, paths in own.items():
            if len(paths) > 1:
                raise TaskError(
                    f"task {name!r} is defined twice: {paths[0]} and {paths[1]}; rename one"
                )
        built_in = _built_in_files(own) if own and check_built_ins else {}
        for name, path in built_in.items():
            raise TaskError(
                f"task {name!r} of {own[name][0]} has the name of lm-eval's own task in {path}; "
                "rename yours"
            )


def _built_in_files(names: Sequence[str] | dict[str, Any]) -> dict[str, Path]:
    """lm-eval's own files that define one of these names.

    A name stands literally in the file that defines it, or in one beside it that is included: so
    bytes are searched first (0.7 s for all of them) and only directories that hit are parsed.
    """
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    wanted = {name.encode(): name for name in names}
    suspects = []
    for folder, _, files in os.walk(Path(lm_eval.tasks.__file__).parent):
        for file in files:
            if file.endswith((".py", ".pyc", ".md", ".json", ".jpg")):
                continue
            text = Path(folder, file).read_bytes()
            if any(name in text for name in wanted):
                suspects.append(folder)
                break
    found: dict[str, Path] = {}
    for folder in suspects:
        for path in TaskIndex._iter_yaml_files(Path(folder)):
            text = path.read_bytes()
            if not any(name in text for name in wanted) and b"include" not in text:
                continue
            try:
                cfg = load_yaml(path, resolve_func=False)
            except Exception:  # lm-eval cannot use this file either
                continue
            for key in ("group", "task", "tag"):
                value = cfg.get(key)
                for name in value if isinstance(value, list) else [value]:
                    if isinstance(name, str) and name in wanted.values():
                        if key == "task" and cfg.get("group"):
                            continue  # a group's list of members
                        found.setdefault(name, path)
    return found


def _members(cfg: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(name, whether it may be defined in place) of everything a group's file lists."""
    listed = cfg.get("task")
    for member in listed if isinstance(listed, list) else [listed] if listed else []:
        if isinstance(member, str):
            yield member, False
        elif isinstance(member, dict) and isinstance(member.get("group"), str):
            yield member["group"], True
            yield from _members(member)
        elif isinstance(member, dict) and isinstance(member.get("task"), str):
            yield member["task"], "dataset_path" in member or "custom_dataset" in member


def _walk(names: Sequence[str], index: Any) -> tuple[list[str], list[str]]:
    """(names reached through groups and tags, those of them that nobody defines)."""
    from lm_eval.tasks._index import Kind

    todo = [(name, False) for name in names]
    seen: dict[str, None] = {}
    missing = []
    while todo:
        name, inline = todo.pop()
        if name in seen:
            continue
        seen[name] = None
        entry = index.get(name)
        if entry is None:
            if not inline:
                missing.append(name)
        elif entry.kind is Kind.TAG:
            todo += [(tagged, False) for tagged in sorted(entry.tags)]
        elif entry.kind is Kind.GROUP:
            todo += list(_members(entry.cfg or {}))
    return list(seen), missing


def _reached(names: Sequence[str], index: Any) -> list[str]:
    return _walk(names, index)[0]


def _missing(names: Sequence[str], index: Any) -> list[str]:
    return _walk(names, index)[1]


def _load(name: str, manager: Any, custom: _CustomFiles) -> LoadedTasks:
    from lm_eval.tasks._index import Kind

    entry = manager.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.6)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "check its spelling"
        where = f" nor in {', '.join(map(str, custom.roots))}" if custom.roots else ""
        bad = f"; files that cannot be read: {'; '.join(custom.unreadable[:3])}"
        raise TaskError(
            f"task {name!r} is neither one of lm-eval's own{where}; {hint}"
            f"{bad if custom.unreadable else ''}"
        )
    if entry.kind is Kind.TAG:
        raise TaskError(
            f"{name!r} is a tag, a list of tasks without an aggregate; "
            f"name its tasks instead: {', '.join(sorted(entry.tags))}"
        )
    for reached in _reached([name], manager.task_index):
        refuse_odd_documents(reached, getattr(manager.task_index.get(reached), "cfg", None) or {})
    try:
        loaded = manager.load([name])
    except Exception as error:  # a task file can run any code of its author
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TaskError(f"task {name!r} ({entry.yaml_path}) cannot be loaded: {reason}") from error
    tasks = tuple(loaded["tasks"].values())
    for task in tasks:
        if getattr(task, "UNSAFE_CODE", False):
            raise TaskError(f"task {task.task_name!r} runs code that models write; not supported")
        if getattr(task, "MULTIMODAL", False):
            raise TaskError(f"task {task.task_name!r} asks about images or sound; not supported")
    return LoadedTasks(name, tasks, loaded.get("groups", {}).get(name))


def _set_fewshot(task: Any, asked: int | None) -> None:
    """By simple_evaluate's rule: a task that says 0 itself keeps 0."""
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and its friends without progress bars, log lines and warnings."""
    import lm_eval.api.task as task_module
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars
    from datasets.utils import enable_progress_bars as enable_data_bars
    from transformers.utils import logging as transformers_logging

    data_bars = not are_progress_bars_disabled()
    model_bars = transformers_logging.is_progress_bar_enabled()
    bar = task_module.tqdm
    task_module.tqdm = lambda iterable, **_: iterable
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        with _silenced("lm_eval", "datasets", "transformers"):
            yield
    finally:
        task_module.tqdm = bar
        if data_bars:
            enable_data_bars()
        if model_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _silenced(*names: str) -> Iterator[None]:
    """Without the log lines of these loggers, and without warnings."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
