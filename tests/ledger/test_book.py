"""A run in memory says what its ledger says, whatever was written in whatever order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from agentmerge.contracts.strategy import Proposal
from agentmerge.ledger import Ledger, RunRow, evaluations, incumbent
from agentmerge.ledger.book import Book


def _row() -> RunRow:
    return RunRow("r", "name", 1.0, "new", "", "", "s", 0, "random", None, None, {}, None)


def _same(book: Book, ledger: Ledger) -> None:
    rows = ledger.candidates("r")
    assert book.candidates() == rows
    assert book.incumbent() == incumbent(rows)
    last = rows[-1].generation
    for up_to in (0, last // 2, last):
        known = [c for c in rows if c.generation <= up_to]
        still_open = [c for c in known if c.state == "open"]
        assert book.pending(up_to) == still_open
        assert book.evaluations(up_to) == evaluations(known)
        promised = evaluations(known) + sum(c.cost for c in still_open)
        assert book.evaluations(up_to, promised=True) == pytest.approx(promised)


@pytest.mark.parametrize("seed", range(6))
def test_it_says_what_the_ledger_says(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ledger.add_run(_row())
        book = Book(ledger, "r")
        for generation in range(12):
            recipes = [f"recipe-{rng.randrange(20)}" for _ in range(rng.randint(1, 3))]
            book.add_candidates(
                generation,
                [(Proposal((0.5,), "random"), text, text, rng.choice(["", "", "bad"]))
                 for text in recipes],
            )  # fmt: skip
            book.save_advice(generation, "proposer", {"said": generation % 2})
            for candidate in book.pending(generation):
                at = (candidate.generation, candidate.slot)
                if rng.random() < 0.3:
                    continue  # others end first
                if rng.random() < 0.2:
                    book.save_evaluation(at, score=None, lost=(rng.random(), 0.5, 0.5))
                else:
                    book.save_evaluation(at, score=rng.choice([0.25, 0.5, rng.random()]))
                _same(book, ledger)
            scored = [c for c in book.candidates() if c.score is not None and c.twin is None]
            for candidate in rng.sample(scored, min(2, len(scored))):
                at = (candidate.generation, candidate.slot)
                book.save_violations({at: rng.choice([0.0, 0.1])})
                _same(book, ledger)
            odd = [w["generation"] for w in book.words("proposer", _is_odd)]
            assert odd == [g for g in range(generation + 1) if g % 2]
        assert Book(ledger, "r").incumbent() == book.incumbent()


def _is_odd(word: dict[str, object]) -> bool:
    return word["said"] == 1
