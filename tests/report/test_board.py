"""One fold over events: who drives a search, who watches it and ``show`` say the same of it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.contracts.card import Card
from agentmerge.contracts.events import Event, Generation, parsed
from agentmerge.ledger import Ledger
from agentmerge.report.board import Board, Follower
from agentmerge.report.summary import run_summary
from agentmerge.session import driving
from agentmerge.testing.scripted import ScriptedServer
from tests.session.conftest import OBJECTIVES, config_text
from tests.session.test_agents import advised, adviser


@pytest.fixture(params=["accuracy", "perplexity"])
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A search with an adviser, failures, and a constraint that the best score breaks."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-7c1f")
    with ScriptedServer(adviser) as server:
        search = {"algorithm": "cma_es", "population": 5}
        search |= {"constraints": [{"task": "two", "max_drop": 0.05}]}
        body = yaml.safe_load(config_text(**advised(server, search=search)))
        body |= deepcopy(OBJECTIVES[request.param]) | {"budget": {"max_evaluations": 44}}
        body["worker"]["options"]["fail_when"] = "mean_weight<0.28"
        body["tasks"] = [body["tasks"][0], body["tasks"][1] | {"weight": -1.0}]
        yield SearchConfig.from_text(yaml.safe_dump(body))


def folded(config: SearchConfig, events: list[Event]) -> Board:
    board = Board(config)
    for event in events:
        board.tell(event)
    return board


def test_driver_watcher_and_show_say_the_same(asked: SearchConfig, tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    row = driving.run(asked, name="a", runs_dir=tmp_path, emit=told.append)
    with Ledger(tmp_path / driving.LEDGER, read_only=True) as ledger:
        read = list(Follower(ledger, ledger.run("a")).news())
        shown = run_summary(ledger, row)
        found = ledger.best_candidate(row.id)
    driven, watched = folded(asked, [parsed(event) for event in told]), folded(asked, read)
    for board in (driven, watched):
        assert board.best is not None
        assert (board.best.score, dict(board.best.tasks)) == (found.score, dict(found.tasks))
        assert board.evaluations == shown["evaluations"]["total"]
        assert board.failed == shown["evaluations"]["failed"] > 0
        assert board.tokens == shown["agents"]["tokens_in"] + shown["agents"]["tokens_out"] > 0
        assert board.best_parent == max(line["score"] for line in shown["parents"]
                                        if line["operator"] == "parent")  # fmt: skip
    assert driven.trail == watched.trail
    assert driven.rivals == watched.rivals
    wholes = [[e for e in events if isinstance(e, Generation)]
              for events in (map(parsed, told), read)]  # fmt: skip
    assert wholes[0] == wholes[1]
    assert wholes[0][-1].leader == [found.generation, found.slot]

    # and what is told outside and kept are plain objects, of which the values come back
    for event in told:
        assert type(event) is dict
        assert parsed(json.loads(json.dumps(event))).to_json() == event
    assert told[-1]["card"] == json.loads(json.dumps(row.card.to_json()))
    assert row.card.to_json() == row.result == Card.parse(row.result).to_json()


def test_a_card_of_an_older_version_lacks_what_it_did_not_have() -> None:
    card = Card.parse({"answer": {"name": "a", "score": 0.5}, "verdict": "so"})
    assert (card.answer.name, card.verdict, card.parents, card.notes) == ("a", "so", [], ())
    assert card.best_rival is None


def test_who_looks_on_from_elsewhere_tells_no_wall_clock() -> None:
    """When the present session began, only its driver knows."""
    config = SearchConfig.from_text(config_text(), overrides={"budget.timeout_s": 60.0})
    names = [[row[0] for row in Board(config, clocked=c).budgets] for c in (True, False)]
    assert names == [["evaluations", "seconds"], ["evaluations"]]
