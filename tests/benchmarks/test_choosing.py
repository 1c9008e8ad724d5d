"""The simulation of how answers are chosen, at a size for every day."""

from __future__ import annotations

import pytest

from benchmarks.choosing import World, rates


@pytest.mark.parametrize("climbing", [False, True], ids=["drawn", "climbing"])
@pytest.mark.parametrize("rivals", [1, 3, 10])
def test_what_is_no_better_is_seldom_called_ahead(rivals: int, climbing: bool) -> None:
    found = rates(World(rivals, 0.0, climbing), 60)
    assert found["handed out"] <= 0.1  # of 1,000: at most .045
    assert found["said"] <= 0.04
    if rivals == 1:
        assert found["one pair"] >= 0.2, "what the tries are counted for"


def test_a_gain_is_found() -> None:
    found = rates(World(3, 0.12, False), 40)
    assert found["handed out"] >= 0.8
    assert found["said"] >= 0.5
