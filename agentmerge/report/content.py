"""One search as plain data: everything that the report shows. Reads the ledger, draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.contracts.card import Compared
from agentmerge.contracts.operators import CHEAP, PARENT, RIVALS, UNIFORM
from agentmerge.errors import AgentmergeError
from agentmerge.evaluation.statistics import Interval
from agentmerge.ledger import Candidate, Ledger, RunRow, counted
from agentmerge.recipe import Recipe
from agentmerge.recipe.names import short_name
from agentmerge.report.grid import Grid, grid
from agentmerge.report.items import ItemsAsked, Values, asked, candidate_name, gains, paired, scores
from agentmerge.report.summary import answer_of, depth_rows, run_summary
from agentmerge.space.grouped import SearchSpace

#: Candidates whose recipe the page carries; with more, the best and the seeds are kept.
MAX_GRIDS = 400
#: Candidates drawn as points; with more, the best so far and an even sample of the others.
MAX_POINTS = 4000
#: Items drawn in a matrix; with more, an even sample.
MAX_ITEMS = 1500


@dataclass(frozen=True)
class Point:
    """A scored candidate, in the order of evaluation. cost_s: worker seconds up to and with it."""

    candidate: Candidate
    name: str
    evaluations: float
    cost_s: float
    best_score: float


@dataclass(frozen=True)
class Contender:
    """A row of the closing comparison: the answer, a parent or the best cheap merge."""

    candidate: Candidate
    name: str
    kind: str
    search: float | None
    sealed: float | None
    sealed_tasks: Mapping[str, float]
    values: Values | None


@dataclass(frozen=True)
class Content:
    """A search, ready to be drawn."""

    row: RunRow
    config: SearchConfig
    summary: Mapping[str, Any]
    points: Sequence[Point]
    failed: Sequence[Candidate]
    answer: Candidate | None
    contenders: Sequence[Contender]
    asked: ItemsAsked | None
    grids: Mapping[str, Grid]
    names: Mapping[str, str]
    operators: Sequence[Mapping[str, Any]]
    advice: Sequence[Mapping[str, Any]]
    recipe: str
    lineage: Sequence[tuple[str, int | None, str]]
    depths: Sequence[Mapping[str, Any]] = ()

    @property
    def tasks(self) -> list[str]:
        return [task.name for task in self.config.tasks.tasks]

    @property
    def reference_lines(self) -> list[Contender]:
        return [c for c in self.contenders if c.kind != "answer" and c.search is not None]


def content(ledger: Ledger, row: RunRow, *, recipes: int = MAX_GRIDS) -> Content:
    """recipes: how many grids of recipes are wanted at most, which take longest to make; the
    answer's, or the best's so far, comes first."""
    candidates = ledger.candidates(row.id, vectors=False)
    config = SearchConfig.from_text(row.config, row.name)
    own = [c for c in candidates if not c.prior and c.twin is None]
    scored = [c for c in own if c.score is not None]
    answer = answer_of(ledger, row)
    points = _points(own)
    question = asked(ledger, row, "sealed" if row.card.sealed else "search")
    shown = _shown(scored, answer)
    return Content(
        row=row,
        config=config,
        summary=run_summary(ledger, row),
        points=points,
        failed=[c for c in own if c.state == "failed"],
        answer=answer,
        contenders=_contenders(ledger, row, scored, answer, question),
        asked=question,
        grids=_grids(ledger, row, config, shown[:recipes]),
        names={place(c): candidate_name(c) for c in shown},
        operators=_operators(candidates, points),
        advice=ledger.advice(row.id),
        recipe="" if answer is None else ledger.recipe(answer.recipe_hash, row.id),
        lineage=_lineage(ledger, row),
        depths=depth_rows(ledger, row),
    )


def place(candidate: Candidate) -> str:
    return f"{candidate.generation}.{candidate.slot}"


def _points(own: Sequence[Candidate]) -> list[Point]:
    found, best, cost, count = [], float("-inf"), 0.0, 0.0
    for candidate in own:
        if candidate.state not in ("scored", "stopped", "failed"):
            continue
        count += candidate.share
        cost += candidate.seconds or 0.0
        if candidate.score is None:
            continue
        best = max(best, candidate.score)
        found.append(Point(candidate, candidate_name(candidate), counted(count), cost, best))
    return found


def _shown(scored: Sequence[Candidate], answer: Candidate | None) -> list[Candidate]:
    """Candidates whose recipe can be looked at, the answer first, then the best."""
    ranked = sorted(scored, key=lambda c: c.rank)
    seeds = [c for c in ranked if c.operator in CHEAP]
    first = [answer] if answer else []
    kept = dict.fromkeys([*first, *ranked[: MAX_GRIDS - len(seeds)], *seeds])
    return list(kept)


def _grids(
    ledger: Ledger, row: RunRow, config: SearchConfig, shown: Sequence[Candidate]
) -> dict[str, Grid]:
    try:
        space = SearchSpace(config.genome, row.facts["num_layers"], row.facts["dtype"], row.seed)
    except AgentmergeError:
        return {}
    found = {}
    for candidate in shown:
        recipe = Recipe.parse(ledger.recipe(candidate.recipe_hash, row.id)).canonical(
            space.num_layers
        )
        found[place(candidate)] = grid(space, recipe)
    return found


def _contenders(
    ledger: Ledger,
    row: RunRow,
    scored: Sequence[Candidate],
    answer: Candidate | None,
    question: ItemsAsked | None,
) -> list[Contender]:
    if answer is None:
        return []
    rivals = sorted((c for c in scored if c.operator in RIVALS), key=lambda c: c.rank)
    uniform = [c for c in rivals if c.operator == UNIFORM]
    parents = [c for c in scored if c.operator == PARENT]
    named = [("answer", answer), *((PARENT, c) for c in parents)]
    named += [("best cheap merge", c) for c in rivals[:1]]
    named += [("uniform", c) for c in uniform if c not in rivals[:1]]
    card = {tuple(told.candidate): told for told in row.card.rows}
    found = []
    for kind, candidate in named:
        told = card.get((candidate.generation, candidate.slot), Compared())
        values = None if question is None else question.values(ledger, candidate.recipe_hash)
        sealed, tasks = told.sealed_score, told.sealed_tasks or {}
        if question and question.part == "sealed" and values and not told.name:
            tasks = scores(values, question)
            weights = {o["name"]: o["signed_weight"] for o in question.objectives}
            if tasks.keys() == weights.keys():
                sealed = sum(weights[name] * value for name, value in tasks.items())
        found.append(
            Contender(
                candidate,
                candidate_name(candidate),
                kind,
                candidate.score,
                sealed,
                tasks,
                values,
            )
        )
    return found


def comparisons(content: Content) -> list[dict[str, Any]]:
    """The answer against each other contender: {name, kind, difference or None, tasks}."""
    question = content.asked
    if question is None or not content.contenders:
        return []
    mine = content.contenders[0].values
    # As the search found them: of metrics that stored values alone do not make, too.
    told = {d.against: Interval(d.mean, d.low, d.high) for d in content.row.card.differences}
    found = []
    for other in content.contenders[1:]:
        if mine is None or other.values is None or other.candidate == content.answer:
            continue
        found.append(
            {
                "name": other.name,
                "kind": other.kind,
                "difference": told.get(other.candidate.label)
                or paired(mine, other.values, question),
                "tasks": gains(mine, other.values, question),
            }
        )
    return found


def _operators(candidates: Sequence[Candidate], points: Sequence[Point]) -> list[dict[str, Any]]:
    """Who proposed what, and what it earned: how far it moved the best so far, in all."""
    rows: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        if candidate.prior:
            continue
        row = rows.setdefault(
            candidate.operator,
            {"operator": candidate.operator, "proposed": 0, "scored": 0, "failed": 0}
            | {"stopped": 0, "twins": 0, "best": None, "became_best": 0}
            | {"earned": 0.0, "seconds": 0.0},
        )
        row["proposed"] += 1
        row["failed"] += candidate.state == "failed"
        row["stopped"] += candidate.state == "stopped"
        row["twins"] += candidate.state == "twin"
        row["seconds"] += candidate.seconds or 0.0
        if candidate.score is not None and candidate.twin is None:
            row["scored"] += 1
            row["best"] = max(candidate.score, row["best"] or candidate.score)
    before: float | None = None
    for point in points:
        if before is None or point.best_score > before:
            row = rows[point.candidate.operator]
            row["became_best"] += 1
            row["earned"] += 0.0 if before is None else point.best_score - before
            before = point.best_score
    return sorted(rows.values(), key=lambda row: (-row["earned"], row["operator"]))


def _lineage(ledger: Ledger, row: RunRow) -> list[tuple[str, int | None, str]]:
    """(run, generation it left its parent at, parent), oldest first; this run's family only."""
    rows = {found.id: found for found in ledger.runs()}
    root = row
    while root.parent_run in rows:
        root = rows[str(root.parent_run)]
    found: list[tuple[str, int | None, str]] = []
    family = {root.id}
    for run in rows.values():  # by age, so that parents come first
        if run.id == root.id:
            found.append((run.name, None, ""))
        elif run.parent_run in family:
            family.add(run.id)
            found.append((run.name, run.parent_generation, rows[str(run.parent_run)].name))
    return found


def shortened(text: str) -> str:
    """Model paths in the agents' words, cut to the models' names."""
    return " ".join(
        f"({short_name(word[1:])}" if word.startswith("(/") else short_name(word)
        if word.startswith("/") else word
        for word in text.split(" ")
    )  # fmt: skip
