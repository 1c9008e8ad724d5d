"""Hard limits: reserved before they are spent, ending with the best so far, raised on resume."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agentmerge.agents.prices import cost_usd, price_of
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger
from agentmerge.report.summary import run_summary
from agentmerge.search import budget
from agentmerge.session import driving
from agentmerge.session.replay import replay
from agentmerge.testing.scripted import ScriptedServer, scripted_chat_model
from tests.session.conftest import config, trace_of
from tests.session.test_agents import advised, adviser

PRICES = {"adviser": [10.0, 30.0]}


def summary_of(runs_dir: Path, name: str) -> dict:
    with Ledger(runs_dir / driving.LEDGER) as ledger:
        return run_summary(ledger, ledger.run(name))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")


@pytest.mark.parametrize(
    ("budget", "reason", "spent"),
    [
        ({"max_tokens": 8_000}, "tokens", lambda a: a["tokens_in"] + a["tokens_out"] <= 8_000),
        ({"max_cost_usd": 0.15, "prices": PRICES}, "cost", lambda a: 0 < a["cost_usd"] <= 0.15),
    ],
    ids=["tokens", "cost"],
)
def test_what_models_may_cost_is_never_passed(tmp_path, budget, reason, spent) -> None:
    with ScriptedServer(adviser) as server:
        sections = advised(server, agents={"max_tokens": 500}, budget=budget)
        row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
        assert (row.status, row.stop_reason) == ("done", reason)
        assert spent(summary_of(tmp_path, "a")["agents"])
        assert (tmp_path / "a" / "best.yml").is_file()
        assert row.result["verdict"]
        more = {f"budget.{key}": value * 1000 for key, value in budget.items() if key != "prices"}
        row = driving.resume("a", runs_dir=tmp_path, overrides=more)
        assert (row.status, row.stop_reason) == ("done", "budget")
        plain = advised(server, agents={"max_tokens": 500}, budget={"prices": PRICES})
        driving.run(config(**plain), name="free", runs_dir=tmp_path)
    assert trace_of(tmp_path, "a") == trace_of(tmp_path, "free"), "the end left a mark"


def test_nothing_is_asked_that_cannot_be_paid(tmp_path) -> None:
    with ScriptedServer(adviser) as server:
        sections = advised(server, budget={"max_tokens": 1000})
        row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
        assert server.requests == []
    assert row.stop_reason == "tokens"


def items_asked(runs_dir: Path) -> int:
    with Ledger(runs_dir / driving.LEDGER) as ledger:
        (row,) = ledger.records(
            "SELECT sum(s.count) AS items FROM results r JOIN item_sets s ON s.id = r.item_set_id"
        )
    return int(row["items"])


@pytest.mark.parametrize("objective", ["accuracy", "loss"], indirect=True)
def test_items_are_a_budget_too_and_the_end_is_in_it(tmp_path, objective) -> None:
    items = 120  # two tasks, 60 search items each, and as many sealed ones
    end = (3 + 2) * items  # the parents, the best cheap merge and the answer
    most = 14 * items + items // 2 + end
    row = driving.run(config(budget={"max_items": most}), name="a", runs_dir=tmp_path / "a")
    assert (row.status, row.stop_reason) == ("done", "budget")
    assert row.result["sealed"]
    assert summary_of(tmp_path / "a", "a")["evaluations"]["total"] == 14
    assert items_asked(tmp_path / "a") <= most
    driving.resume("a", runs_dir=tmp_path / "a", overrides={"budget.max_items": 10**6})
    assert summary_of(tmp_path / "a", "a")["evaluations"]["total"] == 34


@pytest.mark.parametrize("objective", ["accuracy"], indirect=True)  # 120 items a candidate
def test_a_budget_that_pays_for_nothing_is_refused(tmp_path, objective) -> None:
    small = config(budget={"max_items": 700})
    with pytest.raises(UserError, match=r"700 pays for no candidate: one is asked 120 items.* 600"):
        driving.run(small, name="a", runs_dir=tmp_path)
    row = driving.run(config(budget={"max_items": 1400}), name="a", runs_dir=tmp_path)
    assert row.status == "done"


@pytest.mark.parametrize("algorithm", ["auto", "cma_es"])
@pytest.mark.parametrize("objective", ["accuracy", "perplexity"], indirect=True)
def test_a_raised_budget_asks_the_rivals_that_a_smaller_one_left_out(
    tmp_path, objective, algorithm
) -> None:
    """Else the answer is called ahead of "the best cheap rival", and that one was never asked."""
    search = {"algorithm": algorithm}
    for name, budgets in {"at-once": [20], "raised": [1, 4, 9, 20]}.items():
        small = config(search=search, budget={"max_evaluations": budgets[0]})
        driving.run(small, name=name, runs_dir=tmp_path)
        for most in budgets[1:]:
            more = {"budget.max_evaluations": most}
            driving.resume(name, runs_dir=tmp_path, overrides=more)
    assert trace_of(tmp_path, "raised") == trace_of(tmp_path, "at-once")
    assert replay("raised", runs_dir=tmp_path).identical


def test_a_branch_with_a_larger_budget_asks_them_too(tmp_path) -> None:
    driving.run(config(budget={"max_evaluations": 4}), name="small", runs_dir=tmp_path)
    for name, changed in {"same": {}, "other": {"limit": 50}}.items():
        more = {"budget.max_evaluations": 16} | changed
        driving.branch("small", at=0, name=name, runs_dir=tmp_path, overrides=more)
        found = {c["operator"] for c in trace_of(tmp_path, name)["candidates"]}
        assert {"parent", "uniform", "scale", "depth"} <= found, name


def test_the_end_is_within_the_timeout(tmp_path, monkeypatch) -> None:
    """Time for the sealed items is kept; where it is not enough, they are left to a resume."""
    slow = config(worker={"options": {"delay_s": 0.1}}, budget={"timeout_s": 3.0})
    began = time.monotonic()
    row = driving.run(slow, name="a", runs_dir=tmp_path / "a")
    if row.stop_reason == "timeout" and row.result["sealed"]:
        assert time.monotonic() - began < 3.0 + 5.0  # loading, and a busy machine
    monkeypatch.setattr(budget, "ending_s", lambda _: 0.0)
    row = driving.run(slow, name="b", runs_dir=tmp_path / "b")
    assert row.stop_reason == "timeout"
    assert not row.result["sealed"]
    assert any("sealed items were not asked; resume asks them" in n for n in row.result["notes"])
    row = driving.resume("b", runs_dir=tmp_path / "b", overrides={"budget.timeout_s": 600.0})
    assert row.result["sealed"]


def test_an_unknown_price_is_said_not_guessed(tmp_path) -> None:
    with ScriptedServer(adviser) as server:
        limited = config(**advised(server, budget={"max_cost_usd": 1.0}))
        with pytest.raises(UserError, match="price of openai:adviser, which is not known: set"):
            driving.run(limited, name="a", runs_dir=tmp_path)
        row = driving.run(config(**advised(server)), name="b", runs_dir=tmp_path)
    agents = summary_of(tmp_path, row.name)["agents"]
    assert agents["cost_usd"] is None
    assert agents["unpriced"] == agents["calls"]


def test_a_ready_model_needs_its_price_too(tmp_path) -> None:
    chat = scripted_chat_model([])
    with pytest.raises(UserError, match="price of scripted"):
        driving.run(
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
