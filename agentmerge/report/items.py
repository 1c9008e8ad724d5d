"""What a search asked, item by item, and how two merges differ on it. From the ledger alone.

No task is loaded and no model: which items were asked, and how their values make a score, is
written down when a search begins. Searches from before that have no item tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentmerge.contracts.operators import PARENT
from agentmerge.contracts.worker import EngineInfo, ItemResult
from agentmerge.evaluation.statistics import Interval, paired_score_difference
from agentmerge.evaluation.tasks import leaf_shares
from agentmerge.ledger import Candidate, Ledger, ResultKey, RunRow
from agentmerge.recipe.names import short_name

Part = Literal["search", "sealed"]

#: Leaf task -> item key -> what the item showed.
Values = Mapping[str, Mapping[str, ItemResult]]


@dataclass(frozen=True, slots=True)
class ItemsAsked:
    """The items of one part of a search, and what else decides an answer.

    keys: leaf task -> item keys, in order. objectives: as in the run's facts.
    """

    part: Part
    keys: Mapping[str, Sequence[str]]
    protocols: Mapping[str, str]
    engine: EngineInfo
    objectives: Sequence[Mapping[str, Any]]
    seed: int

    def values(self, ledger: Ledger, recipe_hash: str) -> Values | None:
        """A recipe's results for these items, without those that have no verdict; None where one
        was not asked."""
        found = {}
        for task, keys in self.keys.items():
            stored = ledger.results(ResultKey(recipe_hash, self.engine, self.protocols[task]))
            if not all(key in stored for key in keys):
                return None
            found[task] = {key: stored[key] for key in keys if not stored[key].missing}
            if not found[task]:
                return None
        return found


def asked(ledger: Ledger, row: RunRow, part: Part) -> ItemsAsked | None:
    """What a search asked; None where that was not written down, or nothing is sealed."""
    keys = ledger.item_keys(row.id, part)
    if not keys or "objectives" not in row.facts:
        return None
    return ItemsAsked(
        part,
        {task: keys[task] for task in row.facts["protocols"] if task in keys},
        row.facts["protocols"],
        EngineInfo(**row.facts["engine"]),
        row.facts["objectives"],
        row.seed,
    )


def scores(values: Values, question: ItemsAsked) -> dict[str, float]:
    """Each objective's metric on these items, of those whose metric is a mean over items."""
    found = {}
    for objective in question.objectives:
        if not objective["mean"]:
            continue
        means = {task: _mean(values[task]) for task in objective["leaves"]}
        size = {task: len(values[task]) if objective["by_size"] else 1 for task in means}
        total = sum(size.values())
        found[str(objective["name"])] = sum(means[t] * size[t] / total for t in means)
    return found


def _mean(results: Mapping[str, ItemResult]) -> float:
    return sum(result.value for result in results.values()) / len(results)


def paired(mine: Values, theirs: Values, question: ItemsAsked) -> Interval | None:
    """How far ``mine`` is ahead on the items that both have; None where a metric is no mean."""
    rows = []
    for objective in question.objectives:
        if not objective["mean"]:
            return None
        shared = {
            task: [
                key
                for key in question.keys[task]
                if key in theirs.get(task, ()) and key in mine[task]
            ]
            for task in objective["leaves"]
        }
        if not all(shared.values()):
            return None
        shares = leaf_shares(objective["by_size"], {t: len(keys) for t, keys in shared.items()})
        for task, keys in shared.items():
            rows.append(
                (
                    objective["signed_weight"] * shares[task],
                    [mine[task][key].value for key in keys],
                    [theirs[task][key].value for key in keys],
                )
            )
    return paired_score_difference(rows, question.seed) if rows else None


def goodness(question: ItemsAsked, task: str) -> Callable[[ItemResult], float | None]:
    """How good one item's result is, higher for better, by what the task's values are.

    A perplexity's are log-likelihoods; of an f1's, predicted classes, only the margin tells right
    (1) from wrong (0), and None where there is none.
    """
    rebuild, sign = "plain", 1.0
    for objective in question.objectives:
        if task in objective["leaves"]:
            place = list(objective["leaves"]).index(task)
            rebuild = (objective.get("rebuild") or {place: "plain"})[place]
            # Searches from before signs were written down know the metric's direction.
            known = 1.0 if objective["higher_is_better"] or rebuild == "weighted" else -1.0
            sign = (objective.get("item_sign") or {place: known})[place]
    if rebuild == "class":
        return lambda result: None if result.margin is None else float(result.margin > 0)
    return lambda result: sign * result.value


def gains(mine: Values, theirs: Values, question: ItemsAsked) -> list[dict[str, Any]]:
    """Task by task: how many items ``mine`` gained, lost, and left as they were.

    An item is gained where its value is better; for zeros and ones, ``both`` and ``neither`` say
    how many stayed right and stayed wrong.
    """
    rows = []
    for task, keys in question.keys.items():
        good = goodness(question, task)
        both = [
            (good(mine[task][key]), good(theirs[task][key]))
            for key in keys
            if key in theirs.get(task, ()) and key in mine[task]
        ]
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        kept = [a for a, b in pairs if a == b]
        rows.append(
            {
                "task": task,
                "items": len(pairs),
                "gained": sum(a > b for a, b in pairs),
                "lost": sum(a < b for a, b in pairs),
                "both": sum(a > 0 for a in kept),
                "neither": sum(a <= 0 for a in kept),
            }
        )
    return rows


def candidate_name(candidate: Candidate) -> str:
    """What to call a candidate before people: never a path, always unique within a search."""
    place = f"{candidate.generation}.{candidate.slot}"
    label = short_name(candidate.label) if candidate.label else ""
    if candidate.operator == PARENT:
        return f"parent {label}"
    return f"{label} ({place})" if label else f"{candidate.operator} {place}"
