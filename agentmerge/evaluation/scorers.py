"""A generation task whose answers a scorer judges (``contracts/scorer.py``)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.contracts.scorer import Scorer
from agentmerge.errors import TaskError
from agentmerge.system.code import code_files


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
    judged = partial(_judged, name=name, scorer=scorer, code=_code_of(scorer))
    task.set_config("process_results", judged)
    task._aggregation_list[name] = _mean()
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


def _code_of(scorer: Any) -> dict[str, str]:
    made = scorer if inspect.isroutine(scorer) or inspect.isclass(scorer) else type(scorer)
    file = inspect.getsourcefile(made)
    return code_files(Path(file)) if file else {}


def _mean() -> Any:
    from lm_eval.api.metrics import mean

    return mean
