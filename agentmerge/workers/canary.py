"""A parent's answers to a few items, asked again now and then: they must stay what they were.

What a long search would otherwise not notice: weights that something else writes to, caches that
answer for earlier candidates, a device that has begun to err. It knows results, and no engine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

from agentmerge.contracts.worker import Fingerprint, ItemRef, ItemResult
from agentmerge.errors import RunFailed
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.recipe import Recipe

_ITEMS_A_TASK = 4
#: Bits after the point of a number's first digit, by dtype.
_BITS = {"float64": 52, "float32": 23, "float16": 10}
_HALF_BITS = 7
#: Logits are below this, mostly; a log-likelihood may move by two of their steps when sums are
#: taken in another order, as a device's kernels do from run to run.
_LOGITS = 64
_LEAST_TOLERANCE, _RELATIVE_HALF = 1e-4, 2e-2

Ask = Callable[[Recipe, Sequence[ItemRef]], tuple[Fingerprint, list[ItemResult]]]


class Canary:
    """See the module's head.

    parent: its recipe, canonical. every: candidates between two looks; 0: never. ask: loads a
    recipe and scores items on it.
    """

    def __init__(self, parent: Recipe, taskset: TaskSet, dtype: str, every: int, ask: Ask) -> None:
        self._parent = parent
        self._refs = [
            ref
            for task in taskset.tasks
            if task.name not in taskset.served
            for ref in task.items[:_ITEMS_A_TASK]
        ]
        step = _LOGITS / 2 * 2.0 ** -_BITS.get(dtype, _HALF_BITS)
        self._absolute = max(_LEAST_TOLERANCE, 2 * step)
        self._relative = _LEAST_TOLERANCE if step < _LEAST_TOLERANCE else _RELATIVE_HALF
        self._every = every
        self._ask = ask
        self._first: tuple[Fingerprint, list[ItemResult]] | None = None
        self._since = 0

    def before_candidate(self) -> None:
        """Look, if it is time to.

        Raises:
            RunFailed: the answers are others than at the first time, with both fingerprints.
        """
        if self._every and (self._first is None or self._since >= self._every):
            self.look()
        self._since += 1

    def at_end(self) -> None:
        """Look once more, if candidates came since the last time."""
        if self._every and self._since and self._first is not None:
            self.look()

    def look(self) -> None:
        found = self._ask(self._parent, self._refs)
        self._since = 0
        if self._first is None:
            self._first = found
        elif not self._same(found):
            then, now = _said(*self._first), _said(*found)
            raise RunFailed(
                f"a parent no longer scores as at the start ({then} then, {now} now): results "
                "since the last look are not to be trusted; see whether the device is in order, "
                "and lower worker.canary_every to see it sooner"
            )

    def _same(self, found: tuple[Fingerprint, list[ItemResult]]) -> bool:
        assert self._first is not None
        if found[0] != self._first[0]:
            return False
        return all(
            self._near(old.log_likelihood, new.log_likelihood)
            for old, new in zip(self._first[1], found[1], strict=True)
        )

    def _near(self, old: float | None, new: float | None) -> bool:
        if old is None or new is None:
            return old is new
        return math.isclose(old, new, rel_tol=self._relative, abs_tol=self._absolute)


def _said(fingerprint: Fingerprint, results: Sequence[ItemResult]) -> str:
    rows = repr([result.log_likelihood for result in results])
    return f"weights {fingerprint.digest}, answers {hashlib.sha256(rows.encode()).hexdigest()[:16]}"
