"""Which metrics come back from stored values, and how a document's answers become one value.

lm-eval's own filters and ``process_results`` decide what a document is worth; this module only
knows what shape that has. Imports lm-eval where it is used, and no torch.
"""

from __future__ import annotations

import copy
import numbers
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from agentmerge.errors import TaskError
from agentmerge.evaluation import whole
from agentmerge.evaluation.aggregation import Aggregation, Rebuild, aggregation_of
from agentmerge.evaluation.tasks import MarginKind

#: A response to try a task's own code on, by the type of its requests.
_TRIAL = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": ""}


def filtered(task: Any, filter_name: str, instances: Sequence[Any], answers: Sequence[Any]) -> Any:
    """Each instance's answers through the task's own filter.

    instances: requests of any number of documents. answers: a list of responses each (more than
    one where the task repeats a request). The instances themselves are left as they are.
    """
    copies = []
    for instance, answer in zip(instances, answers, strict=True):
        copied = copy.copy(instance)
        copied.resps, copied.filtered_resps = answer, {}
        copies.append(copied)
    ensemble = next(e for e in task._filters if e.name == filter_name)
    ensemble.apply(copies)
    return [copied.filtered_resps[filter_name] for copied in copies]


def trial(task: Any, filter_name: str, instances: Sequence[Any]) -> dict[str, Any]:
    """What ``process_results`` says of a dull answer to one document."""
    answers = []
    for i, instance in enumerate(instances):
        answer = _TRIAL[instance.request_type]
        if isinstance(answer, tuple):
            answer = (-1.0 - i, False)
        answers.append([answer] * (instance.repeats or 1))
    result = task.process_results(instances[0].doc, filtered(task, filter_name, instances, answers))
    return dict(result)


def parse_metric(text: str, task_name: str) -> tuple[str, str]:
    """The metric and the filter of "acc,none", which is how lm-eval keys its results."""
    metric, comma, filter_name = text.rpartition(",")
    if not comma:
        raise TaskError(
            f"metric {text!r} of task {task_name!r} has no filter; write {text + ',none'!r}"
        )
    return metric.strip(), filter_name.strip()


def check_metric(task: Any, metric: str, filter_name: str, instances: Sequence[Any]) -> Rebuild:
    """How ``metric`` is rebuilt from stored values.

    Raises:
        TaskError: no such metric or filter, naming the legal ones, or one that is no metric.
    """
    filters = [ensemble.name for ensemble in task._filters]
    known = [name for name in task.aggregation() if name != "bypass"]
    probe: dict[str, Any] | None = None
    with suppress(Exception):  # code that takes no empty answer: the real ones will tell
        probe = trial(task, filter_name if filter_name in filters else filters[0], instances)
    known += [name for name in probe or {} if name not in known]
    if metric not in known or filter_name not in filters:
        legal = ", ".join(f"{name},{f}" for name in known for f in filters)
        raise TaskError(
            f"metric '{metric},{filter_name}' does not exist in task {task.task_name!r}; "
            f"it has: {legal}"
        )
    known_as = aggregation_of(aggregation(task, metric))
    rule = known_as.rebuild
    if rule is not None and (probe is None or metric not in probe or _fits(rule, probe[metric])):
        if rule != "whole" or probe is None or _is_pair(probe.get(metric)):
            return rule
    elif known_as == Aggregation() and probe and _fits("whole", probe[metric]):
        return "whole"  # a task's own, of texts or tuples
    given = str((probe or {}).get(metric))[:80]
    raise TaskError(
        f"metric {metric!r} of task {task.task_name!r} is made of {given}, of which no number "
        "comes; choose another metric"
    )


def check_classes(task: Any, metric: str, golds: Sequence[float], choices: int) -> None:
    """lm-eval's F1 knows two classes, and raises at a third as soon as a model says it.

    golds: every document's class. choices: the most that a document has.

    Raises:
        TaskError: the metric cannot be computed with so many classes.
    """
    answers = [*range(choices), *(int(gold) for gold in golds)]
    values = [(int(golds[i % len(golds)]), answer) for i, answer in enumerate(answers)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            aggregation(task, metric)(values)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise TaskError(
            f"metric {metric!r} of task {task.task_name!r} cannot be computed with "
            f"{len(set(answers))} classes ({reason}); choose acc or mcc"
        ) from error


def _fits(rule: Rebuild, value: Any) -> bool:
    if rule == "plain":
        return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if rule == "one_hot":
        right = isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], int)
        return right and 0 <= value[0] < len(value[1])
    if rule == "whole":
        try:
            return bool(whole.kept(value))
        except ValueError:
            return False
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value))


