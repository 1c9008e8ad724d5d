"""What the agents see of a search: one bounded table, in words and integers.

Knows how to show a history (least to most fit, unit box as integers 0..100, real ranges stated) and
the plain statistics of one. Knows no model and no prompt. Nothing here reads a clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

import numpy as np

from agentmerge.agents.ladder import Ladder, Noise
from agentmerge.agents.schemas import SCALE, Bounds, clean_text, percent
from agentmerge.agents.standings import ELITES, Standing, Standings
from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.space import Axis, Space
from agentmerge.contracts.strategy import Observation, fittest
from agentmerge.methods import METHODS
from agentmerge.recipe.names import public_names, short_name

BEST_SHOWN = 8
#: Most integers of genomes in one prompt: a wide space shows fewer rows.
MAX_INTEGERS = 6_000
MIN_ROWS = 6
#: Most axes whose values are said by name as well.
MAX_NAMED = 24
_MIN_FOR_CORRELATION = 6


@dataclass(frozen=True, slots=True)
class TaskView:
    """One objective as the models are told of it; `weight` is its share of the score."""

    name: str
    weight: float
    metric: str
    higher_is_better: bool


@dataclass(frozen=True)
class HistoryView:
    """Everything an agent may know. `entries` is the whole history, ordered by (generation, slot).

    sigma: the step of the last generation, None where the strategy has none.
    budget_left: evaluations. forecasts: how good the proposer's were, in words.
    noise: of a pair of candidates; what is shown is released by the Ladder (``told``).
    ladder, standings: with that noise, and what walked the history as it was before.
    tied: (generation, slot) of candidates shown with the score of the best before them.
    moves: what became of structural moves so far, a sentence each. deeper: how many layers a move
    to layers may add; 0 where there is none. absent: experts of a pool that are not merged; room:
    whether one more may be.
    failing: items that the best candidate fails, quoted (``agents.failing``). faults: what is wrong
    with its answers to all of them, a sentence.
    """

    space: Space
    tasks: tuple[TaskView, ...]
    entries: tuple[Observation, ...]
    sigma: float | None
    sigma_low: float
    sigma_high: float
    improved_last: bool
    budget_left: int
    forecasts: str = "no forecast has been tried yet"
    noise: Noise = lambda a, b: 0.0
    ladder: Ladder | None = None
    standings: Standings | None = None
    tied: frozenset[tuple[int, int]] = frozenset()
    moves: tuple[str, ...] = ()
    deeper: int = 0
    absent: tuple[str, ...] = ()
    room: bool = False
    failing: str = ""
    faults: str = ""

    @cached_property
    def released(self) -> HistoryView:
        """The view as it may be shown to a model."""
        ladder = self.ladder or Ladder(self.noise)
        released = ladder.release(self.entries)
        return replace(
            self,
            entries=released.entries,
            standings=ladder.standings,
            tied=released.tied,
            improved_last=self.improved_last and ladder.standings.of(released.entries).improved,
        )

    @cached_property
    def standing(self) -> Standing:
        return (self.standings or Standings()).of(self.entries)

    @cached_property
    def generation(self) -> int:
        return self.entries[-1].generation if self.entries else 0

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.space.axes

    @property
    def bounds(self) -> Bounds:
        low, high = sorted((self.sigma_low, self.sigma_high))
        models = tuple(short_name(model) for model in self.space.models)
        return Bounds(
            self.space.dimensions,
            low,
            high,
            self.space.num_layers,
            tuple(METHODS),
            models,
            deeper=self.deeper,
            absent=self.absent,
            room=self.room,
        )

    @cached_property
    def last(self) -> tuple[Observation, ...]:
        """The last generation."""
        latest = takewhile(lambda e: e.generation == self.generation, reversed(self.entries))
        return tuple(latest)[::-1]


def variables(view: HistoryView) -> dict[str, str]:
    """The prompt variables that every role has (prompts.COMMON), as the Ladder releases them; what
    stored searches were asked is said in these very words (``agents.tables`` has shorter ones)."""
    view = view.released
    return {name: published(view, text) for name, text in _variables(view).items()}


def published(view: HistoryView, text: str) -> str:
    """Labels and failures name models as the user's machine does; a provider need not know."""
    names = public_names(view.space.genome.parents)
    for name in sorted(names, key=len, reverse=True):
        if names[name] != name:
            text = text.replace(name, names[name])
    return text


