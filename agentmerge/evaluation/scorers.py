"""A generation task whose answers somebody else judges: a plugin's function, a function of a user's
file, or a user's program (``scripts.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.config import ScorerCommand, TaskConfig
from agentmerge.contracts.scorer import Scorer
from agentmerge.errors import AgentmergeError, TaskError
from agentmerge.evaluation import metrics
from agentmerge.system.code import failed_in, files_of, run_file
from agentmerge.system.commands import described_command, refuse_missing


def judge(task: Any, entry: TaskConfig, folders: Sequence[str]) -> None:
    """Let an entry's scorer judge a loaded lm-eval task, as its metric of that name.

    Raises:
        TaskError: the task generates nothing.
        UserError: no such scorer.
    """
    scorer = entry.scorer
    name = metrics.parse_metric(entry.metric, entry.name)[0]
    if task.OUTPUT_TYPE != "generate_until":
        raise TaskError(
            f"scorer {_called(scorer)!r} judges what models generate, and task {task.task_name!r} "
            f"is {task.OUTPUT_TYPE}; leave the scorer out, or name a generate_until task"
        )
    # Part of the protocol, with the code of both functions.
    if isinstance(scorer, ScorerCommand):
        refuse_missing(scorer.command, f"the scorer of task {entry.name!r}")
        told: dict[str, Any] = {"command": described_command(scorer.command), "range": scorer.range}
        judged = partial(_by_command, name=name, **told)
        higher = scorer.higher_is_better
    else:
        function = _function(entry, folders)
        judged = partial(_judged, name=name, scorer=function, code=files_of(function))
        higher = bool(getattr(function, "higher_is_better", True))
    task.set_config("process_results", judged)
    task._aggregation_list[name] = metrics.aggregation(task, name)
    task._higher_is_better[name] = higher


def code_of(entry: TaskConfig, folders: Sequence[str]) -> str:
    """What of the user's own code would be run here; empty where there is none.

    Raises:
        TaskError: it is where none may be.
    """
    file = entry.scorer_file
    return f"{str(entry.scorer).rpartition(':')[2]} in {_within(file, folders)}" if file else ""


def texts(results: Sequence[Any]) -> Iterator[str]:
    """The answers in what a task's filter gives."""
    for result in results:
        if isinstance(result, str):
            yield result
        else:
            yield from texts(result)


def _called(scorer: Any) -> str:
    return scorer if isinstance(scorer, str) else Path(scorer.command[0]).name


def _function(entry: TaskConfig, folders: Sequence[str]) -> Scorer:
    file, name = entry.scorer_file, str(entry.scorer).rpartition(":")[2]
    if not file:
        found: Scorer = plugins.load("agentmerge.scorers", name)
        return found
    path = _within(file, folders)
    sys.path.insert(0, str(path.parent))  # as a script's own: it may import what lies beside it
    try:
        made = getattr(run_file(path, "agentmerge_scorer"), name, None)
    except AgentmergeError:
        raise
    except Exception as error:
        raise TaskError(failed_in(path, error)) from error
    finally:
        sys.path.remove(str(path.parent))
    if not callable(made):
        raise TaskError(f"{path} has no function {name!r}; write scorer: {file}:FUNCTION")
    function: Scorer = made
    return function


def _within(file: str, folders: Sequence[str]) -> Path:
    """The file in a folder that the user named for tasks and their code."""
    roots = [Path(folder).expanduser().resolve() for folder in folders]
    for root in roots:
        path = (root / Path(file).expanduser()).resolve()
        if path.is_file() and any(path.is_relative_to(other) for other in roots):
            return path
    where = ", ".join(map(str, roots)) or "none"
    raise TaskError(
        f"scorer {file} is in none of the folders of task_search_path ({where}); code is run from "
        "those alone: put it there, or name its folder"
    )


def _judged(
    document: Mapping[str, Any],
    results: Sequence[Any],
    *,
    name: str,
    scorer: Scorer,
    code: Mapping[str, str],
) -> dict[str, float]:
    return {name: float(scorer(document, list(texts(results))))}


def _by_command(
    document: Mapping[str, Any], results: Sequence[Any], *, name: str, command: Any, range: Any
) -> dict[str, float]:
    """Of one document by itself: nothing. ``scripts.verdicts`` asks the command of all at once."""
    return {name: 0.0}