def _is_pair(value: Any) -> bool:
    """What lm-eval's metrics of texts are made of: references and what was said."""
    return isinstance(value, list | tuple) and len(value) == 2


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def aggregation(task: Any, metric: str) -> Callable[[list[Any]], Any]:
    """lm-eval's function; the mean where the task names none, as lm-eval has it."""
    from lm_eval.api.metrics import mean

    found: Callable[[list[Any]], Any] = task.aggregation().get(metric, mean)
    return found


def higher_is_better(task: Any, metric: str) -> bool:
    """Which way a metric is better: as the task says, else as its aggregation does."""
    said = task.higher_is_better().get(metric)
    if said is None:
        said = aggregation_of(aggregation(task, metric)).higher_is_better
    return True if said is None else bool(said)


def static_part(task: Any, metric: str, filter_name: str, rule: Rebuild, instances: Any) -> float:
    """The half of a document's value that no model changes: its words or bytes, or its class."""
    value = trial(task, filter_name, instances)[metric]
    return float(value[1] if rule == "weighted" else value[0])


def stored_value(task: Any, rule: Rebuild, metric: str, value: Any) -> tuple[float, str]:
    """The number that is kept of a document's value, and all of it where a number is not enough."""
    if not _fits(rule, value):
        what = "cannot be kept" if rule == "whole" else "is not a number"
        raise TaskError(
            f"metric {metric!r} of task {task.task_name!r} gave {str(value)[:80]!r}, which {what}; "
            "choose another metric"
        )
    if rule == "whole":
        gave = whole.kept(value)
        return whole.OfWhole(aggregation(task, metric)).alone(gave), gave
    if rule == "one_hot":
        gold, shares = value
        return float(sum((share - (i == gold)) ** 2 for i, share in enumerate(shares))), ""
    return float(value if rule == "plain" else value[0] if rule == "weighted" else value[1]), ""


def margin_kind(task: Any, companion: bool) -> MarginKind | None:
    """Choice margins are free; token margins cost a companion request, where there is one gold."""
    if callable(task.get_config("process_results")) and task.OUTPUT_TYPE == "multiple_choice":
        return None  # its own code may count several choices as right
    if task.OUTPUT_TYPE == "multiple_choice":
        return "choice"
    return "token" if task.OUTPUT_TYPE == "generate_until" and companion else None


def gold_choices(task: Any, doc: Any) -> tuple[int, ...]:
    """The right choices of a document; empty where its label is outside the choices."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    marks = gold if isinstance(gold, list) else [gold]
    found = []
    for mark in marks:
        if isinstance(mark, str):
            mark = choices.index(mark) if mark in choices else -1
        if not 0 <= mark < len(choices):
            return ()
        found.append(int(mark))
    return tuple(found)


def choice_scales(task: Any, doc: Any, metric: str) -> tuple[float, ...]:
    """What each choice's log-likelihood is divided by under this metric."""
    choices = task.doc_to_choice(doc)
    if metric == "acc_norm":
        return tuple(float(len(choice)) for choice in choices)
    if metric == "acc_bytes":
        return tuple(float(len(choice.encode())) for choice in choices)
    return (1.0,) * len(choices)


def choice_margin(
    log_likelihoods: Sequence[Any],
    gold: Sequence[int],
    scales: Sequence[float],
    mutual: bool = False,
) -> tuple[Any, Any]:
    """(log-likelihood of the gold choice, margin: best gold minus best wrong choice),
    None where there is no such thing.

    log_likelihoods: floats, or scalars on a graph that the margin is to be on as well.
    mutual: subtract each choice's unconditional log-likelihood, which the second half holds.
    """
    count = len(scales)
    if not gold:
        return None, None
    lls = log_likelihoods[:count]
    # An empty choice has no length to divide by: to lm-eval it is never the best one.
    compared = {i: ll / scales[i] for i, ll in enumerate(lls) if scales[i]}
    if mutual:
        compared = {i: lls[i] - log_likelihoods[count + i] for i in range(count)}
    wrong = [value for i, value in compared.items() if i not in gold]
    right = [compared[i] for i in gold if i in compared]
    margin = max(right) - max(wrong) if right and wrong else None
    return (lls[gold[0]] if len(gold) == 1 else None), margin
