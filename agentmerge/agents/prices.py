"""What a model's tokens cost, where that is known. Unknown is said, never guessed.

US dollars a million tokens (in, out), as the providers listed them in autumn 2025; a price changes
without notice, so ``budget.prices`` in the config wins over this table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PRICES: Mapping[str, tuple[float, float]] = {
    "openai:gpt-4o": (2.5, 10.0),
    "openai:gpt-4o-mini": (0.15, 0.6),
    "openai:gpt-4.1": (2.0, 8.0),
    "openai:gpt-4.1-mini": (0.4, 1.6),
    "openai:gpt-4.1-nano": (0.1, 0.4),
    "openai:gpt-5": (1.25, 10.0),
    "openai:gpt-5-mini": (0.25, 2.0),
    "openai:gpt-5-nano": (0.05, 0.4),
    "openai:o3": (2.0, 8.0),
    "openai:o4-mini": (1.1, 4.4),
    "anthropic:claude-opus-4-1": (15.0, 75.0),
    "anthropic:claude-sonnet-4": (3.0, 15.0),
    "anthropic:claude-sonnet-4-5": (3.0, 15.0),
    "anthropic:claude-haiku-4-5": (1.0, 5.0),
    "anthropic:claude-3-5-haiku": (0.8, 4.0),
    "google_genai:gemini-2.5-pro": (1.25, 10.0),
    "google_genai:gemini-2.5-flash": (0.3, 2.5),
    "google_genai:gemini-2.5-flash-lite": (0.1, 0.4),
}
_RELEASE = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8}|latest|\d{3})$")

Price = tuple[float, float]


def price_of(
    provider: str, model: str, own_server: bool, overrides: Mapping[str, Price]
) -> Price | None:
    """Dollars a million tokens (in, out); None where nobody said.

    own_server: asked at a base URL, where a list price says nothing. overrides: by "provider:model"
    or by the model's name alone.
    """
    full = f"{provider}:{model}"
    for name in (full, model):
        if name in overrides:
            return overrides[name]
    if own_server:
        return None
    return PRICES.get(full) or PRICES.get(_RELEASE.sub("", full))


def cost_usd(price: Price | None, tokens_in: int, tokens_out: int) -> float | None:
    if price is None:
        return None
    return (tokens_in * price[0] + tokens_out * price[1]) / 1e6
