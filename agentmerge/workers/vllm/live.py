"""One rank of a live vLLM model, the parents beside it, and how a merge gets into it.

Two ways to write:
    map     straight into the model's parameters, where its loader was recorded (``vllm_map``);
    reload  vLLM's own ``reload_weights``, for weights that are packed or that others derive from.
Whichever it was, the live weights are read back and compared with what was merged. It knows vLLM's
model and worker from inside; it knows no engine, no items and no search.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agentmerge.errors import AgentmergeError, RunFailed
from agentmerge.merging.digests import digest_of_lines, tensor_line
from agentmerge.merging.family import Family
from agentmerge.merging.live import LiveWeights
from agentmerge.merging.plan import MergePlan, TensorPlan
from agentmerge.methods import METHODS
from agentmerge.recipe import Recipe
from agentmerge.workers.vllm.deeper import Depth
from agentmerge.workers.vllm.map import Parameters, Unmappable, WeightMap, record

#: Layers whose weights others derive from, or that keep them in another form, by class name.
_DERIVED = ("MoE", "MLA", "Mamba", "ShortConv", "GatedDelta", "LinearAttention", "LoRA")
_PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


class LiveModel:
    """See the module's head.

    worker: vLLM's own. options: ``parents`` (name -> directory), ``base``, ``dtype``,
    ``placement``, ``most`` (parents that stay), ``methods`` (the config's own), ``extra_layers``
    (how many this model has beyond its parents', or None) and ``way`` ("reload", or None for the
    fastest that it allows).

    Raises:
        ParentError: the parents cannot be merged with each other.
        RunFailed: their tensors cannot be found again inside this model, so that no swap could be
            proved.
    """

    def __init__(self, worker: Any, options: Mapping[str, Any]) -> None:
        for name, body in options.get("methods", {}).items():
            METHODS.declare(name, body)
        self._worker = worker
        self._model = worker.get_model()
        self._dtype: torch.dtype = worker.model_config.dtype
        self._family = Family.open(
            {name: Path(path) for name, path in options["parents"].items()},
            base=options["base"],
            dtype=options["dtype"],
            device=str(worker.device),
            placement=options["placement"],
            most=options.get("most"),
        )
        self._depth = Depth(self._family, options.get("extra_layers"))
        self._own = {item.spec.name: item.inputs[0] for item in self._depth.tensors}
        if options.get("extra_layers"):
            _refuse_random(self._model)
        self._packed = _packed(self._model)
        self._before_packing: dict[str, torch.Tensor] = {}
        self._map = self._recorded()
        self._weights: LiveWeights | None = None
        self._reason = (
            "" if options.get("way") is None else f"worker.options.way is {options['way']}"
        )
        self._reason = self._reason or _why_reload(worker, self._model, bool(self._packed))
        self._way = "reload" if self._reason else "map"

    def facts(self) -> dict[str, Any]:
        """What the engine's owner needs: the way, why it is not the map, what to test it with."""
        return {"way": self._way, "reason": self._reason, "test": self._depth.test.to_dict()}

    def parameters(self) -> dict[str, torch.Tensor]:
        """Live parameters by vLLM's names; packed ones as they were before the last packing."""
        return {**dict(self._model.named_parameters()), **self._before_packing}

    def load(self, body: Mapping[str, Any], way: str) -> dict[str, Any]:
        """Merge, write and prove: plan hash, digest, tensors, and the seconds it took.

        Raises:
            CandidateFailed: the recipe's fault; the model is whole, but it is not this recipe.
            RunFailed: the live weights are not what was merged.
        """
        start = time.perf_counter()
        recipe = Recipe.parse(body).canonical(self._family.layout.num_layers)
        planned = self._family.plan(recipe)
        filling = self._depth.filling(planned)
        report = {"recipe": planned.digest}
        with torch.no_grad():
            if way == "map" and all(map(self._map.is_whole, self._own)):
                report |= self._written_in_place(planned, filling)
            else:
                report |= self._written(planned, filling, way)
        self._before_packing.clear()
        return report | {"total_s": time.perf_counter() - start}

    def zero(self) -> None:
        """Every live parameter zero: what is not written afterwards is seen."""
        self._weights = None
        with torch.no_grad():
            for parameter in self.parameters().values():
                parameter.zero_()

    def _written_in_place(
        self, planned: MergePlan, filling: Sequence[TensorPlan]
    ) -> dict[str, Any]:
        """Each tensor lies whole in the model: merged there, and only those that differ from the
        merge before."""
        if self._weights is None:
            live = self.parameters()
            views = {name: next(self._map.live_parts(name, live)) for name in self._own}
            self._weights = LiveWeights(self._family, views)
        loaded = self._weights.load(planned, filling)
        return {"digest": loaded.digest, "tensors": loaded.tensors}

    def _written(
        self, planned: MergePlan, filling: Sequence[TensorPlan], way: str
    ) -> dict[str, Any]:
        """By the loader, or part by part where this rank has parts only."""
        self._weights = None
        whole = replace(planned, tensors=(*planned.tensors, *filling))
        merge = LiveMerge(self._family, whole, self._map, self._dtype, self._worker.device)
        start = time.perf_counter()
        if way == "map":
            merge.write(self.parameters())
        else:
            self._reload(merge)
        swap_s = time.perf_counter() - start - merge.seconds
        self._prove(merge)
        return {
            "digest": digest_of_lines(merge.lines[item.spec.name] for item in planned.tensors),
            "tensors": len(planned.tensors),
            "swap_s": swap_s,
        }

    def _prove(self, merge: LiveMerge) -> None:
        """Every part of every tensor that this rank holds, read back from the live weights."""
        live = self.parameters()
        for name in self._own:
            parts = self._map.live_parts(name, live)
            found = [tensor_line(name, part) for part in parts]
            if found != merge.parts[name]:
                raise RunFailed(
                    f"the live weights of {name!r} are not the merged ones: vLLM loads this model "
                    "otherwise than its files say, or something else writes to it"
                )

    def _recorded(self) -> WeightMap:
        specs = {
            item.spec.name: (item.spec.shape, getattr(torch, item.spec.dtype))
            for item in self._depth.tensors
        }
        try:
            if not self._packed:
                return record(self._model, specs)
            with torch.no_grad(), self._seeing_packing():
                fresh = ((name, self._fresh(name)) for name in self._own)
                self._worker.reload_weights(weights_iterator=fresh)
            with self._unpacked():
                return record(self._model, specs)
        except Unmappable as error:
            raise RunFailed(
                f"no swap into this model could be proved: {error}; use worker.kind: hf or disk"
            ) from error

    # --- vLLM's own reload ----------------------------------------------------------------------

    def _reload(self, merge: LiveMerge) -> None:
        with self._seeing_packing():
            self._worker.reload_weights(weights_iterator=self._fed(merge))
        for module in self._model.modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():  # a tied head's own copy
                module.quant_method.process_weights_after_loading(module)
        if merge.failure is not None:
            raise merge.failure

    def _fed(self, merge: LiveMerge) -> Iterator[tuple[str, torch.Tensor]]:
        """The merge; one that fails half-way goes on with a parent's tensors, since a reload that
        is not finished leaves a model beyond repair."""
        try:
            yield from merge.tensors()
        except AgentmergeError as error:
            merge.failure = error
            for name in self._own:
                if name not in merge.lines:
                    yield name, self._fresh(name)

    def _fresh(self, name: str) -> torch.Tensor:
        """The first parent's tensor, for a loader to keep: one on the device at a time."""
        return self._family.tensor(*self._own[name]).to(self._dtype, copy=True)

    @contextmanager
    def _seeing_packing(self) -> Iterator[None]:
        """Keeps each weight that vLLM packs as it is before that; packing frees it."""
        self._before_packing.clear()
        for name, module in self._packed.items():
            _wrap(module.quant_method, f"{name}.weight", self._before_packing)
        try:
            yield
        finally:
            for module in self._packed.values():
                del module.quant_method.process_weights_after_loading

    @contextmanager
    def _unpacked(self) -> Iterator[None]:
        """The model with its packed weights as parameters again."""
        freed = {name: module.weight for name, module in self._packed.items()}
        for name, module in self._packed.items():
            module.weight = self._before_packing[f"{name}.weight"]
        try:
            yield
        finally:
            for name, module in self._packed.items():
                module.weight = freed[name]


class LiveMerge:
    """A merge on its way into the model: each expected tensor once, finite, and its digests.

    lines: of whole tensors, as merged. parts: of the parts that this rank holds, in live order.
    seconds: what merging took, without writing.
    """

    def __init__(
        self,
        family: Family,
        planned: MergePlan,
        weight_map: WeightMap,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lines: dict[str, str] = {}
        self.parts: dict[str, list[str]] = {}
        self.failure: AgentmergeError | None = None
        self.seconds = 0.0
        self._family = family
        self._plan = planned
        self._map = weight_map
        self._make = partial(torch.empty, dtype=dtype, device=device)

    def write(self, live: Parameters) -> None:
        """Into the live parameters: where a tensor lies there whole, it is merged right there."""
        for item in self._items():
            name = item.spec.name
            if self._map.is_whole(name):
                self._merged(item, next(iter(self._map.live_parts(name, live))))
            else:
                self._map.write(name, self._merged(item, None), live)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """For a loader: each a fresh tensor, since vLLM's keeps them until a layer is complete."""
        for item in self._items():
            yield item.spec.name, self._merged(item, None)

    def _items(self) -> Iterator[TensorPlan]:
        """Raises RunFailed for a name that is missing, unknown or given twice."""
        for item in self._plan.tensors:
            name = item.spec.name
            expected = self._map.shapes.get(name)
            if expected is None or name in self.lines:
                raise RunFailed(f"the merge gave {name!r} twice, or the model has no such tensor")
            if item.spec.shape != expected:
                raise RunFailed(f"{name!r} has shape {list(item.spec.shape)}, not {list(expected)}")
            yield item
        if missing := self._map.shapes.keys() - self.lines.keys():
            raise RunFailed(f"the merge left {len(missing)} tensors out: {sorted(missing)[:3]}")
        self._family.verify()

    def _merged(self, item: TensorPlan, target: torch.Tensor | None) -> torch.Tensor:
        start = time.perf_counter()
        name = item.spec.name
        if target is None:
            target = self._make(item.spec.shape)
        self._family.merge_into(item, self._plan.merge_seed, target)
        self.seconds += time.perf_counter() - start
        self.lines[name] = tensor_line(name, target)
        if self._map.is_whole(name):
            self.parts[name] = [self.lines[name]]
        else:
            self.parts[name] = [tensor_line(name, part) for part in self._map.parts(name, target)]
        return target


def _refuse_random(model: Any) -> None:
    """An engine deeper than its models starts with random numbers, and of merges come parameters.

    Raises:
        RunFailed: something else is stored with them, which nothing would write.
    """
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        # scales of a quantised cache are 1 again by now
        if name in stored and buffer.is_floating_point() and not (buffer == 1).all():
            raise RunFailed(
                f"vLLM keeps {name!r} of this model beside its parameters, so it cannot be made "
                "deeper; use worker.kind: hf or disk"
            )


def _packed(model: Any) -> dict[str, Any]:
    """Modules whose weight vLLM has packed into a form of its own and freed."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "quant_method")
        and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        and not module.weight.numel()
    }


def _wrap(method: Any, name: str, kept: dict[str, torch.Tensor]) -> None:
    pack = method.process_weights_after_loading

    def keep_and_pack(layer: Any) -> None:
        kept[name] = layer.weight
        pack(layer)

    method.process_weights_after_loading = keep_and_pack


def _why_reload(worker: Any, model: Any, packed: bool) -> str:
    """Why parameters of this model must not be written in place; empty if they may be."""
    if packed:
        return "this build of vLLM packs its weights"
    if getattr(worker.model_config, "quantization", None) is not None:
        return "the model is quantised in the engine"
    if worker.parallel_config.pipeline_parallel_size > 1:
        return "the engine is pipeline-parallel"
    for module in model.modules():
        kind = type(module).__name__
        if any(word in kind for word in _DERIVED):
            return f"a {kind} keeps its weights in another form"
        method = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in _PLAIN:
            return f"{type(method).__name__} is not known to keep weights as they are"
    return ""
