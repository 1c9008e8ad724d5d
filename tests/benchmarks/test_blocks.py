"""The table of repeated blocks: what was worked out once is what a whole stack says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agentmerge.demo.family import TinyFamily
from agentmerge.testing.tiny import TINY, TinyProblem
from benchmarks import blocks
from benchmarks.stack_problem import Run, Stacks, sheets


@pytest.mark.parametrize("block", [(0, -1, 1.0), (0, 3, 0.5), (1, 2, 1.0), (3, 3, 0.5)])
def test_a_block_goes_on_from_where_its_first_run_ended(
    family: TinyFamily, block: blocks.Block
) -> None:
    weights = TinyProblem(TINY["tiny-so-8"], 0)
    stacks = Stacks(weights, weights.space.everywhere(weight=0.85)[1])
    asked = sheets(weights._search)
    first, last, scale = block
    order = [(layer, 1.0) for layer in range(last + 1)]
    order += [(layer, scale) for layer in range(first, last + 1)]
    order += [(layer, 1.0) for layer in range(last + 1, 4)]
    whole: list[Run] = [(None, layer, (strength, strength)) for layer, strength in order]
    for mine, theirs in zip(
        blocks.asker(stacks, 4, asked)(block), stacks.ask(whole, asked), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_the_stored_table_has_every_block_once_and_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = json.loads(blocks.TABLE.read_text())
    rows = [tuple(row[:3]) for row in table["blocks"]]
    assert rows == [*blocks.blocks(table["layers"])]
    assert len(rows) == 1 + 2 * 465
    blocks.main([])
    said = capsys.readouterr().out
    assert f"{table['sealed_items']} sealed items" in said
