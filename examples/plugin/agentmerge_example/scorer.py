"""A scorer: half a right answer is worth more than none."""

from collections.abc import Mapping, Sequence
from typing import Any


def letters(document: Mapping[str, Any], answers: Sequence[str]) -> float:
    """The share of the gold answer's letters that stand where they should."""
    gold = document["answer"]
    right = sum(a == b for a, b in zip(gold, answers[0].strip(), strict=False))
    return right / max(len(gold), len(answers[0].strip()))
