"""What a search was worth, in words: the verdict, and the notes that belong on its card.

Knows candidates, the card's rows and differences; asks and decides nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter

from agentmerge.contracts.card import Compared, Difference
from agentmerge.contracts.operators import CHEAP, PARENT, RIVALS
from agentmerge.evaluation.statistics import Interval, figure
from agentmerge.ledger import Candidate
from agentmerge.recipe.names import short_name


def name_of(candidate: Candidate) -> str:
    return candidate.label or f"{candidate.operator} {candidate.generation}.{candidate.slot}"


def verdict(
    answer: Candidate,
    scored: Sequence[Candidate],
    differences: Sequence[Difference],
    where: str,
    missing: Sequence[str] = (),
    *,
    unproven: bool = False,
) -> str:
    """What the search was worth, in a sentence or two, and nothing that was not asked.

    scored: every candidate with a score. differences: of the answer to parents and cheap merges.
    where: the items that they are of. missing: parents without a score. unproven: a searched merge
    is better on search items by no more than luck can do, and was not asked whether on others.
    """
    words = _worth(answer, scored, differences, where, unproven)
    best = min(differences, key=attrgetter("mean"), default=None)
    if answer.operator in CHEAP and best is not None and best.high < 0:
        turned = Interval(-best.mean, -best.high, -best.low)
        words += f" But {_called(best)} is ahead of it on {where} by {span(turned)}."
    if missing:
        words += f" Without a score: {', '.join(f'parent {short_name(name)}' for name in missing)}."
    return words


def _worth(
    answer: Candidate,
    scored: Sequence[Candidate],
    differences: Sequence[Difference],
    where: str,
    unproven: bool,
) -> str:
    noise = " beyond the noise" if unproven else ""
    name = short_name(answer.label) if answer.operator == PARENT else name_of(answer)
    if answer.operator == PARENT:
        if all(c.operator == PARENT for c in scored):
            return f"No merge was scored: {name} is the best of the parents that were."
        return f"No merge beat the parent {name}{noise}: use it as it is."
    if answer.operator in RIVALS:
        if all(c.operator in CHEAP for c in scored):
            return (
                f"No searched merge was scored: the cheap {name} merge is the best of the others."
            )
        told = " that these items could tell" if unproven else ""
        return f"Nothing beat the cheap {name} merge{noise}: there was nothing to gain{told}."
    if all(c.operator not in CHEAP for c in scored):
        return "There was no cheap rival to compare with."
    if not differences:
        return f"The cheap rivals cannot be compared with: there are too few {where}."
    best = min(differences, key=attrgetter("mean"))
    rival = f"the best cheap rival, {_called(best)},"
    if best.high < 0:
        return f"The searched merge is worse than {rival} on {where}: {span(best)}."
    if all(d.low > 0 for d in differences):
        return f"The searched merge beats {rival} on {where} by {span(best)}."
    near = min(differences, key=attrgetter("low"))
    rival = rival if near is best else f"{_called(near)}, a cheap rival,"
    return f"The searched merge and {rival} cannot be told apart on {where}: {span(near)}."


def _called(difference: Difference) -> str:
    if difference.operator == PARENT:
        return f"parent {short_name(difference.against)}"
    return f"the {difference.against} merge"


def span(found: Interval | Difference) -> str:
    mean, low, high = (figure(end, "+") for end in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high}, 95 %)"


def unasked(rows: Iterable[Compared]) -> list[str]:
    """Whom the sealed items could not compare, and why."""
    return [
        f"{short_name(row.name)} is not compared on sealed items: {row.sealed_failure}"
        for row in rows
        if row.sealed_failure is not None
    ]


def unfair(rows: Collection[Compared], chosen: Compared, items: int) -> list[str]:
    """A published ten-point gain was parents' answers being cut off more often: say so. Where all
    are cut alike, how many."""
    found = []
    if chosen.truncated:
        found.append(
            f"{chosen.truncated} of {items} prompts were cut to fit the context, so their "
            "beginnings were not asked; make them shorter, or give models a longer context"
        )
    for key, what in (("truncated", "prompts cut to fit"), ("cut_off", "answers cut off")):
        counts = {short_name(row.name): getattr(row, key) for row in rows}
        if len(set(counts.values())) > 1:
            some = [f"{name} {count}" for name, count in counts.items() if count]
            each = ", ".join([*some, "none of the others"] if len(some) < len(counts) else some)
            found.append(f"{what} differ between the compared models ({each}); compare with care")
    return found
