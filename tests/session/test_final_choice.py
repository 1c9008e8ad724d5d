"""The answer is a searched merge only where the items put it ahead of every cheap rival."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.config import SearchConfig
from agentmerge.contracts.operators import CHEAP
from agentmerge.ledger import Ledger
from agentmerge.session import driving


def card_of(config: str, folder: Path, **overrides: object) -> tuple[dict, list]:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    row = driving.run(SearchConfig.from_text(config, overrides=named), name="a", runs_dir=folder)
    assert row.result is not None
    with Ledger(folder / driving.LEDGER) as ledger:
        return row.result, ledger.candidates(row.id)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_luck_on_few_items_is_not_the_answer(fake_config: str, tmp_path: Path, seed: int) -> None:
    card, found = card_of(
        fake_config, tmp_path, search__algorithm="random", search__seed=seed, limit=12
    )
    best = max((c for c in found if c.score is not None), key=lambda c: c.score)
    if best.operator not in CHEAP:
        assert card["answer"]["operator"] in CHEAP
        assert any("within the noise" in note for note in card["notes"])
        assert "beyond the noise" in card["verdict"], "what was ahead is not said to be no gain"
    assert "nothing to gain" in card["verdict"] or "use it as it is" in card["verdict"]


def test_a_gain_beyond_the_noise_is(fake_config: str, tmp_path: Path) -> None:
    card, _ = card_of(
        fake_config,
        tmp_path,
        search__algorithm="margins",
        limit=200,
        budget__max_evaluations=35,
        search__population=1,
    )
    assert card["answer"]["operator"] == "margins"
    assert not any("within the noise" in note for note in card["notes"])
    against = {d["against"] for d in card["differences"]}
    assert len(against) == 3 + 1  # parents, the best cheap merge
    low, high = card["answer"]["interval"]
    assert low < card["answer"]["sealed_score"] < high
