"""Metrics of all answers together (BLEU, chrF, TER, a task's own aggregation of texts or tuples):
what each item gives to them is kept as JSON, and the aggregation itself makes the metric of it.

sacrebleu's are sums over items, whose parts are found once an item, so that a metric of many
halves and resamples is not a tokenisation of everything each time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

#: Characters that one item may give.
_MOST = 1_000_000
#: Items whose reading and parts are remembered.
_REMEMBERED = 100_000


def kept(value: Any) -> str:
    """What ``process_results`` says of an item, as JSON.

    Raises:
        ValueError: it cannot be written so, or is too long.
    """
    body = {"tuple": list(value)} if isinstance(value, tuple) else {"": value}
    try:
        text = json.dumps(body, default=_plain, ensure_ascii=False)
    except (TypeError, RecursionError):
        raise ValueError("which cannot be kept as JSON") from None
    if len(text) > _MOST:
        raise ValueError(f"which has {len(text)} characters, more than {_MOST}")
    return text


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's
        return value.tolist()
    raise TypeError


@lru_cache(maxsize=_REMEMBERED)
def read(text: str) -> Any:
    """The value again; it is shared, and nobody may change it."""
    body = json.loads(text)
    return tuple(body["tuple"]) if "tuple" in body else body[""]


@dataclass(frozen=True)
class OfWhole:
    """An aggregation, of what ``kept`` made. function: lm-eval's or the task's own."""

    function: Callable[[list[Any]], Any]

    def __call__(self, texts: Sequence[str]) -> float:
        if found := self._summed(texts):
            return found[0]
        return float(self.function([read(text) for text in texts]))

    def alone(self, text: str) -> float:
        """The metric of one item by itself; 0 where it has none."""
        try:
            found = self([text])
        except Exception:  # a metric that is nothing of one item
            return 0.0
        return found if math.isfinite(found) else 0.0

    def _summed(self, texts: Sequence[str]) -> tuple[float] | None:
        """None where it is no sum, or items have different numbers of references, of which lm-eval
        takes the fewest that any has."""
        name = getattr(self.function, "__name__", "")
        if getattr(self.function, "__module__", "") != "lm_eval.api.metrics":
            return None
        if name not in ("bleu", "chrf", "chrfpp", "ter"):
            return None
        parts = [_parts(name, text) for text in texts]
        if len({references for references, _ in parts}) != 1:
            return None
        return (float(_metric(name)._aggregate_and_compute([own for _, own in parts]).score),)


@cache
def _metric(name: str) -> Any:
    """As lm-eval's aggregation of that name has it."""
    from sacrebleu import metrics

    theirs = {"bleu": "BLEU", "chrf": "CHRF", "chrfpp": "CHRF", "ter": "TER"}[name]
    return getattr(metrics, theirs)(**({"word_order": 2} if name == "chrfpp" else {}))


@lru_cache(maxsize=_REMEMBERED)
def _parts(name: str, text: str) -> tuple[int, list[Any]]:
    """(how many references, what an item adds to the sums)."""
    from lm_eval.api.metrics import _sacreformat

    references, said = zip(read(text), strict=True)
    streams, texts = _sacreformat(references, said)
    return len(streams), _metric(name)._extract_corpus_statistics(texts, streams)[0]
