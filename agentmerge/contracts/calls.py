"""One request to a chat model, as it is kept, and what stands between a request and the wire.

Knows no provider and no database: a ``CallLog`` does the keeping, and may refuse a request that
the budget cannot pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from agentmerge.contracts.events import Called

if TYPE_CHECKING:
    from langchain_core.language_models import BaseChatModel

#: More tokens than any context holds: a count beyond it is no count.
MOST_TOKENS = 10_000_000
#: answered: its text was understood, or it asked for tools. refused: its text was not.
#: retry: a fault that may pass. lower: the server does not take this shape. no_system: nor a
#: message of the system. failed: a fault that ended the asking.
Ending = Literal["answered", "refused", "retry", "lower", "no_system", "failed"]


@dataclass(frozen=True, slots=True)
class Call:
    """A request and what came of it.

    messages: all that was sent. reply: the model's text. tool_calls: LangChain's plain dicts.
    error: why it was of no use. shape: how the reply's form was asked for. price: dollars a million
    tokens, None where unknown.
    """

    messages: Sequence[dict[str, Any]]
    ending: Ending
    shape: str
    reply: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    error: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    latency_s: float = 0.0
    cost_usd: float | None = None

    def event(self, role: str, generation: int, attempt: int) -> Called:
        return Called(
            role=role,
            generation=generation,
            attempt=attempt,
            ending=self.ending,
            error=self.error or "",
            tokens=[self.tokens_in, self.tokens_out],
            cost_usd=self.cost_usd,
            seconds=round(self.latency_s, 3),
        )


class CallLog(Protocol):
    """Where the requests of one question go; ``number`` counts them from 0."""

    def stored(self, number: int) -> Call | None:
        """What came of this request in an earlier life, so that it is not paid for twice."""
        ...

    def reserve(self, tokens_in: int, tokens_out: int, cost_usd: float | None) -> None:
        """Called before a request goes out, with the most that it can cost.

        Raises:
            BudgetReached: it cannot be paid.
            ReplyMissing: nothing may be asked (a replay).
        """
        ...

    def keep(self, number: int, call: Call) -> None:
        """Called as soon as a request ended."""
        ...


class ModelProvider(Protocol):
    """From the name behind the colon of ``--llm provider:name`` to a chat model."""

    def __call__(self, model: str, **options: Any) -> BaseChatModel:
        """options: base_url, temperature, max_tokens and timeout, as far as the user set them."""
        ...


class NoLog:
    """Keeps nothing and allows everything."""

    def stored(self, number: int) -> Call | None:
        return None

    def reserve(self, tokens_in: int, tokens_out: int, cost_usd: float | None) -> None:
        """Everything can be paid."""

    def keep(self, number: int, call: Call) -> None:
        """Nobody reads it."""
