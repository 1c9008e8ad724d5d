"""What the agents see of a search, as short as it can be said: tables, and digits that tell apart.

Our prompts are written with these variables. The long ones of ``agents.view`` say the same in
sentences and stay as they are: prompts of users' own are written with them, and stored searches
replay by what was asked. Knows no model and no prompt.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from agentmerge.agents.schemas import bounded_lines, clean_text
from agentmerge.agents.standings import ELITES
from agentmerge.agents.view import (
    HistoryView,
    TaskView,
    clear_axes,
    elites,
    ends,
    integers,
    last_move,
    observations,
    pressed,
    published,
    spread,
    standing,
)
from agentmerge.agents.view import variables as spelled_out
from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.strategy import Observation, fittest
from agentmerge.recipe.names import short_name

#: About so many numbers are in the table of candidates: a wide space shows fewer rows.
MAX_NUMBERS = 75
MIN_ROWS = 6
#: The last generation has this share of the rows, where it has so many.
_LAST_SHARE = 0.4
#: Parents that are shown with their tasks, but for those that are the best at one.
_MOST_PARENTS = 6
#: Failures that are shown.
_FAILURES = 2
#: Axes that are said to go with the score.
_CORRELATED = 3
#: What the critic said is told as far as whole lines fit in so many characters.
_CRITIQUE = 700
#: Where values lie close together: digits that tell apart a hundredth of the distance.
_MOST_DECIMALS = 4
#: Before the point, beyond three: larger numbers are written with their power of ten.
_MOST_DIGITS = 6
#: Marks a candidate that has the score of the best before it.
TIED = "="


def variables(view: HistoryView) -> dict[str, str]:
    """The prompt variables of the three roles that advise (prompts.COMMON and prompts.TABLES), as
    the Ladder releases them."""
    shown = view.released
    tables = _Tables(shown, _digits(shown))
    found = {
        "parents": _parents(shown),
        "objectives": _objectives(shown.tasks),
        "baselines": tables.baselines(),
        "space": _space(shown),
        "candidates": tables.candidates(),
        "scores": tables.scores(),
        "failed": _failed(shown),
        "facts": tables.facts(),
        "last_step": tables.last_step() or "- nothing moved",
        "parameters": _parameters(shown),
    }
    return spelled_out(view) | {name: published(view, text) for name, text in found.items()}


def critic_said(view: HistoryView, guidance: Guidance) -> dict[str, str]:
    """The variables of what the critic said: all of it, and without what the facts say already."""
    critique = published(view, guidance.critique) or "none"
    lines = critique.splitlines()
    facts = [published(view, line) for line in observations(view.released)]
    said = bounded_lines(lines, _CRITIQUE)
    if lines == facts[: len(lines)]:
        said = "nothing beyond the facts"
    return {"critique": critique, "critic_said": said}


@dataclass(frozen=True, slots=True)
class _Digits:
    """How many decimals tell the best candidates apart: of the score, and of each task."""

    score: int
    tasks: dict[str, int]


def _digits(view: HistoryView) -> _Digits:
    told = [*fittest(view.entries, ELITES + ELITES), *view.last, *view.standing.rivals]
    by_task = {task.name: [dict(e.tasks).get(task.name) for e in told] for task in view.tasks}
    return _Digits(
        _decimals([entry.score for entry in told]),
        {name: _decimals(values) for name, values in by_task.items()},
    )


def _decimals(values: Sequence[float | None]) -> int:
    """As many as show a tenth of how far most are from the first, which is the best, and of how far
    the nearest of the next few is."""
    best, *others = [v for v in values if v is not None and math.isfinite(v)] or [0.0]
    if not (distances := [abs(value - best) for value in others if value != best]):
        return 0
    nearest = [abs(value - best) for value in others[: ELITES - 1] if value != best]
    return 1 - math.floor(math.log10(min([statistics.median(distances), *nearest])))


def number(value: float, decimals: int = 0) -> str:
    """Three digits, or more where ``decimals`` asks for them."""
    if not math.isfinite(value) or not value:
        return "0" if value == 0 else str(value)
    three = 2 - math.floor(math.log10(abs(value)))
    if three > _MOST_DECIMALS + 2 or three < -_MOST_DIGITS:
        return f"{value:.3g}"
    places = max(0, three, min(decimals, _MOST_DECIMALS))
    text = f"{value:.{places}f}"
    if places:
        text = text.rstrip("0").rstrip(".")
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _parents(view: HistoryView) -> str:
    base = view.space.genome.base_model
    models = ", ".join(short_name(model) for model in view.space.genome.models)
    if base and base not in view.space.genome.models:
        models += f"; base {short_name(base)}"
    return models


def _objectives(tasks: Sequence[TaskView]) -> str:
    """In order; a metric once where the next task has it too."""
    lines = []
    for (metric, higher), found in groupby(tasks, lambda t: (t.metric, t.higher_is_better)):
        weighted = ", ".join(f"{task.name} {number(task.weight)}" for task in found)
        lines.append(f"{metric}, {'higher' if higher else 'lower'}: {weighted}")
    return "\n".join(lines)


def _parameters(view: HistoryView) -> str:
    """What each kind of axis does beside weights, as the merge method's table has it."""
    method, used = view.space.method, {axis.parameter for axis in view.axes} - {"weight"}
    found = [p for p in (*method.source, *method.shared) if p.name in used]
    return "".join(f" {p.name}: {p.doc}" for p in found)