def _variables(view: HistoryView) -> dict[str, str]:
    return {
        "models": _models(view),
        "method": _method(view),
        "axes": _axes(view),
        "dimensions": str(view.space.dimensions),
        "tasks": "\n".join(_task(task) for task in view.tasks),
        "rivals": "\n".join(_rival(entry) for entry in view.standing.rivals) or "none scored yet",
        "generation": str(view.generation),
        "history": _history(view),
        "failures": _failures(view),
        "statistics": "\n".join(f"- {line}" for line in observations(view)),
        "sigma": "none yet" if view.sigma is None else f"{view.sigma:g}",
        "sigma_low": f"{view.bounds.sigma_low:g}",
        "sigma_high": f"{view.bounds.sigma_high:g}",
        "improved_last": "yes" if view.improved_last else "no",
        "best_score": _score(view.standing.best),
        "budget_left": str(view.budget_left),
        "forecasts": view.forecasts,
        "noise": _noise(view),
        "layers": str(view.space.num_layers),
        "methods": ", ".join(METHODS),
        "deeper": "\n".join(filter(None, (_deeper(view), _pool(view)))),
        "moves": "; ".join(clean_text(move, 300) for move in view.moves) or "none",
    }


def integers(vector: Sequence[float]) -> list[int]:
    """A unit-box vector as agents read it."""
    return [percent(value) for value in vector]


def shown(view: HistoryView) -> list[Observation]:
    """The rows of the table, least to most fit: the best few and the last generation."""
    rows = max(MIN_ROWS, MAX_INTEGERS // max(view.space.dimensions, 1))
    best = fittest(view.entries, min(BEST_SHOWN, rows))
    others = [entry for entry in fittest(view.last, len(view.last)) if entry not in best]
    chosen = best + others[: rows - len(best)]
    return fittest(chosen, len(chosen))[::-1]


def observations(view: HistoryView) -> list[str]:
    """Statistics of the history as sentences: all that the rule-based critic has to say."""
    lines = [_progress(view)]
    lines += [line for task in view.tasks if (line := _task_standing(view, task))]
    lines += [view.faults] if view.faults else []
    lines += _correlations(view)
    lines += _elites(view)
    if (line := _moved(view)) is not None:
        lines.append(line)
    failed = [entry for entry in view.last if entry.score is None]
    if failed:
        lines.append(f"{len(failed)} of {len(view.last)} candidates of the last generation failed.")
    return lines


def _pool(view: HistoryView) -> str:
    """Which experts are not merged, and how one may be."""
    if not view.absent:
        return ""
    adding = "add_model with its name, or " if view.room else ""
    return (
        f"Experts that are not merged now: {', '.join(view.absent)}. One may be: {adding}"
        f'swap_model, with a value such as "{view.bounds.swaps[0]}".'
    )


def _deeper(view: HistoryView) -> str:
    """What a model is told of the move to layers; "" where there is none."""
    if not view.deeper:
        return ""
    layers = view.space.num_layers
    return (
        'The change "layers", with the value "", searches depth once the weights are settled: '
        f"up to {view.deeper} layers of the models may run beside the {layers} of the best merge "
        f"so far, each at a strength of its own. Every layer costs 1/{layers} more time a token, "
        "so ask for it where weights have stopped to gain; it is opened without you when they have."
    )


def _models(view: HistoryView) -> str:
    base = view.space.genome.base_model
    lines = [f"- {short_name(model)}" for model in view.space.genome.models]
    if base and base not in view.space.genome.models:
        lines.append(f"- {short_name(base)} (the base)")
    return "\n".join(lines)


def _method(view: HistoryView) -> str:
    genome = view.space.genome
    if view.space.about:
        return view.space.about + "."
    if view.space.method.pairwise:
        pair = [short_name(model) for model in view.space.models]
        return "slerp" if len(pair) > 2 else f"slerp; {pair[0]} is the base, {pair[1]} the partner"
    text, method = genome.merge_method, view.space.method
    if not method.source:
        text += "; the models have no weights"
    elif genome.normalizes:
        text += "; normalize is on: only the ratios of a group's weights matter, not their scale"
    else:
        text += "; normalize is off: weights count as they are"
    if genome.smooth:
        text += "; smooth is on: values are set at knots and interpolated over the layers between"
    return f"{text}. {method.doc}"


def _axes(view: HistoryView) -> str:
    return "\n".join(f"{i}. {axis.name}: {ends(view, axis)}" for i, axis in enumerate(view.axes))


def ends(view: HistoryView, axis: Axis) -> str:
    """What the ends of 0..100 stand for; slerp's choice of models is no number."""
    names = ", ".join(short_name(model) for model in view.space.models)
    if axis.parameter == "base":
        return f"equal parts of 0 to {SCALE} pick one of {names}"
    if axis.parameter == "partner":
        return f"equal parts of 0 to {SCALE} pick one of {names} that is not the base"
    if axis.kind == "bool":
        return f"below {SCALE // 2} is off, above it on"
    if axis.kind == "int":
        return f"equal parts of 0 to {SCALE} are the whole numbers {axis.low:g} to {axis.high:g}"
    scale = ", on a logarithmic scale" if axis.kind == "log" else ""
    return f"0 is {axis.low:g}, {SCALE} is {axis.high:g}{scale}"


def _task(task: TaskView) -> str:
    direction = "higher" if task.higher_is_better else "lower"
    return f"- {task.name}: {task.metric}, {direction} is better, weight {task.weight:g}"


def _score(entry: Observation | None) -> str:
    return "none" if entry is None or entry.score is None else f"{entry.score:.4f}"


def _by_task(entry: Observation) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in entry.tasks) or "-"


