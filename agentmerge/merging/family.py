"""A family of parents, and the merges of it.

It knows weights: it reads every parent, changes none of them, and makes a merge tensor by tensor.
It knows nothing of live models, tasks or scores, and it writes no files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch

from agentmerge.errors import CandidateFailed, ParentError
from agentmerge.merging.engines import is_finite, merge_tensor
from agentmerge.merging.kernels import Operand
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.merging.placement import Placement, plan_memory
from agentmerge.merging.plan import MergePlan, TensorPlan, plan
from agentmerge.merging.weights import (
    FamilySource,
    ParentFiles,
    Resident,
    TensorSource,
    upon_models,
)
from agentmerge.methods import RECIPE_METHODS
from agentmerge.parents.layout import Layout, read_layout
from agentmerge.recipe import Recipe


class Family:
    """Parents that can be merged with each other, and where their weights are. Built by ``open``.

    placement: "device" or "host" (all in memory, on the device or copied there tensor by tensor),
        or "stream" (read from the files for every merge). The bits of a merge are the same in all.
    most: so many parents are in memory at a time, those of the merges before; None for all.
    """

    def __init__(
        self,
        layout: Layout,
        source: FamilySource,
        placement: Placement,
        dtype: str | None,
        most: int | None = None,
    ) -> None:
        self.layout = layout
        self.placement = placement
        self.identities = dict(source.identities)
        self._source = source
        self._dtype = dtype
        self._most = most
        self._present: list[str] = []  # of some, the last merged last
        self.statistics = Statistics()

    @classmethod
    def open(
        cls,
        paths: Mapping[str, Path],
        *,
        base: str | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        placement: Placement | Literal["auto"] = "auto",
        most: int | None = None,
    ) -> Family:
        """Read every parent once; keep them in memory unless they are to be streamed.

        paths: the name that recipes use -> local directory. base: the one the others are compared
            with. dtype: of merged tensors where a recipe names none; by default as stored.
        placement: "auto" takes the first of device, host and stream that fits beside one live
            model in the memory that is free now.
        most: keep only so many of them, those that were merged last.

        Raises:
            ParentError: the models cannot be merged with each other (every reason), or a model
                holds a number that is not finite.
            RunFailed: they do not fit, with how much is needed.
        """
        layout = read_layout(paths, base)
        if placement == "auto":
            placement = plan_memory(layout, dtype=dtype, device=device, most=most).placement
        if most is not None and most >= len(layout.parents):
            most = None
        source: FamilySource = ParentFiles(paths, device)
        if placement != "stream":
            home = device if placement == "device" else "cpu"
            at_first = layout.parents if most is None else ()
            upon, more = upon_models(paths)
            files = ParentFiles({**paths, **more})
            source = Resident(files, layout, device=device, home=home, models=at_first, upon=upon)
        for model in layout.parents:
            _refuse_broken(model, layout, source)
        return cls(layout, source, placement, dtype, most)

    @property
    def size_bytes(self) -> int:
        """What is in memory of the parents."""
        return self._source.size_bytes

    def keeps(self, model: str, name: str) -> bool:
        """Whether ``tensor`` gives the same memory every time, until the next plan."""
        return self._source.keeps(model, name)

    def tensor(self, model: str, name: str) -> torch.Tensor:
        """A parent's own tensor, as stored; it must not be changed."""
        return self._source.tensor(model, name)

    def plan(self, recipe: Recipe) -> MergePlan:
        """How ``recipe`` (canonical) makes each tensor; errors are ``merging.plan.plan``'s.

        Where only some parents stay in memory, its own are among them from here on. One that is a
        model by itself is read from its files: it says nothing of what is merged next.

        Raises:
            RunFailed: a parent's file was removed or changed.
        """
        made = plan(recipe, self.layout, dtype=self._dtype)
        if self._most is not None and len(recipe.models) > 1:
            self._keep(recipe.models)
        return made

    def _keep(self, models: Sequence[str]) -> None:
        assert self._most is not None
        there = [name for name in self._present if name not in models]
        present = [*there, *models][-self._most :]
        if not set(self._present).issubset(present):
            self.statistics.forget(lambda pair: not _models_of(pair).issubset(present))
        self._present = present
        self._source.keep(present)

    def merge(self, recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the merge once, in the layout's order, each a fresh tensor.

        Raises:
            RecipeRejected: at the call, before anything is merged.
            CandidateFailed: at the tensor that holds a number that is not finite.
            RunFailed: a file that the parents are streamed from is gone, or was changed.
        """
        return self._merged(self.plan(recipe))

    @torch.no_grad()
    def merge_into(self, item: TensorPlan, merge_seed: int | None, target: torch.Tensor) -> None:
        """One tensor of a plan, written into ``target``; rounded to the plan's dtype, then its own.

        target: of the tensor's shape; a view (some rows of a larger parameter) will do.

        Raises:
            CandidateFailed: it holds a number that is not finite. So does ``target``, then.
        """
        if str(target.dtype) == f"torch.{item.dtype}":
            merged_tensor(item, merge_seed, self, target=target, statistics=self.statistics)
            return
        target.copy_(merged_tensor(item, merge_seed, self, statistics=self.statistics))
        if not is_finite(target):
            raise CandidateFailed(f"{item.spec.name!r} is not finite in {target.dtype}")

    def verify(self) -> None:
        """Raises RunFailed where the files that parents are streamed from were changed."""
        self._source.verify()

    def _merged(self, merge_plan: MergePlan) -> Iterator[tuple[str, torch.Tensor]]:
        seed = merge_plan.merge_seed
        for item in merge_plan.tensors:
            tensor = merged_tensor(item, seed, self, statistics=self.statistics)
            yield item.spec.name, tensor
        self.verify()


@torch.no_grad()
def merged_tensor(
    item: TensorPlan,
    merge_seed: int | None,
    source: TensorSource,
    *,
    target: torch.Tensor | None = None,
    statistics: Statistics | None = None,
) -> torch.Tensor:
    """One tensor of a plan: fresh and contiguous, or written into ``target``, at its dtype.

    statistics: what is remembered of the source's tensors, from one merge to the next.

    Raises:
        CandidateFailed: it holds a number that is not finite. So does ``target``, then.
    """
    effective = item.effective
    known = statistics or Statistics()
    base, operands = operands_of(item, merge_seed, source, known)
    if target is None:
        like = base if base is not None else operands[0].tensor
        target = torch.empty(like.shape, dtype=getattr(torch, item.dtype), device=like.device)
    shared = dict(effective.shared)
    if not merge_tensor(effective.method, base, operands, shared, target, known):
        dtype = str(target.dtype).removeprefix("torch.")
        raise CandidateFailed(
            f"merging {item.spec.name!r} by {effective.method} gave numbers that are not finite "
            f"in {dtype}; the weights are too large"
        )
    return target


def operands_of(
    item: TensorPlan,
    merge_seed: int | None,
    source: TensorSource,
    statistics: Statistics | None = None,
) -> tuple[torch.Tensor | None, list[Operand]]:
    """The base's tensor, where the method sets one apart, and the other sources in order; those
    that are merged first, merged."""
    effective = item.effective
    method = RECIPE_METHODS[effective.method]
    foreign = method.engine == "foreign"
    base: torch.Tensor | None = None
    operands = []
    inputs = dict(item.inputs)
    ground = f"{effective.base_model}\n{inputs.get(effective.base_model or '')}"
    rows = zip(item.inputs, effective.sources, item.first or repeat(None), strict=False)
    for (model, name), (_, _, own), made in rows:
        if made is None:
            tensor = source.tensor(model, name)
        else:
            tensor = merged_tensor(*made, source, statistics=statistics)
        if model == effective.base_model:
            base = tensor
            continue
        key = mask_key(merge_seed or 0, source.identities[model], name) if method.random else ""
        given: Any = {"values": own} if foreign else dict(own)
        pair = f"{ground}\n{model}\n{name}" if made is None else ""  # another with each recipe
        operands.append(Operand(tensor, key=key, pair=pair, **given))
    return base, operands


def _models_of(pair: str) -> set[str]:
    """Of ``Operand.pair``."""
    base, _, model, _ = pair.split("\n")
    return {base, model}


def mask_key(merge_seed: int, fingerprint: str, tensor: str) -> str:
    """What a random mask depends on: nothing of the recipe but its seed.

    tensor: the name under which the parent has it, whatever layer it goes to.
    """
    return f"{merge_seed}\n{fingerprint}\n{tensor}"


def _refuse_broken(model: str, layout: Layout, source: TensorSource) -> None:
    broken = sorted(
        spec.name for spec in layout.tensors if not is_finite(source.tensor(model, spec.name))
    )
    if broken:
        raise ParentError(
            f"{model}: {len(broken)} tensors hold numbers that are not finite, the first is "
            f"{broken[0]}; the model is broken"
        )