def rows(view: HistoryView) -> list[Observation]:
    """The rows of the table, least to most fit: the best, and the ends of the last generation."""
    wide = view.space.dimensions + len(view.tasks) + 2
    most = max(MIN_ROWS, MAX_NUMBERS // wide)
    last = fittest(view.last, len(view.last))
    kept = min(len(last), int(most * _LAST_SHARE))
    ends = last[: (kept + 1) // 2] + last[len(last) - kept // 2 :]
    best = [entry for entry in fittest(view.entries, most) if entry not in ends]
    chosen = ends + best[: most - kept]
    return fittest(chosen, len(chosen))[::-1]


@dataclass(frozen=True)
class _Tables:
    view: HistoryView
    digits: _Digits

    @cached_property
    def rows(self) -> list[Observation]:
        return rows(self.view)

    def score(self, entry: Observation | None) -> str:
        return "none" if entry is None or entry.score is None else self.scored(entry.score)

    def scored(self, value: float) -> str:
        return number(value, self.digits.score)

    def valued(self, task: str, value: float) -> str:
        return number(value, self.digits.tasks.get(task, 0))

    def tasks(self, entry: Observation) -> str:
        values = dict(entry.tasks)
        return " ".join(
            self.valued(task.name, values[task.name]) if task.name in values else "-"
            for task in self.view.tasks
        )

    def baselines(self) -> str:
        """Who matters with its tasks, and of the others the score alone."""
        rivals = self.view.standing.rivals
        parents = [entry for entry in rivals if entry.operator == PARENT]
        stand = [standing(self.view, task) for task in self.view.tasks]
        champions = [found[1] for found in stand if found is not None]
        merged = [entry for entry in rivals if entry.operator != PARENT]
        shown = [*_highest(parents, _MOST_PARENTS), *champions, *_highest(merged, 1)]
        whole = [entry for entry in rivals if entry in shown]
        lines = [f"{self.score(e)} | {self.tasks(e)} | {_called(e)}" for e in whole]
        rest = [entry for entry in rivals if entry not in whole]
        if rest:
            found = groupby(rest, _kind)
            lines.append("other scores: " + "; ".join(self.alike(h, [*es]) for h, es in found))
        return "\n".join(lines) or "none"

    def alike(self, head: str, entries: Sequence[Observation]) -> str:
        """The scores of some rivals of one kind."""
        if len(entries) == 1:
            return f"{_called(entries[0])} {self.score(entries[0])}"
        values = (f"{_called(e)[len(head) :].strip()} {self.score(e)}" for e in entries)
        return f"{head}: {', '.join(values)}"

    def candidates(self) -> str:
        blocks = _blocks(self.view)
        lines = []
        for entry in self.rows:
            mark = _mark(self.view, entry)
            tasks = f" | {self.tasks(entry)}" if mark != TIED else ""
            lines.append(
                f"{self.score(entry)}{mark}{tasks} | {_genome(entry, blocks)} | "
                f"{entry.generation} {entry.operator}"
            )
        return "\n".join(lines + self.legend()) or "none"

    def scores(self) -> str:
        lines = [
            f"{self.score(e)}{_mark(self.view, e)} {e.generation} {e.operator}" for e in self.rows
        ]
        return "\n".join(lines + self.legend()) or "none"

    def legend(self) -> list[str]:
        """Of the marks that the table has."""
        marks = {_mark(self.view, entry)[:1] for entry in self.rows}
        said = {
            TIED: "=: no better than the best before it beyond noise, and shown as that",
            "~": "~n%: an estimate, stopped after n % of the items",
            "!": "!n: breaks the constraints by n, and the score is lowered",
        }
        known = [text for mark, text in said.items() if mark in marks]
        return [f"({'; '.join(known)})"] if known else []

    def facts(self) -> str:
        view = self.view
        lines = [self.progress(), *self.standings()]
        lines += [view.faults] if view.faults else []
        if (clear := clear_axes(view)) is not None:
            count, found = clear
            named = ", ".join(f"{self.axis(name)} {r:+.2f}" for name, r in found[:_CORRELATED])
            lines.append(f"correlations with the score ({count}): {named or 'no axis'}")
        if best := elites(view):
            lines.append(f"the best {len(best)} differ by {spread(best):.0f} an axis")
            if at_edge := pressed(view, best):
                lines.append(f"all press: {', '.join(map(self.axis, at_edge))}")
        return _listed(lines)

    def last_step(self) -> str:
        view, lines = self.view, []
        if (moved := last_move(view)) is not None:
            before, after, steps = moved
            said = ", ".join(f"{self.axis(name)} {old} to {new}" for name, old, new in steps)
            lines.append(
                f"best before {self.score(before)}, of the last generation {self.score(after)}: "
                f"moved {said}"
            )
        failed = [entry for entry in view.last if entry.score is None]
        if failed:
            lines.append(f"{len(failed)} of {len(view.last)} of the last generation failed")
        return _listed(lines)

    def progress(self) -> str:
        view, best = self.view, self.view.standing.best
        if best is None:
            return f"last generation {view.generation}; nothing has a score yet"
        line = f"best {self.score(best)} (generation {best.generation}, {best.operator})"
        last = [entry.score for entry in view.last if entry.score is not None]
        if not last:
            return f"{line}; last generation {view.generation} has no score"
        verdict = "improved" if view.improved_last else "no improvement"
        median = self.scored(statistics.median(last))
        return (
            f"{line}; last generation {view.generation} (size {len(view.last)}): {verdict}, "
            f"best {self.scored(max(last))}, median {median}"
        )

    def standings(self) -> list[str]:
        """The best candidate on each task beside the parent that is best at it."""
        found = []
        for task in self.view.tasks:
            if (stands := standing(self.view, task)) is None:
                continue
            relation, champion, best, reach = stands
            own, other = (self.valued(task.name, value) for value in (best, reach))
            name = champion.label or "the best parent"
            found.append(f"{task.name}: best {own}, {relation} {name} {other}")
        return found

    def axis(self, name: str) -> str:
        """Without the word that all of them end with."""
        if not self.shared:
            return name
        return re.sub(rf" {re.escape(self.shared)}(?= at \d+$|$)", "", name)

    @property
    def shared(self) -> str:
        ends = {axis.name.split()[-1] for axis in self.view.axes}
        return ends.pop() if len(ends) == 1 and len(self.view.axes[0].name.split()) > 1 else ""


def _listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _highest(entries: Sequence[Observation], count: int) -> list[Observation]:
    """Those outside the space too."""
    scored = [entry for entry in entries if entry.score is not None]
    return sorted(scored, key=lambda entry: -(entry.score or 0.0))[:count]


def _called(entry: Observation) -> str:
    return " ".join(part for part in (entry.operator, entry.label) if part)


def _kind(entry: Observation) -> str:
    """What its name begins with; a parent's name stays whole, since a folder's may have blanks."""
    return PARENT if entry.operator == PARENT else _called(entry).rpartition(" ")[0]


def _mark(view: HistoryView, entry: Observation) -> str:
    if entry.censored:
        return f"~{entry.rung:.0%}"
    if entry.violation:
        return f"!{number(entry.violation)}"
    return TIED if (entry.generation, entry.slot) in view.tied else ""


def _genome(entry: Observation, blocks: Sequence[int]) -> str:
    """Integers, with a blank between the layer groups of the space."""
    if entry.vector is None:
        return "outside"
    values, parts, start = integers(entry.vector), [], 0
    for size in blocks:
        parts.append(",".join(map(str, values[start : start + size])))
        start += size
    return " ".join(parts)


def _failed(view: HistoryView) -> str:
    blocks = _blocks(view)
    failed = [entry for entry in view.entries if entry.score is None]
    if not failed:
        return "none"
    lines = [f"{len(failed)} of {len(view.entries)}, the latest (generation.slot | genome):"]
    for reason, found in groupby(failed[-_FAILURES:], lambda entry: entry.failure):
        where = (f"{e.generation}.{e.slot} | {_genome(e, blocks)}" for e in found)
        lines += [*where, f"for: {clean_text(reason, 120)}"]
    return "\n".join(lines)


def _blocks(view: HistoryView) -> list[int]:
    """How many axes each layer group has, in order."""
    return [len([*axes]) for _, axes in groupby(view.axes, lambda axis: axis.group)]


def _space(view: HistoryView) -> str:
    """The axes in order. Where all groups have the same ones, groups and axes are said once."""
    blocks = [[*axes] for _, axes in groupby(view.axes, lambda axis: axis.group)]
    heads = [_head([axis.name for axis in block]) for block in blocks]
    tails = [
        [(axis.name[len(head) :].strip(), ends(view, axis)) for axis in block]
        for head, block in zip(heads, blocks, strict=True)
    ]
    if not all(heads) or any(tail != tails[0] for tail in tails):
        heads, tails = [""], [[(axis.name, ends(view, axis)) for axis in view.axes]]
    first = tails[0]
    same = {end for _, end in first}
    names = ", ".join(name if len(same) == 1 else f"{name} ({end})" for name, end in first)
    said = f"; {same.pop()}" if len(same) == 1 else ""
    return f"{_places(heads)}{names}{said}"


def _places(heads: Sequence[str]) -> str:
    if heads == [""]:
        return ""
    kind = _head(heads)
    where = ", ".join(head.removeprefix(kind).strip() for head in heads)
    return f"{kind} {where}; in each ".lstrip()


def _head(names: Sequence[str]) -> str:
    """The words that names begin with in common, but for the last word of each."""
    common: list[str] = []
    words = [name.split()[:-1] for name in names]
    for place in zip(*words, strict=False):
        if len(set(place)) > 1:
            break
        common.append(place[0])
    return " ".join(common)
