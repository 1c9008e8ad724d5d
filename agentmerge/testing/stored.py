"""A problem's answers at many points, in one small file, so that a search is replayed in
milliseconds.

    python -m benchmarks.table --points 20000 --out FILE

    here = StoredProblem.read(FILE)
    point = here.nearest(vector, asked)
    here.evaluate(point)

It has the answers of its points and of no others: the nearest one's answer passed off as another
point's would be a landscape of steps that nobody has. So ``evaluate`` refuses what is not stored,
and a search asks ``nearest`` first which point it gets, and is told that one. What it then searches
is the points that there are: how fine it may step is theirs to say.

Points are drawn for no search's sake: rounds of a Sobol sequence alternate with rounds of normal
steps, of three widths, from the best points so far. Margins are float16, as the ledger keeps them.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.stats import qmc

from agentmerge.config import GenomeConfig
from agentmerge.contracts.strategy import Evidence, Items
from agentmerge.errors import UserError
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.one_plus_one import reflected
from agentmerge.system.temporary import replacing
from agentmerge.testing.problem import Problem, Shown, first_points

ROUND = 500
ELITES = 50
WIDTHS = (0.02, 0.07, 0.2)
_ARRAYS = ("points", "margins", "right", "sealed_right", "task", "weight")


@dataclass(frozen=True, eq=False)
class StoredProblem:
    """points: (n, d) float32. margins: (n, m) float16. right, sealed_right: (n, items / 8) packed
    bits. task, weight: (m,), of the search items. about: what else the problem is, and how many
    sealed items it has."""

    points: np.ndarray
    margins: np.ndarray
    right: np.ndarray
    sealed_right: np.ndarray
    task: np.ndarray
    weight: np.ndarray
    about: dict[str, object]
    space: SearchSpace = field(init=False)
    name: str = field(init=False)
    tasks: tuple[str, ...] = field(init=False)
    _row: dict[tuple[float, ...], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        genome = GenomeConfig.model_validate(self.about["genome"])
        rows = {tuple(point): row for row, point in enumerate(self.points.tolist())}
        set_ = object.__setattr__  # of what follows from the rest
        set_(self, "space", SearchSpace(genome, int(str(self.about["layers"])), "float32"))
        set_(self, "name", f"{self.about['name']}-stored")
        set_(self, "tasks", tuple(self.about["tasks"]))  # type: ignore[arg-type]
        set_(self, "_row", rows)

    @classmethod
    def read(cls, path: Path | str) -> StoredProblem:
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in _ARRAYS}
                return cls(**arrays, about=json.loads(str(file["about"])))
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile):
            raise UserError(
                f"{path} is no stored problem: python -m benchmarks.table writes one"
            ) from None

    def write(self, path: Path) -> None:
        """In one step: whoever reads has the old file or the new one."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with replacing(path) as draft, draft.open("wb") as file:
            np.savez_compressed(file, **arrays, about=np.array(json.dumps(self.about)))

    def first_points(self) -> list[tuple[str, str, tuple[float, ...]]]:
        return [
            (operator, label, self.nearest(point))
            for operator, label, point in first_points(self.space)
        ]

    def nearest(
        self, vector: Sequence[float], asked: Collection[tuple[float, ...] | None] = ()
    ) -> tuple[float, ...]:
        """The stored point nearest to one, of those that were not asked."""
        away = ((self.points - np.asarray(vector)) ** 2).sum(1)
        away[[self._row[point] for point in asked if point in self._row]] = np.inf
        return tuple(self.points[int(away.argmin())].tolist())

    def evaluate(self, vector: Sequence[float]) -> Shown:
        row = self._place(vector)
        items = Items(self.task, self.weight, np.ones(len(self.task), bool))
        values = np.unpackbits(self.right[row], count=len(self.task)).astype(float)
        evidence = Evidence(items, self.margins[row].astype(float), values)
        return Shown(float(values @ self.weight), evidence)

    def gradient(self, vector: Sequence[float]) -> Shown:
        return self.evaluate(vector)

    def sealed(self, vector: Sequence[float]) -> np.ndarray:
        count = int(str(self.about["sealed"]))
        return np.unpackbits(self.sealed_right[self._place(vector)], count=count) / count

    def _place(self, vector: Sequence[float]) -> int:
        row = self._row.get(tuple(float(x) for x in vector))
        if row is None:
            raise UserError(
                f"{tuple(vector)} is none of the {len(self.points)} stored points; ask nearest() "
                "which one is, and search that"
            )
        return row


def grown(
    there: Problem, seed: int, count: int, known: StoredProblem | None = None
) -> Iterator[StoredProblem]:
    """The table of a problem with ever more points, round after round, up to so many."""
    found = known or _empty(there, seed)
    while len(found.points) < count:
        new = _round(found, there, seed)[: count - len(found.points)]
        found = _with(found, new, there)
        yield found


def _empty(there: Problem, seed: int) -> StoredProblem:
    point = there.space.uniform()[1]
    assert point is not None
    evidence, sealed = there.evaluate(point).evidence, there.sealed(point)
    if evidence is None or not evidence.items.margins.all():
        raise UserError(f"{there.name} has no margins to store; take one of the tiny families")
    items = evidence.items
    about = {
        "name": there.name,
        "seed": seed,
        "tasks": there.tasks,
        "genome": there.space.genome.model_dump(mode="json"),
        "layers": there.space.num_layers,
        "sealed": len(sealed),
    }
    return StoredProblem(
        np.zeros((0, there.space.dimensions), np.float32),
        np.zeros((0, len(items.task)), np.float16),
        np.zeros((0, -(-len(items.task) // 8)), np.uint8),
        np.zeros((0, -(-len(sealed) // 8)), np.uint8),
        items.task,
        items.weight,
        about,
    )


def _round(found: StoredProblem, there: Problem, seed: int) -> np.ndarray:
    """What is left of the present round, whatever it was stopped at; float32, so that what is
    stored is what was asked."""
    dimensions = there.space.dimensions
    number, done = divmod(len(found.points), ROUND)
    if number % 2 == 0:
        last = (number // 2 + 1) * ROUND
        points = qmc.Sobol(dimensions, seed=seed).random_base2(math.ceil(math.log2(last)))
        points = points[last - ROUND : last]
    else:
        before = slice(number * ROUND)
        right = np.unpackbits(found.right[before], axis=1, count=len(found.task))
        best = np.argsort(-(right @ found.weight), kind="stable")[:ELITES]
        rng = np.random.default_rng([seed, number])
        steps = rng.choice(WIDTHS, size=(ROUND, 1)) * rng.standard_normal((ROUND, dimensions))
        points = reflected(found.points[best][rng.integers(len(best), size=ROUND)] + steps)
    if number == 0:
        points = np.vstack([[point for _, _, point in there.first_points()], points])[:ROUND]
    left: np.ndarray = points[done:].astype(np.float32)
    return left


def _with(found: StoredProblem, points: np.ndarray, there: Problem) -> StoredProblem:
    margins, right, sealed = [], [], []
    for point in points.tolist():
        evidence = there.evaluate(point).evidence
        assert evidence is not None
        margins.append(evidence.signals.astype(np.float16))
        right.append(np.packbits(evidence.values > 0))
        sealed.append(np.packbits(there.sealed(point) > 0))
    return replace(
        found,
        points=np.vstack([found.points, points]),
        margins=np.vstack([found.margins, margins]),
        right=np.vstack([found.right, right]),
        sealed_right=np.vstack([found.sealed_right, sealed]),
    )
