"""The reader of failures reads what the critic sees, and a model is asked the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agentmerge.agents.failing import section
from agentmerge.agents.models import AgentModel
from agentmerge.agents.reading import FAULTS, fault_of, unspecial
from agentmerge.testing import scripted_chat_model
from benchmarks.failures import INJECTED, by_rules, failed, one, read_back, table


def test_faults_are_the_readers() -> None:
    assert set(INJECTED) == set(FAULTS)


@pytest.mark.parametrize("name", INJECTED)
def test_a_prompt_is_read_back_as_it_was_made(name: str) -> None:
    items = failed(name, 3).items
    for start in range(0, len(items), 3):
        shown = items[start : start + 3]
        for read, made in zip(read_back(section(shown)), shown, strict=True):
            assert (read.index, read.asks, read.right, read.cut_off) == (
                made.index, made.asks, made.right, made.cut_off,
            )  # fmt: skip
            assert read.answer.strip() == unspecial(made.answer).strip()
            assert fault_of(read, {}) == fault_of(made, {})


def test_a_model_is_asked_the_same_prompt() -> None:
    asked: list[str] = []

    def read(messages: list) -> Any:
        asked.append(messages[-1].text)
        return {"fault": by_rules(asked[-1])}

    model = AgentModel(scripted_chat_model(read))
    rows = [one(name, 0, model) for name in INJECTED]
    assert [row["model"] for row in rows] == [row["rules"] for row in rows]
    assert all(len(prompt) < 2_800 for prompt in asked)
    lines = table(rows, True).splitlines()[2:]
    assert [line.split(" | ")[0][2:] for line in lines] == list(INJECTED)
    assert json.dumps(rows)


def test_a_model_that_says_no_such_word_names_nothing() -> None:
    model = AgentModel(scripted_chat_model(lambda messages: {"fault": "bad"}))
    assert one("empty", 0, model)["model"] == "(no valid reply)"
