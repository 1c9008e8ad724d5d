"""Every call of a tool is within bounds: of what it costs, of what it sends, of what it is told."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge import MergeToolkit, SearchConfig
from agentmerge.ledger.folder import LEDGER
from agentmerge.search.budget import evaluations_left
from agentmerge.workers.fake import FakeWorker


@pytest.fixture
def paid(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items the worker was asked, call by call."""
    found: list[int] = []
    made = FakeWorker.score

    def score(self, items):
        found.append(len(items))
        return made(self, items)

    monkeypatch.setattr(FakeWorker, "score", score)
    return found


@pytest.mark.parametrize("part", [{}, {"tasks": ["one"], "limit": 7}], ids=["whole", "part"])
def test_the_same_call_of_many_at_once_is_paid_for_once(
    toolkit: MergeToolkit, paid: list[int], monkeypatch, part: dict[str, Any]
) -> None:
    """Without an order between them, each would find nothing and ask a worker."""
    merge = next(t for t in toolkit.get_tools() if t.name == "merge_and_evaluate")
    known, together = type(toolkit.search.scoring).known, threading.Barrier(4)

    def slow(self, *arguments):
        found = known(self, *arguments)
        with suppress(threading.BrokenBarrierError):  # whoever looks now sees what the others see
            together.wait(0.2)
        return found

    monkeypatch.setattr(type(toolkit.search.scoring), "known", slow)
    with ThreadPoolExecutor(4) as threads:
        asks = [{"recipe": "[9, 8, 7, 6]"} | part] * 4
        said = [*threads.map(merge.invoke, asks)]
    assert len(paid) == 1
    assert len({json.dumps(json.loads(text).get("tasks")) for text in said}) == 1


def test_time_is_a_budget_too(fake_config: str, tmp_path: Path, paid: list[int]) -> None:
    body = yaml.safe_load(fake_config)
    body["budget"] = {"max_evaluations": 19, "timeout_s": 1000}
    config = SearchConfig.from_text(yaml.safe_dump(body))
    with MergeToolkit(config, runs_dir=tmp_path) as kit:
        merge, *others = kit.get_tools()
        first = {"recipe": "[9, 8, 7, 6]"}
        assert merge.invoke(first).startswith("{")
        left, spent = evaluations_left(kit.search), sum(paid)
        object.__setattr__(kit.search, "seconds_left", lambda: 0.0)
        for more in ({}, {"limit": 5}):
            told = merge.invoke({"recipe": "[1, 2, 3, 4]"} | more)
            assert told == "the time of this search is used up (budget.timeout_s 1000)"
        assert json.loads(merge.invoke(first))["known"], "what was paid for is there"
        assert evaluations_left(kit.search) == left, "nothing was promised"
        assert sum(paid) == spent
        assert next(t for t in others if t.name == "list_candidates").invoke({}).startswith("{")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


LARGE = {
    "a long recipe": ("merge_and_evaluate", {"recipe": "x" * 10**7}),
    "a long object": ("merge_and_evaluate", {"recipe": {"models": ["x" * 10**6]}}),
    "a deep object": ("merge_and_evaluate", {"recipe": nested(120)}),
    "a long key": ("merge_and_evaluate", {"recipe": f"{'k' * 10**3}: 1"}),
    "a huge number": ("merge_and_evaluate", {"recipe": f"[{'9' * 4000}, 1, 1, 1]"}),
    "a larger one": ("merge_and_evaluate", {"recipe": f"[{'9' * 9000}, 1, 1, 1]"}),
    "a long task": ("merge_and_evaluate", {"recipe": "[1, 1, 1, 1]", "tasks": ["y" * 10**6]}),
    "many tasks": ("merge_and_evaluate", {"recipe": "[1, 1, 1, 1]", "tasks": ["one"] * 10**5}),
    "a huge limit": ("merge_and_evaluate", {"recipe": "[1, 1, 1, 1]", "limit": 10**30}),
    "a long name": ("compare", {"a": "z" * 10**6, "b": "north"}),
    "a huge count": ("list_candidates", {"count": 10**30}),
}


@pytest.mark.parametrize("case", LARGE)
def test_what_is_too_large_is_refused_in_a_sentence_and_not_kept(
    ask, tmp_path: Path, case: str
) -> None:
    name, arguments = LARGE[case]
    status, text = ask(name, **arguments)
    assert status == "error"
    assert 10 < len(text) < 1200
    assert sum(file.stat().st_size for file in tmp_path.glob(f"{LEDGER}*")) < 10**6


def test_no_recipe_is_more_than_a_sentence(ask: Callable[..., Any], toolkit: MergeToolkit) -> None:
    """Forty recipes with something in them replaced by something else."""
    rng = random.Random(11)
    recipe = toolkit.search.space.recipe((0.5, 0.4, 0.3, 0.2)).to_dict()
    odd = [
        None, True, -1, 10**400, 1e308, float("nan"), "", "../..", "north", [], {}, [[]], 2**63,
        {"model": "north"}, [{"filter": "x", "value": [1] * 300}], "x" * 900, {"a": {"b": 1}},
        nested(60),
    ]  # fmt: skip
    for _ in range(40):
        changed = json.loads(json.dumps(recipe))
        spot: Any = changed
        while True:
            key = rng.choice([*spot] if isinstance(spot, dict) else range(len(spot)))
            deeper = spot[key]
            if not isinstance(deeper, (dict, list)) or not deeper or rng.random() < 0.3:
                break
            spot = deeper
        spot[key] = rng.choice(odd)
        status, text = ask("merge_and_evaluate", recipe=changed)
        assert status in ("success", "error")
        assert 0 < len(text) < 1200
    assert evaluations_left(toolkit.search) >= 0
