"""One candidate's score: its race against the incumbent, its items, its gradient, its row.

In a race it is asked rung by rung, and dropped once it has lost. Only losers stop early. A winner
is asked everything, so that scores are always of the same items; what a rung showed is in the
ledger before the next begins, and is never asked twice. The incumbent is the best before this
generation, whatever finishes meanwhile. All of a candidate is one piece of work for the worker
pool, from ``dispatch`` to ``collect``. Knows no strategy.
"""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

from agentmerge.contracts.events import Evaluate, NoGradient
from agentmerge.contracts.operators import PARENT, PROBE, SHADOW, SHALLOWER
from agentmerge.contracts.worker import Gradient
from agentmerge.errors import (
    AgentmergeError,
    AnswerRefused,
    BudgetReached,
    CandidateFailed,
    NotBegun,
    NoWorker,
    TaskError,
    WorkerLost,
)
from agentmerge.evaluation.tasks import Score
from agentmerge.ledger import Candidate, GradientKey, incumbent
from agentmerge.recipe import Recipe
from agentmerge.recipe.names import short_name
from agentmerge.search import budget
from agentmerge.search.constraints import violation
from agentmerge.search.past import arm_of
from agentmerge.search.scoring import Answers, there
from agentmerge.search.search import Search
from agentmerge.search.window import horizon, within
from agentmerge.space.chain_rule import unit_gradient


def dispatch(search: Search, generation: int) -> None:
    """Hand every open candidate, up to a generation, to the pool, unless it is there already."""
    for candidate in search.book.pending(generation):
        at = (candidate.generation, candidate.slot)
        if at not in search.dispatched:
            # In a context like this one, in which what is told reaches whoever streams the graph.
            context = copy_context()
            search.dispatched[at] = search.pool.submit(context.run, evaluate, search, *at)


def collect(search: Search, generation: int, *, whole: bool = False) -> None:
    """Wait until all that was handed out and the next proposal is to know has ended; what it cost
    is in the ledger by then. whole: until all that was handed out has.

    Raises:
        AgentmergeError: what no candidate is to blame for; those that had not begun stay open.
    """
    known = generation if whole else horizon(search, generation)
    due = [turn for at, turn in search.dispatched.items() if at[0] <= known]
    beside = [turn for at, turn in search.dispatched.items() if at[0] > known]
    try:
        search.pool.wait(due, beside)
    finally:
        ended = {at: turn for at, turn in search.dispatched.items() if turn.done()}
        for at in ended:
            del search.dispatched[at]
    for turn in ended.values():
        error = None if turn.cancelled() else turn.exception()
        if error is not None and not isinstance(error, NotBegun):
            raise error


def judged(search: Search) -> list[Candidate]:
    """All candidates, their violations brought up to date."""
    candidates = search.book.candidates()
    if not search.config.search.constraints:
        return candidates
    bounds = search.floors(candidates)
    found = {(c.generation, c.slot): violation(bounds, dict(c.tasks), c.tokens) for c in candidates}
    search.book.save_violations(found)
    return search.book.candidates()


def evaluate(search: Search, generation: int, slot: int) -> None:
    """Score one candidate and commit what it cost; a bad candidate becomes a failed row.

    So does one that loses two workers, or breaks a task's code, once another has been scored:
    until then it is the machine or the task.
    """
    candidate = search.book.find(generation, slot)
    # Where a server's checkpoint is ahead of the ledger there is none: `select` puts it right.
    if candidate is None or candidate.state != "open" or not budget.wanted(search):
        return
    turns = [*search.dispatched.values()]
    waiting = sum(not (turn.running() or turn.done()) for turn in turns)
    worker = getattr(search.pool, "mine", None)
    search.emit(Evaluate(generation=generation, slot=slot, worker=worker, waiting=waiting))
    recipe = Recipe.parse(search.ledger.recipe(candidate.recipe_hash, search.run_id))
    try:
        lost, spent = _race(search, candidate, recipe)
        if lost is not None:
            _save_loser(search, candidate, lost, spent)
            return
        answers = search.scoring.ask(
            recipe, candidate.recipe_hash, wanted=partial(budget.wanted, search)
        )
        if candidate.want == "gradient":  # whatever becomes of it, these are paid for
            search.scoring.save(answers)
        score = _score(search, candidate, answers)
        if answers.paid:
            search.seconds.append(answers.seconds)
        slope, more_seconds = _slope(search, candidate, recipe)
    except NotBegun:
        return  # left open: whoever goes on with this search scores it
    except BudgetReached as limit:
        search.reached.add(limit.limit)  # of a judge; its verdicts so far are kept
        return
    except (CandidateFailed, TaskError, WorkerLost) as error:
        if not isinstance(error, CandidateFailed) and _all_may_fail(search, error):
            raise
        search.book.save_evaluation((generation, slot), score=None, failure=str(error))
        if isinstance(error, AnswerRefused) and candidate.operator == PARENT:
            # Of a model that was there before the search: told at once, and kept, so that
            # whoever does not mind can go on.
            raise TaskError(
                f"{error}; that was the parent {short_name(candidate.label)!r}: mend the task, "
                "or resume, which goes on without this parent"
            ) from error
    else:
        search.book.save_evaluation(
            (generation, slot),
            score=score.value,
            tasks=score.tasks,
            reused=not answers.paid and not spent,
            counts=answers.counts,
            seconds=spent + answers.seconds + more_seconds,
            fingerprint=answers.fingerprint,
            results=answers.paid,
            slope=slope,
            tokens=search.taskset.tokens(answers.results),
        )
    search.emit(search.book.candidate(generation, slot).event())


