"""The arm that hears no model: its share, its isolation, and what the closing card says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agentmerge.agents.view import integers
from agentmerge.cli.render import card_text
from agentmerge.config import SearchConfig
from agentmerge.contracts.operators import SHADOW
from agentmerge.contracts.strategy import Observation
from agentmerge.errors import ConfigError
from agentmerge.ledger import Candidate, Ledger
from agentmerge.search.past import arm_history, best_within, charges
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.testing.scripted import ScriptedServer
from tests.session.conftest import config, trace_of
from tests.session.test_agents import advised, adviser


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")


def candidates_of(runs_dir: Path, name: str) -> list[Candidate]:
    with Ledger(runs_dir / driving.LEDGER) as ledger:
        return ledger.candidates(ledger.run(name).id)


def settings(server: ScriptedServer, share: float, **sections: dict) -> SearchConfig:
    search = {"algorithm": "llm_evo", "shadow": share} | sections.pop("search", {})
    return config(**advised(server, search=search, **sections))


def test_both_arms_get_their_share_and_the_card_says_what_the_models_earned(tmp_path) -> None:
    with ScriptedServer(adviser) as server:
        row = driving.run(settings(server, 0.4), name="a", runs_dir=tmp_path)
    found = candidates_of(tmp_path, "a")
    assert sum(c.cost for c in found) <= 34
    mine = [c for c in found if c.generation and c.operator != SHADOW]
    shadow = [c for c in found if c.operator == SHADOW]
    assert len(shadow) / (len(shadow) + len(mine)) == pytest.approx(0.4, abs=0.08)
    card = row.result["uplift"]
    assert card["share"] == 0.4
    assert 0 < card["evaluations"] <= len(shadow)
    assert card["part"] == "sealed"
    gap = card["difference"]
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert card["cost"]["calls"] > 0
    assert card["cost"]["tokens_in"] > 0
    text = card_text(row.card)
    assert f"{card['cost']['calls']} calls" in text
    assert "The models' advice" in text


def test_the_models_do_not_hear_of_the_other_arm(tmp_path) -> None:
    with ScriptedServer(adviser) as server:
        driving.run(settings(server, 0.4), name="a", runs_dir=tmp_path)
        asked = "\n".join(str(request) for request in server.requests)
    found = candidates_of(tmp_path, "a")

    def shown(candidate: Candidate) -> bool:
        told = r"[, ]+".join(map(str, integers(candidate.vector or ())))
        return re.search(rf"\b{told}\b", asked) is not None

    before_last = [c for c in found if c.generation < found[-1].generation]
    mine = [c for c in before_last if c.operator == "llm_evo" and c.generation]
    theirs = [c for c in before_last if c.operator == SHADOW and c.twin is None]
    assert mine
    assert theirs
    assert any(map(shown, mine))
    assert not any(map(shown, theirs))
    assert SHADOW not in asked


def test_it_ends_the_same_when_replayed_and_when_raced(tmp_path) -> None:
    with ScriptedServer(adviser) as server:
        raced = settings(server, 0.4, search={"racing": True})
        driving.run(raced, name="a", runs_dir=tmp_path)
        driving.run(raced, name="b", runs_dir=tmp_path)
    assert replay("a", runs_dir=tmp_path).identical
    assert trace_of(tmp_path, "a") == trace_of(tmp_path, "b")


def row(generation: int, slot: int, operator: str, score: float, **more: object) -> Candidate:
    state = "twin" if "twin" in more else "scored"
    text = f"{generation}.{slot}"
    return Candidate(generation, slot, operator, "", (0.5,), text, state, score, **more)


ARMS = [
    row(0, 0, "parent", 0.5),
    row(1, 0, "llm_evo", 0.6),
    row(1, 1, SHADOW, 0.6, twin=(1, 0)),
    row(1, 2, SHADOW, 0.4),
    row(2, 0, "llm_evo", 0.7),
    row(2, 1, "llm_evo", 0.9),
    row(2, 2, SHADOW, 0.5, twin=(0, 0)),
]


def test_arms_are_compared_after_as_many_evaluations_and_twins_of_the_other_are_not_free() -> None:
    assert charges(ARMS, shadow=True) == {(1, 1): 1.0, (1, 2): 1.0, (2, 2): 0.0}
    assert best_within(ARMS, 2, shadow=True).score == 0.6
    assert best_within(ARMS, 2, shadow=False).score == 0.7
    assert best_within(ARMS, 0, shadow=False).score == 0.5
    assert best_within(ARMS, 9, shadow=False).score == 0.9


def test_an_arm_hears_of_itself_and_of_what_both_share() -> None:
    told = [Observation(c.generation, c.slot, c.vector, c.operator, c.score) for c in ARMS]
    assert [(o.generation, o.slot) for o in arm_history(told, 0, shadow=True)] == [
        (0, 0), (1, 1), (1, 2), (2, 2),
    ]  # fmt: skip
    assert [(o.generation, o.slot) for o in arm_history(told, 0, shadow=False)] == [
        (0, 0), (1, 0), (2, 0), (2, 1),
    ]  # fmt: skip


def test_without_a_model_there_is_nothing_to_measure(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"shadow 0\.3 measures what a language model adds"):
        driving.run(config(search={"shadow": 0.3}), name="a", runs_dir=tmp_path)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("share", [1.0, -0.1, "half"])
def test_a_share_is_below_one(share) -> None:
    with pytest.raises(ConfigError, match=r"search\.shadow"):
        config(search={"shadow": share})
