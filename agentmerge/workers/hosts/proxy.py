"""A worker that lives apart, as whoever asks it sees it: calls go over, and errors come back."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from agentmerge.contracts.worker import (
    EngineInfo,
    Fingerprint,
    Gradient,
    ItemRef,
    ItemResult,
    Loss,
)
from agentmerge.errors import AgentmergeError, WorkerLost
from agentmerge.recipe import Recipe


class Proxy:
    """``_info`` is set once the worker is built."""

    _info: EngineInfo | None = None

    def _call(self, name: str, *arguments: Any) -> Any:
        """What the worker's method gives or raises; WorkerLost where it is gone."""
        raise NotImplementedError

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    def load(self, recipe: Recipe) -> Fingerprint:
        found: Fingerprint = self._call("load", recipe)
        return found

    def score(self, items: Sequence[ItemRef]) -> list[ItemResult]:
        found: list[ItemResult] = self._call("score", tuple(items))
        return found

    def gradient(
        self,
        recipe: Recipe,
        items: Sequence[ItemRef],
        loss: Loss = "margin",
        weights: Sequence[float] | None = None,
    ) -> Gradient:
        found: Gradient = self._call("gradient", recipe, tuple(items), loss, weights)
        return found


def portable(error: BaseException) -> AgentmergeError:
    """The error, or what can be said of it elsewhere: a candidate's failure is read among others,
    with no traceback, and not a driver's ten lines."""
    if isinstance(error, AgentmergeError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # a plugin's own exception
            return WorkerLost(str(error))
        return error
    return WorkerLost(one_line(error))


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
