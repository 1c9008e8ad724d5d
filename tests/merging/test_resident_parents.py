"""Merges in memory: each tensor once and fresh, parents untouched, bad results refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agentmerge.errors import CandidateFailed, ParentError, RecipeRejected
from agentmerge.merging.digests import digest
from agentmerge.merging.family import Family
from agentmerge.parents.headers import content_fingerprint
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import LAYERS, METHODS, edit_weights, load_all, recipes

FamilyOf = Callable[..., dict[str, Path]]


def canonical(text: str) -> Recipe:
    return Recipe.parse(text).canonical(LAYERS)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_expected_tensor_once_and_fresh(family_of: FamilyOf, tied: bool, method: str) -> None:
    family = Family.open(family_of(tied=tied), base="base")
    owned = {
        family.tensor(model, spec.name).data_ptr()
        for model in family.layout.parents
        for spec in family.layout.tensors
    }
    made = list(family.merge(canonical(recipes(method)["smooth"])))
    assert [name for name, _ in made] == [spec.name for spec in family.layout.tensors]
    pointers = {tensor.data_ptr() for _, tensor in made}
    assert len(pointers) == len(made)
    assert not pointers & owned
    for spec, (_, tensor) in zip(family.layout.tensors, made, strict=True):
        assert tuple(tensor.shape) == spec.shape
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_a_parent_as_a_recipe_is_that_parent(family_of: FamilyOf, model: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        paths = family_of(dtype=dtype)
        family = Family.open(paths, base="base")
        made = digest(family.merge(Recipe.of_model(model, LAYERS).canonical(LAYERS)))
        assert made == digest(load_all(paths[model]).items())


def test_merging_changes_no_parent(family_of: FamilyOf) -> None:
    paths = family_of()
    family = Family.open(paths, base="base")

    def digests() -> list[str]:
        return [
            digest((spec.name, family.tensor(model, spec.name)) for spec in family.layout.tensors)
            for model in paths
        ]

    before = digests()
    for method in METHODS:
        for text in recipes(method).values():
            for _, tensor in family.merge(canonical(text)):
                tensor.zero_()  # whoever gets a tensor may do as they like with it
    for model in paths:
        for _, tensor in family.merge(Recipe.of_model(model, LAYERS).canonical(LAYERS)):
            tensor.zero_()
    assert digests() == before


def test_what_happens_to_the_files_changes_nothing(own_family: dict[str, Path]) -> None:
    family = Family.open(own_family, base="base")
    recipe = canonical(recipes("ties")["filters"])
    before = digest(family.merge(recipe))
    with (own_family["a"] / "model.safetensors").open("r+b") as stream:
        stream.seek(-4000, 2)
        stream.write(b"\0" * 4000)
    assert digest(family.merge(recipe)) == before


def test_identities_are_content_fingerprints(family_of: FamilyOf) -> None:
    paths = family_of()
    family = Family.open(paths, base="base")
    assert family.identities == {name: content_fingerprint(path) for name, path in paths.items()}


def test_the_same_parent_under_another_name_is_masked_the_same(family_of: FamilyOf) -> None:
    paths = family_of()
    text = recipes("dare_ties")["filters"]
    first = digest(Family.open(paths, base="base").merge(canonical(text)))
    renamed = {{"a": "first"}.get(name, name): path for name, path in paths.items()}
    again = canonical(text.replace("model: a,", "model: first,"))
    assert digest(Family.open(renamed, base="base").merge(again)) == first
    seeded = canonical(text + "\nmerge_seed: 1")
    assert digest(Family.open(paths, base="base").merge(seeded)) != first


def test_a_familys_dtype_is_for_recipes_that_name_none(family_of: FamilyOf) -> None:
    family = Family.open(family_of(), base="base", dtype="bfloat16")
    text = recipes("linear")["smooth"]
    assert {t.dtype for _, t in family.merge(canonical(text))} == {torch.bfloat16}
    named = canonical(text + "\ndtype: float32")
    assert {t.dtype for _, t in family.merge(named)} == {torch.float32}


def test_float64_parents_are_merged_in_float64(own_family: dict[str, Path]) -> None:
    for path in own_family.values():
        weights = {name: tensor.double() / 3 for name, tensor in load_all(path).items()}
        save_file(weights, path / "model.safetensors")
    family = Family.open(own_family, base="base")
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}},"
    recipe = canonical(text + "{model: b, parameters: {weight: 1}}]")
    for name, tensor in family.merge(recipe):
        assert tensor.dtype == torch.float64
        want = (family.tensor("a", name) + family.tensor("b", name)) / 2
        torch.testing.assert_close(tensor, want, rtol=1e-15, atol=1e-16)


def test_numbers_that_are_not_finite_are_a_failed_candidate(own_family: dict[str, Path]) -> None:
    for name, factor in (("a", 1.0), ("b", -1.0)):
        huge = torch.full((16,), factor * 3e38)
        edit_weights(own_family[name], model__norm__weight=huge)
    family = Family.open(own_family, base="base")
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 2}}]\n"
    made = family.merge(canonical(text + "parameters: {normalize: false}"))
    with pytest.raises(CandidateFailed, match=r"'model.norm.weight'.*not finite in float32"):
        list(made)
    fine = family.merge(canonical(text + "parameters: {normalize: true}"))
    assert len(list(fine)) == 21


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parent_that_is_not_finite_is_refused(own_family: dict[str, Path], value: float) -> None:
    broken = torch.ones(16)
    broken[3] = value
    edit_weights(own_family["b"], model__norm__weight=broken)
    with pytest.raises(ParentError, match=r"b: 1 tensors .* the first is model.norm.weight"):
        Family.open(own_family, base="base")


def test_a_refused_recipe_is_refused_at_the_call(family_of: FamilyOf) -> None:
    family = Family.open(family_of(), base="base")
    text = "merge_method: linear\nmodels: [{model: nobody, parameters: {weight: 1}}]"
    with pytest.raises(RecipeRejected, match="'nobody'"):
        family.merge(canonical(text))


def test_gradients_are_left_on_between_tensors(family_of: FamilyOf) -> None:
    family = Family.open(family_of(), base="base")
    for _ in family.merge(canonical(recipes("linear")["smooth"])):
        assert torch.is_grad_enabled()


def test_memory_does_not_grow(family_of: FamilyOf) -> None:
    family = Family.open(family_of(), base="base")
    recipe = canonical(recipes("dare_ties")["smooth"])

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(20):
        list(family.merge(recipe))
    before = resident_bytes()
    for _ in range(200):
        list(family.merge(recipe))
    assert resident_bytes() - before < 8_000_000


class TestDigest:
    def test_it_is_of_every_bit_name_shape_and_dtype(self) -> None:
        tensor = torch.arange(1000, dtype=torch.float32)
        first = digest([("x", tensor)])
        assert first == digest([("x", tensor.clone())])
        assert first != digest([("y", tensor)])
        assert first != digest([("x", tensor.reshape(10, 100))])
        assert first != digest([("x", tensor.view(torch.int32))])
        assert first != digest([("x", tensor), ("y", tensor)])
        for place in (0, 500, 999):
            changed = tensor.clone()
            changed.view(torch.int32)[place] ^= 1
            assert first != digest([("x", changed)])
        swapped = tensor.clone()
        swapped[[3, 4]] = swapped[[4, 3]]
        assert first != digest([("x", swapped)])

    def test_places_far_apart_count(self) -> None:
        tensor = torch.zeros(3 * 65536)
        places = []
        for place in (5, 5 + 65536, 5 + 2 * 65536):
            one = tensor.clone()
            one[place] = 1.0
            places.append(digest([("x", one)]))
        assert len(set(places)) == 3

    def test_order_and_strides_do_not_matter(self) -> None:
        one, two = torch.randn(6, 4), torch.randn(3).bfloat16()
        assert digest([("x", one), ("y", two)]) == digest([("y", two), ("x", one)])
        assert digest([("x", one.t())]) == digest([("x", one.t().contiguous())])

    def test_any_size_and_alignment(self) -> None:
        for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.bool):
            for count in (0, 1, 3):
                assert len(digest([("x", torch.ones(count, dtype=dtype))])) == 16
        scalar = torch.tensor(1.0)
        assert digest([("x", scalar)]) != digest([("x", scalar.reshape(1))])
        row = torch.randn(9).bfloat16()
        assert digest([("x", row[1:5])]) == digest([("x", row[1:5].clone())])
