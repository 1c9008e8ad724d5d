"""A search replayed offline: no server, no key, no worker, and the same end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agentmerge import MergeToolkit
from agentmerge.agents import prompts
from agentmerge.cli.app import run_app
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.session.preview import preview
from agentmerge.session.replay import replay
from agentmerge.testing.scripted import Fault, ScriptedServer, ToolCalls
from tests.session.conftest import config
from tests.session.test_agents import advised, adviser
from tests.session.test_faults import role_of

DATA = Path(__file__).parents[1] / "data"


def asking_first(body: dict):
    """A model that tries a recipe, fails, talks nonsense and then answers."""
    asking_first.count += 1
    tried = any(m["role"] == "tool" for m in body["messages"])
    if role_of(body) == "proposer" and not tried:
        return ToolCalls(
            (("merge_and_evaluate", {"recipe": f"[{asking_first.count}, 50, 9, 80]"}),)
        )
    return [adviser(body), Fault("500"), "nonsense", adviser(body)][asking_first.count % 4]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch) -> Path:
    """A search with probes, faults, repairs and failing candidates; its server and key are gone."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    asking_first.count = 0
    with ScriptedServer(asking_first) as server:
        sections = advised(
            server,
            agents={"probes": 2, "max_retries": 2},
            worker={"options": {"base": "base", "fail_when": "max_weight>0.95"}},
        )
        row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
    assert row.status == "done"
    monkeypatch.delenv("OPENAI_API_KEY")
    return tmp_path


@pytest.mark.parametrize("objective", ["accuracy", "perplexity"], indirect=True)
def test_it_ends_identically_without_model_key_or_worker(objective: str, kept: Path) -> None:
    before = (kept / driving.LEDGER).read_bytes()
    found = replay("a", runs_dir=kept)
    assert (found.identical, found.stopped, found.differs_from) == (True, "", None)
    assert found.candidates >= 34
    assert found.replies > 10
    assert (kept / driving.LEDGER).read_bytes() == before, "a replay writes nothing"
    assert run_app(["replay", "a", "--runs-dir", str(kept)]) == 0


def test_other_prompts_say_where_they_differ(kept: Path, tmp_path: Path, capsys) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "critic.md").write_text("You judge, briefly.\n---\n{{history}}")
    found = replay("a", runs_dir=kept, prompts=prompts)
    assert not found.identical
    assert found.differs_from == 1
    assert found.stopped == "the critic of generation 0 would be asked something new"
    line = ["replay", "a", "--runs-dir", str(kept), "--prompts", str(prompts)]
    assert run_app(line) == 0
    assert "differs from generation 1 on: the critic of generation 0" in capsys.readouterr().out


def test_it_asks_with_the_prompts_of_the_time(tmp_path: Path, monkeypatch) -> None:
    prompts = tmp_path / "mine"
    prompts.mkdir()
    (prompts / "critic.md").write_text("You judge, briefly.\n---\n{{history}}")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(adviser) as server:
        sections = advised(server, agents={"prompts": str(prompts)})
        driving.run(config(**sections), name="a", runs_dir=tmp_path)
    (prompts / "critic.md").unlink()
    prompts.rmdir()
    assert replay("a", runs_dir=tmp_path).identical
    prompts.mkdir()
    (prompts / "proposer.md").write_text("You propose. {{history}} {{axes}} {{dimensions}}")
    found = replay("a", runs_dir=tmp_path, prompts=prompts)
    assert found.stopped == "the proposer of generation 0 would be asked something new"


