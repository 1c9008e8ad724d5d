"""The saver keeps LangGraph's whole contract, and what we ask of it beyond."""

import asyncio
import multiprocessing
import sqlite3
from operator import or_
from typing import Annotated, TypedDict

import pytest

from agentmerge.errors import UserError
from agentmerge.session.checkpoints import Saver, langgraph_checkpointer, open_saver


class Counting(TypedDict):
    step: int
    seen: Annotated[dict, or_]


def counting_graph(saver, *, steps=5):
    from langgraph.graph import END, START, StateGraph
    from langgraph.types import Command

    def count(state: Counting) -> Command:
        step = state["step"] + 1
        update = {"step": step, "seen": {str(step): float(step)}}
        return Command(update=update, goto=END if step >= steps else "count")

    graph = StateGraph(Counting)
    graph.add_node("count", count, destinations=("count", END))
    graph.add_edge(START, "count")
    return graph.compile(checkpointer=saver)


def run_thread(saver, thread_id, **kwargs):
    config = {"configurable": {"thread_id": thread_id}}
    counting_graph(saver, **kwargs).invoke({"step": 0, "seen": {}}, config, durability="sync")
    return config


def count_checkpoints(saver, thread_id):
    return len([*saver.list({"configurable": {"thread_id": thread_id}})])


def test_conformance_in_full(tmp_path):
    from langgraph.checkpoint.conformance import checkpointer_test, validate
    from langgraph.checkpoint.conformance.capabilities import ALL_CAPABILITIES

    @checkpointer_test(name="agentmerge.Saver")
    async def saver_factory():
        with open_saver(tmp_path / "checkpoints.sqlite") as saver:
            yield saver

    report = asyncio.run(validate(saver_factory)).to_dict()
    assert report["conformance_level"] == "FULL"
    results = report["results"]
    assert {name for name, r in results.items() if r["passed"]} == {
        capability.value for capability in ALL_CAPABILITIES
    }
    assert sum(r["tests_failed"] + r["tests_skipped"] for r in results.values()) == 0


def test_prune_keeps_the_newest_frees_the_disk_and_the_thread_goes_on(tmp_path):
    path = tmp_path / "checkpoints.sqlite"
    with open_saver(path) as saver:
        old = run_thread(saver, "old", steps=60)
        run_thread(saver, "other", steps=4)
        graph = counting_graph(saver)
        before, size = graph.get_state(old), saver.size_bytes()

        found = saver.prunable(["old"])
        assert found.checkpoints == count_checkpoints(saver, "old") - 1
        assert found.writes > 0
        assert found.payload_bytes > 0
        assert count_checkpoints(saver, "old") > 1, "a dry run must change nothing"

        saver.prune(["old"])
        assert count_checkpoints(saver, "old") == 1
        assert saver.prunable(["old"]) == type(found)(0, 0, 0)
        assert size - saver.size_bytes() > found.payload_bytes / 2
        assert path.stat().st_size == saver.size_bytes()
        assert count_checkpoints(saver, "other") > 4
        assert graph.get_state(old).values == before.values
        graph.update_state(old, {"step": 2})
        assert graph.get_state(old).values["step"] == 2


def test_prune_while_another_connection_reads_still_removes(tmp_path):
    with open_saver(tmp_path / "c.sqlite") as saver, open_saver(tmp_path / "c.sqlite") as reader:
        run_thread(saver, "t")
        saver.conn.execute("PRAGMA busy_timeout = 50")
        reader.conn.execute("BEGIN")
        reader.conn.execute("SELECT COUNT(*) FROM checkpoints").fetchone()
        saver.prune(["t"])
        reader.conn.rollback()
        assert count_checkpoints(saver, "t") == 1


def test_unknown_strategy_names_the_known_ones(tmp_path):
    with open_saver(tmp_path / "c.sqlite") as saver:
        with pytest.raises(UserError, match=r"'keep_all'.*delete, keep_latest"):
            saver.prune(["t"], strategy="keep_all")
        with pytest.raises(UserError, match="keep_latest"):
            saver.prunable(["t"], strategy="keep_all")


