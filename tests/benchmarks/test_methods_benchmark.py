"""``python -m benchmarks.methods``: what docs/yardsticks.md says of mergekit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


def test_every_method_is_mergekits_but_for_roundings() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.methods import HEAD, Shape, markdown, measure, table
    finally:
        sys.path.remove(str(ROOT))
    from agentmerge.methods import RECIPE_METHODS

    result = measure(Shape(hidden=16, layers=1, vocabulary=24, repeats=1), (), lambda line: None)
    rows = result["rows"]
    assert {row["method"] for row in rows} >= set(RECIPE_METHODS)
    assert len({(row["dtype"], row["tied"]) for row in rows}) == 4
    for row in rows:
        method = RECIPE_METHODS[row["method"]]
        assert min(row["ours_s"], row["mergekit_s"]) > 0
        assert row["roundings"] <= (1 if row["dtype"] == "bfloat16" else 10), row
        if method.engine == "mergekit":
            assert row["off"] == 0, row
        elif not method.random:  # whose masks mergekit computes in float32
            assert row["wide"] <= 1, row
    assert all(len(line) == len(HEAD) for line in table(result))
    assert result["machine"]["mergekit"] in markdown(result)
