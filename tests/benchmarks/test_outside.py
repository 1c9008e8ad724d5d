"""Some draws of ``benchmarks.outside replies``: no reply, and no HTTP, breaks a search."""

from __future__ import annotations

import pytest

from benchmarks.outside.mutations import KINDS
from benchmarks.outside.replies import one
from benchmarks.outside.tally import Tally

DRAWS = 3  # of each kind: 21; `python -m benchmarks.outside replies` draws 500


@pytest.mark.parametrize("kind", KINDS)
def test_no_reply_breaks_a_search(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none-000000")
    tally = Tally()
    for number in range(DRAWS):
        tally.merge(one(number, 1, kind))
    assert tally.notes == []
    assert tally.counts[kind].total() == DRAWS


def test_the_table_counts_every_draw() -> None:
    tally, other = Tally(), Tally()
    tally.add("usage", "advice kept")
    other.add("usage", "unexpected", "draw 3")
    other.add("HTTP", "advice lost")
    tally.merge(other)
    assert tally.bad == 1
    assert tally.notes == ["usage: unexpected: draw 3"]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in tally.table().splitlines()]
    head, _, *counted = rows
    assert head[:2] == ["broken", "draws"]
    assert head[-3:] == ["unexpected", "not mended", "over bounds"]
    assert [row[:2] for row in counted] == [["HTTP", "1"], ["usage", "2"], ["all", "3"]]
