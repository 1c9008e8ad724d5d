"""What a model is told of a long answer of a tool: whole lines, never half of one."""

from __future__ import annotations

import json

from agentmerge.agents.models import MAX_TOOL_CHARS
from agentmerge.search.tools import _as_json, _fitted


def test_a_long_answer_loses_items_and_stays_json() -> None:
    items = [{"index": n, "asks": "사과는 몇 개입니까? " * 40} for n in range(20)]
    text = _fitted({"note": "no instruction", "candidate": {"id": "1.0"}, "items": items})
    found = json.loads(text)
    assert len(text) <= MAX_TOOL_CHARS < len(text) + 700
    assert found["note"] == "no instruction"
    assert found["items"] == items[: len(found["items"])]
    assert found["left_out"] == 20 - len(found["items"])
    assert len(found["items"]) > 5, "no letter takes six characters"


def test_a_short_answer_is_as_it_was() -> None:
    found = {"candidates": [{"id": "0.1", "score": 0.5}], "axes": ["a"]}
    assert _fitted(found) == json.dumps(found)
    assert json.loads(_as_json({"x": "a\ud800b"})) == {"x": "a?b"}, "no lone surrogate"
    assert len(_fitted({"one": "x" * 9_000, "items": [1, 2]})) > MAX_TOOL_CHARS
