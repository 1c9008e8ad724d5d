"""The lag window: a search is the same whatever ends first and however many workers there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentmerge import plugins
from agentmerge.config import SearchConfig
from agentmerge.contracts.strategy import Observation, Proposal
from agentmerge.errors import ConfigError, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.preflight.graphs import load_graph
from agentmerge.preflight.prepare import prepare
from agentmerge.search.state import GRAPH_VERSION, SearchState
from agentmerge.session.checkpoints import open_saver
from agentmerge.session.context import Context, at_hand
from agentmerge.session.driving import resume, run
from agentmerge.session.opening import new_run, opened_search
from agentmerge.strategies.random import random_vectors
from benchmarks.scale import VirtualPool, virtual

#: What a search came to: each candidate with what came of it, in the order of proposals.
Trace = list[tuple[Any, ...]]


def config(fake_config: str, **over: Any) -> SearchConfig:
    keys = {"search.population": None, "search.algorithm": "auto", "search.lag": 6}
    keys |= {"budget.max_evaluations": 30} | {k.replace("__", "."): v for k, v in over.items()}
    return SearchConfig.from_text(fake_config, overrides=keys)


def trace(runs: Path, name: str) -> Trace:
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        row = ledger.run(name)
        told = [
            (c.generation, c.slot, c.operator, c.recipe_hash, c.state, c.score, c.rung)
            for c in ledger.candidates(row.id)
        ]
        return [*told, (row.status, row.stop_reason)]


def searched(settings: SearchConfig, runs: Path, name: str, workers: int, seed: int = 0) -> Trace:
    with virtual(workers, 1.0, seed):
        run(settings, name=name, runs_dir=runs)
    return trace(runs, name)


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"search__racing": True, "search__seed": 5, "limit": 100, "budget__max_evaluations": 20},
        {"search__algorithm": "one_plus_one", "search__population": 2},
        {"search__algorithm": "random", "search__lag": 40},
        {"search__structure": "free", "search__algorithm": "margins"},
        {"budget__max_items": 700},
    ],
    ids=lambda over: "-".join(str(value) for value in over.values()) or "auto",
)
def test_neither_the_order_nor_the_number_of_workers_changes_a_search(
    fake_config: str, tmp_path: Path, over: dict[str, Any]
) -> None:
    settings = config(fake_config, **over)
    alone = searched(settings, tmp_path / "a", "s", 1)
    assert alone[-1][0] == "done"
    for workers, seed in ((3, 1), (6, 2)):
        assert searched(settings, tmp_path / f"{workers}.{seed}", "s", workers, seed) == alone


def test_without_a_window_a_search_is_another(fake_config: str, tmp_path: Path) -> None:
    window = searched(config(fake_config), tmp_path, "window", 2)
    barrier = searched(config(fake_config, search__lag=None), tmp_path, "barrier", 2)
    assert [row for row in window if row[0] == 0] == [row for row in barrier if row[0] == 0]
    assert window != barrier
    assert searched(config(fake_config, search__lag=1), tmp_path, "one", 2) == barrier


class Spy:
    """A strategy that keeps what it was told."""

    name = "spy"

    def __init__(self) -> None:
        self.told: list[list[Observation]] = []

    def propose(self, space, history, guidance, count, rng_for) -> list[Proposal]:
        if not history:
            return []
        self.told.append(list(history))
        vectors = random_vectors(space, history[-1].generation + 1, count, rng_for)
        return [Proposal(vector, "random") for vector in vectors]

    def population(self, dimensions: int) -> int:
        return 1


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    spy = Spy()
    own: Callable[..., Any] = plugins.load
    monkeypatch.setattr(
        plugins, "load", lambda group, name: spy if name == "random" else own(group, name)
    )
    return spy


def test_a_proposal_knows_all_but_the_window_and_that_it_is_pending(
    fake_config: str, tmp_path: Path, spy: Spy
) -> None:
    settings = config(fake_config, search__algorithm="random", search__lag=4)
    searched(settings, tmp_path, "s", 4)
    later = [[o for o in told if o.generation] for told in spy.told]
    for number, told in enumerate(later):
        assert [o.generation for o in told] == list(range(1, number + 1))
        pending = [o for o in told if o.pending]
        assert pending == told[max(0, number - 3) :]
        assert all(o.score is None and not o.failed and o.vector for o in pending)
        assert all(o.score is not None for o in told if o not in pending)
    assert len(later) > 10


@pytest.mark.parametrize("algorithm", ["cma_es", "llm_evo", "null_llm", "gradient"])
def test_what_needs_whole_generations_has_them_and_says_so(
    fake_config: str, tmp_path: Path, algorithm: str
) -> None:
    # One a worker at least where the strategy's own generations are smaller.
    over = {"search__algorithm": algorithm, "worker__count": 11}
    prepared = prepare(config(fake_config, **over))
    assert prepared.config.generation_size(4) == 11
    notes = prepared.notes
    assert any(f"{algorithm} learns from whole generations" in note for note in notes)
    window = searched(config(fake_config, **over), tmp_path, "window", 11)
    plain = config(fake_config, search__lag=None, **over)
    assert window == searched(plain, tmp_path, "plain", 11)
    assert not any("search.lag" in note for note in prepare(plain).notes)
    with pytest.raises(UserError, match=r"worker\.count cannot change on resume"):
        resume("window", runs_dir=tmp_path, overrides={"worker.count": 2})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [3, 14, 22])
def test_a_search_goes_on_with_other_workers_on_another_host_as_if_nothing_had_been(
    fake_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    settings = config(fake_config, worker__count=3)
    whole = searched(settings, tmp_path / "whole", "s", 3)
    score, scored = VirtualPool.evaluate, [0]

    def dies(pool: VirtualPool, *asked: Any) -> Any:
        scored[0] += 1
        if scored[0] > after:
            raise Killed
        return score(pool, *asked)

    with monkeypatch.context() as patch:
        patch.setattr(VirtualPool, "evaluate", dies)
        with virtual(3, 1.0, 7), pytest.raises(Killed):
            run(settings, name="s", runs_dir=tmp_path)
    assert sum(row[4] == "scored" for row in trace(tmp_path, "s")[:-1]) >= after
    resume("s", runs_dir=tmp_path, overrides={"worker.count": 2, "worker.host": "process"})
    assert trace(tmp_path, "s") == whole


def stepped(settings: SearchConfig, runs: Path, killed: Callable[[int], bool] | None) -> Trace:
    """A search that is stopped after each step of its graph and gone on with from its checkpoint:
    after some of them by another process, after the others by one that remembers no decision.

    killed: of which steps' number; None of none of the first kind.
    """
    with ExitStack() as stack:
        made = stack.enter_context(virtual(3, 1.0, 4))
        search, prepared, row = stack.enter_context(
            opened_search(runs, lambda ledger: new_run(ledger, prepare(settings), "s"), drive=True)
        )
        saver = stack.enter_context(open_saver(runs / CHECKPOINTS))
        graph = load_graph("search").compile(checkpointer=saver)
        thread: Any = {"configurable": {"thread_id": row.id}, "recursion_limit": 1000}
        begin: Any = SearchState(run_id=row.id, graph_version=GRAPH_VERSION)
        for step in range(400):
            decided: Any = {
                "exhausted": set(),
                "whole": set(),
                "windows": {},
                "views": {},
                "_told": {},
            }
            book = search.book
            if killed is not None and killed(step):
                pool = VirtualPool(prepared.spec, prepared.taskset, 3, 1.0, step)
                search = replace(search, pool=pool, dispatched={}, _histories={}, **decided)
            else:
                search = replace(search, _histories={}, **decided)
                search.__dict__["book"] = book
            with at_hand(search):
                context = Context(run=row.id, runs_dir=str(runs))
                graph.invoke(begin, thread, context=context, interrupt_after="*")
            begin = None
            if not graph.get_state(thread).next:
                break
        assert len(made) == 1
    return trace(runs, "s")


class Patient(Spy):
    """Proposes while it is told of two that are pending at most, and nothing new at last."""

    def propose(self, space, history, guidance, count, rng_for) -> list[Proposal]:
        if sum(o.pending for o in history) > 2 or len(history) > 24:
            return []
        return super().propose(space, history, guidance, count, rng_for)


RACING: dict[str, Any] = {
    "search__racing": True, "search__seed": 5, "limit": 100, "budget__max_evaluations": 16,
}  # fmt: skip


@pytest.mark.parametrize("over", [RACING, {"search__algorithm": "random"}], ids=["race", "patient"])
@pytest.mark.parametrize("killed", [None, lambda step: step % 9 == 8], ids=["forgets", "killed"])
def test_what_was_waited_for_is_known_whoever_goes_on(
    fake_config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    over: dict[str, Any],
    killed: Callable[[int], bool] | None,
) -> None:
    """Where a search would stop for what it knows, all is waited for and known: that must not
    hang on who waited."""
    if over is not RACING:
        patient, own = Patient(), plugins.load
        monkeypatch.setattr(
            plugins, "load", lambda group, name: patient if name == "random" else own(group, name)
        )
    settings = config(fake_config, **over)
    calm = searched(settings, tmp_path / "calm", "s", 3)
    assert calm[-1] == ("done", "budget" if over is RACING else "nothing more to gain")
    assert stepped(settings, tmp_path / "torn", killed) == calm


def test_a_time_out_inside_a_window_has_an_answer_and_is_gone_on_from(
    fake_config: str, tmp_path: Path
) -> None:
    settings, runs = config(fake_config), tmp_path / "late"
    calm = searched(settings, tmp_path / "calm", "s", 3)
    with (
        virtual(3, 1.0, 2) as made,
        opened_search(runs, lambda ledger: new_run(ledger, prepare(settings), "s"), drive=True) as (
            search,
            _,
            row,
        ),
        at_hand(replace(search, seconds_left=lambda: 6.0 - made[0].now)),
    ):
        context = Context(run=row.id, runs_dir=str(runs))
        begin: Any = SearchState(run_id=row.id, graph_version=GRAPH_VERSION)
        load_graph("search").compile().invoke(begin, {"recursion_limit": 1000}, context=context)
        assert not search.dispatched
    found = trace(runs, "s")
    assert found[-1] == ("done", "timeout")
    scored = [row for row in found[:-1] if row[4] == "scored"]
    assert [row for row in found[:-1] if row[4] == "open"]
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        assert tuple(ledger.run("s").card.answer.candidate) in [row[:2] for row in scored]
    with virtual(2, 1.0, 5):
        resume("s", runs_dir=runs)
    assert trace(runs, "s") == calm


def test_where_generations_follow_from_the_workers_their_number_stays(
    fake_config: str, tmp_path: Path
) -> None:
    searched(config(fake_config, search__lag=None), tmp_path, "s", 1)
    with pytest.raises(UserError, match=r"worker\.count cannot change on resume"):
        resume("s", runs_dir=tmp_path, overrides={"worker.count": 2})


def test_a_window_follows_from_the_workers_and_agents_that_would_wait_are_refused(
    fake_config: str,
) -> None:
    auto = config(fake_config, search__lag="auto", worker__count=3)
    assert prepare(auto).config.search.lag == 6
    assert auto.generation_size(1) == 1
    assert auto.generation_size(8) == 1  # a strategy's own number, which would fill the window
    for key, value in (("probes", 3), ("ahead", True)):
        with pytest.raises(ConfigError, match=rf"agents\.{key} {value} is not possible with"):
            prepare(config(fake_config, **{f"agents__{key}": value, "agents__llm": "openai:x"}))


@pytest.mark.parametrize("name", ["auto", "margins", "one_plus_one", "random", "sobol", "tpe"])
def test_a_strategy_proposes_beside_what_is_pending(name: str) -> None:
    """Nothing that is pending again, and the same whatever a pending one will come to."""
    from agentmerge.config import GenomeConfig
    from agentmerge.contracts import rng_factory
    from agentmerge.testing import space_of

    if name == "tpe":
        pytest.importorskip("optuna")
    strategy = plugins.load("agentmerge.strategies", name)
    genome = GenomeConfig(models=("a", "b", "c"), merge_method="linear")
    space = space_of(genome, 4)
    rng_for = rng_factory(3)
    points = random_vectors(space, 0, 14, rng_for)
    known = [
        Observation(0, i, p, "random", sum(p), recipe_hash=str(i)) for i, p in enumerate(points)
    ]
    history = known[:10]
    for generation in range(1, 5):
        told = [replace(o, generation=1 + i, score=None, pending=True)
                for i, o in enumerate(known[10 : 10 + generation - 1])]  # fmt: skip
        found = strategy.propose(space, [*history, *told], None, 1, rng_for)
        assert len(found) == 1
        assert found[0].vector not in [o.vector for o in told]
        known[10 + generation - 1 : 10 + generation] = [
            replace(known[0], vector=found[0].vector, operator=found[0].operator)
        ]
    assert len({o.vector for o in known[10:]}) == 4
