"""Adapters are held as adapters: the model that they are of once, factors, and the same bits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from agentmerge.config import SearchConfig
from agentmerge.errors import RunFailed, UserError
from agentmerge.merging.digests import digest
from agentmerge.merging.family import Family
from agentmerge.merging.placement import layout_bytes, plan_memory
from agentmerge.parents import applying
from agentmerge.parents.headers import content_fingerprint, made_from, read_headers
from agentmerge.parents.low_rank import Factors, adaptation_of
from agentmerge.parents.made import made
from agentmerge.parents.plain import make_plain, survey
from agentmerge.parents.sources import find_parent
from agentmerge.preflight.spec import memory_of, spec_of
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import LAYERS, make_family
from tests.merging.stack_cases import random_model
from tests.parents.adapter_cases import CONFIGS, write_adapter

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "della")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGENTMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def adapted(root: Path, model: Path, kinds: dict[str, str]) -> dict[str, Path]:
    """Plain checkpoints of a model with adapters of those kinds."""
    names = {
        name: f"{model}+{write_adapter(model, root / name, kind, seed)}"
        for seed, (name, kind) in enumerate(kinds.items())
    }
    made = make_plain(find_parent(name) for name in names.values())
    return {name: made[long] for name, long in names.items()}


def full(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, **how: object) -> Family:
    """All parents held as whole models."""
    with monkeypatch.context() as patch:
        patch.setattr("agentmerge.merging.family.upon_models", lambda paths: ({}, {}))
        return Family.open(paths, **how)  # type: ignore[arg-type]


def merge(method: str, *names: str) -> Recipe:
    own = {"weight": 0.4} | ({} if method == "linear" else {"density": 0.6})
    if method == "della":
        own["epsilon"] = 0.1
    if method == "task_arithmetic":
        del own["density"]
    models = [{"model": name, "parameters": own} for name in names]
    body = {"merge_method": method, "models": models}
    return Recipe.parse(body if method == "linear" else body | {"base_model": "base"}).canonical(
        LAYERS
    )


@pytest.mark.parametrize("most", [None, 2, 3])
def test_the_forecast_is_what_is_held(most: int | None, tmp_path: Path) -> None:
    base = make_family(tmp_path / "family", tied=True, dtype=torch.bfloat16)["base"]
    kinds = {"x": "thin", "y": "lora", "z": "thin", "d": "dora"}
    paths = {"base": base} | adapted(tmp_path, base, kinds)
    names = {"base": str(base)} | {n: f"{base}+{tmp_path / n}" for n in kinds}
    low_rank = survey([replace(find_parent(long), name=n) for n, long in names.items()]).low_rank
    assert {name: ground for name, (ground, _) in low_rank.items()} == dict.fromkeys("xyz", "base")
    family = Family.open(paths, base="base", most=most)
    plan = plan_memory(family.layout, most=most, low_rank=low_rank)
    family.plan(merge("ties", "d", "y") if most == 3 else merge("ties", "d"))
    assert family.size_bytes == plan.forecasts[0].host.parents


THIN = (CONFIGS["lora"][0], CONFIGS["lora"][1] | {"r": 1, "lora_alpha": 3})


@pytest.fixture(autouse=True)
def _thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank that takes less than half of a model of 16 numbers."""
    monkeypatch.setitem(CONFIGS, "thin", THIN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_less_memory(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_family(tmp_path / "family", tied=True, dtype=dtype)["base"]
    paths = {"base": base} | adapted(tmp_path, base, dict.fromkeys(("x", "y", "z"), "thin"))
    low, whole = Family.open(paths, base="base"), full(paths, monkeypatch, base="base")
    model = layout_bytes(low.layout)
    assert whole.size_bytes == 4 * model
    assert low.size_bytes < 2 * model
    weight = next(s.name for s in low.layout.tensors if "q_proj" in s.name)
    norm = next(s.name for s in low.layout.tensors if "norm" in s.name)
    assert low.keeps("x", norm)
    assert low.tensor("x", norm).data_ptr() == low.tensor("base", norm).data_ptr()
    assert not low.keeps("x", weight)
    for spec in low.layout.tensors:
        assert torch.equal(low.tensor("x", spec.name), whole.tensor("x", spec.name))
    for method in METHODS:
        recipe = merge(method, "x", "y", "z")
        assert digest(low.merge(recipe)) == digest(whole.merge(recipe)), method


def test_a_model_that_is_no_parent_is_held_once_for_its_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_family(tmp_path / "family", tied=False, dtype=torch.float32)
    paths = {"a": made["a"]} | adapted(tmp_path, made["base"], {"x": "thin", "y": "thin"})
    low, whole = Family.open(paths, base="a"), full(paths, monkeypatch, base="a")
    few = Family.open(paths, base="a", most=2)
    model = layout_bytes(low.layout)
    assert 2 * model < low.size_bytes < 2.5 * model
    for recipe in (merge("linear", "x", "y"), merge("linear", "a", "x"), merge("linear", "x", "y")):
        assert digest(low.merge(recipe)) == digest(whole.merge(recipe)) == digest(few.merge(recipe))
        assert few.size_bytes < 2.5 * model
    made["base"].rename(tmp_path / "away")
    moved = Family.open(paths, base="a")  # whole models, then
    assert moved.size_bytes == 3 * model
    assert digest(moved.merge(recipe)) == digest(low.merge(recipe))


@pytest.mark.parametrize("kind", ["dora", "whole modules", "ranks, rslora"])
def test_adapters_of_other_kinds_have_the_same_bits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_family(tmp_path / "family", tied=False, dtype=torch.bfloat16)["base"]
    paths = {"base": base} | adapted(tmp_path, base, {"x": kind, "y": "thin"})
    low, whole = Family.open(paths, base="base"), full(paths, monkeypatch, base="base")
    for spec in low.layout.tensors:
        assert torch.equal(low.tensor("x", spec.name), whole.tensor("x", spec.name)), spec.name
    assert low.size_bytes < whole.size_bytes


def test_weights_that_are_stored_the_other_way_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"r": 1, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    monkeypatch.setitem(CONFIGS, "thin", (CONFIGS["lora"][0], lora))
    base = tmp_path / "base"
    random_model("gpt2", 0, n_embd=16, n_head=2, n_layer=2).bfloat16().save_pretrained(base)
    paths = {"base": base} | adapted(tmp_path, base, {"x": "thin"})
    low, whole = Family.open(paths, base="base"), full(paths, monkeypatch, base="base")
    names = [spec.name for spec in low.layout.tensors]
    assert [name for name in names if not low.keeps("x", name)] == [
        name for name in names if "c_attn.weight" in name or "c_fc.weight" in name
    ]
    for name in names:
        assert torch.equal(low.tensor("x", name), whole.tensor("x", name)), name


@pytest.mark.parametrize("damage", ["cut", "other numbers", "gone"])
def test_factors_that_are_damaged_change_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_family(tmp_path / "family", tied=False, dtype=torch.float32)["base"]
    paths = {"base": base} | adapted(tmp_path, base, {"x": "thin"})
    recipe = merge("ties", "x")
    want = digest(full(paths, monkeypatch, base="base").merge(recipe))
    file = paths["x"] / "low_rank" / "factors.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:100])
    else:
        said = file.read_bytes()
        file.write_bytes(said[:-64] + bytes(64))
    assert digest(Family.open(paths, base="base").merge(recipe)) == want


def test_one_made_before_factors_were_kept_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_family(tmp_path / "family", tied=False, dtype=torch.float32)["base"]
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(applying, "write_factors", lambda *given: None)
        patch.setattr(
            "agentmerge.parents.plain.made", lambda kind, of, *rest: made(kind, of[:3], *rest)
        )
        old = adapted(tmp_path, base, {"x": "thin"})["x"]
    new = make_plain([find_parent(f"{base}+{tmp_path / 'x'}")]).popitem()[1]
    assert adaptation_of(old) is None
    assert adaptation_of(new) is not None
    assert content_fingerprint(old) == content_fingerprint(new)
    before, after = made_from(old), made_from(new)
    assert before is not None
    assert after is not None
    assert after == before | {"made_from": [*before["made_from"], "factors"]}


def test_an_adapter_of_an_adapted_model_is_held_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_family(tmp_path / "family", tied=False, dtype=torch.float32)["base"]
    paths = {"base": base} | adapted(tmp_path, base, {"x": "thin"})
    paths |= adapted(tmp_path, paths["x"], {"y": "thin"})
    recipe = merge("ties", "x", "y")
    want = digest(full(paths, monkeypatch, base="base").merge(recipe))
    for most in (None, 2, 3):
        low = Family.open(paths, base="base", most=most)
        assert digest(low.merge(recipe)) == want
    assert 2 * layout_bytes(low.layout) < low.size_bytes < 3 * layout_bytes(low.layout)


def test_a_weight_is_made_at_one_precision_whatever_the_process_has() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = (256, 256), (512, 256), (256, 512)  # some processors round smaller ones alike
    weight, a, b = (torch.randn(size, generator=draw) for size in sizes)
    factors = Factors(b, a, 0.7)
    want = factors.added_to(weight)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(factors.added_to(weight), want)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_file_that_changes_while_some_are_kept_is_noticed(tmp_path: Path) -> None:
    paths = make_family(tmp_path / "family", tied=False, dtype=torch.float32)
    one, two = Family.open(paths, base="base", most=2), Family.open(paths, base="base")
    merges = [family.merge(merge("linear", "a")) for family in (one, two)]
    for merged in merges:
        for _ in one.layout.tensors:
            next(merged)
    os.utime(paths["a"] / "model.safetensors", ns=(1, 1))
    with pytest.raises(RunFailed, match="was changed while merges were read"):
        next(merges[0])
    assert next(merges[1], None) is None  # all were in memory


def test_factors_need_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    base = make_family(tmp_path / "family", tied=False, dtype=torch.float32)["base"]
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr("agentmerge.parents.low_rank.save_file", refuse)
        with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
            adapted(tmp_path, base, {"x": "thin"})
    weights = sum(header.end - header.start for header in read_headers(base).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=weights))
    with pytest.raises(UserError, match=r"needs .* GB are free"):
        adapted(tmp_path, base, {"y": "thin"})


def test_variants_of_lora_are_forecast_as_whole_models(tmp_path: Path) -> None:
    base = make_family(tmp_path / "family", tied=False, dtype=torch.float32)["base"]
    config = write_adapter(base, tmp_path / "x", "thin") / "adapter_config.json"
    said = json.loads(config.read_text())
    parent = find_parent(f"{base}+{tmp_path / 'x'}")
    assert survey([parent]).low_rank
    variants: tuple[dict[str, object], ...] = (
        {"lora_bias": True},
        {"use_qalora": True},
        {"use_bdlora": {"target_modules_bd_a": []}},
        {"kasa_config": {"beta": 1}},
        {"init_lora_weights": "mica"},
    )
    for odd in variants:
        config.write_text(json.dumps(said | odd))
        assert not survey([parent]).low_rank, odd


def test_a_gpu_is_forecast_to_hold_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "agentmerge.merging.placement.plan_memory",
        lambda layout, *, low_rank, **rest: seen.append(low_rank),
    )
    paths = make_family(tmp_path / "family", tied=False, dtype=torch.float32)
    models = [str(paths["a"]), str(paths["b"])]
    body = {"genome": {"models": models, "merge_method": "linear"}, "tasks": {"tasks": ["copa"]}}
    config = SearchConfig.model_validate(body | {"worker": {"kind": "hf"}})
    layout = Family.open(paths, base="base", placement="stream").layout
    for device in ("cpu", "cuda:0"):
        spec = spec_of(config, {name: Path(name) for name in models}, "float32", device)
        memory_of(config, spec, layout, {"a": ("base", 1)})
    assert seen == [{"a": ("base", 1)}, {}]
