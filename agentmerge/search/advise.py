"""How the agents are asked: what they see, what they may spend, and where their words are kept.

Knows the three roles of every generation and a search's ledger and budget; the curator, asked once
of a pool, is ``curating``'s. A question that was answered before is read
from the ledger, request by request, so that a node may run twice and a whole search be replayed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

from agentmerge.agents import controller, critic, proposer
from agentmerge.agents.forecasts import Forecast, forecasts, foretells, track
from agentmerge.agents.prompts import Message, prompt_hash
from agentmerge.agents.schemas import json_schema, parse_reply
from agentmerge.agents.view import HistoryView, TaskView
from agentmerge.config import Role, models_asked
from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.calls import Call
from agentmerge.contracts.operators import CURATOR, PROBE, STRUCTURE
from agentmerge.errors import BudgetReached, ModelReplyError, ReplyMissing
from agentmerge.ledger.words import Opening, guidance_of, openings, spoken
from agentmerge.recipe.names import short_name
from agentmerge.search import budget
from agentmerge.search.failing import reading
from agentmerge.search.propose import population
from agentmerge.search.search import Search
from agentmerge.search.trials import Trials, verdicts
from agentmerge.search.window import lag_of, told_in, within

_AGENTS: dict[Role, Any] = {"critic": critic, "controller": controller, "proposer": proposer}
#: Who may call tools before it answers.
_PROBERS: tuple[Role, ...] = ("critic", "proposer")


def think_ahead(search: Search, generation: int) -> None:
    """With ``agents.ahead``: ask all agents of a generation while it is scored. A limit that does
    not allow it is met again when their turn comes."""
    if search.config.agents.ahead and generation:
        for role in _AGENTS:
            if _advised(search, role, generation):
                return


def advise(search: Search, role: Role, generation: int) -> str:
    """Ask one agent and keep its word; without a model, or where it fails, its rules speak.

    Returns the limit that does not allow it, or "".
    """
    search.entering()
    limit = _advised(search, role, generation)
    search.entering()  # what is decided next, a move, may have waited for a larger budget
    return limit


def _advised(search: Search, role: Role, generation: int) -> str:
    if search.book.advice(generation, role):
        return ""
    search = within(search, generation)
    book = search.book
    agent = _AGENTS[role]
    view = view_of(search, role, generation)
    guidance = guidance_of(book.advice(generation))
    failure = ""
    advised = agent.by_rules(view, guidance)
    if role in search.models and models_asked(generation, population(search, view.space)):
        try:
            advised = _asked(search, role, generation, view, guidance)
        except ModelReplyError as error:
            failure = str(error)
        except BudgetReached as reached:
            return reached.limit
    body = {"guidance": advised.to_json(), "failure": failure, "of_space": view.space.key}
    book.save_advice(generation, role, body)
    search.emit(spoken({"generation": generation, "role": role} | body))
    return ""


def question(
    search: Search, role: Role, generation: int
) -> tuple[list[Message], HistoryView, Guidance]:
    """What a role is asked of a generation, what it may know, and what was said before it."""
    view = view_of(search, role, generation)
    guidance = guidance_of(search.book.advice(generation))
    return _AGENTS[role].messages(view, search.prompts, guidance), view, guidance


def view_of(search: Search, role: Role, generation: int) -> HistoryView:
    """All that an agent may know when this generation is scored; with ``agents.ahead`` when the one
    before it is, but for the curator, who waits for the experts.

    What it tried itself in this generation is left out: where a node runs again, its question is
    the same, and the answer is found.
    """
    ahead = search.config.agents.ahead and role != CURATOR
    seen = generation - bool(ahead and generation)
    now = told_in(search, generation, ahead=ahead)
    space = now.turn[0]
    history = search.history(up_to=seen, space=space)
    latest = takewhile(lambda o: o.generation == generation, reversed(history))
    own = [o for o in latest if (o.operator, o.label) == (PROBE, role)]
    left = budget.left(search, seen) * (1 - search.config.search.shadow)
    asked = (search.book.changes, generation, seen, left, role if own else None)
    if asked in search.views:
        return search.views[asked]
    history = [o for o in history if not (o.pending or (o.prior and o.score is None))]
    history = [o for o in history if o not in own] if own else history
    decided = openings(search.book.advice(role=STRUCTURE))
    moves = [opening for opening in decided if opening.generation < generation]
    before = guidance_of(search.book.advice(generation - 1)) if generation else None
    settings = search.config.search
    metrics = {task.name: task.metric for task in search.config.tasks.tasks}
    found = HistoryView(
        space=space,
        tasks=tuple(
            TaskView(o.name, o.weight, metrics.get(o.name, ""), o.higher_is_better)
            for o in search.taskset.objectives
        ),
        entries=tuple(history),
        sigma=None if before is None else before.sigma,
        sigma_low=settings.sigma_low,
        sigma_high=settings.sigma_high,
        improved_last=search.standings.of(history).improved,
        budget_left=math.floor(left + 1e-9) + len(own),
        forecasts=track(_forecasts(search, seen)).sentence(),
        noise=search.noise,
        ladder=search.ladder,
        standings=search.standings,
        moves=tuple(verdicts(now, moves)),
        deeper=_deeper(search, now, moves),
        absent=_absent(search, now),
        room=(most := now.leader.genome.pool) is not None and len(now.leader.models) < most.most,
    )
    found = reading(search, found, generation)
    search.views.clear()
    search.views[asked] = found  # one that tried nothing itself is told what the last one was
    return found


def _deeper(search: Search, now: Trials, moves: Sequence[Opening]) -> int:
    """How many layers a move to them may add; 0 where there was one, or none is possible."""
    fixed = search.config.search.structure == "fixed"
    known = any(opening.move.change == "layers" for opening in moves)
    return 0 if fixed or known or now.leader.stacks is not None else search.space.deeper


def _absent(search: Search, now: Trials) -> tuple[str, ...]:
    """The experts of a pool that a move may let in."""
    if search.config.search.structure == "fixed" or now.leader.stacks is not None:
        return ()
    return tuple(short_name(m) for m in now.leader.pool if m not in now.leader.models)


def _forecasts(search: Search, generation: int) -> list[Forecast]:
    said = search.book.words("proposer", foretells)
    words = [word for word in said if word["generation"] < generation]
    if not words:
        return []
    own = [o for o in search.history(generation) if not o.prior]  # others were of another scale
    return forecasts(words, own)


@dataclass(frozen=True, slots=True)
class Kept:
    """The requests of one question, in the ledger."""

    search: Search
    role: Role
    generation: int
    prompt: str

    def stored(self, number: int) -> Call | None:
        run = self.search.replies_of or self.search.run_id
        return self.search.ledger.call(run, self.generation, self.role, self.prompt, number)

    def reserve(self, tokens_in: int, tokens_out: int, cost_usd: float | None) -> None:
        if self.search.replies_of is not None:
            self._follow(self.search.replies_of)
        limits = self.search.config.budget
        # A price that nobody knows was refused before the search began.
        most = (tokens_in + tokens_out, cost_usd or 0.0)
        judges = self.search.judges  # what their verdicts will take in the end is not agents'
        left = (0, 0.0) if judges is None else judges.kept_back()
        self.search.purse.reserve((self.role, self.prompt), *most, limits, left)
        if self.search.seconds_left() <= 0:
            raise BudgetReached("timeout")

    def _follow(self, run_id: str) -> None:
        """A replay stops where the search did; elsewhere its question is a new one."""
        ledger = self.search.ledger
        stop = ledger.run(run_id).stop_reason
        last = max(c.generation for c in ledger.candidates(run_id))
        if stop in ("tokens", "cost", "timeout") and self.generation == last:
            raise BudgetReached(stop)
        raise ReplyMissing(
            f"the {self.role} of generation {self.generation} would be asked something new"
        )

    def keep(self, number: int, call: Call) -> None:
        search = self.search
        search.purse.settle((self.role, self.prompt), call)
        search.ledger.save_call(
            search.run_id, self.generation, self.role, self.prompt, number, call,
            model=search.models[self.role].name,
            prompt_file=getattr(search.prompts, self.role).sha,
        )  # fmt: skip
        search.emit(call.event(self.role, self.generation, number))


def _asked(
    search: Search, role: Role, generation: int, view: HistoryView, guidance: Guidance
) -> Guidance:
    """The model's word.

    Raises:
        ModelReplyError: no valid reply; every request is kept with its cost.
        BudgetReached: the next request cannot be paid.
    """
    agent = _AGENTS[role]
    told_less = search.config.agents.ahead or lag_of(search)
    asked_at = generation if told_less else view.generation
    messages = agent.messages(view, search.prompts, guidance)
    parse = partial(parse_reply, reply=agent.REPLY, bounds=view.bounds)
    move = "structural_move"
    probes = search.config.agents.probes if role in _PROBERS else 0
    tools: Sequence[Any] = ()
    if probes:
        from agentmerge.search.tools import tools_of

        tools = tools_of(search, view.generation, role, view.noise)
    reply = search.models[role].ask(
        messages,
        json_schema(agent.REPLY, view.bounds),
        parse,
        log=Kept(search, role, asked_at, prompt_hash(messages)),
        tools=tools,
        probes=probes,
        limit_s=search.seconds_left(),
        # Of a reply whose structural move cannot be made, what else it says.
        rescue=partial(parse, without=(move,)) if move in agent.REPLY.model_fields else None,
    )
    advised: Guidance = agent.by_model(reply.parsed, guidance)
    return advised
