"""Which documents are asked, in which order, and which of them are sealed until the end.

Pure functions of the config and of what the items ask; it knows no task and no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import ItemRef
from agentmerge.evaluation.tasks import ScoredTask, TaskSet

#: With fewer sealed items than this a confirmation says nothing, so sealing is off.
MIN_SEALED = 20
_STANDS_IN = "is confirmed on its search items"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which documents are asked: ``search`` in order, and ``beyond`` that may be sealed."""

    search: tuple[int, ...]
    beyond: tuple[int, ...]


def choose_documents(count: int, config: TasksConfig, task: str) -> Choice:
    """Document numbers, in the fixed order (seeded where ``shuffle`` is on).

    With a limit, search items are the first ``limit``, and sealed ones are drawn by seed from all
    that lie beyond: as many as the limit, or as ``sealed_share`` of the whole would be if that is
    more. (Drawn, not the next ones, because files are often sorted by subject.) Without a limit,
    ``beyond`` is empty and the split is by hash: see ``split``.
    """
    words = [config.seed, *hashlib.sha256(task.encode()).digest()[:8]]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
    order = rng.permutation(count).tolist() if config.shuffle else list(range(count))
    if config.limit is None or not config.sealed_share:
        return Choice(tuple(order[: config.limit]), ())
    share = config.sealed_share
    wanted = max(config.limit, round(config.limit * share / (1 - share)))
    rest = order[config.limit :]
    drawn = sorted(rng.permutation(len(rest))[:wanted].tolist())
    return Choice(tuple(order[: config.limit]), tuple(rest[i] for i in drawn))


def split(
    search: Sequence[ItemRef], beyond: Sequence[ItemRef], config: TasksConfig
) -> tuple[tuple[ItemRef, ...], tuple[int, ...], tuple[int, ...], str | None]:
    """(items, search positions, sealed positions, note).

    An item that asks the same as a search item is never sealed. The note says why sealing is off
    where it was wanted.
    """
    if config.limit is not None:
        known = {ref.key for ref in search}
        sealed = [ref for ref in beyond if ref.key not in known]
        kept = list(search)
    else:
        sealed = [ref for ref in search if _share_of(ref.key) < config.sealed_share]
        kept = [ref for ref in search if _share_of(ref.key) >= config.sealed_share]
    if len(sealed) < MIN_SEALED or not kept:
        note = None
        if config.sealed_share:
            name = search[0].task
            note = f"task {name!r}: no sealed items, since only {len(sealed)} could be set aside"
        items = tuple(search)
        return items, tuple(range(len(items))), (), note
    if config.limit is not None:
        items = (*kept, *sealed)
        return items, tuple(range(len(kept))), tuple(range(len(kept), len(items))), None
    chosen = set(sealed)
    items = tuple(search)
    places = range(len(items))
    return (
        items,
        tuple(i for i in places if items[i] not in chosen),
        tuple(i for i in places if items[i] in chosen),
        None,
    )


def numbered(
    name: str, count: int, config: TasksConfig, key: Callable[[int], str]
) -> tuple[tuple[ItemRef, ...], tuple[int, ...], tuple[int, ...], str | None]:
    """``split`` of a task's items where each is known by its number alone. key: an item's."""
    chosen = choose_documents(count, config, name)
    search, beyond = (
        [ItemRef(name, n, key(n)) for n in part] for part in (chosen.search, chosen.beyond)
    )
    return split(search, beyond, config)


def stand_in(tasks: Sequence[ScoredTask]) -> tuple[list[ScoredTask], list[str]]:
    """(tasks, notes): among sealed tasks, one without sealed items is confirmed on its search ones.

    So a sealed score covers the same tasks as a search score.
    """
    if not any(task.sealed for task in tasks):
        return list(tasks), []
    notes = [
        f"task {task.name!r} {_STANDS_IN}: too few can be set aside"
        for task in tasks
        if not task.sealed
    ]
    return [task if task.sealed else replace(task, sealed=task.search) for task in tasks], notes


def unsealed(taskset: TaskSet, searched: Set[str]) -> TaskSet:
    """The same without sealed items that a search before it saw, by their keys.

    They are asked no more. Where too few are left, sealing is off for that task, with a note.
    """
    tasks, more = [], []
    for task in taskset.tasks:
        own = () if task.sealed == task.search else task.sealed  # else its search items stand in
        left = tuple(i for i in own if task.items[i].key not in searched)
        if own and len(left) < MIN_SEALED:
            more.append(
                f"task {task.name!r}: no sealed items, since an earlier search that this one goes "
                f"on from saw {len(own) - len(left)} of {len(own)}"
            )
            left = ()
        tasks.append(replace(task, sealed=left))
    if not more and all(a.sealed == b.sealed for a, b in zip(tasks, taskset.tasks, strict=True)):
        return taskset
    tasks, standing = stand_in(tasks)
    notes = [note for note in taskset.notes if _STANDS_IN not in note]
    return replace(taskset, tasks=tuple(tasks), notes=(*notes, *more, *standing))


def _share_of(key: str) -> float:
    """A number in [0, 1) that depends on the item alone."""
    digest = hashlib.sha256(f"sealed:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
