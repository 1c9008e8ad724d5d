"""What a LangGraph server's client may say, and how a run on a server gives back what it held; with
the platform's own part (a graph entered for a run) played here. tests/langgraph_server has it."""

from __future__ import annotations

import asyncio
import runpy
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from langgraph.types import Command

from agentmerge.config import SearchConfig
from agentmerge.errors import AgentmergeError, LeaseHeld, RunFailed, TaskError, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.lease import Lease
from agentmerge.ledger.words import openings
from agentmerge.session import driving
from agentmerge.session.checkpoints import open_saver
from agentmerge.session.context import _HELD, _OPEN, ClientContext
from agentmerge.system.bundled import bundled
from agentmerge.testing.scripted import ScriptedServer
from agentmerge.workers.fake import FakeWorker
from tests.session.conftest import BODY, config, trace_of
from tests.session.test_agents import advised
from tests.session.test_structure import mover

OWN = {"worker": BODY["worker"], "budget": {"max_evaluations": 21}}


#: Runs directory -> its checkpoints, which a server has open as long as it lives: a cancelled run's
#: last writes are under way when the run is over.
SAVERS: dict[Path, Any] = {}


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The server's own file."""
    path = tmp_path / "server.yml"
    path.write_text(yaml.safe_dump(OWN))
    monkeypatch.setenv("AGENTMERGE_SERVER_CONFIG", str(path))
    monkeypatch.setenv("AGENTMERGE_RUNS_DIR", str(tmp_path))
    with open_saver(tmp_path / driving.CHECKPOINTS) as SAVERS[tmp_path]:
        yield path


async def on_server(runs_dir: Path, context: ClientContext, thread_id: str, begin: Any):
    """As langgraph-api runs it: the graph is entered for one run, and left however that ends."""
    thread = {"configurable": {"thread_id": thread_id}}
    served = runpy.run_path(str(bundled("graphs") / "search.py"))["served"]
    async with served(thread, SimpleNamespace(execution_runtime=True)) as graph:
        compiled = graph.compile(checkpointer=SAVERS[runs_dir])
        return await compiled.ainvoke(begin, thread, context=context)


def served(runs_dir: Path, context: ClientContext, begin: dict | None = None) -> dict:
    return asyncio.run(on_server(runs_dir, context, str(uuid.uuid4()), begin or {}))


def asked(**sections: object) -> ClientContext:
    body = {name: value for name, value in BODY.items() if name != "worker"}
    for section, values in sections.items():
        old = body.get(section)
        body[section] = old | values if isinstance(old, dict) else values
    return ClientContext(config=yaml.safe_dump(body), name="served")


FOREIGN = {
    "worker": {"kind": "fake"},
    "agents": {"llm": "openai:m", "base_url": "http://elsewhere"},
    "search.graph": "mine.py:build",
    "search.init": ["/etc/passwd"],
    "budget.prices": {"m": [0, 0]},
    "task_search_path": ["."],
}


@pytest.mark.parametrize("key", FOREIGN)
def test_a_client_says_what_is_searched_and_nothing_else(tmp_path: Path, key: str) -> None:
    section, _, inner = key.partition(".")
    value = FOREIGN[key]
    whole = {inner: value} if inner else value
    with pytest.raises(UserError, match=f"{key} is the server's own to set"):
        served(tmp_path, asked(**{section: whole}))
    driving.run(config(budget={"max_evaluations": 12}), name="trunk", runs_dir=tmp_path)
    for overrides in ({key: value}, {section: whole}, {f"{section}.{inner or 'kind'}": value}):
        twig = ClientContext(branch_of="trunk", at=1, overrides=overrides)
        with pytest.raises(UserError, match="is the server's own to set"):
            served(tmp_path, twig)


