"""Gradients are kept exactly, and a merge is differentiated once by each loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import EngineInfo, Gradient, TensorSlope
from agentmerge.ledger import GradientKey, Ledger, RunRow

ENGINE = EngineInfo("hf", "1", "cpu", "float32", "64")
KEY = GradientKey("same", ENGINE, "question")
GRADIENT = Gradient(
    1 / 3,
    7,
    (
        TensorSlope("model.embed_tokens.weight", None, False, (("ü/b", 1e-300), ("c", -0.1))),
        TensorSlope("model.layers.1.mlp.weight", 1, False, (("ü/b", 2.0), ("c", 0.0)), -1 / 7),
        TensorSlope("model.norm.weight", None, True, ()),
    ),
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    with Ledger(tmp_path / "l.sqlite") as found:
        found.add_run(RunRow("r", "r", 1.0, "new", "", "", "s", 0, "x", None, None, {}, None))
        yield found


def add(ledger: Ledger, generation: int, *asked: Proposal) -> None:
    ledger.add_candidates("r", generation, [(p, "same", "yaml", "") for p in asked])


def test_a_gradient_comes_back_exactly(ledger: Ledger) -> None:
    assert ledger.gradient(KEY) is None
    add(ledger, 0, Proposal((0.5, 0.5), "x", want="gradient"))
    ledger.save_evaluation("r", (0, 0), score=1.0, slope=(KEY, GRADIENT, (0.1, 1 / 3)))
    assert ledger.gradient(KEY) == GRADIENT
    assert ledger.gradient(GradientKey("same", ENGINE, "another")) is None
    (seen,) = ledger.history("r")
    assert (seen.gradient, seen.loss) == ((0.1, 1 / 3), 1 / 3)


def test_the_same_merge_is_differentiated_once_by_each_loss(ledger: Ledger) -> None:
    score = Proposal((0.5,), "x")
    first = Proposal((0.5,), "x", want="gradient", loss="margin")
    other = Proposal((0.5,), "x", want="gradient", loss="log_likelihood")
    add(ledger, 0, score)
    ledger.save_evaluation("r", (0, 0), score=0.5)
    add(ledger, 1, first, first, other, score)
    states = [(c.state, c.twin) for c in ledger.candidates("r", 1)]
    assert states == [("open", (0, 0)), ("twin", (1, 0)), ("open", (0, 0)), ("twin", (0, 0))]
    ledger.save_evaluation("r", (1, 0), score=0.5, slope=(KEY, GRADIENT, (0.1,)))
    ledger.save_evaluation("r", (1, 2), score=0.5)  # a gradient that failed: the score stands
    seen = ledger.history("r")
    assert [o.gradient for o in seen] == [None, (0.1,), (0.1,), None, None]
    assert {o.score for o in seen} == {0.5}
    assert sum(c.cost for c in ledger.candidates("r") if c.state == "scored") == 1 + 3 + 3


def test_each_space_has_its_own_gradient_of_a_merge(ledger: Ledger) -> None:
    """One space's was read as another's, with as many numbers as that has axes."""
    first = Proposal((0.5,), "x", want="gradient", space="one")
    other = Proposal((0.5, 0.2), "x", want="gradient", space="two")
    add(ledger, 0, first)
    ledger.save_evaluation("r", (0, 0), score=0.5, slope=(KEY, GRADIENT, (0.1,)))
    add(ledger, 1, other, first)
    assert [c.state for c in ledger.candidates("r", 1)] == ["open", "twin"]
    ledger.save_evaluation("r", (1, 0), score=0.5)  # it never came
    assert [o.gradient for o in ledger.history("r")] == [(0.1,), None, (0.1,)]


def test_a_merge_that_failed_cost_one(ledger: Ledger) -> None:
    add(ledger, 0, Proposal((0.5,), "x", want="gradient"))
    ledger.save_evaluation("r", (0, 0), score=None, failure="not finite")
    assert [c.cost for c in ledger.candidates("r")] == [1]
