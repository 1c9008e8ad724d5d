"""Merges written into live weights: only what changes, equal to a full load, proved each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmerge.errors import CandidateFailed, RunFailed
from agentmerge.merging.digests import digest
from agentmerge.merging.family import Family
from agentmerge.merging.live import LiveWeights
from agentmerge.merging.memory import resident_bytes
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import LAYERS, METHODS, recipes

FamilyOf = Callable[..., dict[str, Path]]


def family(family_of: FamilyOf, **how: Any) -> Family:
    return Family.open(family_of(dtype=torch.bfloat16), base="base", **how)


def targets(family: Family, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {spec.name: torch.full(spec.shape, 9.0, dtype=dtype) for spec in family.layout.tensors}


def grouped(
    method: str, by_filter: dict[str, float], seed: int | None = None, density: float = 0.5
) -> Recipe:
    """A recipe whose first expert's weight depends on the tensor's name."""
    rows = [f"{{filter: {name}, value: {value}}}" for name, value in by_filter.items()]
    rows.append("{value: 0.5}")
    own = "" if method in ("linear", "task_arithmetic") else f", density: {density}"
    text = (
        f"merge_method: {method}\n"
        + ("" if method == "linear" else "base_model: base\n")
        + "models:\n"
        + f"- {{model: a, parameters: {{weight: [{', '.join(rows)}]{own}}}}}\n"
        + f"- {{model: b, parameters: {{weight: 0.4{own}}}}}\n"
        + "parameters: {normalize: false}\n"
        + ("" if seed is None else f"merge_seed: {seed}\n")
    )
    return Recipe.parse(text).canonical(LAYERS)


def full(family: Family, recipe: Recipe) -> str:
    return digest(family.merge(recipe))


def test_only_what_a_recipe_makes_otherwise_is_rewritten(family_of: FamilyOf) -> None:
    parents = family(family_of)
    live = LiveWeights(parents, targets(parents))
    first = grouped("ties", {"mlp": 0.3})
    loaded = live.load(parents.plan(first))
    assert loaded.tensors == loaded.rewritten == len(parents.layout.tensors)
    assert loaded.digest == full(parents, first)
    second = grouped("ties", {"mlp": 0.7})
    loaded = live.load(parents.plan(second))
    assert loaded.rewritten == 3 * LAYERS
    assert loaded.digest == full(parents, second)
    assert live.load(parents.plan(second)).rewritten == 0
    assert live.load(parents.plan(first)).digest == full(parents, first)


def test_a_seed_matters_where_masks_are_random(family_of: FamilyOf) -> None:
    parents = family(family_of)
    for method, rewritten in (("dare_ties", len(parents.layout.tensors)), ("ties", 0)):
        live = LiveWeights(parents, targets(parents))
        live.load(parents.plan(grouped(method, {}, seed=1)))
        loaded = live.load(parents.plan(grouped(method, {}, seed=2)))
        assert loaded.rewritten == rewritten
        assert loaded.digest == full(parents, grouped(method, {}, seed=2))


steps = st.lists(
    st.tuples(
        st.sampled_from(["linear", "ties", "dare_ties", "task_arithmetic", "breadcrumbs"]),
        st.dictionaries(
            st.sampled_from(["mlp", "self_attn", "layers.1", "norm", "embed_tokens"]),
            st.sampled_from([0.0, 0.2, 0.9, 1e39]),
        ),
        st.sampled_from([0.4, 1.0]),
    ),
    min_size=2,
    max_size=8,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps)
def test_any_walk_ends_where_a_full_load_does(
    family_of: FamilyOf, walk: list[tuple[str, dict[str, float], float]]
) -> None:
    """Candidates that fail in the middle included: a weight of 1e39 is no finite merge."""
    parents = family(family_of)
    weights = targets(parents)
    live = LiveWeights(parents, weights)
    for method, by_filter, density in walk:
        recipe = grouped(method, by_filter, density=density)
        try:
            want = full(parents, recipe)
        except CandidateFailed:
            with pytest.raises(CandidateFailed):
                live.load(parents.plan(recipe))
        else:
            assert live.load(parents.plan(recipe)).digest == want
            assert digest(weights.items()) == want


@pytest.mark.parametrize("placement", ["device", "stream"])
@pytest.mark.parametrize("method", METHODS)
def test_there_and_back(family_of: FamilyOf, method: str, placement: str) -> None:
    parents = family(family_of, placement=placement)
    weights = targets(parents)
    live = LiveWeights(parents, weights)
    one, two = (Recipe.parse(recipes(method)[k]).canonical(LAYERS) for k in ("smooth", "filters"))
    first = live.load(parents.plan(one)).digest
    assert live.load(parents.plan(two)).digest != first
    assert live.load(parents.plan(one)).digest == first == full(parents, one)


def test_some_rows_of_fused_parameters(family_of: FamilyOf) -> None:
    """As in an engine that keeps q, k and v in one parameter."""
    parents = family(family_of)
    fused: dict[int, torch.Tensor] = {}
    weights = targets(parents)
    for layer in range(LAYERS):
        names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in "qkv"]
        fused[layer] = torch.cat([weights[name] for name in names])
        parts = fused[layer].split([len(weights[name]) for name in names])
        weights.update(zip(names, parts, strict=True))
    live = LiveWeights(parents, weights)
    recipe = grouped("ties", {"q_proj": 0.1})
    assert live.load(parents.plan(recipe)).digest == full(parents, recipe)
    again = grouped("ties", {"k_proj": 0.1})
    assert live.load(parents.plan(again)).digest == full(parents, again)
    made = dict(parents.merge(again))
    for layer, parameter in fused.items():
        names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for kind in "qkv"]
        assert torch.equal(parameter, torch.cat([made[name] for name in names]))


def test_live_weights_of_another_dtype_hold_the_rounded_merge(family_of: FamilyOf) -> None:
    parents = family(family_of)
    weights = targets(parents, torch.float32)
    recipe = grouped("linear", {"mlp": 0.3})
    LiveWeights(parents, weights).load(parents.plan(recipe))
    for name, tensor in parents.merge(recipe):
        assert torch.equal(weights[name], tensor.float())
    half = targets(parents, torch.float16)
    with pytest.raises(CandidateFailed, match=r"not finite in torch\.float16"):
        LiveWeights(parents, half).load(parents.plan(grouped("linear", {"mlp": 1e9})))


def test_two_threads_write_the_same(family_of: FamilyOf) -> None:
    parents = family(family_of)
    recipe = grouped("ties", {"mlp": 0.3})
    want = full(parents, recipe)
    torch.set_num_threads(2)
    live = LiveWeights(parents, targets(parents))
    assert live.load(parents.plan(recipe)).digest == want
    with pytest.raises(CandidateFailed):
        live.load(parents.plan(grouped("ties", {"mlp": 1e39})))
    assert live.load(parents.plan(recipe)).digest == want


class TestProof:
    def test_a_foreign_write_is_found_also_where_nothing_was_rewritten(
        self, family_of: FamilyOf
    ) -> None:
        parents = family(family_of)
        weights = targets(parents)
        live = LiveWeights(parents, weights)
        plan = parents.plan(grouped("linear", {"mlp": 0.3}))
        live.load(plan)
        weights["model.norm.weight"][3] += 1
        with pytest.raises(RunFailed, match=r"1 live tensors .* the first is model\.norm\.weight"):
            live.load(plan)
        assert live.load(plan).rewritten == len(parents.layout.tensors)

    def test_two_names_of_one_memory(self, family_of: FamilyOf) -> None:
        parents = family(family_of)
        weights = targets(parents)
        kind = "model.layers.{}.mlp.up_proj.weight"
        weights[kind.format(0)] = weights[kind.format(1)]
        with pytest.raises(RunFailed, match=r"layers\.0\.mlp\.up_proj"):
            LiveWeights(parents, weights).load(parents.plan(grouped("linear", {})))

    @pytest.mark.parametrize("fault", ["missing", "more", "reshaped"])
    def test_a_model_of_other_tensors_is_not_touched(self, family_of: FamilyOf, fault: str) -> None:
        parents = family(family_of)
        weights = targets(parents)
        if fault == "missing":
            del weights["model.norm.weight"]
        elif fault == "more":
            weights["model.other.weight"] = torch.full((3,), 9.0)
        else:
            weights["model.norm.weight"] = torch.full((1,), 9.0)
        with pytest.raises(RunFailed):
            LiveWeights(parents, weights).load(parents.plan(grouped("linear", {})))
        assert all(bool((value == 9).all()) for value in weights.values())


def test_five_hundred_merges_leave_memory_flat_and_parents_as_they_were(
    family_of: FamilyOf,
) -> None:
    parents = family(family_of)
    live = LiveWeights(parents, targets(parents))
    methods = ["linear", "task_arithmetic", "ties", "dare_ties", "breadcrumbs"]

    def parent() -> str:
        names = [spec.name for spec in parents.layout.tensors]
        return digest((name, parents.tensor("base", name)) for name in names)

    def merge(count: int) -> None:
        for index in range(count):
            density = 0.2 + 0.6 * (index % 97) / 97
            by_filter = {"mlp": (index % 31) / 31}
            live.load(parents.plan(grouped(methods[index % 5], by_filter, density=density)))

    before = parent()
    merge(100)
    memory = resident_bytes()
    merge(500)
    assert resident_bytes() - memory < 4_000_000
    assert parent() == before
