"""Whole models: ours is at least as near to the exact merge as mergekit's own run_merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge

from agentmerge.errors import CandidateFailed, UserError
from agentmerge.merging.family import Family, mask_key
from agentmerge.merging.kernels import random_mask
from agentmerge.merging.plan import TensorPlan
from agentmerge.merging.reference import mergekit_merge
from agentmerge.recipe import Recipe
from tests.merging.formulas import float64_reference
from tests.merging.merge_cases import (
    LAYERS,
    METHODS,
    assert_at_least_as_near,
    load_all,
    masks_given,
    near_a_threshold,
    recipes,
    rounding_of,
)

# said when mergekit is imported, of its own imports
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")


def masks_of(item: TensorPlan, family: Family, seed: int) -> list[torch.Tensor]:
    """What dare_ties keeps of each expert in one tensor."""
    masks = []
    for (model, name), (_, _, own) in zip(item.inputs, item.effective.sources, strict=True):
        if model == item.effective.base_model:
            continue
        tensor = family.tensor(model, name)
        key = mask_key(seed, family.identities[model], name)
        mask = random_mask(key, tensor.numel(), dict(own)["density"])
        mask = torch.ones(tensor.numel(), dtype=torch.bool) if mask is None else mask
        masks.append(mask.reshape(tensor.shape))
    return masks


@contextmanager
def mergekit_given_masks(family: Family, recipe: Recipe) -> Iterator[None]:
    """Inside, mergekit drops what we drop."""
    plan = {item.spec.name: item for item in family.plan(recipe).tensors}
    original = GeneralizedTaskArithmeticMerge.merge_group

    def with_masks(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        item = plan[group.metadata.name]
        order = [model for model, _ in item.inputs if model != item.effective.base_model]
        names = [Path(str(entry.id)).name for entry in group.non_base]
        assert names == order
        with masks_given(masks_of(item, family, recipe.merge_seed or 0)):
            return original(self, group, **parameters)

    if recipe.merge_method == "dare_ties":
        GeneralizedTaskArithmeticMerge.merge_group = with_masks
    try:
        yield
    finally:
        GeneralizedTaskArithmeticMerge.merge_group = original


def exact(item: TensorPlan, family: Family, seed: int) -> torch.Tensor:
    base, experts, values = None, [], []
    for (model, name), (_, _, own) in zip(item.inputs, item.effective.sources, strict=True):
        if model == item.effective.base_model:
            base = family.tensor(model, name)
        else:
            experts.append(family.tensor(model, name))
            values.append(dict(own))
    return float64_reference(
        item.effective.method,
        base,
        experts,
        weights=[value.get("weight", 0.0) for value in values],
        densities=[value.get("density", 1.0) for value in values],
        shared=dict(item.effective.shared),
        masks=masks_of(item, family, seed) if item.effective.method == "dare_ties" else None,
    )


def undecided(item: TensorPlan, family: Family, rounding: float) -> torch.Tensor:
    """Elements at a threshold, or where the weighted sum is next to zero."""
    base_model = item.effective.base_model
    excluded = torch.zeros(item.spec.shape, dtype=torch.bool)
    if item.effective.method not in ("ties", "dare_ties"):
        return excluded
    bases = dict(item.inputs)
    base = family.tensor(str(base_model), bases[str(base_model)])
    total = torch.zeros(item.spec.shape, dtype=torch.float64)
    size = torch.zeros_like(total)
    for (model, name), (_, _, own) in zip(item.inputs, item.effective.sources, strict=True):
        if model == base_model:
            continue
        tensor, value = family.tensor(model, name), dict(own)
        if item.effective.method == "ties":
            excluded |= near_a_threshold(base, tensor, value["density"], rounding)
        part = value["weight"] * (tensor.double() - base.double())
        total, size = total + part, size + part.abs()
    return excluded | (total.abs() <= rounding * size)


@pytest.mark.parametrize("kind", ["smooth", "filters", "slices"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_whole_models(
    family_of: Callable[..., dict[str, Path]],
    tmp_path: Path,
    tied: bool,
    dtype: torch.dtype,
    method: str,
    kind: str,
) -> None:
    paths = family_of(tied=tied, dtype=dtype)
    family = Family.open(paths, base="base")
    as_written = Recipe.parse(recipes(method)[kind])
    recipe = as_written.canonical(LAYERS)
    ours = dict(family.merge(recipe))
    with mergekit_given_masks(family, recipe):
        mergekit_merge(as_written, paths, tmp_path / "theirs", template_model="a")
    theirs = load_all(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    wide = 1e-6 if dtype == torch.bfloat16 else 1e-14
    excluded = 0
    for item in family.plan(recipe).tensors:
        name = item.spec.name
        assert ours[name].dtype == theirs[name].dtype
        want = exact(item, family, recipe.merge_seed or 0)
        skip = undecided(item, family, 4 * rounding_of(dtype))
        excluded += int(skip.sum())
        slack = wide * torch.full_like(want, 10 * float(want.abs().max()))
        assert_at_least_as_near(
            ours[name], theirs[name], want, slack=slack, excluded=skip, what=name
        )
        torch.testing.assert_close(
            ours[name][~skip].double(), want[~skip], rtol=2 * rounding_of(dtype), atol=1e-6
        )
    assert excluded < 0.1 * family.layout.parameters


@pytest.mark.parametrize("method", METHODS)
def test_int8_mask_changes_nothing(
    family_of: Callable[..., dict[str, Path]], tmp_path: Path, method: str
) -> None:
    paths = family_of()
    family = Family.open(paths, base="base")
    text = recipes(method)["smooth"].replace("int8_mask: true", "int8_mask: false")
    with_it = Recipe.parse(recipes(method)["smooth"]).canonical(LAYERS)
    without = Recipe.parse(text).canonical(LAYERS)
    assert with_it.hash() == without.hash()
    assert family.plan(with_it).digest == family.plan(without).digest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_recipes_dtype_is_that_of_the_result(
    family_of: Callable[..., dict[str, Path]], tmp_path: Path, dtype: str
) -> None:
    paths = family_of(dtype=torch.float32)
    family = Family.open(paths, base="base")
    text = recipes("task_arithmetic")["smooth"] + f"\ndtype: {dtype}"
    recipe = Recipe.parse(text).canonical(LAYERS)
    mergekit_merge(recipe, paths, tmp_path / "theirs", template_model="a")
    theirs = load_all(tmp_path / "theirs")
    for item, (name, tensor) in zip(family.plan(recipe).tensors, family.merge(recipe), strict=True):
        assert tensor.dtype == theirs[name].dtype == getattr(torch, dtype)
        want = exact(item, family, 0)
        assert_at_least_as_near(
            tensor, theirs[name], want, slack=1e-7 * want.abs() + 1e-14, what=name
        )


def test_mergekit_leaves_the_generators_as_they_were(
    family_of: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths = family_of()
    recipe = Recipe.parse(recipes("dare_ties")["smooth"] + "\nmerge_seed: 5").canonical(LAYERS)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    mergekit_merge(recipe, paths, tmp_path / "one", template_model="a")
    assert torch.equal(torch.rand(2), want)
    mergekit_merge(recipe, paths, tmp_path / "two", template_model="a")
    one, two = load_all(tmp_path / "one"), load_all(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (tmp_path / "one" / "tokenizer.json").is_file()
    assert (tmp_path / "one" / "mergekit_config.yml").is_file()


def test_a_merge_that_mergekit_cannot_do_leaves_nothing(
    family_of: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    paths = family_of()
    text = "merge_method: slerp\nbase_model: base\nmodels: [{model: a}, {model: b}]"
    with pytest.raises(CandidateFailed, match="mergekit could not merge"):
        mergekit_merge(Recipe.parse(text), paths, tmp_path / "out", template_model="a")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(UserError, match="already there"):
        mergekit_merge(Recipe.parse(text), paths, tmp_path / "out", template_model="a")