def test_a_search_goes_on_with_the_prompts_that_it_began_with(tmp_path: Path, monkeypatch) -> None:
    """Ours may say it otherwise by then: that makes no other search of it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    shutil.copytree(prompts.bundled("prompts"), tmp_path / "of-then")
    shutil.copytree(DATA / "prompts-1", tmp_path / "of-then", dirs_exist_ok=True)
    with ScriptedServer(adviser) as server, monkeypatch.context() as before:
        before.setattr(prompts, "bundled", lambda name: tmp_path / "of-then")
        sections = advised(server, budget={"max_evaluations": 14})
        driving.run(config(**sections), name="a", runs_dir=tmp_path)
        before.undo()
        monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
        asked = len(server.requests)
        driving.resume("a", runs_dir=tmp_path, overrides={"budget.max_evaluations": 24})
        later = [r.body["messages"][1]["content"] for r in server.requests[asked:]]
    assert later
    assert all(text.startswith("Merge method: ") for text in later), "as it was said before"
    found = replay("a", runs_dir=tmp_path)
    assert (found.identical, found.stopped) == (True, "")
    own = preview("a", "critic", runs_dir=tmp_path)
    assert own["messages"][1]["content"].startswith("Merge method: ")


@pytest.mark.parametrize("budget", [{"max_tokens": 8_000}, {"max_items": 2000}], ids=str)
def test_a_search_that_a_limit_ended(tmp_path: Path, monkeypatch, budget) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(adviser) as server:
        sections = advised(server, agents={"max_tokens": 500}, budget=budget)
        driving.run(config(**sections), name="a", runs_dir=tmp_path)
    assert replay("a", runs_dir=tmp_path).identical


RAISED = {
    "evaluations": ({"max_evaluations": 18}, {"max_evaluations": 30}),
    "items": ({"max_items": 17 * 120}, {"max_items": 40 * 120}),
    "tokens, then more": ({"max_tokens": 8_000}, {"max_tokens": 10**7, "max_evaluations": 40}),
    "generations": ({"max_evaluations": 34}, {"max_evaluations": 40}),
    "a limit that was not there": ({"max_evaluations": 18}, {"max_items": 20 * 120}),
}


@pytest.mark.parametrize("algorithm", ["llm_evo", "auto"])
@pytest.mark.parametrize(("first", "later"), RAISED.values(), ids=RAISED)
def test_limits_are_raised_where_they_were(tmp_path, monkeypatch, algorithm, first, later) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    with ScriptedServer(adviser) as server:
        search = {"algorithm": algorithm, "max_generations": 2}
        sections = advised(server, agents={"max_tokens": 500}, search=search, budget=first)
        driving.run(config(**sections), name="a", runs_dir=tmp_path)
        for generations in (3, 20):
            more = {f"budget.{name}": limit for name, limit in later.items()}
            more["search.max_generations"] = generations
            driving.resume("a", runs_dir=tmp_path, overrides=more)
    found = replay("a", runs_dir=tmp_path)
    assert (found.identical, found.stopped) == (True, "")
    assert found.replies > 0


@pytest.mark.parametrize("algorithm", ["llm_evo", "cma_es"])
def test_a_search_that_ran_out_of_time(tmp_path: Path, algorithm: str) -> None:
    slow = {"options": {"base": "base", "delay_s": 0.1}}
    sections = {"budget": {"timeout_s": 1.0}, "worker": slow, "search": {"algorithm": algorithm}}
    row = driving.run(config(**sections), name="a", runs_dir=tmp_path)
    assert row.stop_reason == "timeout"
    assert replay("a", runs_dir=tmp_path).identical
    driving.resume("a", runs_dir=tmp_path, overrides={"budget.timeout_s": 100})
    found = replay("a", runs_dir=tmp_path)
    assert (found.identical, found.candidates) == (True, 34)


@pytest.mark.parametrize("events", [0, 1, 8, 17, 24, 31, 40])
def test_a_search_that_has_not_ended(tmp_path, monkeypatch, capsys, events: int) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    drain, seen = driving.Drain(), []

    def stop_after(event: dict) -> None:
        seen.append(event)
        if len(seen) > events:
            drain.request()

    with ScriptedServer(adviser) as server:
        settings = config(**advised(server))
        row = driving.run(settings, name="a", runs_dir=tmp_path, emit=stop_after, drain=drain)
    assert row.status == "interrupted"
    found = replay("a", runs_dir=tmp_path)
    assert (found.identical, found.stopped) == (True, "'a' has not gone further")
    assert run_app(["replay", "a", "--runs-dir", str(tmp_path)]) == 0
    assert "the same again as far as it went" in capsys.readouterr().out


def test_a_branch_is_replayed_from_its_own_past(kept: Path) -> None:
    overrides = {"agents.llm": "none", "search.algorithm": "cma_es", "agents.probes": 0}
    driving.branch("a", at=1, name="b", runs_dir=kept, overrides=overrides)
    assert replay("b", runs_dir=kept).identical


def test_what_was_tampered_with_is_found(kept: Path) -> None:
    import sqlite3

    with sqlite3.connect(kept / driving.LEDGER) as db:
        db.execute("UPDATE candidates SET score = score + 0.001 WHERE generation = 0")
    db.close()
    found = replay("a", runs_dir=kept)
    assert (found.identical, found.differs_from) == (False, 0)
    assert run_app(["replay", "a", "--runs-dir", str(kept)]) == 1


def test_a_run_of_tools_has_nothing_to_replay(tmp_path: Path) -> None:
    with MergeToolkit(config(), runs_dir=tmp_path):
        pass
    with pytest.raises(UserError, match="made by tools"):
        replay("tools", runs_dir=tmp_path)


def test_another_number_of_threads_is_named_as_the_cause(tmp_path: Path, capsys) -> None:
    """Last digits of the strategy's linear algebra decide what it proposes."""
    driving.run(config(budget={"max_evaluations": 20}), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        row = ledger.run("a")
        own = row.facts["arithmetic"]
        assert own["threads"] >= 1
        with ledger._writing() as conn:
            conn.execute("UPDATE candidates SET recipe_hash = 'x' WHERE generation = 2")
            conn.execute("UPDATE runs SET facts = json_set(facts, '$.arithmetic.threads', 64)")
    found = replay("a", runs_dir=tmp_path)
    assert found.differs_from == 2
    assert f"had 64 threads and has {own['threads']} here" in found.cause
    assert run_app(["replay", "a", "--runs-dir", str(tmp_path)]) == 1
    assert "set OMP_NUM_THREADS=64" in capsys.readouterr().out
