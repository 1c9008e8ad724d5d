"""Parents in memory or in their files: the same bits, flat memory, and no garbage from a file that
changed. The host placement's way to a device is run on a CPU only."""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from agentmerge.errors import ParentError, RunFailed
from agentmerge.merging.digests import digest
from agentmerge.merging.family import Family
from agentmerge.merging.placement import PLACEMENTS, Placement
from agentmerge.merging.weights import ParentFiles, Resident
from agentmerge.methods import METHODS as ALL_METHODS
from agentmerge.parents.layout import read_layout
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import LAYERS, METHODS, edit_weights, load_all, recipes

FamilyOf = Callable[..., dict[str, Path]]


def canonical(text: str) -> Recipe:
    return Recipe.parse(text).canonical(LAYERS)


def plain_recipe(method: str) -> Recipe:
    """Any method of the table with its defaults."""
    experts = ["a", "b"][: ALL_METHODS[method].most]
    base = "" if method in ("linear", "karcher") else "base_model: base\n"
    if method == "slerp":
        base, experts = "base_model: a\n", ["a", "b"]
    own = {p.name for p in ALL_METHODS[method].source}
    values = {"weight": 0.4, "density": 0.6, "gamma": 0.01, "epsilon": 0.1}
    models = [
        {"model": name, "parameters": {key: values[key] for key in own & values.keys()}}
        for name in experts
    ]
    shared = "".join(
        f"  {name}: {value}\n"
        for name, value in (("t", 0.3), ("select_topk", 0.5))
        if name in {p.name for p in ALL_METHODS[method].shared}
    )
    text = f"merge_method: {method}\n{base}models: {models}\n"
    return canonical(text + (f"parameters:\n{shared}" if shared else ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_placement_gives_the_same_bits(family_of: FamilyOf, dtype: torch.dtype) -> None:
    paths = family_of(dtype=dtype)
    families = [Family.open(paths, base="base", placement=p) for p in PLACEMENTS]
    cases = [canonical(text) for method in METHODS for text in recipes(method).values()]
    for recipe in [*cases, *map(plain_recipe, ALL_METHODS)]:
        digests = {digest(family.merge(recipe)) for family in families}
        assert len(digests) == 1, recipe.merge_method
    assert [family.placement for family in families] == list(PLACEMENTS)


@pytest.mark.parametrize("placement", ["device", "stream"])
def test_five_hundred_merges_in_flat_memory(family_of: FamilyOf, placement: Placement) -> None:
    family = Family.open(family_of(), base="base", placement=placement)

    def parent_0() -> str:
        return digest((spec.name, family.tensor("base", spec.name)) for spec in layout.tensors)

    def used() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

    layout = family.layout
    texts = [recipes(method)["smooth"] for method in METHODS]
    cases = [canonical(text) for text in texts]
    for recipe in cases * 4:
        list(family.merge(recipe))
    gc.collect()
    before, (memory, files) = parent_0(), used()
    for _ in range(100):
        for recipe in cases:
            for _, tensor in family.merge(recipe):
                tensor.zero_()  # whoever gets a tensor may do as they like with it
    gc.collect()
    assert used()[0] - memory < 8_000_000
    assert used()[1] == files
    assert parent_0() == before


def test_a_streamed_family_holds_no_weights_and_writes_to_no_file(family_of: FamilyOf) -> None:
    paths = family_of()
    before = {path: (path / "model.safetensors").read_bytes() for path in paths.values()}
    family = Family.open(paths, base="base", placement="stream")
    name = family.layout.tensors[0].name
    tensor = family.tensor("a", name)
    assert tensor.data_ptr() != family.tensor("a", name).data_ptr()  # each read is its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor.zero_()  # a caller's fault, and it reaches neither the file nor the next read
    assert torch.equal(family.tensor("a", name), load_all(paths["a"])[name])
    assert before == {path: (path / "model.safetensors").read_bytes() for path in paths.values()}


class TestFilesThatChange:
    """Streaming from a file that is not the one that was identified is an error, not a merge."""

    @pytest.fixture
    def family(self, own_family: dict[str, Path]) -> Family:
        return Family.open(own_family, base="base", placement="stream")

    def merge(self, family: Family) -> None:
        list(family.merge(canonical(recipes("ties")["smooth"])))

    def test_removed(self, family: Family, own_family: dict[str, Path]) -> None:
        self.merge(family)
        (own_family["a"] / "model.safetensors").unlink()
        with pytest.raises(RunFailed, match=r"a/model.safetensors was there .* No such file"):
            self.merge(family)

    def test_replaced_by_another(self, family: Family, own_family: dict[str, Path]) -> None:
        other = {name: tensor + 1 for name, tensor in load_all(own_family["a"]).items()}
        (own_family["a"] / "new").write_bytes(save(other))
        os.replace(own_family["a"] / "new", own_family["a"] / "model.safetensors")
        with pytest.raises(RunFailed, match=r"a/model.safetensors was changed while"):
            self.merge(family)

    def test_written_into(self, family: Family, own_family: dict[str, Path]) -> None:
        with (own_family["b"] / "model.safetensors").open("r+b") as stream:
            stream.seek(-64, 2)
            stream.write(b"\0" * 64)
        with pytest.raises(RunFailed, match=r"b/model.safetensors was changed while"):
            self.merge(family)

    def test_cut_short(self, family: Family, own_family: dict[str, Path]) -> None:
        file = own_family["b"] / "model.safetensors"
        os.truncate(file, file.stat().st_size - 100)
        with pytest.raises(RunFailed, match=r"b/model.safetensors was changed while"):
            self.merge(family)

    def test_within_the_last_tensor(self, family: Family, own_family: dict[str, Path]) -> None:
        made = family.merge(canonical(recipes("ties")["smooth"]))
        for _ in family.layout.tensors:
            next(made)
        with (own_family["a"] / "model.safetensors").open("r+b") as stream:
            stream.seek(-64, 2)
            stream.write(b"\0" * 64)
        with pytest.raises(RunFailed, match=r"a/model.safetensors was changed while"):
            next(made)

    def test_put_back(self, family: Family, own_family: dict[str, Path]) -> None:
        file = own_family["a"] / "model.safetensors"
        os.replace(file, file.with_suffix(".away"))
        with pytest.raises(RunFailed):
            self.merge(family)
        os.replace(file.with_suffix(".away"), file)
        self.merge(Family.open(own_family, base="base", placement="stream"))

    def test_resident_parents_do_not_mind(self, own_family: dict[str, Path]) -> None:
        family = Family.open(own_family, base="base", placement="device")
        recipe = canonical(recipes("ties")["smooth"])
        before = digest(family.merge(recipe))
        (own_family["a"] / "model.safetensors").unlink()
        assert digest(family.merge(recipe)) == before


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_broken_parent_is_refused(own_family: dict[str, Path], placement: Placement) -> None:
    edit_weights(own_family["b"], model__norm__weight=torch.full((16,), float("nan")))
    with pytest.raises(ParentError, match=r"b: 1 tensors .* the first is model.norm.weight"):
        Family.open(own_family, base="base", placement=placement)


def test_a_file_that_is_not_aligned(own_family: dict[str, Path]) -> None:
    """Old files may have any length of header; torch wants numbers where they belong."""
    want = load_all(own_family["a"])
    file = own_family["a"] / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes(
        (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
    )
    source = ParentFiles({"a": own_family["a"]})
    for name, tensor in want.items():
        assert torch.equal(source.tensor("a", name), tensor)
        assert source.tensor("a", name).data_ptr() % 4 == 0


def test_tensors_without_elements(own_family: dict[str, Path]) -> None:
    for path in own_family.values():
        edit_weights(path, model__layers__0__none__weight=torch.empty(0, 3))
    found = [
        digest(Family.open(own_family, placement=p).merge(canonical(recipes("linear")["smooth"])))
        for p in PLACEMENTS
    ]
    assert len(set(found)) == 1


def test_sharded_parents_are_streamed(own_family: dict[str, Path]) -> None:
    want = digest(Family.open(own_family).merge(canonical(recipes("ties")["smooth"])))
    weights = load_all(own_family["a"])
    names = sorted(weights)
    (own_family["a"] / "model.safetensors").unlink()
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: weights[name] for name in held}, own_family["a"] / file)
    index = {name: file for file, held in parts.items() for name in held}
    (own_family["a"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    family = Family.open(own_family, placement="stream")
    assert digest(family.merge(canonical(recipes("ties")["smooth"]))) == want


def test_the_host_keeps_what_the_device_is_given(family_of: FamilyOf) -> None:
    """With torch's "meta" device in the card's place: only where tensors are can be seen."""
    paths = family_of()
    source = Resident(ParentFiles(paths), read_layout(paths), device="meta", home="cpu")
    name = read_layout(paths).tensors[0].name
    assert source.tensor("a", name).device.type == "meta"
    assert source.identities == ParentFiles(paths).identities
