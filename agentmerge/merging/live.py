"""The weights of a live model, and merges written straight into them.

It knows where each tensor of the model is (a parameter, or some rows of one) and what was merged
into it last. A load rewrites only the tensors that a plan makes otherwise than the one before, each
from the parents, never from what is live; and it proves the swap by reading every live tensor back,
rewritten or not. It knows nothing of engines, tasks or scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from agentmerge.errors import RunFailed
from agentmerge.merging.digests import digest_of_lines, tensor_line
from agentmerge.merging.engines import has_fused, has_loops
from agentmerge.merging.family import Family
from agentmerge.merging.plan import MergePlan, TensorPlan
from agentmerge.methods import RECIPE_METHODS

#: How a tensor is made: its plan, and the merge seed where the method draws random masks.
_Made = tuple[TensorPlan, int | None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did. ``digest`` is of all live tensors, as read back from memory."""

    digest: str
    tensors: int
    rewritten: int


class LiveWeights:
    """A model's tensors, by the names that the family's files give them.

    targets: every tensor of the family's layout, of its shape; views will do, at any dtype. Nobody
        else may write to what is not lent.
    """

    def __init__(self, family: Family, targets: Mapping[str, torch.Tensor]) -> None:
        self._family = family
        self._targets = {name: target.detach() for name, target in targets.items()}
        self._made: dict[str, _Made] = {}
        self._lines: dict[str, str] = {}

    def load(self, merge_plan: MergePlan, filling: Sequence[TensorPlan] = ()) -> Loaded:
        """Make the model what ``merge_plan`` says. After an error the next load rewrites all.

        filling: the other tensors of a model that has more of them than a merge; written and proved
            alike, and counted nowhere.

        Raises:
            CandidateFailed: a tensor holds a number that is not finite.
            RunFailed: the plan does not make every tensor once, or what is live afterwards is not
                what was merged.
        """
        items = (*merge_plan.tensors, *filling)
        self._check(items)
        made = {item.spec.name: _made(item, merge_plan) for item in items}
        stale = [item for name, (item, _) in made.items() if self._made.get(name) != made[name]]
        self._made = {}  # what is live is known again when all has gone well
        for name, line in self._rewritten(stale, merge_plan.merge_seed):
            self._lines[name] = line
        self._family.verify()
        lines = {name: tensor_line(name, target) for name, target in self._targets.items()}
        if wrong := [name for name, line in lines.items() if self._lines[name] != line]:
            raise RunFailed(
                f"{len(wrong)} live tensors are not the merged ones, the first is {wrong[0]}: "
                "memory is faulty or something else writes to the model"
            )
        self._made = made
        merged = [lines[item.spec.name] for item in merge_plan.tensors]
        return Loaded(digest_of_lines(merged), len(merged), len(stale))

    def lend(self, names: Iterable[str]) -> None:
        """Others write over these: the next load makes them anew."""
        for name in names:
            self._made.pop(name, None)

    def _check(self, items: Sequence[TensorPlan]) -> None:
        names = Counter(item.spec.name for item in items)
        odd = [name for name, count in names.items() if count > 1 or name not in self._targets]
        if odd:
            raise RunFailed(f"the merge gives {odd[0]!r} twice, or the model has no such tensor")
        if missing := self._targets.keys() - names.keys():
            raise RunFailed(f"the merge left {len(missing)} tensors out: {sorted(missing)[:3]}")
        for item in items:
            shape = tuple(self._targets[item.spec.name].shape)
            if shape != item.spec.shape:
                raise RunFailed(f"{item.spec.name!r} has shape {item.spec.shape}, not {shape}")

    def _rewritten(
        self, items: Sequence[TensorPlan], merge_seed: int | None
    ) -> Iterator[tuple[str, str]]:
        """Merge some tensors; each one's name and the line of what was written."""

        def write(item: TensorPlan) -> tuple[str, str]:
            target = self._targets[item.spec.name]
            self._family.merge_into(item, merge_seed, target)
            return item.spec.name, tensor_line(item.spec.name, target)

        threads = min(torch.get_num_threads(), len(items))
        if self._family.placement == "stream":
            threads = 1  # memory is short, and the forecast is of one tensor at a time
        if threads < 2 or not all(map(self._is_free_of_torch, items)):
            yield from map(write, items)
            return
        largest_first = sorted(items, key=lambda item: -math.prod(item.spec.shape))
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(write, largest_first)

    def _is_free_of_torch(self, item: TensorPlan) -> bool:
        """Whether merging it leaves torch's own threads idle."""
        steps = (item, *(made[0] for made in item.first if made))
        fused = all(has_fused(step.effective.method) for step in steps)
        kept = all(self._family.keeps(*given) for step in steps for given in step.inputs)
        return fused and kept and has_loops(self._targets[item.spec.name])


def _made(item: TensorPlan, merge_plan: MergePlan) -> _Made:
    return item, merge_plan.merge_seed if RECIPE_METHODS[item.effective.method].random else None
