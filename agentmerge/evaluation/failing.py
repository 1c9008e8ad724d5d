"""Which items an answer fails, and what of an answer is kept for people and agents to read.

An item fails where its value is below the middle of what it can be; where nobody said what it can
be, below the mean of its task. Of a task's failing items the answers to the first few by key are
kept, cut to a length; of sealed items none. Knows no ledger and no agent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.rendering import MOST_SAID, said
from agentmerge.evaluation.tasks import ScoredTask, TaskSet
from agentmerge.system.bounded import both_ends

#: Answers kept of one task's failing items, of one merge.
MOST_KEPT = 64
#: Characters of all turns of a conversation and its answers.
_MOST_TURNS = 2 * MOST_SAID


def keep_failing(
    taskset: TaskSet,
    results: Mapping[ItemRef, ItemResult],
    known: Mapping[ItemRef, ItemResult] | None = None,
) -> dict[ItemRef, ItemResult]:
    """The same results, with answers and reasons only where they are kept.

    known: what the merge's other items came to before.
    """
    kept = set()
    every = {**(known or {}), **results}
    for task in taskset.tasks:
        own = {ref: row for ref, row in every.items() if ref.task == task.name}
        spoken = {ref for ref, row in own.items() if row.answers or row.reasons}
        fresh = spoken & results.keys()
        if not fresh:
            continue
        failed = [ref for ref in _failing(taskset, task, own) if ref in fresh]
        room = max(MOST_KEPT - len(spoken - fresh), 0)
        kept.update(sorted(failed, key=lambda ref: ref.key)[:room])
    return {
        ref: replace(row, answers=_cut(row.answers), reasons=row.reasons)
        if ref in kept
        else unsaid(row)
        for ref, row in results.items()
    }


def unsaid(row: ItemResult) -> ItemResult:
    """A result without the words that it was made of."""
    return replace(row, answers=(), reasons=()) if row.answers or row.reasons else row


def texts(
    taskset: TaskSet, task: ScoredTask, refs: Sequence[ItemRef]
) -> dict[str, tuple[str, str]]:
    """Key -> what an item asks, of a long one the end, and what is right; empty where no text is
    known here (a program's own items)."""
    if asked := taskset.asked.get(task.name):
        return said(asked, refs)
    if judged := taskset.judged.get(task.name):
        found = {ref.key: judged.conversations[ref.index] for ref in refs}
        return {
            key: ("\n".join(_cut(chat.turns)), "\n".join(_cut(chat.references)).strip())
            for key, chat in found.items()
        }
    return {}


def _failing(
    taskset: TaskSet, task: ScoredTask, results: Mapping[ItemRef, ItemResult]
) -> list[ItemRef]:
    if task.rebuild == "class":  # its value is a class: the margin alone tells
        return [ref for ref, row in results.items() if row.margin is not None and row.margin <= 0]
    present = {ref: row.value for ref, row in results.items() if not row.missing}
    if not present:
        return []
    ends = _ends(taskset, task, present.values())
    middle = sum(ends) / 2 if ends else sum(present.values()) / len(present)
    sign = taskset.item_sign(task) or 1.0
    return [ref for ref, value in present.items() if sign * value < sign * middle]


def _ends(
    taskset: TaskSet, task: ScoredTask, values: Iterable[float]
) -> tuple[float, float] | None:
    """The least and the most that an item's value can be, None where nobody said."""
    if judged := taskset.judged.get(task.name):
        return (0.0, 1.0) if judged.baseline else judged.settings.scale
    if served := taskset.served.get(task.name):
        return served.scorer.range
    asked = taskset.asked.get(task.name)
    if asked is not None and asked.script is not None:
        return asked.script.range
    return (0.0, 1.0) if set(values) <= {0.0, 1.0} else None


def _cut(turns: Sequence[str]) -> tuple[str, ...]:
    """Each turn with its share of the length, of a long one beginning and end: how an answer ends
    says as much as how it begins."""
    most = max(MOST_SAID if len(turns) == 1 else _MOST_TURNS // max(len(turns), 1), 40)
    return tuple(both_ends(turn, most) for turn in turns)
