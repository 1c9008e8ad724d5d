"""An open search: its parts, and what its nodes may ask of it.

``Search`` holds everything a search needs while it runs (ledger, space, tasks, pool, strategy,
agents) and no progress of its own. What is done with it is one module a node (``seed``,
``evaluate``, ``select``, ``advise``, ``propose``, ``structure``, ``finish``): a function of a
search that reads the ledger and writes the ledger, so that a node may run again after a crash and
repeat or lose nothing. Prints nothing; what happens is told through ``emit``.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import is_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.agents.ladder import Ladder
from agentmerge.agents.models import AgentModel
from agentmerge.agents.prompts import Prompts
from agentmerge.agents.standings import Standings
from agentmerge.agents.view import HistoryView
from agentmerge.config import Role, SearchConfig
from agentmerge.contracts.events import Event
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.contracts.strategy import Observation, Proposal, Strategy
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import AgentmergeError, LedgerError, UserError
from agentmerge.evaluation.failing import texts
from agentmerge.evaluation.leads import PairedNoise
from agentmerge.evaluation.racing import Course
from agentmerge.evaluation.tasks import Part, Score, TaskSet
from agentmerge.ledger import Candidate, Ledger
from agentmerge.ledger.book import Book
from agentmerge.ledger.words import openings
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import layers_read, stacked_layers
from agentmerge.search.constraints import Limit, ceilings, floors, penalised
from agentmerge.search.evidence import ItemTable, comparable
from agentmerge.search.gradients import Gradients
from agentmerge.search.judging import Judges
from agentmerge.search.past import arm_history, first_generation
from agentmerge.search.purse import Purse
from agentmerge.search.scoring import Evaluator, Scoring, there
from agentmerge.search.trials import Trials, seen_from, trials_of
from agentmerge.space.grouped import SearchSpace

#: A method of a search in version 0.1 -> the module beside this one where it is a function now.
_METHODS_OF_0_1 = {"first_state": "seed", "open_slots": "select"} | {
    name: name for name in ("seed", "evaluate", "select", "advise", "propose", "finish")
}

#: Merges whose item results are kept in memory.
KEPT_RESULTS = 16


@dataclass(frozen=True)
class Search:
    """A search with its doors open; see the module's head.

    configured: the config as of now; a replay's has the limits that held at its place in time.
    identities: model name -> content fingerprint; paths: -> its directory.
    check: raises RecipeRejected for a recipe that cannot be merged, from headers alone.
    seconds_left: of its time. purse: what models may cost. judges: of tasks that have one. reached:
        limits that did not allow a verdict.
    replies_of: the run whose stored replies answer for the models; by default its own.
    stopping: set by the first Ctrl-C; candidates that have not begun are left open.
    entering: called where a node begins; raises LeaseHeld where another process took it over.
    exhausted: generations for which the strategy had no proposal.
    whole: the generation that it ends after, of which all is known. windows: the last view of a
        window (``window``), and what was found out of it.
    dispatched: (generation, slot) -> what the pool will have done. seconds: what candidates took
        that were scored just now. views: what an agent was shown last, by the state of the
        candidates, the generation, what is left and who asks.
    proposals: what a strategy asks, by the state of the candidates and all else that it is told;
        a decision on a space asks for it before a generation does.
    """

    configured: Callable[[], SearchConfig]
    run_id: str
    run_dir: Path
    settings_hash: str
    ledger: Ledger
    space: SearchSpace
    taskset: TaskSet
    pool: Evaluator
    strategy: Strategy
    identities: Mapping[str, str]
    check: Callable[[Recipe], object]
    models: Mapping[Role, AgentModel]
    prompts: Prompts
    emit: Callable[[Event], None]
    paths: Mapping[str, Path] = field(default_factory=dict)
    replies_of: str | None = None
    seconds_left: Callable[[], float] = lambda: math.inf
    stopping: Callable[[], bool] = lambda: False
    entering: Callable[[], None] = lambda: None
    exhausted: set[int] = field(default_factory=set)
    whole: set[int] = field(default_factory=set)
    windows: dict[str, Any] = field(default_factory=dict)
    dispatched: dict[tuple[int, int], Future[None]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    judges: Judges | None = None
    purse: Purse = field(default_factory=Purse)
    reached: set[str] = field(default_factory=set)
    views: dict[Any, HistoryView] = field(default_factory=dict)
    proposals: dict[Any, list[Proposal]] = field(default_factory=dict, init=False)
    _items: OrderedDict[tuple[str, Part], dict[ItemRef, ItemResult]] = field(
        default_factory=OrderedDict
    )
    _histories: dict[Any, list[Observation]] = field(default_factory=dict)
    _told: dict[str | None, tuple[list[Observation], list[Observation]]] = field(
        default_factory=dict
    )
    _looking: threading.RLock = field(default_factory=threading.RLock)
    _points: dict[tuple[str, str], tuple[float, ...] | None] = field(default_factory=dict)

    if not TYPE_CHECKING:  # or any name would pass for an attribute

        def __getattr__(self, name: str) -> Any:
            """Where a user's own graph is one of version 0.1, it says so."""
            if name not in _METHODS_OF_0_1:
                raise AttributeError(f"a search has no {name!r}", name=name, obj=self)
            raise UserError(
                f"a search has no .{name}() of its own since version 0.1: write `from "
                f"agentmerge.search.{_METHODS_OF_0_1[name]} import {name}` and `{name}(search, "
                "...)` in its place (see CHANGELOG.md)"
            )

    @property
    def config(self) -> SearchConfig:
        return self.configured()

    @cached_property
    def book(self) -> Book:
        """This run in memory, read when it is first asked."""
        return Book(self.ledger, self.run_id)

    def trials(self, generation: int, *, decided: bool = True) -> Trials:
        """The search spaces after a generation; decided: with what was decided after it."""
        moves = [
            opening
            for opening in openings(self.book.advice(role=STRUCTURE))
            if opening.generation < generation + decided
        ]
        if not moves:
            return trials_of(self.space, (), ())
        return trials_of(
            self.space, moves, self.book.candidates(up_to=generation), self.recipe_text
        )

    @property
    def present(self) -> SearchSpace:
        """The space that the next generation's first turn is in."""
        candidates = self.book.candidates()
        return self.trials(candidates[-1].generation if candidates else 0).turn[0]

    def recipe_text(self, candidate: Candidate | Observation) -> str:
        return self.ledger.recipe(candidate.recipe_hash, self.run_id)

    def canonical_of(self, candidate: Candidate) -> Recipe:
        return Recipe.parse(self.recipe_text(candidate)).canonical(self.space.num_layers)

    def depth_of(self, candidate: Candidate) -> int:
        """How many layers a candidate's merge has."""
        return len(layers_read(self.canonical_of(candidate)))

    def is_stack(self, candidate: Candidate) -> bool:
        """Whether its layers are others than its models', or not in their places."""
        layers = self.space.num_layers
        return stacked_layers(self.canonical_of(candidate), layers) is not None

    def recipe_of(self, observation: Observation) -> Recipe:
        return Recipe.parse(self.recipe_text(observation))

    def point_of(self, space: SearchSpace, observation: Observation) -> tuple[float, ...] | None:
        """Where another space's candidate lies in this one."""
        key = (space.key, observation.recipe_hash)
        if key not in self._points:
            try:
                self._points[key] = space.vector(self.recipe_of(observation))
            except AgentmergeError:
                self._points[key] = None  # refused, or nothing that this space can say
        return self._points[key]

    @property
    def scoring(self) -> Scoring:
        counted = self.config.search.counted
        return Scoring(self.ledger, self.taskset, self.pool, self.judges, counted)

    @cached_property
    def course(self) -> Course:
        return Course(self.taskset)

    @cached_property
    def item_table(self) -> ItemTable:
        settings = self.config.search
        return ItemTable(self.taskset, self.item_results, settings.counted, settings.traded)

    @cached_property
    def texts(self) -> dict[str, dict[str, tuple[str, str]]]:
        """Task -> key of a search item -> what it asks and what is right, where that is known."""
        found = {task.name: texts(self.taskset, task, task.part("search"))
                 for task in self.taskset.tasks}  # fmt: skip
        return {name: own for name, own in found.items() if own}

    @cached_property
    def noise(self) -> PairedNoise:
        return PairedNoise(self.taskset, self.item_results)

    @cached_property
    def ladder(self) -> Ladder:
        """What models are told of scores, walked once."""
        return Ladder(self.noise)

    @cached_property
    def standings(self) -> Standings:
        """Where the history that agents know stands, walked once."""
        return Standings()

    @property
    def gradients(self) -> Gradients:
        return Gradients(self.ledger, self.taskset, self.pool, self.identities)

    def history(
        self, up_to: int | None = None, *, shadow: bool = False, space: SearchSpace | None = None
    ) -> list[Observation]:
        """The history as strategies and agents are told it. shadow: as the arm without them is.

        What was scored under other settings has its score under these where the ledger held all
        items' results when the branch began, else none.
        space: the one to look from; by default every vector is in the space that it was made in.
        Not to be changed: whoever asks again before a candidate changes is told the same.
        """
        asked = (self.book.changes, up_to, shadow, space and space.key)
        with self._looking:  # agents may think while candidates are scored
            if asked not in self._histories:
                if any(changes != self.book.changes for changes, *_ in self._histories):
                    self._histories.clear()
                self._histories[asked] = self._history_of(up_to, shadow, space)
            return self._histories[asked]

    def _history_of(
        self, up_to: int | None, shadow: bool, space: SearchSpace | None
    ) -> list[Observation]:
        history = self.book.history(up_to)
        if history and history[0].prior:  # what a branch goes on from comes first
            constrained = self.config.search.constraints
            known = self.book.candidates(up_to=up_to) if constrained else []
            history = comparable(history, self._score_now, self.floors(known))
        if self.config.search.shadow:
            first = first_generation(self.book.candidates(up_to=up_to))
            history = arm_history(history, first, shadow=shadow)
        # Most of it was told of the last candidate, too.
        key = None if space is None else space.key
        before, told = self._told.get(key, ([], []))
        same = [*map(is_, before, history), False].index(False)
        told = told[:same] + self._as_told(history[same:], space)
        self._told[key] = history, told
        return told

    def _as_told(
        self, history: Sequence[Observation], space: SearchSpace | None
    ) -> list[Observation]:
        found = penalised(history, self.taskset.objectives)
        found = [o if o.space else replace(o, space=self.space.key) for o in found]
        if space is None:
            return found
        # After the arms are told apart: seen from another space, a candidate has no operator.
        found = seen_from(found, space, partial(self.point_of, space))
        dimensions = space.dimensions
        for o in found:
            if o.vector is not None and len(o.vector) != dimensions:
                raise LedgerError(
                    f"candidate {o.generation}.{o.slot} has {len(o.vector)} coordinates, and its "
                    f"search space {dimensions}: the ledger was edited, or made by another "
                    "version; start anew"
                )
        return found

    @cached_property
    def _rescored(self) -> dict[str, Score]:
        """Recipe hash -> the present score of what a branch's past had asked in full."""
        covered = self.ledger.run(self.run_id).facts.get("rescored", ())
        every, scores, whole = len(set(self.taskset.refs("search"))), dict[str, Score](), set[str]()
        for found in covered:
            results = self.item_results(found)
            scores[found] = self.taskset.score(results)
            if len(results) == every:
                whole.add(found)
        if not whole:
            return scores
        best = max(sorted(whole), key=lambda found: scores[found].value)
        beside = dict(scores[best].tasks), self.item_results(best)
        for found in scores.keys() - whole:  # of whom verdicts are missing
            scores[found] = self.taskset.score(self.item_results(found), beside=beside)
        return scores

    def _score_now(self, recipe_hash: str) -> Score | None:
        return self._rescored.get(recipe_hash)

    def floors(self, candidates: Sequence[Candidate]) -> list[Limit]:
        """What the constraints ask for, as the parents among these candidates set it."""
        asked = self.config.search.constraints
        return [
            *floors(asked, self.taskset.objectives, candidates),
            *ceilings(asked, candidates),
        ]

    def item_results(self, recipe_hash: str, part: Part = "search") -> dict[ItemRef, ItemResult]:
        """What the ledger knows of a recipe's items, without paying for anything.

        Items without a verdict are left out. Not to be changed: the last few that are whole are
        kept, the incumbent's above all.
        """
        key = (recipe_hash, part)
        found = self._items.pop(key, None)
        whole = found is not None
        if found is None:
            found = self.scoring.known(recipe_hash, part)
            whole = len(found) == len(set(self.taskset.refs(part)))
            found = there(found)
        if whole:
            self._items[key] = found
            if len(self._items) > KEPT_RESULTS:
                self._items.popitem(last=False)
        return found
