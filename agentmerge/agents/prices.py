"""What a model's tokens cost, where that is known. Unknown is said, never guessed.

``prices.json`` has US dollars a million tokens (in, out), of 28 November 2026, as the list that
litellm 1.110.2 carries has them; not taken from the providers' own pages. For prompts below 200,000
tokens, without discounts for cached input or batches. A price changes without notice, so
``budget.prices`` in the config wins over this table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

Price = tuple[float, float]
PRICES: Mapping[str, Price] = {
    name: (price[0], price[1])
    for name, price in json.loads(Path(__file__).with_suffix(".json").read_bytes()).items()
}
_RELEASE = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8}|latest|\d{3})$")


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
