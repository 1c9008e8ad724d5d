"""Which answers are kept: of items that fail, whatever their values are."""

from __future__ import annotations

import math
from typing import Any

import pytest

from agentmerge.config import ScorerCommand
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.failing import MOST_KEPT, keep_failing
from agentmerge.evaluation.rendering import MOST_SAID, ServedTask
from agentmerge.evaluation.tasks import Objective, ScoredTask, TaskSet
from agentmerge.ledger.packing import pack, unpack
from agentmerge.system.bounded import both_ends

REFS = tuple(ItemRef("t", n, f"{n:016x}") for n in range(100))


def kept(values: list[float], *, higher: bool = True, **more: Any) -> list[float]:
    """The values of the items whose answers are kept."""
    margins, rebuild = more.pop("margins", [None] * len(values)), more.pop("rebuild", "plain")
    task = ScoredTask("t", 1.0, "m", "none", higher, "generate_until", None, "p", REFS,
                      tuple(range(100)), rebuild=rebuild)  # fmt: skip
    taskset = TaskSet((task,), (Objective("t", 1.0, higher, ("t",)),))
    rows = {
        ref: ItemResult(value, margin=margin, answers=("said",), reasons=("why",), **more)
        for ref, value, margin in zip(REFS, values, margins, strict=False)
    }
    found = keep_failing(taskset, rows)
    assert list(found) == list(rows)
    assert [row.value for row in found.values()] == pytest.approx(values, nan_ok=True)
    assert all(bool(row.answers) == bool(row.reasons) for row in found.values())
    return [row.value for row in found.values() if row.answers]


def test_right_and_wrong() -> None:
    assert kept([0.0, 1.0, 0.0]) == [0.0, 0.0]
    assert kept([0.0, 0.0]) == [0.0, 0.0], "all fail"
    assert kept([1.0, 1.0]) == []
    assert kept([0.0, 1.0], higher=False) == [1.0], "an error rate"


def test_other_values_are_held_against_their_mean() -> None:
    assert kept([10.0, 20.0, 60.0]) == [10.0, 20.0]
    assert kept([10.0, 20.0, 60.0], higher=False) == [60.0]
    assert kept([5.0, 5.0]) == []


def test_what_a_harness_says_of_items_that_it_asked_itself_is_kept_by_its_range() -> None:
    """There is no answer to keep, only why; and the middle of the range tells who fails."""
    task = ScoredTask("t", 1.0, "m", "none", True, "served", None, "p", REFS, tuple(range(100)))
    scorer = ScorerCommand(command=("x",), serve=True, items=100, range=(0, 10))
    taskset = TaskSet(
        (task,), (Objective("t", 1.0, True, ("t",)),), served={"t": ServedTask("t", scorer, None)}
    )
    values = [1.0, 2.0, 7.0]
    rows = {
        ref: ItemResult(value, reasons=(f"worth {value}",))
        for ref, value in zip(REFS, values, strict=False)
    }
    found = [*keep_failing(taskset, rows).values()]
    assert [row.reasons for row in found] == [("worth 1.0",), ("worth 2.0",), ()]
    assert unpack(pack(found)) == found


def test_of_classes_the_margin_tells() -> None:
    assert kept([1.0, 0.0, 2.0], margins=[0.5, -0.1, None], rebuild="class") == [0.0]


def test_an_item_without_a_verdict_does_not_fail() -> None:
    assert kept([math.nan, math.nan], missing=True) == []


def test_no_more_than_a_few_are_kept() -> None:
    assert len(kept([0.0] * 100)) == MOST_KEPT < 100


def test_the_bound_and_the_mean_are_of_all_that_a_merge_was_asked() -> None:
    task = ScoredTask("t", 1.0, "m", "none", True, "generate_until", None, "p", REFS,
                      tuple(range(100)))  # fmt: skip
    taskset = TaskSet((task,), (Objective("t", 1.0, True, ("t",)),))

    def asked(start: int, values: list[float], known: dict[ItemRef, ItemResult]) -> list[int]:
        refs = REFS[start : start + len(values)]
        rows = {r: ItemResult(v, answers=("x",)) for r, v in zip(refs, values, strict=True)}
        found = keep_failing(taskset, rows, known)
        assert list(found) == list(refs)
        known.update(found)
        return [ref.index for ref, row in found.items() if row.answers]

    known: dict[ItemRef, ItemResult] = {}
    for start in range(0, 100, 25):
        asked(start, [0.0] * 25, known)
    assert sum(bool(row.answers) for row in known.values()) == MOST_KEPT
    assert len(asked(0, [0.0] * 25, known)) == 25, "what is asked again makes room for itself"
    known = {}
    assert asked(0, [10.0, 20.0], known) == [0]
    assert asked(2, [20.0, 100.0], known) == [2], "below the mean of all four, not of the two only"
    assert asked(4, [30.0, 35.0], known) == [4, 5]
    assert asked(6, [90.0, 80.0], known) == []


def test_of_a_long_right_answer_the_end_is_kept() -> None:
    text = both_ends(f"{'We count once more. ' * 60}#### 72", MOST_SAID)
    assert text.startswith("We count")
    assert text.endswith("#### 72")
    assert len(text) < MOST_SAID + 10


def test_what_is_kept_comes_back_as_it_was() -> None:
    rows = [
        ItemResult(0.0, answers=("사과 \ud800 \x00", ""), reasons=("", "why"), tokens=3),
        ItemResult(1.0, whole="[1]"),
        ItemResult(0.5, margin=0.25, cut_off=True, answers=("x",)),
    ]
    assert unpack(pack(rows)) == [
        rows[0], ItemResult(1.0, whole="[1]"), rows[2],
    ]  # fmt: skip
    plain = [ItemResult(0.5, margin=0.25)]
    assert len(pack(plain)) < 100, "nothing is stored for what nobody said"
    assert unpack(pack(plain)) == plain
