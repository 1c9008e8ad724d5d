"""What models may still cost: what they did, and the most that requests under way can.

Reserved before a request is sent, settled when it ended; shared by all that ask models at the same
time, so that together they stay within the limits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from agentmerge.config import BudgetSettings
from agentmerge.contracts.calls import Call
from agentmerge.errors import BudgetReached


class Purse:
    """spent: what the ledger has of the run so far (``call_totals``), asked once."""

    def __init__(self, spent: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._read = spent
        self._lock = threading.Lock()
        self._spent: tuple[int, float] | None = None
        self._promised: dict[Hashable, tuple[int, float]] = {}

    def reserve(
        self,
        whose: Hashable,
        tokens: int,
        usd: float,
        limits: BudgetSettings,
        left: tuple[int, float] = (0, 0.0),
    ) -> None:
        """Promise the next request of a question the most that it can cost.

        left: (tokens, dollars) that must be over after it.

        Raises:
            BudgetReached: it cannot be paid.
        """
        with self._lock:
            used, paid = self._known()
            others = [cost for key, cost in self._promised.items() if key != whose]
            used += tokens + left[0] + sum(cost[0] for cost in others)
            paid += usd + left[1] + sum(cost[1] for cost in others)
            if limits.max_tokens is not None and used > limits.max_tokens:
                raise BudgetReached("tokens")
            if limits.max_cost_usd is not None and paid > limits.max_cost_usd:
                raise BudgetReached("cost")
            self._promised[whose] = (tokens, usd)

    def settle(self, whose: Hashable, call: Call) -> None:
        """What a request did cost, in place of what it could."""
        with self._lock:
            used, paid = self._known()
            self._spent = (used + call.tokens_in + call.tokens_out, paid + (call.cost_usd or 0.0))
            self._promised.pop(whose, None)

    def _known(self) -> tuple[int, float]:
        if self._spent is None:
            found = self._read()
            tokens = found.get("tokens_in", 0) + found.get("tokens_out", 0)
            self._spent = (tokens, found.get("cost_usd") or 0.0)
        return self._spent
