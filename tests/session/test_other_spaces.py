"""A branch may change the search space: vectors of another one are never taken for its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.session import driving
from agentmerge.session.replay import replay
from tests.session.conftest import BODY, OBJECTIVES, config
from tests.session.test_branch import candidates

#: Changes of the search space.
OTHER_SPACES = {
    "finer": {"genome.layer_granularity": 1},
    "filters": {"genome.filters": ["self_attn"]},
    "method": {"genome.merge_method": "ties", "genome.normalize": None},
    "fewer models": {"genome.models": ["north", "east"]},
    "no base": {"genome.merge_method": "linear", "genome.base_model": None},
}
ALGORITHMS = ["auto", "cma_es", "llm_evo", "margins", "one_plus_one", "gradient", "tpe", "null_llm"]


@pytest.mark.parametrize("asks", ["the same", "another limit"])
@pytest.mark.parametrize("change", OTHER_SPACES.values(), ids=OTHER_SPACES)
def test_a_branch_may_change_the_space(
    tmp_path: Path, change: dict, asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The incumbent stays the merge that it is, whatever its vector means in the new space."""
    number = list(OTHER_SPACES.values()).index(change) + 5 * (asks == "another limit")
    objective = list(OBJECTIVES.values())[number % len(OBJECTIVES)]
    for key, value in objective.items():
        monkeypatch.setitem(BODY, key, value)
    three = config(
        genome={"models": ["north", "south", "east"]},
        search={"algorithm": "llm_evo"},
        budget={"max_evaluations": 24},
    )
    driving.run(three, name="a", runs_dir=tmp_path)
    found = candidates(tmp_path, "a")
    last = found[-1].generation
    more = {"limit": 40} if asks == "another limit" else {}
    anew = bool(more) or "genome.models" in change  # then the past is knowledge, and not paid for
    algorithm = ALGORITHMS[number % len(ALGORITHMS)]
    row = driving.branch(
        "a",
        at=last,
        name="b",
        runs_dir=tmp_path,
        overrides=change
        | more
        | {"search.algorithm": algorithm, "budget.max_evaluations": 16 if anew else 28},
    )
    assert row.status == "done"
    mine = candidates(tmp_path, "b")
    new = [c for c in mine if c.generation > last]
    assert new
    again = [c for c in new if c.operator == "incumbent"]
    if more and again:
        assert again[0].recipe_hash in {c.recipe_hash for c in found}
        assert again[0].state in ("scored", "twin")
    made = [c for c in new if c.vector is not None]
    assert len({(c.space, len(c.vector)) for c in made}) == 1
    assert replay("b", runs_dir=tmp_path).identical
