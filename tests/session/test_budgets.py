"""Hard limits: reserved before they are spent, ending with the best so far, raised on resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge import session
from agentmerge.agents.prices import cost_usd, price_of
from agentmerge.agents.testing import ScriptedServer, scripted_chat_model
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger
from agentmerge.report.summary import run_summary
from tests.session.conftest import config, trace_of
from tests.session.test_agents import advised, adviser

PRICES = {"adviser": [10.0, 30.0]}


def summary_of(runs_dir: Path, name: str) -> dict:
    with Ledger(runs_dir / session.LEDGER) as ledger:
        return run_summary(ledger, ledger.run(name))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")


@pytest.mark.parametrize(
    ("budget", "reason", "spent"),
    [
        ({"max_tokens": 16_000}, "tokens", lambda a: a["tokens_in"] + a["tokens_out"] <= 16_000),
        ({"max_cost_usd": 0.15, "prices": PRICES}, "cost", lambda a: 0 < a["cost_usd"] <= 0.15),
    ],
    ids=["tokens", "cost"],
)
def test_what_models_may_cost_is_never_passed(tmp_path, budget, reason, spent) -> None:
    with ScriptedServer(adviser) as server:
        sections = advised(server, agents={"max_tokens": 500}, budget=budget)
        row = session.run(config(**sections), name="a", runs_dir=tmp_path)
        assert (row.status, row.stop_reason) == ("done", reason)
        assert spent(summary_of(tmp_path, "a")["agents"])
        assert (tmp_path / "a" / "best.yml").is_file()
        assert row.result["verdict"]
        more = {f"budget.{key}": value * 1000 for key, value in budget.items() if key != "prices"}
        row = session.resume("a", runs_dir=tmp_path, overrides=more)
        assert (row.status, row.stop_reason) == ("done", "budget")
        plain = advised(server, agents={"max_tokens": 500}, budget={"prices": PRICES})
        session.run(config(**plain), name="free", runs_dir=tmp_path)
    assert trace_of(tmp_path, "a") == trace_of(tmp_path, "free"), "the end left a mark"


def test_nothing_is_asked_that_cannot_be_paid(tmp_path) -> None:
    with ScriptedServer(adviser) as server:
        sections = advised(server, budget={"max_tokens": 1000})
        row = session.run(config(**sections), name="a", runs_dir=tmp_path)
        assert server.requests == []
    assert row.stop_reason == "tokens"


def test_items_are_a_budget_too(tmp_path) -> None:
    whole = config()
    items = 120  # two tasks, 60 search items each
    row = session.run(
        config(budget={"max_items": 14 * items + items // 2}), name="a", runs_dir=tmp_path
    )
    session.run(whole, name="b", runs_dir=tmp_path)
    assert (row.status, row.stop_reason) == ("done", "budget")
    assert summary_of(tmp_path, "a")["evaluations"]["total"] == 14
    row = session.resume("a", runs_dir=tmp_path, overrides={"budget.max_items": 10**6})
    assert summary_of(tmp_path, "a")["evaluations"]["total"] == 34


def test_an_unknown_price_is_said_not_guessed(tmp_path) -> None:
    with ScriptedServer(adviser) as server:
        limited = config(**advised(server, budget={"max_cost_usd": 1.0}))
        with pytest.raises(UserError, match="price of openai:adviser, which is not known: set"):
            session.run(limited, name="a", runs_dir=tmp_path)
        row = session.run(config(**advised(server)), name="b", runs_dir=tmp_path)
    agents = summary_of(tmp_path, row.name)["agents"]
    assert agents["cost_usd"] is None
    assert agents["unpriced"] == agents["calls"]


def test_a_ready_model_needs_its_price_too(tmp_path) -> None:
    chat = scripted_chat_model([])
    with pytest.raises(UserError, match="price of scripted"):
        session.run(
            config(budget={"max_cost_usd": 1.0}), runs_dir=tmp_path, models={"critic": chat}
        )


@pytest.mark.parametrize(
    ("provider", "model", "own_server", "price"),
    [
        ("openai", "gpt-4o", False, (2.5, 10.0)),
        ("openai", "gpt-4o-2024-08-06", False, (2.5, 10.0)),
        ("openai", "gpt-4o-audio-preview", False, None),
        ("openai", "gpt-4o", True, None),
        ("openai", "mine", True, (1.0, 2.0)),
        ("ollama", "llama3:8b", False, (0.0, 0.0)),
    ],
)
def test_prices(provider, model, own_server, price) -> None:
    own = {"mine": (1.0, 2.0), "ollama:llama3:8b": (0.0, 0.0)}
    assert price_of(provider, model, own_server, own) == price
    assert cost_usd(price, 10**6, 10**6) == (None if price is None else sum(price))
