"""What the curators of benchmarks.pool are told, and that a reply is paid for once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentmerge.agents.curator import PoolView
from agentmerge.agents.models import AgentModel
from agentmerge.agents.view import HistoryView
from agentmerge.config import GenomeConfig
from agentmerge.space.grouped import SearchSpace
from agentmerge.testing.scripted import scripted_chat_model
from benchmarks.curators import Named, ask, cards, skill_of

EXPERTS = [*cards()]
WEIGHTS = {name: {"norm": 1.0, "cosine": 0.5, "nearest": "sort"} for name in EXPERTS}


def test_names_say_nothing_and_are_dealt_anew() -> None:
    one, other = (Named.of(EXPERTS, seed).names for seed in (0, 1))
    assert (
        sorted(one.values()) == sorted(other.values()) == [f"model-{n:02d}" for n in range(1, 13)]
    )
    assert one != other


@pytest.mark.parametrize("seed", range(4))
def test_cards_are_the_experts_own_nobodys_or_missing(seed: int) -> None:
    named = Named.of(EXPERTS, seed)
    back = {name: expert for expert, name in named.names.items()}
    honest, shuffled, blank = (named.facts(k, seed, WEIGHTS) for k in ("", "shuffled", "blank"))
    for name, expert in back.items():
        own = cards()[expert]["card"]
        assert honest[name]["card"] == own
        theirs = {skill_of(e) for e, c in cards().items() if c["card"] == shuffled[name]["card"]}
        assert len(theirs) == 1
        assert skill_of(expert) not in theirs
        assert blank[name] == {"norm": 1.0, "cosine": 0.5, "nearest": named.names["sort"]}
    assert sorted(f["card"] for f in shuffled.values()) == sorted(
        c["card"] for c in cards().values()
    )


def test_the_same_question_is_paid_for_once(tmp_path: Path) -> None:
    named = Named.of(EXPERTS, 0)
    right = [named.names[name] for name in ("shift", "reverse", "sort")]
    said: dict[str, Any] = {"thought": "", "subsets": [{"models": right}, {"models": right[:2]}]}
    chat = scripted_chat_model([json.dumps(said)])
    genome = GenomeConfig(
        models=tuple(right), base_model="base", merge_method="task_arithmetic", layer_granularity=2
    )
    space = SearchSpace(genome, 4, "float32")
    history = HistoryView(space, (), (), None, 0.05, 0.2, False, 0)
    view = PoolView(history, named.facts("", 0, WEIGHTS), 3)
    first, again = (ask(view, AgentModel.from_spec(chat), tmp_path / "replies") for _ in range(2))
    assert (first["new"], again["new"], len(chat.calls)) == (True, False, 1)
    assert first | {"new": False} == again
    assert [*map(sorted, first["subsets"])] == [sorted(right), sorted(right[:2])]
    assert first["tokens"] > 500
    other = PoolView(history, named.facts("blank", 0, WEIGHTS), 3)
    failed = ask(
        other, AgentModel.from_spec(scripted_chat_model(["no", "no"])), tmp_path / "replies"
    )
    assert failed["subsets"] == []
    assert "gave no valid reply in two tries" in failed["failure"]
