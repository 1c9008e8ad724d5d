"""The search as a LangGraph state machine: topology only; each node calls one thing.

    seed -> evaluate (one Send a candidate) -> select -> critic -> controller -> proposer
                 ^                               |                                   |
                 |_______________________________|_______ (structure, for a move) ___|
                                                 `-> finish

``runtime.context`` is an ``agentmerge.session.context.Context``; ``search_of`` gives the search
that it stands for, with open ledger, worker pool, strategy and agents. The graph is exported
uncompiled and without a saver.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, Send, interrupt
from langgraph_sdk.runtime import ServerRuntime

from agentmerge.search.state import Assignment, SearchState
from agentmerge.search.structure import approval, question, restructure, wanted_move
from agentmerge.session.context import (
    ClientContext,
    Context,
    let_go,
    releasing,
    search_of,
    served_run,
)

Next = Literal["evaluate", "select"]


def seed(state: SearchState, runtime: Runtime[Context]) -> Command[Next]:
    """Generation 0: parents, uniform merges, warm starts, the strategy's first draws."""
    search = search_of(runtime)
    generation = search.seed()
    return Command(
        update=search.first_state(generation), goto=_dispatch(search.open_slots(generation))
    )


def evaluate(state: Assignment, runtime: Runtime[Context]) -> None:
    """Score one candidate; what it costs is in the ledger before this returns."""
    search_of(runtime).evaluate(state["generation"], state["slot"])


def select(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["evaluate", "critic", "finish"]]:
    """Update the incumbent; decide whether to score what is left, go on, or stop."""
    outcome = search_of(runtime).select(state["generation"])
    if outcome.stop_reason:
        return Command(update=outcome.update(), goto="finish")
    return Command(update=outcome.update(), goto=_dispatch(outcome.open_slots, done="critic"))


def critic(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["controller", "finish"]]:
    """Explain what the last generation showed."""
    return _advised(search_of(runtime).advise("critic", state["generation"]), "controller")


def controller(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["proposer", "finish"]]:
    """Decide how far to step."""
    return _advised(search_of(runtime).advise("controller", state["generation"]), "proposer")


def proposer(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["evaluate", "select", "structure", "finish"]]:
    """Suggest where to look; the strategy turns all advice into the next generation."""
    search = search_of(runtime)
    limit = search.advise("proposer", state["generation"])
    if limit:
        return _advised(limit, "select")
    if wanted_move(search, state["generation"]) is not None:
        return Command(goto="structure")
    return _proposed(search, state["generation"])


def structure(
    state: SearchState, runtime: Runtime[Context]
) -> Command[Literal["evaluate", "select"]]:
    """Open another search space; with ``search.approve`` only once a person has agreed."""
    search, generation = search_of(runtime), state["generation"]
    move = wanted_move(search, generation)
    if move is not None:  # else it was decided before a crash
        approved = approval(search, generation)
        if approved is None:
            approved = interrupt(question(generation, move)) in (True, "yes")
        restructure(search, generation, move, approved=approved)
    return _proposed(search, generation)


def finish(state: SearchState, runtime: Runtime[Context]) -> SearchState:
    """Choose among the best few, confirm on sealed items, write recipe and report."""
    search = search_of(runtime)
    update = search.finish(state["stop_reason"])
    let_go(search)
    return update


def _advised(limit: str, then: Any) -> Command[Any]:
    """On to the next agent, or to the end where a limit does not allow this one to be asked."""
    return Command(update={"stop_reason": limit}, goto="finish") if limit else Command(goto=then)


def _proposed(search: Any, generation: int) -> Command[Any]:
    generation = search.propose(generation)
    return Command(update={"generation": generation}, goto=_dispatch(search.open_slots(generation)))


def _dispatch(slots: list[tuple[int, int]], done: Literal["select", "critic"] = "select") -> Any:
    """One ``evaluate`` a candidate that is still open, or straight on where there is none."""
    sends = [Send("evaluate", Assignment(generation=g, slot=s)) for g, s in slots]
    return sends or done


def build(context: type[ClientContext] = Context) -> StateGraph[SearchState, Any]:
    """The uncompiled graph. context: what whoever invokes it is trusted to say."""
    graph: StateGraph[SearchState, Any] = StateGraph(SearchState, context_schema=context)
    graph.add_node("seed", releasing(seed))
    for node in (evaluate, select, critic, controller, proposer, structure, finish):
        graph.add_node(node.__name__, releasing(node))
    graph.add_edge(START, "seed")
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
