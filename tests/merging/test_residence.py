"""Of a pool the parents that are merged are in memory, and no others; the bits are the same."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from agentmerge.errors import RunFailed
from agentmerge.merging.digests import digest
from agentmerge.merging.family import Family
from agentmerge.merging.placement import Placement, layout_bytes
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import LAYERS, edit_weights, load_all, make_family

EXPERTS = [f"e{number}" for number in range(12)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and twelve experts of it."""
    root = tmp_path_factory.mktemp("pool")
    paths = {"base": make_family(root / "made", tied=True, dtype=torch.bfloat16)["base"]}
    for seed, name in enumerate(EXPERTS):
        paths[name] = make_family(root / name, tied=True, dtype=torch.bfloat16)["a"]
        draw = torch.Generator().manual_seed(seed)
        edit_weights(
            paths[name],
            **{
                key: (value + 0.01 * torch.randn(value.shape, generator=draw)).bfloat16()
                for key, value in load_all(paths[name]).items()
            },
        )
    return paths


def merge(*names: str, weight: float = 0.4) -> Recipe:
    own = {"weight": weight, "density": 0.6}
    models = [{"model": name, "parameters": own} for name in names]
    body = {"merge_method": "ties", "base_model": "base", "models": models}
    return Recipe.parse(body).canonical(LAYERS)


#: Two spaces in turn, a model by itself, one more space, and back.
WALK = [
    merge("e0", "e1", "e2"),
    merge("e0", "e1", "e3"),
    merge("e0", "e1", "e2", weight=0.7),
    Recipe.of_model("e7", LAYERS),
    merge("e0", "e1", "e3", weight=0.1),
    merge("e9", "e10", "e11"),
    Recipe.of_model("base", LAYERS),
    merge("e0", "e1", "e2"),
    merge("e2", "e5"),
]


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_what_is_not_merged_does_not_stay(pool: dict[str, Path], placement: Placement) -> None:
    whole = Family.open(pool, base="base", placement=placement)
    few = Family.open(pool, base="base", placement=placement, most=4)
    model = layout_bytes(few.layout)
    assert whole.size_bytes == (13 * model if placement == "device" else 0)
    assert few.size_bytes == 0
    known = []
    for recipe in WALK:
        assert digest(few.merge(recipe)) == digest(whole.merge(recipe))
        assert few.size_bytes <= (4 * model if placement == "device" else 0)
        known.append(few.statistics.size_bytes)
    assert max(known) < 1.1 * known[0]  # of three experts, not of all


def test_what_is_dropped_is_free_and_what_is_merged_is_there(pool: dict[str, Path]) -> None:
    family = Family.open(pool, base="base", most=4)
    name = family.layout.tensors[0].name
    family.plan(WALK[0])
    dropped, stays = weakref.ref(family.tensor("e2", name)), family.tensor("e1", name)
    assert family.keeps("e1", name)
    family.plan(WALK[1])
    assert dropped() is None
    assert family.tensor("e1", name).data_ptr() == stays.data_ptr()
    assert not family.keeps("e2", name)
    assert torch.equal(family.tensor("e2", name), load_all(pool["e2"])[name])  # out of its file


def test_a_search_that_goes_on_elsewhere_merges_the_same(pool: dict[str, Path]) -> None:
    whole = [digest(Family.open(pool, base="base").merge(recipe)) for recipe in WALK]
    for killed in (1, 4, 7):
        family = Family.open(pool, base="base", most=4)  # of a worker that was started anew
        assert [digest(family.merge(recipe)) for recipe in WALK[killed:]] == whole[killed:]


def test_more_than_there_is_room_for_are_read_from_their_files(pool: dict[str, Path]) -> None:
    wide = merge(*EXPERTS)
    family = Family.open(pool, base="base", most=4)
    assert digest(family.merge(wide)) == digest(Family.open(pool, base="base").merge(wide))
    assert family.size_bytes == 4 * layout_bytes(family.layout)


def test_a_file_that_changed_before_its_model_came_back(tmp_path: Path) -> None:
    paths = make_family(tmp_path, tied=True, dtype=torch.float32)
    paths |= {"c": make_family(tmp_path / "more", tied=True, dtype=torch.float32)["b"]}
    edit_weights(paths["c"], model__norm__weight=torch.full((16,), 2.0))
    family = Family.open(paths, base="base", most=2)
    list(family.merge(merge("a")))
    edit_weights(paths["a"], model__norm__weight=torch.full((16,), 3.0))
    for asked in ("a", "b", "b"):  # files are looked at while any parent may yet be read from one
        with pytest.raises(RunFailed, match=r"a/model.safetensors was changed while"):
            list(family.merge(merge(asked)))
