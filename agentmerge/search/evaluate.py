"""One candidate's race against the incumbent: asked rung by rung, dropped once it has lost.

Only losers stop early. A winner is asked everything, so that scores are always of the same items;
what a rung showed is in the ledger before the next begins, and is never asked twice. The incumbent
is the best before this generation, whatever finishes meanwhile. Knows no strategy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentmerge.ledger import Candidate
from agentmerge.recipe import Recipe
from agentmerge.search.probes import PROBE

if TYPE_CHECKING:
    from agentmerge.search.scoring import Answers
    from agentmerge.search.search import Search


@dataclass(frozen=True, slots=True)
class Lost:
    """estimate: of its score. rung: the fraction of every task that it was asked. share: of all
    items. answers: of these items; the last rung's are not saved yet."""

    estimate: float
    rung: float
    share: float
    answers: Answers


def run_heats(search: Search, candidate: Candidate, recipe: Recipe) -> tuple[Lost | None, float]:
    """The rungs below the last, and the seconds they took; None where it has not lost on them.

    Raises:
        CandidateFailed, NotBegun, WorkerLost: as the pool does.
    """
    racing = search.config.search.racing
    course = search.course
    if racing is None or not course.raceable or candidate.want == "gradient":
        return None, 0.0
    if candidate.operator == PROBE:  # who asks by a tool waits for a score
        return None, 0.0
    best = search.best_before(candidate)
    if best is None or best.score is None or best.violation:
        return None, 0.0
    theirs = search.item_results(best.recipe_hash)
    whole = len(search.taskset.refs("search"))
    seconds = 0.0
    for rung in racing.rungs:
        refs = course.refs(rung)
        if len(refs) == whole:
            break
        answers = search.scoring.ask(recipe, candidate.recipe_hash, wanted=search.wanted, only=refs)
        seconds += answers.seconds
        mine = {ref: answers.results[ref] for ref in refs}
        evidence, ahead = course.standing(rung, mine, theirs)
        if ahead < 0 and evidence * racing.alpha >= 1.0:
            return Lost(best.score + ahead, rung, len(refs) / whole, answers), seconds
        search.scoring.save(answers)
    return None, seconds