def _score(search: Search, candidate: Candidate, answers: Answers) -> Score:
    """A candidate's score; of one whose judge left items out, beside the incumbent before it."""
    beside = None
    if any(result.missing for result in answers.results.values()):
        best = _best_before(search, candidate)
        if best is not None:
            beside = dict(best.tasks), search.item_results(best.recipe_hash)
    return search.taskset.score(answers.results, beside=beside)


def _all_may_fail(search: Search, error: AgentmergeError) -> bool:
    """Whether a fault is perhaps not this candidate's alone."""
    found = search.book.candidates()
    return isinstance(error, NoWorker) or all(c.score is None or c.prior for c in found)


@dataclass(frozen=True, slots=True)
class Lost:
    """estimate: of its score. rung: the fraction of every task that it was asked. share: of all
    items. answers: of these items; the last rung's are not saved yet."""

    estimate: float
    rung: float
    share: float
    answers: Answers


def _race(search: Search, candidate: Candidate, recipe: Recipe) -> tuple[Lost | None, float]:
    """The rungs below the last, and the seconds they took; None where it has not lost on them.

    Raises:
        CandidateFailed, NotBegun, WorkerLost: as the pool does.
    """
    racing = search.config.search.racing
    course = search.course
    if racing is None or not course.raceable or candidate.want == "gradient":
        return None, 0.0
    # Who asks by a tool waits for a score; a rung of the table of depths is weaker, and belongs in.
    if candidate.operator in (PROBE, SHALLOWER):
        return None, 0.0
    best = _best_before(search, candidate)
    if best is None or best.score is None or best.violation:
        return None, 0.0
    theirs = search.item_results(best.recipe_hash)
    whole = len(search.taskset.refs("search"))
    seconds = 0.0
    for rung in racing.rungs:
        refs = course.refs(rung)
        if len(refs) == whole:
            break
        answers = search.scoring.ask(
            recipe, candidate.recipe_hash, wanted=partial(budget.wanted, search), only=refs
        )
        seconds += answers.seconds
        mine = there({ref: answers.results[ref] for ref in refs})
        evidence, ahead = course.evidence(rung, mine, theirs)
        if ahead < 0 and evidence * racing.alpha >= 1.0:
            return Lost(best.score + ahead, rung, len(refs) / whole, answers), seconds
        search.scoring.save(answers)
    return None, seconds


def _best_before(search: Search, candidate: Candidate) -> Candidate | None:
    """The incumbent of its generation and arm, whatever of that generation is scored."""
    before = candidate.generation - 1
    found = within(search, before, whole=False).book.candidates(up_to=before)
    return incumbent(arm_of(found, shadow=candidate.operator == SHADOW))


def _save_loser(search: Search, candidate: Candidate, lost: Lost, seconds: float) -> None:
    search.book.save_evaluation(
        (candidate.generation, candidate.slot),
        score=None,
        reused=not seconds,
        counts=lost.answers.counts,
        seconds=seconds,
        fingerprint=lost.answers.fingerprint,
        results=lost.answers.paid,
        lost=(lost.estimate, lost.rung, lost.share),
    )
    search.emit(search.book.candidate(candidate.generation, candidate.slot).event())


def _slope(
    search: Search, candidate: Candidate, recipe: Recipe
) -> tuple[tuple[GradientKey, Gradient, tuple[float, ...]] | None, float]:
    """A candidate's gradient with itself in the unit box, if it wants one, and the seconds.

    One that fails, in whatever way, is told and left out: the score stands without it.
    """
    if candidate.want != "gradient" or candidate.loss_kind is None:
        return None, 0.0
    slopes, recipe_hash = search.gradients, candidate.recipe_hash
    seen = within(search, candidate.generation, whole=False)
    space = seen.trials(candidate.generation).of(candidate.space)
    if space.stacks is not None:  # absent layers have slopes too
        recipe = space.slope_recipe(candidate.vector or ())
        recipe_hash = recipe.hash(search.identities)
    try:
        key, kept, seconds = slopes.ask(
            recipe, recipe_hash, candidate.loss_kind, partial(budget.wanted, search)
        )
        unit = unit_gradient(space, candidate.vector or (), slopes.named(kept))
    except (CandidateFailed, TaskError, WorkerLost) as error:
        place = {"generation": candidate.generation, "slot": candidate.slot}
        search.emit(NoGradient(failure=str(error), **place))
        return None, 0.0
    return (key, kept, unit), seconds