def test_a_copied_thread_goes_on_alone(tmp_path):
    with open_saver(tmp_path / "c.sqlite") as saver:
        source = run_thread(saver, "a")
        saver.copy_thread("a", "b")
        target = {"configurable": {"thread_id": "b"}}
        graph = counting_graph(saver)
        assert graph.get_state(target).values == graph.get_state(source).values
        graph.update_state(target, {"step": 40})
        assert graph.get_state(source).values["step"] == 5
        with pytest.raises(UserError, match="'b' already exists"):
            saver.copy_thread("a", "b")


def test_a_failed_transaction_leaves_nothing_behind(tmp_path):
    with open_saver(tmp_path / "c.sqlite") as saver:
        run_thread(saver, "t")
        before = count_checkpoints(saver, "t")

        def fail_half_way():
            with saver.cursor() as cur:
                cur.execute("DELETE FROM checkpoints")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail_half_way()
        assert count_checkpoints(saver, "t") == before


def test_the_saver_can_be_used_while_a_listing_is_read(tmp_path):
    with open_saver(tmp_path / "c.sqlite") as saver:
        config = run_thread(saver, "t")
        for found in saver.list(config):
            assert saver.get_tuple(found.config) is not None


def test_a_class_in_a_checkpoint_comes_back_as_data(tmp_path):
    from langgraph.checkpoint.base import empty_checkpoint

    with open_saver(tmp_path / "c.sqlite") as saver:
        checkpoint = empty_checkpoint()
        checkpoint["channel_values"] = {"error": UserError("x"), "plain": {"a": [1, 2.5, "b"]}}
        config = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
        stored = saver.put(config, checkpoint, {}, {})
        values = saver.get_tuple(stored).checkpoint["channel_values"]
        assert not isinstance(values["error"], Exception)
        assert values["plain"] == {"a": [1, 2.5, "b"]}


def test_async_graph_runs_on_the_saver(tmp_path):
    async def go():
        config = {"configurable": {"thread_id": "t"}}
        with open_saver(tmp_path / "c.sqlite") as saver:
            graph = counting_graph(saver)
            await graph.ainvoke({"step": 0, "seen": {}}, config, durability="sync")
            return (await graph.aget_state(config)).values["step"]

    assert asyncio.run(go()) == 5


def test_langgraph_checkpointer_uses_the_command_lines_file(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENTMERGE_RUNS_DIR", str(tmp_path / "elsewhere"))

    async def go():
        async with langgraph_checkpointer() as saver:
            assert isinstance(saver, Saver)
            config = {"configurable": {"thread_id": "t"}}
            await counting_graph(saver).ainvoke({"step": 0, "seen": {}}, config)

    asyncio.run(go())
    with open_saver(tmp_path / "elsewhere" / "checkpoints.sqlite") as saver:
        state = counting_graph(saver).get_state({"configurable": {"thread_id": "t"}})
        assert state.values["step"] == 5


def test_langgraph_checkpointer_defaults_to_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("AGENTMERGE_RUNS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)

    async def go():
        async with langgraph_checkpointer():
            pass

    asyncio.run(go())
    assert (tmp_path / "runs" / "checkpoints.sqlite").exists()


def test_a_file_that_is_no_database_is_the_users_to_mend(tmp_path):
    path = tmp_path / "c.sqlite"
    path.write_text("this is no database, and long enough to be read as a header" * 20)
    with pytest.raises(UserError, match=r"c\.sqlite.*move"), open_saver(path):
        pass


def test_wal_and_busy_timeout(tmp_path):
    with open_saver(tmp_path / "c.sqlite") as saver:
        assert saver.conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert saver.conn.execute("PRAGMA busy_timeout").fetchone() == (30_000,)


def _open_together(path, barrier, failures):
    barrier.wait()
    try:
        with open_saver(path) as saver:
            saver.prunable(["t"])
    except (UserError, sqlite3.Error) as error:
        failures.put(repr(error))


def test_processes_that_open_a_new_file_together_all_succeed(tmp_path):
    spawn = multiprocessing.get_context("fork")
    for round_ in range(10):
        barrier, failures = spawn.Barrier(6), spawn.SimpleQueue()
        args = (tmp_path / f"c{round_}.sqlite", barrier, failures)
        group = [spawn.Process(target=_open_together, args=args) for _ in range(6)]
        for process in group:
            process.start()
        for process in group:
            process.join()
        assert failures.empty(), failures.get()