def _rival(entry: Observation) -> str:
    name = " ".join(part for part in (entry.operator, entry.label) if part)
    return f"- {name}: score {_score(entry)} | {_by_task(entry)}"


def _history(view: HistoryView) -> str:
    return "\n".join(
        f"score {_score(entry)}{_mark(view, entry)} | {_by_task(entry)} | "
        f"generation {entry.generation}, {entry.operator} | {integers(entry.vector or ())}"
        for entry in shown(view)
    )


def _mark(view: HistoryView, entry: Observation) -> str:
    if entry.censored:
        return f" (estimated: stopped after {entry.rung:.0%} of the items)"
    if entry.violation:
        return f" (it breaks the constraints by {entry.violation:.4f}, and its score is lowered)"
    return " (as the best)" if (entry.generation, entry.slot) in view.tied else ""


def _noise(view: HistoryView) -> str:
    """How far apart the two best must be for a difference to count."""
    best = fittest(view.entries, 2)
    if len(best) < 2 or best[0].recipe_hash == best[1].recipe_hash:
        return "unknown"
    return f"about {view.noise(best[0], best[1]):.3f}"


def _failures(view: HistoryView) -> str:
    failed = [entry for entry in view.entries if entry.score is None][-3:]
    return (
        "\n".join(
            f"generation {entry.generation}, slot {entry.slot}: {clean_text(entry.failure, 120)}"
            + ("" if entry.vector is None else f" | {integers(entry.vector)}")
            for entry in failed
        )
        or "none"
    )


def _progress(view: HistoryView) -> str:
    best = view.standing.best
    if best is None:
        return "No candidate has been scored yet."
    verdict = "improved on" if view.improved_last else "did not improve on"
    last = [entry.score for entry in view.last if entry.score is not None]
    line = f"Best score {_score(best)} (generation {best.generation}, {best.operator})"
    if last:
        line += (
            f"; generation {view.generation} {verdict} what came before: "
            f"best {max(last):.4f}, median {statistics.median(last):.4f}"
        )
    return line + "."


def standing(view: HistoryView, task: TaskView) -> tuple[str, Observation, float, float] | None:
    """The best candidate on one task beside the parents, in the task's own direction: (how it
    stands, the parent that is best there, its own value, the parent's)."""

    def value(entry: Observation) -> float | None:
        return dict(entry.tasks).get(task.name)

    sign = 1.0 if task.higher_is_better else -1.0
    best = None if view.standing.best is None else value(view.standing.best)
    parents = [e for e in view.standing.rivals if e.operator == PARENT and value(e) is not None]
    if best is None or not parents:
        return None
    champion = max(parents, key=lambda e: sign * (value(e) or 0.0))
    reach = value(champion) or 0.0
    gap = sign * (best - reach)
    relation = "level with" if abs(gap) < 5e-4 else "ahead of" if gap > 0 else "behind"
    return relation, champion, best, reach


def _task_standing(view: HistoryView, task: TaskView) -> str | None:
    if (found := standing(view, task)) is None:
        return None
    relation, champion, best, reach = found
    name = champion.label or "the best parent"
    return (
        f"{task.name}: the best candidate has {best:.4f}, {relation} the best parent there "
        f"({name}, {reach:.4f})."
    )


