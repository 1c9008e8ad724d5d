"""The search as a LangGraph state machine: topology only; each node calls one thing.

    seed -> dispatch -> collect -> select -> critic -> controller -> proposer
               ^                     |                                  |
               |_____________________|______ (structure, for a move) ___|
                                     `-> finish

``dispatch`` hands the open candidates of a generation to the worker pool, ``collect`` waits for
them. ``runtime.context`` is an ``agentmerge.session.context.Context``; ``search_of`` gives the
search that it stands for, with open ledger, worker pool, strategy and agents. The graph is exported
uncompiled and without a saver.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt
from langgraph_sdk.runtime import ServerRuntime

from agentmerge.search.advise import advise, think_ahead
from agentmerge.search.curating import curate
from agentmerge.search.evaluate import collect, dispatch
from agentmerge.search.finish import finish
from agentmerge.search.propose import propose
from agentmerge.search.seed import first_state, seed
from agentmerge.search.select import select
from agentmerge.search.state import SearchState
from agentmerge.search.structure import agreed, approval, question, restructure, wanted_move
from agentmerge.session.context import (
    ClientContext,
    Context,
    let_go,
    releasing,
    search_of,
    served_run,
)


def _seed(state: SearchState, runtime: Runtime[Context]) -> SearchState:
    """Generation 0: parents, uniform merges, warm starts, the strategy's first draws."""
    search = search_of(runtime)
    return first_state(search, seed(search))


def _dispatch(state: SearchState, runtime: Runtime[Context]) -> None:
    """Hand every open candidate of the generation to the worker pool."""
    dispatch(search_of(runtime), state["generation"])


def _collect(state: SearchState, runtime: Runtime[Context]) -> None:
    """Wait for what is to be known; what each cost was in the ledger as it ended."""
    search = search_of(runtime)
    think_ahead(search, state["generation"])
    collect(search, state["generation"])


def _evaluate(state: object, runtime: Runtime[Context]) -> None:
    """What threads of graph version 1 were sent for a candidate: ``select`` has it dispatched."""


def _select(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["dispatch", "critic", "finish"]]:
    """Update the incumbent; decide whether to score what is left, go on, or stop."""
    outcome = select(search_of(runtime), state["generation"])
    if outcome.stop_reason:
        return Command(update=outcome.update(), goto="finish")
    return Command(update=outcome.update(), goto="dispatch" if outcome.open_slots else "critic")


def _critic(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["controller", "finish"]]:
    """Explain what the last generation showed."""
    return _advised(advise(search_of(runtime), "critic", state["generation"]), "controller")


def _controller(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["proposer", "finish"]]:
    """Decide how far to step."""
    return _advised(advise(search_of(runtime), "controller", state["generation"]), "proposer")


def _proposer(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["dispatch", "structure", "finish"]]:
    """Suggest where to look; the strategy turns all advice into the next generation. Of a pool
    the curator says once who is worth trying."""
    search = search_of(runtime)
    limit = advise(search, "proposer", state["generation"])
    limit = limit or curate(search, state["generation"])
    if limit:
        return _advised(limit, "dispatch")
    if wanted_move(search, state["generation"]) is not None:
        return Command(goto="structure")
    return Command(update={"generation": propose(search, state["generation"])}, goto="dispatch")


def _structure(state: SearchState, runtime: Runtime[Context]) -> SearchState:
    """Open another search space; with ``search.approve`` only once a person has agreed."""
    search, generation = search_of(runtime), state["generation"]
    move = wanted_move(search, generation)
    if move is not None:  # else it was decided before a crash
        approved = approval(search, generation)
        while approved is None:
            approved = agreed(interrupt(question(generation, move)), move)
        restructure(search, generation, move, approved=approved)
    return SearchState(generation=propose(search, generation))


def _finish(state: SearchState, runtime: Runtime[Context]) -> SearchState:
    """Choose among the best few, confirm on sealed items, write recipe and report."""
    search = search_of(runtime)
    update = finish(search, state["stop_reason"])
    let_go(search)
    return update


def _advised(limit: str, then: Any) -> Command[Any]:
    """On to the next agent, or to the end where a limit does not allow this one to be asked."""
    return Command(update={"stop_reason": limit}, goto="finish") if limit else Command(goto=then)


def build(context: type[ClientContext] = Context) -> StateGraph[SearchState, Any]:
    """The uncompiled graph. context: what whoever invokes it is trusted to say."""
    graph: StateGraph[SearchState, Any] = StateGraph(SearchState, context_schema=context)
    scoring = (_seed, _dispatch, _collect, _evaluate, _select)
    for node in (*scoring, _critic, _controller, _proposer, _structure, _finish):
        graph.add_node(node.__name__.removeprefix("_"), releasing(node))
    graph.add_edge(START, "seed")
    graph.add_edge("seed", "dispatch")
    graph.add_edge("structure", "dispatch")
    graph.add_edge("dispatch", "collect")
    graph.add_edge("collect", "select")
    graph.add_edge("evaluate", "select")
    graph.add_edge("finish", END)
    return graph


graph = build()


@asynccontextmanager
async def served(
    config: RunnableConfig, runtime: ServerRuntime[Any]
) -> AsyncIterator[StateGraph[SearchState, Any]]:
    """What a LangGraph server offers: its clients say what is searched, and nothing else; a run
    that is over, in whatever way, has given back what it held."""
    async with AsyncExitStack() as stack:
        if runtime.execution_runtime:
            await stack.enter_async_context(served_run(config["configurable"]["thread_id"]))
        yield build(ClientContext)
