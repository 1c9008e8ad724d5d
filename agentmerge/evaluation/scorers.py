"""A generation task whose answers a scorer judges (``contracts/scorer.py``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from agentmerge import plugins
from agentmerge.contracts.scorer import Scorer
from agentmerge.errors import TaskError
from agentmerge.evaluation import metrics
from agentmerge.system.code import files_of


def judge(task: Any, name: str) -> None:
    """Let the scorer ``name`` judge a loaded lm-eval task, as its metric of that name.

    Raises:
        TaskError: the task generates nothing.
        UserError: no such scorer.
    """
    scorer = plugins.load("agentmerge.scorers", name)
    if task.OUTPUT_TYPE != "generate_until":
        raise TaskError(
            f"scorer {name!r} judges what models generate, and task {task.task_name!r} is "
            f"{task.OUTPUT_TYPE}; leave the scorer out, or name a generate_until task"
        )
    # Part of the protocol, with the code of both functions.
    judged = partial(_judged, name=name, scorer=scorer, code=files_of(scorer))
    task.set_config("process_results", judged)
    task._aggregation_list[name] = metrics.aggregation(task, name)
    task._higher_is_better[name] = bool(getattr(scorer, "higher_is_better", True))


def _judged(
    document: Mapping[str, Any],
    results: Sequence[Any],
    *,
    name: str,
    scorer: Scorer,
    code: Mapping[str, str],
) -> dict[str, float]:
    return {name: float(scorer(document, list(_texts(results))))}


def _texts(results: Sequence[Any]) -> Iterator[str]:
    for result in results:
        if isinstance(result, str):
            yield result
        else:
            yield from _texts(result)
