"""The results database: runs, candidates, per-item results, model calls, advice.

It is the search's memory. What was paid for is committed here, under a key made of everything that
can change the answer, before the node that paid returns; asking again for a key that is there
costs nothing. Graph state holds only numbers that point here. It knows no strategy and no model.

Laid out for 100,000 candidates x 1,000 items: a result row is one packed block per (recipe,
engine, protocol, item set), three zlib-compressed columns (float64 values, float32 log-likelihoods,
float16 margins) and two bit flags an item; item keys are stored once a set. See ``packing.py``.
"""

from __future__ import annotations

from agentmerge.ledger.overview import Overview
from agentmerge.ledger.packing import KEY_DIGITS, pack, unpack
from agentmerge.ledger.rows import (
    Candidate,
    GradientKey,
    ResultKey,
    RunRow,
    counted,
    evaluations,
    incumbent,
)
from agentmerge.ledger.runs import Runs
from agentmerge.ledger.verdicts import Verdicts


class Ledger(Runs, Overview, Verdicts):
    """One open results database; safe to share between threads and processes."""


__all__ = [
    "KEY_DIGITS",
    "Candidate",
    "GradientKey",
    "Ledger",
    "ResultKey",
    "RunRow",
    "counted",
    "evaluations",
    "incumbent",
    "pack",
    "unpack",
]
