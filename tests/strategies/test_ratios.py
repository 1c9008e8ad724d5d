"""Spaces in which only ratios of weights matter: one point a merge, and no point that is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from agentmerge.config import GenomeConfig, SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.space.grouped import SearchSpace
from agentmerge.strategies.ratios import Ratios
from tests.session.conftest import config_text


def space(method: str = "task_arithmetic", **genome: object) -> SearchSpace:
    base = {} if method == "linear" else {"base_model": "base"}
    body = {"models": ("a", "b", "c"), "merge_method": method, "normalize": True} | base
    return SearchSpace(GenomeConfig(**(body | {"layer_granularity": 2} | genome)), 4)


SPACES = {
    "sum": space(),
    "linear": space("linear"),
    "filters": space(filters=("self_attn", "mlp")),
    "smooth": space(smooth=True),
    "signed": space(allow_negative_weights=True),
    "ties": space("ties"),
    "della": space("della_linear"),
}


@pytest.mark.parametrize("name", SPACES)
def test_the_representative_is_the_same_merge_with_its_largest_weight_at_one(name: str) -> None:
    there = SPACES[name]
    ratios = Ratios.of(there)
    points = np.random.default_rng(0).random((12, there.dimensions))
    found = ratios.representative(points)
    assert ratios.blocks
    assert not np.allclose(points, found)
    for one, other in zip(points, found, strict=True):
        assert there.vector(there.recipe(one)) == pytest.approx(
            there.vector(there.recipe(other)), abs=1e-9
        )
        for block in ratios.blocks:
            assert other[block].max() == pytest.approx(1.0)
    np.testing.assert_allclose(ratios.representative(found), found, atol=1e-12)


def test_its_slope_is_the_slope() -> None:
    there = SPACES["signed"]
    ratios = Ratios.of(there)
    rng = np.random.default_rng(1)
    lean = rng.normal(size=there.dimensions)

    def height(point: np.ndarray) -> float:
        return float(np.sin(3 * ratios.representative(point[None])[0]) @ lean)

    point = rng.random(there.dimensions)
    there_too = ratios.representative(point[None])[0]
    slope = ratios.pulled_back(point, 3 * np.cos(3 * there_too) * lean)
    for axis in range(there.dimensions):
        step = np.eye(there.dimensions)[axis] * 1e-7
        rise = (height(point + step) - height(point - step)) / 2e-7
        assert slope[axis] == pytest.approx(rise, rel=1e-4, abs=1e-5)


def test_where_weights_count_for_themselves_nothing_changes() -> None:
    there = space(normalize=False)
    points = np.random.default_rng(0).random((3, there.dimensions))
    np.testing.assert_array_equal(Ratios.of(there).representative(points), points)


@pytest.mark.parametrize("name", ["sum", "linear", "filters", "smooth", "signed"])
def test_a_point_that_is_no_merge_is_moved_until_it_is_one(name: str) -> None:
    there = SPACES[name]
    nothing = 0.5 if name == "signed" else 0.0
    point = tuple(
        nothing if axis.group == 0 and axis.parameter == "weight" else 0.7 for axis in there.axes
    )
    assert not there.legal(point)
    moved = there.made_legal(point)
    assert there.legal(moved)
    assert max(abs(a - b) for a, b in zip(point, moved, strict=True)) < 0.01
    fine = (0.3,) * there.dimensions
    assert there.made_legal(fine) == fine


@pytest.mark.parametrize(
    ("algorithm", "genome"),
    [
        ("auto", {"normalize": True, "layer_granularity": 1}),
        ("auto", {"merge_method": "linear", "base_model": None, "filters": ["self_attn"]}),
        ("llm_evo", {"normalize": True, "smooth": True, "allow_negative_weights": True}),
        ("llm_evo", {"normalize": True, "layer_granularity": 1}),
    ],
    ids=["auto-sum", "auto-linear", "llm_evo-signed", "llm_evo-sum"],
)
def test_no_proposal_is_refused_for_what_the_space_knew(
    tmp_path: Path, algorithm: str, genome: dict
) -> None:
    search = {"algorithm": algorithm, "population": 1 if algorithm == "auto" else 5}
    text = config_text(genome=genome, search=search, budget={"max_evaluations": 26})
    body = yaml.safe_load(text)
    body["genome"] = {k: v for k, v in body["genome"].items() if v is not None}
    row = driving.run(SearchConfig.from_text(yaml.safe_dump(body)), name="a", runs_dir=tmp_path)
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = [c for c in ledger.candidates(row.id) if c.generation > 0]
    assert len(found) > 6
    assert not [c.failure for c in found if c.failure]
    assert row.status == "done"