def correlations(entries: Sequence[Observation], dimensions: int) -> list[float]:
    """Pearson's r of each axis with the score; 0 where an axis or the score never varied."""
    scores = np.array([entry.score or 0.0 for entry in entries])
    values = np.array([entry.vector for entry in entries if entry.vector is not None], float)
    varies = (np.ptp(values, axis=0) > 0) & (np.ptp(scores) > 0)
    apart, above = values - values.mean(axis=0), scores - scores.mean()
    scale = np.sqrt((apart**2).sum(axis=0) * (above**2).sum())
    found = np.divide(above @ apart, scale, out=np.zeros(dimensions), where=varies & (scale > 0))
    return [float(r) for r in found]


def clear_axes(view: HistoryView) -> tuple[int, list[tuple[str, float]]] | None:
    """Of so many candidates, the axes that go with the score beyond noise, and Pearson's r; None
    where they are too few."""
    scored = view.standing.recent
    if len(scored) < _MIN_FOR_CORRELATION:
        return None
    noise = 2 / math.sqrt(len(scored))
    by_axis = correlations(scored, view.space.dimensions)
    clear = sorted(
        (index for index, r in enumerate(by_axis) if abs(r) > noise),
        key=lambda index: -abs(by_axis[index]),
    )[:ELITES]
    return len(scored), [(view.axes[i].name, by_axis[i]) for i in clear]


def _correlations(view: HistoryView) -> list[str]:
    if (found := clear_axes(view)) is None:
        return []
    count, clear = found
    if not clear:
        return [f"No axis correlates with the score beyond noise ({count} candidates)."]
    named = ", ".join(f"{name} (r {r:+.2f})" for name, r in clear)
    return [f"Axes that go with the score over {count} candidates: {named}."]


def elites(view: HistoryView) -> list[list[int]]:
    """The best few, as integers; none where there are not so many."""
    if len(view.standing.elites) < ELITES:
        return []
    return [integers(entry.vector or ()) for entry in view.standing.elites]


def spread(best: Sequence[Sequence[int]]) -> float:
    """How far these differ an axis, on average."""
    return statistics.fmean(max(values) - min(values) for values in zip(*best, strict=True))


def pressed(view: HistoryView, best: Sequence[Sequence[int]]) -> list[str]:
    """The axes that all of these have at the same end, with the value."""
    at_edge = [
        f"{axis.name} at {values[0]}"
        for axis, values in zip(view.axes, zip(*best, strict=True), strict=True)
        if len(set(values)) == 1 and values[0] in (0, SCALE)
    ]
    return at_edge[:ELITES]


def _elites(view: HistoryView) -> list[str]:
    best = elites(view)
    if not best:
        return []
    lines = [f"The best {len(best)} differ by {spread(best):.0f} of {SCALE} an axis on average."]
    if len(view.axes) <= MAX_NAMED:
        # Small models lose count in a row of integers.
        pairs = zip(view.axes, best[0], strict=True)
        named = ", ".join(f"{axis.name} {value}" for axis, value in pairs)
        lines.insert(0, f"The best candidate has {named}.")
    if at_edge := pressed(view, best):
        lines.append(f"They all press against a bound: {', '.join(at_edge)}.")
    return lines


def last_move(
    view: HistoryView,
) -> tuple[Observation, Observation, list[tuple[str, int, int]]] | None:
    """How the last generation's best differs from the best before it: both, and the axes on which
    it moved most, from where to where."""
    before = [e for e in view.standing.elites if e.generation < view.generation] or fittest(
        view.entries[: len(view.entries) - len(view.last)], 1
    )
    after = fittest(view.last, 1)
    if not before or not after:
        return None
    old, new = integers(before[0].vector or ()), integers(after[0].vector or ())
    widest = sorted(range(len(new)), key=lambda i: -abs(new[i] - old[i]))[:ELITES]
    steps = [(view.axes[i].name, old[i], new[i]) for i in widest if new[i] != old[i]]
    return (before[0], after[0], steps) if steps else None


def _moved(view: HistoryView) -> str | None:
    if (found := last_move(view)) is None:
        return None
    before, after, steps = found
    moved = ", ".join(f"{name} {old}→{new}" for name, old, new in steps)
    return (
        f"From the best before it ({_score(before)}) to the last generation's best "
        f"({_score(after)}) the widest moves are: {moved}."
    )
