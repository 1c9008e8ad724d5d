"""What the nodes of the state machine do, one method a node.

``Search`` holds everything a search needs while it runs (ledger, space, tasks, pool, strategy,
agents) and no progress of its own: every method reads the ledger and writes the ledger, so that a
node may run again after a crash and repeat or lose nothing. Knows no LangGraph and prints nothing;
what happens is told through ``emit``.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from agentmerge.advising import advise, guidance_of
from agentmerge.agents.history import HistoryView
from agentmerge.agents.models import AgentModel
from agentmerge.agents.prompts import Prompts
from agentmerge.answers import Evaluator, Scoring
from agentmerge.check import warm_start
from agentmerge.config import Role, SearchConfig
from agentmerge.constraints import Floor, floors, penalised, violation
from agentmerge.errors import (
    AgentmergeError,
    AnswerRefused,
    BudgetReached,
    CandidateFailed,
    LedgerError,
    NotBegun,
    NoWorker,
    RecipeRejected,
    RunFailed,
    TaskError,
    UserError,
    WorkerLost,
)
from agentmerge.evaluation.racing import Course
from agentmerge.evaluation.tasks import Part, Score, TaskSet
from agentmerge.evidence import Witness, comparable
from agentmerge.final import final_card
from agentmerge.genome import SearchSpace, short_name
from agentmerge.heats import Lost, run_heats
from agentmerge.ledger import (
    Candidate,
    GradientKey,
    Ledger,
    counted,
    incumbent,
)
from agentmerge.ledger.book import Book
from agentmerge.moves import wanted_move
from agentmerge.recipe import Recipe
from agentmerge.shadow import (
    arm_of,
    first_generation,
    heard,
    shadow_proposals,
    uplift,
)
from agentmerge.slopes import Slopes
from agentmerge.state import GRAPH_VERSION, SearchState
from agentmerge.strategies.base import (
    ADVICE,
    GRADIENT_COST,
    SHADOW,
    Observation,
    Proposal,
    Strategy,
    rng_factory,
)
from agentmerge.strategies.chain_rule import unit_gradient
from agentmerge.strategies.random import random_vectors
from agentmerge.structure import (
    STRUCTURE,
    WORTH,
    Standing,
    carried,
    first_points,
    openings,
    standing,
)
from agentmerge.temporary import write_at_once
from agentmerge.workers.base import Gradient, ItemRef, ItemResult

Emit = Callable[[dict[str, Any]], None]

#: Generations in a row without one new merge after which the space counts as exhausted.
BARREN_GENERATIONS = 3
#: Gradients in a row that did not come (no memory, a worker lost) after which none is asked.
FRUITLESS_GRADIENTS = 2
#: Merges whose item results are kept in memory.
KEPT_RESULTS = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """What ``select`` found. open_slots: candidates of this generation still to be scored."""

    best: Candidate | None
    stop_reason: str = ""
    open_slots: list[tuple[int, int]] = field(default_factory=list)
    generation: int = 0

    def update(self) -> SearchState:
        best = self.best
        return SearchState(
            generation=self.generation,
            best=[best.generation, best.slot] if best else None,
            best_score=best.score if best else None,
            stop_reason=self.stop_reason,
        )


@dataclass
class Search:
    """A search with its doors open; see the module's head.

    identities: model name -> content fingerprint; paths: -> its directory.
    check: raises RecipeRejected for a recipe that cannot be merged, from headers alone.
    deadline: ``time.monotonic`` value, or None.
    replies_of: the run whose stored replies answer for the models; by default its own.
    stopping: set by the first Ctrl-C; candidates that have not begun are left open.
    still_mine: raises LeaseHeld where another process took the search over.
    noises: of pairs of recipe hashes, as ``advising.paired_noise`` found them. views: what an agent
        was shown last, by the state of the candidates, the generation and who asks.
    """

    config: SearchConfig
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
    emit: Emit
    paths: Mapping[str, Path] = field(default_factory=dict)
    replies_of: str | None = None
    deadline: float | None = None
    stopping: Callable[[], bool] = lambda: False
    still_mine: Callable[[], None] = lambda: None
    noises: dict[tuple[str, str], float] = field(default_factory=dict)
    views: dict[Any, HistoryView] = field(default_factory=dict)
    _had_no_proposal: int = -1
    _written: str = ""
    _items: OrderedDict[tuple[str, Part], dict[ItemRef, ItemResult]] = field(
        default_factory=OrderedDict
    )
    _seconds: list[float] = field(default_factory=list)
    _told: tuple[int, dict[Any, list[Observation]]] = field(default_factory=lambda: (-1, {}))
    _points: dict[tuple[str, str], tuple[float, ...] | None] = field(default_factory=dict)

    @cached_property
    def book(self) -> Book:
        """This run in memory, read when it is first asked."""
        return Book(self.ledger, self.run_id)

    # --- nodes ------------------------------------------------------------------------------

    def seed(self) -> int:
        """Write generation 0, unless this search has a past (a branch, or this node ran before).

        A branch whose settings make old scores incomparable starts a generation of its own: the
        cheap rivals and the old incumbent, scored again.
        """
        past = self.book.candidates()
        if not past:
            if not self.evaluations_left:
                raise UserError(
                    f"budget.max_items {self.config.budget.max_items} pays for no candidate: "
                    f"one is asked {self._items_each} items, and the end {self.ending_items} "
                    "sealed ones"
                )
            self._add(0, self._seed_population(self.evaluations_left))
            return 0
        last = past[-1].generation
        if all(candidate.prior for candidate in past):
            known = [c for c in past if c.score is not None and c.operator != "parent"]
            found = (self._again(c) for c in sorted(known, key=lambda c: c.rank))
            again = [proposal for proposal in found if proposal is not None][:1]
            self._add(last + 1, [*again, *self._rivals()][: self.evaluations_left])
            return last + 1
        return last

    def first_state(self, generation: int) -> SearchState:
        return SearchState(
            run_id=self.run_id,
            graph_version=GRAPH_VERSION,
            settings_hash=self.settings_hash,
            generation=generation,
            status="running",
            stop_reason="",
        )

    def open_slots(self, generation: int) -> list[tuple[int, int]]:
        return [
            (c.generation, c.slot) for c in self.book.candidates(generation) if c.state == "open"
        ]

    def evaluate(self, generation: int, slot: int) -> None:
        """Score one candidate and commit what it cost; a bad candidate becomes a failed row.

        So does one that loses two workers, or breaks a task's code, once another has been scored:
        until then it is the machine or the task.
        """
        candidate = self.book.find(generation, slot)
        # Where a server's checkpoint is ahead of the ledger there is none: `select` puts it right.
        if candidate is None or candidate.state != "open" or not self.wanted():
            return
        self.emit({"event": "evaluate", "generation": generation, "slot": slot})
        recipe = Recipe.parse(self.ledger.recipe(candidate.recipe_hash, self.run_id))
        try:
            lost, spent = run_heats(self, candidate, recipe)
            if lost is not None:
                self._save_loser(candidate, lost, spent)
                return
            answers = self.scoring.ask(recipe, candidate.recipe_hash, wanted=self.wanted)
            if candidate.want == "gradient":  # whatever becomes of it, these are paid for
                self.scoring.save(answers)
            score = self.taskset.score(answers.results)
            self._seconds += [answers.seconds] if answers.paid else []
            slope, more_seconds = self._slope(candidate, recipe)
        except NotBegun:
            return  # left open: whoever goes on with this search scores it
        except (CandidateFailed, TaskError, WorkerLost) as error:
            if not isinstance(error, CandidateFailed) and self._all_may_fail(error):
                raise
            self.book.save_evaluation((generation, slot), score=None, failure=str(error))
            if isinstance(error, AnswerRefused) and candidate.operator == "parent":
                # Of a model that was there before the search: told at once, and kept, so that
                # whoever does not mind can go on.
                raise TaskError(
                    f"{error}; that was the parent {short_name(candidate.label)!r}: mend the task, "
                    "or resume, which goes on without this parent"
                ) from error
        else:
            self.book.save_evaluation(
                (generation, slot),
                score=score.value,
                tasks=score.tasks,
                reused=not answers.paid and not spent,
                counts=answers.counts,
                seconds=spent + answers.seconds + more_seconds,
                fingerprint=answers.fingerprint,
                results=answers.paid,
                slope=slope,
            )
        self.emit(self._candidate_event(self.book.candidate(generation, slot)))

    def _all_may_fail(self, error: AgentmergeError) -> bool:
        """Whether a fault is perhaps not this candidate's alone."""
        found = self.book.candidates()
        return isinstance(error, NoWorker) or all(c.score is None or c.prior for c in found)

    def select(self, generation: int) -> Outcome:
        """Find the incumbent, save its recipe, and decide what comes next."""
        self.still_mine()
        candidates = self._judged()
        if candidates[-1].generation < generation != self._had_no_proposal:
            # The strategy had none, or the ledger is behind the graph's checkpoint: it decides.
            generation = self.propose(candidates[-1].generation)
            candidates = self._judged()
        if self._complete(generation, candidates):
            candidates = self._judged()
        best = incumbent(candidates)
        if best is not None:
            self._write_best(best)
        if self.seconds_left <= self._ending_s:
            return Outcome(best, "timeout", generation=generation)
        still_open = [
            (c.generation, c.slot)
            for c in candidates
            if c.generation == generation and c.state == "open"
        ]
        if still_open:
            return Outcome(best, open_slots=still_open, generation=generation)
        self.emit(
            {
                "event": "generation",
                "generation": generation,
                "evaluations": counted(self.book.evaluations()),
                "best": None if best is None else best.score,
            }
        )
        limit = self.config.search.max_generations
        reason = ""
        if not self.evaluations_left:
            reason = "budget"
        elif limit is not None and generation >= limit:
            reason = "generations"
        elif generation and best is None:
            reason = "every candidate failed"
        elif _barren(candidates, generation):
            reason = "nothing new"
        elif candidates[-1].generation < generation:
            reason = "nothing more to gain"  # the strategy had no proposal
        return Outcome(best, reason, generation=generation)

    def advise(self, role: Role, generation: int) -> str:
        """Ask one agent and keep its word; without a model, or where it fails, its rules speak.

        Returns the limit that does not allow it, or "".
        """
        return advise(self, role, generation)

    def propose(self, generation: int) -> int:
        """Let the strategy write the next generation; returns its number."""
        candidates = self.book.candidates()
        if candidates[-1].generation > generation:
            return generation + 1  # this node ran before
        left = self.evaluations_left
        own_share = max(1, round(left * (1 - self.config.search.shadow))) if left else 0
        asked: list[Proposal] = []
        for space in self.standing(generation).turn:
            asked = asked or self.asked(space, generation, own_share)
        shadow = shadow_proposals(self, asked, left - sum(p.cost for p in asked))
        self._add(generation + 1, [*asked, *shadow])
        if not asked and not shadow:
            self._had_no_proposal = generation + 1
        return generation + 1

    def asked(self, space: SearchSpace, generation: int, left: int) -> list[Proposal]:
        """What the next generation asks in a space."""
        history = self.told(generation, space=space)
        own = any(o.space == space.key for o in history)
        found: list[Proposal] = [] if own else first_points(space, history, self._recipe)
        if not found:
            if getattr(self.strategy, "uses_items", False):
                bound = self.config.search.constraints
                known = self.book.candidates(up_to=generation) if bound else []
                history = self.witness.of(history, self.floors(known))
            guidance = guidance_of(self.book, generation)
            if space.key != self.standing(generation, decided=False).turn[0].key:
                guidance = replace(guidance, mean=None, candidates=(), forecasts=())
            count = min(self.population(space), left)
            found = self.strategy.propose(space, history, guidance, count, self._rng())
        return _affordable(self._possible(space, found), left)

    # --- structure --------------------------------------------------------------------------

    def standing(self, generation: int, *, decided: bool = True) -> Standing:
        """The search spaces after a generation; decided: with what was decided after it."""
        moves = [
            opening
            for opening in openings(self.book.advice(role=STRUCTURE))
            if opening.generation < generation + decided
        ]
        if not moves:
            return standing(self.space, (), ())
        return standing(self.space, moves, self.book.candidates(up_to=generation))

    @property
    def present(self) -> SearchSpace:
        """The space that the next generation's first turn is in."""
        candidates = self.book.candidates()
        return self.standing(candidates[-1].generation if candidates else 0).turn[0]

    def _recipe(self, observation: Observation) -> Recipe:
        return Recipe.parse(self.ledger.recipe(observation.recipe_hash, self.run_id))

    def _point(self, space: SearchSpace, observation: Observation) -> tuple[float, ...] | None:
        """Where another space's candidate lies in this one."""
        key = (space.key, observation.recipe_hash)
        if key not in self._points:
            try:
                self._points[key] = space.vector(self._recipe(observation))
            except AgentmergeError:
                self._points[key] = None  # refused, or nothing that this space can say
        return self._points[key]

    def finish(self, stop_reason: str) -> SearchState:
        """Choose the answer, confirm it on sealed items, write recipe and card."""
        self.still_mine()
        self.emit({"event": "finish", "reason": stop_reason})
        candidates = self.book.candidates()
        card: dict[str, Any] = {}
        if incumbent(candidates) is not None:
            card = final_card(self, candidates)
            card["notes"] += self._unused(stop_reason)
            if self.config.search.shadow:
                card["uplift"] = uplift(self, candidates)
            self._write_best(self.book.candidate(*card["answer"]["candidate"]))
        self.ledger.update_run(
            self.run_id, status="done", stop_reason=stop_reason, result=card or None
        )
        self.emit({"event": "done", "reason": stop_reason, "card": card})
        return SearchState(status="done", stop_reason=stop_reason)

    def _unused(self, stop_reason: str) -> list[str]:
        """Why evaluations are left, where neither a limit nor a person ended the search."""
        why = {
            "nothing more to gain": "has nothing more to propose",
            "nothing new": "proposes only merges that were tried",
        }.get(stop_reason)
        left = self.evaluations_left
        if why is None or not left:
            return []
        told = f"{left} evaluations are left: {self.config.algorithm} {why}, and "
        move = wanted_move(self, self.book.candidates()[-1].generation, least=0)
        if move is not None:
            return [
                f"{told}another search space ({move.change} {move.value}) is opened only while "
                f"{WORTH} are: resume with {WORTH - left} more evaluations, at least"
            ]
        return [
            f"{told}a larger budget changes nothing; a branch with another strategy goes on from "
            "here"
        ]

    # --- scoring ----------------------------------------------------------------------------

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.ledger, self.taskset, self.pool)

    @cached_property
    def course(self) -> Course:
        return Course(self.taskset)

    @cached_property
    def witness(self) -> Witness:
        return Witness(self.taskset, self.item_results)

    @property
    def slopes(self) -> Slopes:
        return Slopes(self.ledger, self.taskset, self.pool, self.identities)

    def told(
        self,
        up_to: int | None = None,
        *,
        shadow: bool = False,
        space: SearchSpace | None = None,
    ) -> list[Observation]:
        """The history as strategies and agents are told it. shadow: as the arm without them is.

        What was scored under other settings has its score under these where the ledger held all
        items' results when the branch began, else none.
        space: the one to look from; by default every vector is in the space that it was made in.
        Not to be changed: whoever asks again before a candidate changes is told the same.
        """
        asked = (up_to, shadow, space and space.key)
        changes, told = self._told
        if changes != self.book.changes:
            self._told = changes, told = self.book.changes, {}
        if asked not in told:
            told[asked] = self._history(up_to, shadow, space)
        return told[asked]

    def _history(
        self, up_to: int | None, shadow: bool, space: SearchSpace | None
    ) -> list[Observation]:
        history = self.book.history(up_to)
        if any(o.prior for o in history):
            constrained = self.config.search.constraints
            known = self.book.candidates(up_to=up_to) if constrained else []
            history = comparable(history, self._score_now, self.floors(known))
        history = penalised(history, self.taskset.objectives)
        history = [o if o.space else replace(o, space=self.space.key) for o in history]
        if self.config.search.shadow:
            first = first_generation(self.book.candidates(up_to=up_to))
            history = heard(history, first, shadow=shadow)
        if space is None:
            return history
        # After the arms are told apart: seen from another space, a candidate has no operator.
        history = carried(history, space, partial(self._point, space))
        dimensions = space.dimensions
        for o in history:
            if o.vector is not None and len(o.vector) != dimensions:
                raise LedgerError(
                    f"candidate {o.generation}.{o.slot} has {len(o.vector)} coordinates, and its "
                    f"search space {dimensions}: the ledger was edited, or made by another "
                    "version; start anew"
                )
        return history

    @cached_property
    def _rescored(self) -> dict[str, Score]:
        """Recipe hash -> the present score of what a branch's past had asked in full."""
        covered = self.ledger.run(self.run_id).facts.get("rescored", ())
        return {found: self.taskset.score(self.item_results(found)) for found in covered}

    def _score_now(self, recipe_hash: str) -> Score | None:
        return self._rescored.get(recipe_hash)

    def floors(self, candidates: Sequence[Candidate]) -> list[Floor]:
        return floors(self.config.search.constraints, self.taskset.objectives, candidates)

    def _judged(self) -> list[Candidate]:
        """All candidates, their violations brought up to date."""
        candidates = self.book.candidates()
        if not self.config.search.constraints:
            return candidates
        bounds = self.floors(candidates)
        found = {(c.generation, c.slot): violation(bounds, dict(c.tasks)) for c in candidates}
        self.book.save_violations(found)
        return self.book.candidates()

    def best_before(self, candidate: Candidate) -> Candidate | None:
        """The incumbent of its generation and arm, whatever of that generation is scored."""
        found = self.book.candidates(up_to=candidate.generation - 1)
        return incumbent(arm_of(found, shadow=candidate.operator == SHADOW))

    def _save_loser(self, candidate: Candidate, lost: Lost, seconds: float) -> None:
        self.book.save_evaluation(
            (candidate.generation, candidate.slot),
            score=None,
            reused=not seconds,
            counts=lost.answers.counts,
            seconds=seconds,
            fingerprint=lost.answers.fingerprint,
            results=lost.answers.paid,
            lost=(lost.estimate, lost.rung, lost.share),
        )
        stored = self.book.candidate(candidate.generation, candidate.slot)
        self.emit(self._candidate_event(stored))

    def _slope(
        self, candidate: Candidate, recipe: Recipe
    ) -> tuple[tuple[GradientKey, Gradient, tuple[float, ...]] | None, float]:
        """A candidate's gradient with itself in the unit box, if it wants one, and the seconds.

        One that fails, in whatever way, is told and left out: the score stands without it.
        """
        if candidate.want != "gradient" or candidate.loss_kind is None:
            return None, 0.0
        slopes = self.slopes
        try:
            key, kept, seconds = slopes.ask(
                recipe, candidate.recipe_hash, candidate.loss_kind, self.wanted
            )
            space = self.standing(candidate.generation).of(candidate.space)
            unit = unit_gradient(space, candidate.vector or (), slopes.named(kept))
        except (CandidateFailed, TaskError, WorkerLost) as error:
            at = {"generation": candidate.generation, "slot": candidate.slot}
            self.emit({"event": "no_gradient", "failure": str(error)} | at)
            return None, 0.0
        return (key, kept, unit), seconds

    def item_results(self, recipe_hash: str, part: Part = "search") -> dict[ItemRef, ItemResult]:
        """What the ledger knows of a recipe's items, without paying for anything.

        Not to be changed: the last few that are whole are kept, the incumbent's above all.
        """
        key = (recipe_hash, part)
        found = self._items.pop(key, None) or self.scoring.known(recipe_hash, part)
        if len(found) == len(set(self.taskset.refs(part))):
            self._items[key] = found
            if len(self._items) > KEPT_RESULTS:
                self._items.popitem(last=False)
        return found

    def confirm(self, candidate: Candidate) -> dict[ItemRef, ItemResult]:
        """Sealed items' results of a candidate, paid for once and kept.

        Raises:
            CandidateFailed, NotBegun, WorkerLost, TaskError: as the pool does.
            BudgetReached: no time is left.
        """
        recipe = Recipe.parse(self.ledger.recipe(candidate.recipe_hash, self.run_id))
        in_time = self.seconds_left > 0
        try:
            answers = self.scoring.ask(
                recipe, candidate.recipe_hash, "sealed", lambda: in_time and not self.stopping()
            )
        except NotBegun:
            if self.seconds_left < 1 and not self.stopping():  # the pool's clock may be a bit ahead
                raise BudgetReached("timeout") from None
            raise
        self.scoring.save(answers)
        return answers.results

    @property
    def evaluations_left(self) -> int:
        """What of the budget is neither used nor promised to an open candidate."""
        return math.floor(self.budget_left() + 1e-9)

    @property
    def items_left(self) -> int:
        """The same in items."""
        return math.floor(self.budget_left() * self._items_each + 1e-9)

    def budget_left(self, up_to: int | None = None) -> float:
        """The budget in evaluations, as it was before what agents did after generation ``up_to``.

        Items that tools asked beside candidates are parts of evaluations.
        """
        budget = self.config.budget
        probed = self.book.probe_totals(None if up_to is None else up_to - 1)
        used = self.book.evaluations(up_to, promised=True)
        used += probed["items"] / self._items_each
        left = budget.max_evaluations - used
        if budget.max_items is not None:
            left = min(left, (budget.max_items - self.ending_items) / self._items_each - used)
        return max(0.0, left)

    @property
    def ending_items(self) -> int:
        """The sealed items that the end asks, at most, where each merge has a finite answer: of the
        parents, the best cheap merge, the answer, and the other arm's best."""
        merges = len(self.space.genome.parents) + 2 + bool(self.config.search.shadow)
        return merges * len(set(self.taskset.refs("sealed")) - set(self.taskset.refs("search")))

    @property
    def _ending_s(self) -> float:
        """How long that takes, by the candidates that were scored."""
        if not self._seconds:
            return 0.0
        return statistics.median(self._seconds) * self.ending_items / self._items_each

    @property
    def _items_each(self) -> int:
        return max(1, len(self.taskset.refs("search")))

    # --- proposing --------------------------------------------------------------------------

    def population(self, space: SearchSpace) -> int:
        own = self.strategy.population(space.dimensions)
        return self.config.generation_size(own)

    def _rng(self) -> Any:
        return rng_factory(self.config.search.seed)

    def _rivals(self) -> list[Proposal]:
        """Parents, the uniform merge, a five-point uniform scale, a line through the depth."""
        found = [
            _proposal(point, recipe, "parent", label)
            for label, recipe, point in self.space.parents()
        ]
        recipe, point = self.space.uniform()
        found.append(_proposal(point, recipe, "uniform", "uniform"))
        lines = {"scale": self.space.scale_points(), "depth": self.space.depth_line()}
        for operator, points in lines.items():
            found += [_proposal(point, recipe, operator, label) for label, recipe, point in points]
        return found

    def _seeds(self) -> list[Proposal]:
        """The cheap rivals, and the warm starts."""
        seeds = self._rivals()
        for path in self.config.search.init:
            recipe = warm_start(path).canonical(self.space.num_layers)
            try:
                point = self.space.vector(recipe)
            except RecipeRejected:
                point = None  # outside the space, and perhaps refused: `_add` says why
            seeds.append(_proposal(point, recipe, "init", Path(path).name))
        return seeds

    def _seed_population(self, budget: int) -> list[Proposal]:
        seeds = self._seeds()
        left = budget - len(seeds)
        draws = self.strategy.propose(
            self.space, [], None, max(0, min(self.population(self.space), left)), self._rng()
        )
        if self.config.search.random_init and not draws:
            points = random_vectors(
                self.space, 0, max(0, min(self.population(self.space), left)), self._rng()
            )
            draws = [Proposal(point, "random") for point in points]
        return _affordable([*seeds, *self._possible(self.space, draws)], budget)

    def _complete(self, generation: int, candidates: Sequence[Candidate]) -> bool:
        """Ask what a smaller budget left out of the first generation; whether there was any.

        A search whose limits were raised has to beat the same rivals as one that had them at once.
        """
        left = self.evaluations_left
        if not left or not generation == first_generation(candidates) == candidates[-1].generation:
            return False
        begun = [c for c in candidates if c.generation == generation]
        asked = [(c.operator, c.label) for c in begun if c.operator != "incumbent"]
        whole = self._rivals() if generation else self._seeds()  # a branch's begins with rivals
        if asked != [(p.operator, p.label) for p in whole][: len(asked)] or asked[len(whole) - 1 :]:
            return False
        if not generation:
            whole = self._seed_population(left + len(begun))
        self._add(generation, whole[len(asked) :][:left], len(begun))
        return True

    def _possible(self, space: SearchSpace, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The same, in this space, asking for a score alone where no gradient can be had.

        What an agent asked for is asked as it is, so that it hears why it is no merge.
        """
        possible = space.method.differentiable and self.slopes.possible and not self._no_slope
        return [
            replace(
                p,
                vector=space.made_legal(p.vector)
                if p.vector and p.operator != ADVICE
                else p.vector,
                space=space.key,
                want=p.want if possible and p.vector else "score",
            )
            for p in proposals
        ]

    @property
    def _no_slope(self) -> bool:
        """Whether the last gradients that were asked never came: none is asked any more."""
        found = self.book.candidates()
        asked = [c for c in found if c.want == "gradient" and c.state == "scored" and not c.prior]
        last = asked[-FRUITLESS_GRADIENTS:]
        return len(last) == FRUITLESS_GRADIENTS and all(c.gradient is None for c in last)

    def _again(self, candidate: Candidate) -> Proposal | None:
        """A candidate of before as the merge that it is; None where its models are not here.

        Its vector may be another space's: here it has the point of its recipe, if there is one.
        """
        recipe = Recipe.parse(self.ledger.recipe(candidate.recipe_hash, self.run_id))
        if not set(recipe.models) <= set(self.identities):
            return None
        point = self._point(self.space, candidate.observation())
        if point and self.space.recipe(point).hash(self.identities) == candidate.recipe_hash:
            return Proposal(point, "incumbent")
        return Proposal(None, "incumbent", recipe.to_yaml())

    def _add(self, generation: int, proposals: Sequence[Proposal], first_slot: int = 0) -> None:
        rows: list[tuple[Proposal, str, str, str]] = []
        spaces = self.standing(generation)
        for proposal in proposals:
            failure = ""
            proposal = replace(proposal, space=proposal.space or self.space.key)
            try:
                if proposal.recipe is not None:
                    recipe = Recipe.parse(proposal.recipe).at(self.space.dtype)
                    recipe = recipe.canonical(self.space.num_layers)
                else:
                    recipe = spaces.of(proposal.space).recipe(proposal.vector or ())
                text, recipe_hash = recipe.to_yaml(), recipe.hash(self.identities)
                self.check(recipe)
            except RecipeRejected as error:
                failure = str(error)
                text, recipe_hash = (
                    proposal.recipe or "",
                    f"refused-{generation}-{first_slot + len(rows)}",
                )
            rows.append((proposal, recipe_hash, text, failure))
        self.book.add_candidates(generation, rows, first_slot)

    # --- small things -----------------------------------------------------------------------

    @property
    def seconds_left(self) -> float:
        return math.inf if self.deadline is None else self.deadline - time.monotonic()

    def wanted(self) -> bool:
        return not self.stopping() and self.seconds_left > self._ending_s

    def _write_best(self, best: Candidate) -> None:
        """best.yml, replaced in one step: it is whole at every moment."""
        path = self.run_dir / "best.yml"
        if best.recipe_hash == self._written and path.exists():
            return
        text = self.ledger.recipe(best.recipe_hash, self.run_id)
        try:
            write_at_once(path, text)
        except OSError as error:
            raise RunFailed(f"{path} cannot be written: {error}; mend that, then resume") from error
        self._written = best.recipe_hash

    def _candidate_event(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "event": "candidate",
            "generation": candidate.generation,
            "slot": candidate.slot,
            "operator": candidate.operator,
            "label": candidate.label,
            "score": candidate.score,
            "tasks": dict(candidate.tasks),
            "failure": candidate.failure,
            "estimate": candidate.estimate,
            "reused": candidate.reused,
            "seconds": candidate.seconds,
        }


def _affordable(proposals: Sequence[Proposal], left: int) -> list[Proposal]:
    """As many as the budget allows, in order; a gradient that it does not is asked as a score."""
    found: list[Proposal] = []
    for proposal in proposals:
        if proposal.want == "gradient" and left <= GRADIENT_COST:
            proposal = replace(proposal, want="score")
        left -= proposal.cost
        if left < 0:
            break
        found.append(proposal)
    return found


def _barren(candidates: Sequence[Candidate], generation: int) -> bool:
    recent = [c for c in candidates if c.generation > generation - BARREN_GENERATIONS]
    return generation >= BARREN_GENERATIONS and all(c.state == "twin" for c in recent)


def _proposal(
    point: tuple[float, ...] | None, recipe: Recipe, operator: str, label: str
) -> Proposal:
    return Proposal(point, operator, None if point else recipe.to_yaml(), label)
