"""Items' results: from the ledger where they are, else from a worker, and paid for once.

Knows the tasks, the ledger's keys and the pool; nothing of candidates or of a search's course.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from agentmerge.contracts.worker import EngineInfo, Fingerprint, ItemRef, ItemResult
from agentmerge.errors import RunFailed
from agentmerge.evaluation.failing import keep_failing, unsaid
from agentmerge.evaluation.tasks import Part, TaskSet
from agentmerge.ledger import Ledger, ResultKey
from agentmerge.recipe import Recipe
from agentmerge.search.gradients import GradientPool

T = TypeVar("T")
#: Items and the answers to them -> results, what a judge has to say of them among them.
Judge = Callable[[Sequence[ItemRef], Sequence[ItemResult]], list[ItemResult]]


class Evaluator(GradientPool, Protocol):
    """The worker pool, as a search sees it."""

    @property
    def info(self) -> EngineInfo: ...

    def evaluate(
        self, recipe: Recipe, refs: Sequence[ItemRef], wanted: Callable[[], bool] = ...
    ) -> tuple[Fingerprint, list[ItemResult], float]: ...

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]: ...

    def wait(self, turns: Collection[Any], beside: Collection[Any] = ()) -> None: ...


def there(results: Mapping[ItemRef, ItemResult]) -> dict[ItemRef, ItemResult]:
    """Those that have a verdict, or need none."""
    return {ref: result for ref, result in results.items() if not result.missing}


@dataclass(frozen=True, slots=True)
class Answers:
    """Items' results, what of them was paid for just now (by task), and the proof of the swap."""

    results: dict[ItemRef, ItemResult]
    paid: list[tuple[ResultKey, str, list[ItemRef], list[ItemResult]]]
    seconds: float = 0.0
    fingerprint: str = ""

    @property
    def counts(self) -> tuple[int, int]:
        """(truncated prompts, cut-off generations)."""
        found = self.results.values()
        return sum(r.truncated for r in found), sum(r.cut_off for r in found)


@dataclass(frozen=True, slots=True)
class Scoring:
    """The one way to items' results: from the ledger where they are, else from a worker.

    counted: a generated answer whose length nobody kept is asked again.
    """

    ledger: Ledger
    taskset: TaskSet
    pool: Evaluator
    judge: Judge | None = None
    counted: bool = False

    def known(self, recipe_hash: str, part: Part = "search") -> dict[ItemRef, ItemResult]:
        found = {}
        for task in self.taskset.tasks:
            stored = self.ledger.results(self._key(recipe_hash, task.protocol_hash))
            found.update({ref: stored[ref.key] for ref in task.part(part) if ref.key in stored})
        return found

    def ask(
        self,
        recipe: Recipe,
        recipe_hash: str,
        part: Part = "search",
        wanted: Callable[[], bool] = lambda: True,
        only: Sequence[ItemRef] | None = None,
    ) -> Answers:
        """Every item of a part, asking a worker only what the ledger lacks. Saves nothing.

        only: some of the part's items instead of all.

        Raises:
            CandidateFailed, NotBegun, WorkerLost: as the pool does.
            RunFailed: the live weights are not those that the stored results are of.
        """
        results = self.known(recipe_hash, part)
        asked = self.taskset.refs(part) if only is None else only
        missing = [ref for ref in asked if ref not in results or self._uncounted(ref, results)]
        if not missing:
            return Answers(results, [])
        proof, rows, seconds = self.pool.evaluate(recipe, missing, wanted)
        self._refuse_others(recipe_hash, proof.digest)
        if self.judge is not None:
            rows = self.judge(missing, rows)
        fresh = dict(zip(missing, rows, strict=True))
        if part == "search":
            fresh = keep_failing(self.taskset, fresh, results)
        else:  # nobody reads what was said to a sealed item
            fresh = {ref: unsaid(row) for ref, row in fresh.items()}
        paid = []
        for task in self.taskset.tasks:
            refs = [ref for ref in task.part(part) if ref in fresh]
            key = self._key(recipe_hash, task.protocol_hash)
            paid.append((key, task.name, refs, [fresh[ref] for ref in refs]))
        return Answers(results | fresh, paid, seconds, proof.digest)

    def _uncounted(self, ref: ItemRef, results: dict[ItemRef, ItemResult]) -> bool:
        generated = self.counted and any(t.name == ref.task for t in self.taskset.generating)
        return generated and results[ref].tokens is None

    def save(self, answers: Answers) -> None:
        for key, task, refs, rows in answers.paid:
            self.ledger.save_results(key, task, refs, rows, answers.fingerprint, answers.seconds)

    def _refuse_others(self, recipe_hash: str, digest: str) -> None:
        """Results of two different merges are never put together under one recipe."""
        known = self.ledger.fingerprints(recipe_hash, self.pool.info) - {digest}
        if known and digest:
            raise RunFailed(
                f"recipe {recipe_hash} was merged into other weights (fingerprint {digest}) than "
                f"those that its stored results are of ({min(known)}): a parent's file was changed "
                "while it was in use, or merging rounds otherwise here (another machine, library "
                "version or number of threads); put that back, or search in another --runs-dir, "
                "where nothing is reused"
            )

    def _key(self, recipe_hash: str, protocol_hash: str) -> ResultKey:
        return ResultKey(recipe_hash, self.pool.info, protocol_hash)