def test_a_branch_runs_no_file_however_its_name_is_spelled(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    driving.run(config(budget={"max_evaluations": 12}), name="trunk", runs_dir=tmp_path)
    for overrides in (
        {"search": {"graph": f"{code}:build"}},
        {"search": [{"graph": f"{code}:build"}]},
        {"search.graph": f"{code}:build"},
        {" search.graph": f"{code}:build"},
        [f"search.graph={code}:build"],
    ):
        with pytest.raises(AgentmergeError):
            served(tmp_path, ClientContext(branch_of="trunk", at=1, overrides=overrides))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wanted", [30, "30", None, 1e9, True])
def test_a_client_searches_within_the_servers_budget(tmp_path: Path, wanted: object) -> None:
    try:
        served(tmp_path, asked(budget={"max_evaluations": wanted}))
    except AgentmergeError:
        assert wanted in (None, 1e9, True), "no number, or none that is a whole one"
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        for row in ledger.runs():
            assert len(ledger.candidates(row.id)) <= 21
            assert SearchConfig.from_text(row.config).worker.kind == "fake"


def test_a_limit_that_only_the_server_sets_is_not_unset(tmp_path: Path, own: Path) -> None:
    own.write_text(yaml.safe_dump(OWN | {"budget": {"max_items": 900}}))
    served(tmp_path, asked(budget={"max_items": None}))
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        (row,) = ledger.runs()
        assert SearchConfig.from_text(row.config).budget.max_items == 900
        assert len(ledger.candidates(row.id)) < 15


def test_a_branch_is_within_the_servers_budget(tmp_path: Path) -> None:
    driving.run(config(budget={"max_evaluations": 12}), name="trunk", runs_dir=tmp_path)
    for n, overrides in enumerate(
        ({"budget.max_evaluations": 10**6}, {"budget": {"max_evaluations": "1000000"}})
    ):
        served(
            tmp_path,
            ClientContext(branch_of="trunk", at=1, name=f"twig{n}", overrides=overrides),
        )
        with Ledger(tmp_path / driving.LEDGER) as ledger:
            assert len(ledger.candidates(ledger.run(f"twig{n}").id)) == 21


def test_a_server_may_list_the_models_that_clients_name(tmp_path: Path, own: Path) -> None:
    listed = OWN | {"genome": {"models": ["north", "south", "base"]}}
    own.write_text(yaml.safe_dump(listed))
    served(tmp_path, asked())
    for genome in (
        {"models": ["north", "/etc"]},
        {"base_model": "../x"},
        {"tokenizer_source": "y"},
    ):
        with pytest.raises(UserError, match="is not one of this server's models: north, south"):
            served(tmp_path, asked(genome=genome))
    with pytest.raises(UserError, match="is not one of this server's models"):
        served(
            tmp_path,
            ClientContext(
                branch_of="served", at=1, overrides={"genome.models": ["north", "elsewhere"]}
            ),
        )
    trusting = {"worker": BODY["worker"] | {"trust_remote_code": True}}
    own.write_text(yaml.safe_dump(OWN | trusting))
    with pytest.raises(AgentmergeError, match=r"genome\.models must list"):
        served(tmp_path, asked())


def test_a_client_names_no_more_models_than_a_server_holds(tmp_path: Path) -> None:
    many = [f"m{i}" for i in range(65)]
    with pytest.raises(UserError, match=r"genome\.models has 65 entries; from a client 64"):
        served(tmp_path, asked(genome={"models": many}))
    assert not list(tmp_path.glob("served*"))


@pytest.mark.parametrize("template", ["/etc/passwd", "server.yml", "~/.netrc"])
def test_no_file_is_read_as_a_clients_template(tmp_path: Path, monkeypatch, template: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no file is read for a client"):
        served(tmp_path, asked(genome={"chat_template": template}))


@pytest.mark.parametrize(
    "text", ["[1, 2]", "{", "budget: 7", "search: [a]", "a: *b", "[" * 5000, ["genome"]]
)
def test_what_is_no_config_is_said(tmp_path: Path, text: object) -> None:
    with pytest.raises(AgentmergeError):
        served(tmp_path, ClientContext(config=text, name="served"))


def given_back(runs_dir: Path, thread_id: str) -> bool:
    return (
        not _HELD and not _OPEN and Lease.holder(runs_dir / driving.CHECKPOINTS, thread_id) is None
    )


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_cancelled_run_gives_back_what_it_held(tmp_path: Path, monkeypatch) -> None:
    scoring, go_on, closed = threading.Event(), threading.Event(), []
    made = FakeWorker.score

    def slow(self, items):
        scoring.set()
        assert go_on.wait(20)
        return made(self, items)

    monkeypatch.setattr(FakeWorker, "score", slow)
    monkeypatch.setattr(FakeWorker, "close", lambda self: closed.append(self))
    thread_id = str(uuid.uuid4())

    async def cancelled() -> None:
        run = asyncio.create_task(on_server(tmp_path, asked(), thread_id, {}))
        await asyncio.to_thread(scoring.wait, 20)
        run.cancel()
        await asyncio.sleep(0.1)
        go_on.set()  # what a worker has begun is finished, and saved
        with pytest.raises(asyncio.CancelledError):
            await run
        await asyncio.to_thread(until, lambda: given_back(tmp_path, thread_id))

    asyncio.run(cancelled())
    assert closed
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        assert ledger.run("served").status == "interrupted"
        states = [c.state for c in ledger.candidates(thread_id)]
    assert states.count("scored") == 1, "begun when its client went: paid for, so it is kept"
    monkeypatch.setattr(FakeWorker, "score", made)
    asyncio.run(on_server(tmp_path, ClientContext(), thread_id, None))
    driving.run(config(budget={"max_evaluations": 21}), name="calm", runs_dir=tmp_path)
    assert trace_of(tmp_path, "served") == trace_of(tmp_path, "calm")


def test_a_run_that_fails_gives_back_what_it_held(tmp_path: Path, monkeypatch) -> None:
    made, closed, opened = FakeWorker.score, [], []

    def broken(self, items):
        raise TaskError("the data of task 'one' is gone")

    begun = FakeWorker.__init__
    monkeypatch.setattr(
        FakeWorker, "__init__", lambda self, *a, **k: (opened.append(self), begun(self, *a, **k))[1]
    )
    monkeypatch.setattr(FakeWorker, "score", broken)
    monkeypatch.setattr(FakeWorker, "close", lambda self: closed.append(self))
    thread_id = str(uuid.uuid4())
    with pytest.raises(TaskError, match="is gone"):
        asyncio.run(on_server(tmp_path, asked(), thread_id, {}))
    assert given_back(tmp_path, thread_id)
    assert closed == opened, "and no node that was queued opened it anew"
    monkeypatch.setattr(FakeWorker, "score", made)
    found = asyncio.run(on_server(tmp_path, ClientContext(), thread_id, None))
    assert found["status"] == "done"


def test_a_run_cancelled_while_its_search_opens_holds_nothing(tmp_path: Path, monkeypatch) -> None:
    from agentmerge.session import context

    opening, go_on = threading.Event(), threading.Event()
    made = context.prepare

    def slow(*arguments, **options):
        opening.set()
        assert go_on.wait(20)
        return made(*arguments, **options)

    monkeypatch.setattr(context, "prepare", slow)
    thread_id = str(uuid.uuid4())

    async def cancelled() -> None:
        run = asyncio.create_task(on_server(tmp_path, asked(), thread_id, {}))
        await asyncio.to_thread(opening.wait, 20)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        go_on.set()
        await asyncio.to_thread(until, lambda: given_back(tmp_path, thread_id))
        found = await on_server(tmp_path, asked(), thread_id, {})
        assert found["status"] == "done"

    asyncio.run(cancelled())


def test_a_search_is_one_threads_at_a_time(tmp_path: Path, monkeypatch) -> None:
    scoring, go_on = threading.Event(), threading.Event()
    made = FakeWorker.score

    def slow(self, items):
        scoring.set()
        assert go_on.wait(20)
        return made(self, items)

    monkeypatch.setattr(FakeWorker, "score", slow)
    thread_id = str(uuid.uuid4())

    async def both() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
        run = asyncio.create_task(on_server(tmp_path, asked(), thread_id, {}))
        await asyncio.to_thread(scoring.wait, 20)
        for name in (thread_id, "served"):
            with pytest.raises(LeaseHeld, match="another thread of this server"):
                await on_server(tmp_path, ClientContext(run=name), str(uuid.uuid4()), {})
        go_on.set()
        assert (await run)["status"] == "done"

    asyncio.run(both())


def test_a_run_that_waits_for_a_person_holds_nothing(
    tmp_path: Path, own: Path, monkeypatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    thread_id = str(uuid.uuid4())
    with ScriptedServer(mover(("method", "ties"))) as server:
        sections = advised(server)
        own.write_text(yaml.safe_dump({"worker": BODY["worker"], "agents": sections["agents"]}))
        search = sections.get("search", {}) | {"approve": True}
        context = asked(search=search, budget={"max_evaluations": 60})
        asyncio.run(on_server(tmp_path, context, thread_id, {}))
        assert given_back(tmp_path, thread_id)
        with Ledger(tmp_path / driving.LEDGER) as ledger:
            row = ledger.run("served")
        assert (row.status, "merge method ties" in row.stop_reason) == ("waiting", True)
        found = asyncio.run(on_server(tmp_path, ClientContext(), thread_id, Command(resume="yes")))
    assert found["status"] == "done"
    assert given_back(tmp_path, thread_id)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        assert [move.refusal for move in openings(ledger.advice(thread_id))] == [""]


def test_nodes_of_no_run_open_nothing(tmp_path: Path) -> None:
    graph = runpy.run_path(str(bundled("graphs") / "search.py"))["build"](ClientContext)
    thread = {"configurable": {"thread_id": str(uuid.uuid4())}}
    with pytest.raises(RunFailed, match="this run is over"):
        graph.compile(checkpointer=SAVERS[tmp_path]).invoke({}, thread, context=asked())
    assert not _HELD
