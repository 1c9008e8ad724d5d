"""What an aggregation makes of its items' stored values: the one place that knows lm-eval's.

Whether a metric is a mean over items, which way it is better, which way it goes with its values:
all of it hangs on the aggregation and is asked here, through ``TaskSet.is_mean`` and
``TaskSet.item_sign`` once tasks are built. Goes by names, so that nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

#: How a metric comes back from its items' stored values.
Rebuild = Literal["plain", "weighted", "class", "one_hot", "whole"]
#: Those in which every item has a number besides that no model changes.
WITH_STATICS: tuple[Rebuild, ...] = ("weighted", "class")
#: Those whose stored value is all that an item gives.
OF_VALUES: tuple[Rebuild, ...] = ("plain", "one_hot")

_LM_EVAL = "lm_eval.api.metrics"


@dataclass(frozen=True, slots=True)
class Aggregation:
    """rebuild: how the metric comes back from stored values; None: there is no metric.

    mean: whether it is their plain mean, so that each item's value adds to the score by itself.
    higher_is_better: of the metric, for tasks that do not say it; None: nothing is known.
    falls: the metric falls as the stored values (log-likelihoods then) rise.
    """

    rebuild: Rebuild | None = "plain"
    mean: bool = False
    higher_is_better: bool | None = None
    falls: bool = False


_MEAN = Aggregation(mean=True)
_KNOWN = {
    "perplexity": Aggregation("plain", higher_is_better=False, falls=True),
    "weighted_perplexity": Aggregation("weighted", higher_is_better=False, falls=True),
    "bits_per_byte": Aggregation("weighted", higher_is_better=False, falls=True),
    "f1_score": Aggregation("class", higher_is_better=True),
    "matthews_corrcoef": Aggregation("class", higher_is_better=True),
    "brier_score": Aggregation("one_hot", higher_is_better=False),
    "ter": Aggregation("whole", higher_is_better=False),
    "bleu": Aggregation("whole", higher_is_better=True),
    "chrf": Aggregation("whole", higher_is_better=True),
    "chrfpp": Aggregation("whole", higher_is_better=True),
    "bypass_agg": Aggregation(None),
}


def aggregation_of(function: Callable[[list[Any]], Any] | None) -> Aggregation:
    """What is known of an aggregation; None is the mean, as lm-eval has it.

    A task's own function is a mean where it is called one, and else a metric of the whole.
    """
    name = getattr(function, "__name__", "")
    if function is None or name in ("mean", "fmean"):
        return _MEAN
    own = getattr(function, "__module__", "") != _LM_EVAL
    return Aggregation() if own else _KNOWN.get(name, Aggregation())
