"""What every search space promises (``contracts/space.py``), as tests that its author inherits.

    class TestMine(SpaceSuite):
        @pytest.fixture
        def space(self):
            return MySpace(...)

A point of the unit box is one merge, and the way there and back is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from agentmerge.config import GenomeConfig
from agentmerge.contracts.space import Space
from agentmerge.errors import RecipeRejected
from agentmerge.recipe import Recipe
from agentmerge.space.grouped import SearchSpace

DRAWS = 40


def space_of(genome: GenomeConfig, num_layers: int) -> Space:
    """The space that a search of this genome has on models of so many layers."""
    return SearchSpace(genome, num_layers)


def comes_back(space: Space, point: Sequence[float]) -> Recipe:
    """The recipe at a point, after it was read from its text and as a point again."""
    recipe = space.recipe(point)
    assert Recipe.parse(recipe.to_yaml()).canonical(space.num_layers) == recipe
    assert recipe.canonical(space.num_layers) == recipe
    back = space.vector(recipe)
    assert back is not None
    assert all(0.0 <= x <= 1.0 for x in back)
    assert space.recipe(back) == recipe
    assert space.vector(space.recipe(back)) == back
    return recipe


def drawn(space: Space) -> Iterator[tuple[float, ...]]:
    """Legal points: some with values at the walls of the box."""
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        point = rng.random(space.dimensions)
        walls = rng.random(space.dimensions) < 0.2
        yield space.made_legal(np.where(walls, point.round(), point).tolist())


class SpaceSuite:
    @pytest.fixture
    def space(self) -> Space:
        raise NotImplementedError("override the fixture: it returns the space to judge")

    def test_an_axis_a_dimension(self, space: Space) -> None:
        assert space.dimensions == len(space.axes) == len({axis.name for axis in space.axes})
        assert 0 < space.freedoms <= space.dimensions
        assert all(axis.low <= axis.high for axis in space.axes)
        assert {axis.model for axis in space.axes} <= {None, *space.models}
        assert {axis.filter for axis in space.axes} <= set(space.filters)
        assert all(0 <= axis.group < space.groups for axis in space.axes)

    def test_a_point_is_a_recipe_and_comes_back(self, space: Space) -> None:
        recipes = [comes_back(space, point) for point in drawn(space)]
        assert len({recipe.hash() for recipe in recipes}) > DRAWS // 4

    def test_a_legal_point_stays_as_it_is(self, space: Space) -> None:
        for point in drawn(space):
            assert space.legal(point)
            assert space.made_legal(point) == point

    def test_a_point_outside_the_box_is_refused(self, space: Space) -> None:
        point = next(drawn(space))
        for wrong in ((*point, 0.5), (*point[:-1], 1.5), (*point[:-1], float("nan"))):
            with pytest.raises(RecipeRejected):
                space.recipe(wrong)

    def test_a_recipe_of_other_models_has_no_point(self, space: Space) -> None:
        recipe = space.recipe(next(drawn(space)))
        assert space.vector(recipe.renamed(lambda name: f"other-{name}")) is None
