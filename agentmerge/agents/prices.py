"""What a model's tokens cost, where that is known. Unknown is said, never guessed.

US dollars a million tokens (in, out), of 28 November 2026, as the list that litellm 1.110.2 carries
has them; not taken from the providers' own pages. For prompts below 200,000 tokens, without
discounts for cached input or batches. A price changes without notice, so ``budget.prices`` in the
config wins over this table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

PRICES: Mapping[str, tuple[float, float]] = {
    "openai:gpt-4o": (2.5, 10.0),
    "openai:gpt-4o-mini": (0.15, 0.6),
    "openai:gpt-4.1": (2.0, 8.0),
    "openai:gpt-4.1-mini": (0.4, 1.6),
    "openai:gpt-5": (1.25, 10.0),
    "openai:gpt-5-mini": (0.25, 2.0),
    "openai:gpt-5-nano": (0.05, 0.4),
    "openai:gpt-5.1": (1.25, 10.0),
    "openai:gpt-5.2": (1.75, 14.0),
    "openai:gpt-5.4": (2.5, 15.0),
    "openai:gpt-5.4-mini": (0.75, 4.5),
    "openai:gpt-5.4-nano": (0.2, 1.25),
    "openai:gpt-5.5": (5.0, 30.0),
    "openai:gpt-5.6": (4.0, 20.0),
    "openai:gpt-5.6-luna": (0.2, 1.2),
    "openai:gpt-5.6-sol": (4.0, 20.0),
    "openai:gpt-5.6-terra": (2.0, 12.0),
    "openai:gpt-6-luna": (0.1, 0.5),
    "openai:gpt-6-sol": (2.0, 10.0),
    "openai:gpt-6.1-sol": (2.0, 10.0),
    "openai:gpt-6.1-terra": (1.0, 5.0),
    "openai:o3": (2.0, 8.0),
    "anthropic:claude-haiku-4-5": (1.0, 5.0),
    "anthropic:claude-haiku-5-5": (0.1, 0.5),
    "anthropic:claude-sonnet-4-5": (3.0, 15.0),
    "anthropic:claude-sonnet-4-6": (3.0, 15.0),
    "anthropic:claude-sonnet-5": (2.0, 10.0),
    "anthropic:claude-sonnet-5-5": (2.0, 10.0),
    "anthropic:claude-opus-4-5": (5.0, 25.0),
    "anthropic:claude-opus-4-6": (5.0, 25.0),
    "anthropic:claude-opus-4-7": (5.0, 25.0),
    "anthropic:claude-opus-4-8": (5.0, 25.0),
    "anthropic:claude-opus-5": (5.0, 25.0),
    "anthropic:claude-opus-5-5": (4.0, 20.0),
    "google_genai:gemini-2.5-pro": (1.25, 10.0),
    "google_genai:gemini-2.5-flash": (0.3, 2.5),
    "google_genai:gemini-2.5-flash-lite": (0.1, 0.4),
    "google_genai:gemini-3-flash-preview": (0.5, 3.0),
    "google_genai:gemini-3.1-flash-lite": (0.25, 1.5),
    "google_genai:gemini-3.1-pro-preview": (2.0, 12.0),
    "google_genai:gemini-3.5-flash": (1.5, 9.0),
    "google_genai:gemini-3.5-flash-lite": (0.3, 2.5),
    "google_genai:gemini-3.6-flash": (0.75, 3.75),
    "google_genai:gemini-3.7-flash": (0.75, 3.75),
    "google_genai:gemini-3.8-flash": (0.75, 3.75),
    "google_genai:gemini-4-argon": (2.0, 10.0),
    "google_genai:gemini-4-hydrogen": (1.5, 7.5),
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
