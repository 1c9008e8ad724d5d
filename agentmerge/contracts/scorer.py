"""The contract of a scorer: what a generated answer is worth, in place of a task's own metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Scorer(Protocol):
    """A function, or an object that can be called; a plugin's entry point is one, and what a config
    calls ``file.py:name``. The metric that it makes is the mean over documents, and is called as
    the entry point or the function.

    It runs where the worker lives. The same answers are always worth the same: what it says is
    kept, under its own code and that of the files beside it that it imports. ``higher_is_better``
    is False where less is better.
    """

    def __call__(self, document: Mapping[str, Any], answers: Sequence[str]) -> float:
        """What the answers to a document are worth, a finite number.

        document: the task's own. answers: after the task's filter; one, or as many as it repeats.
        Whatever it raises is that candidate's failure.
        """
        ...
