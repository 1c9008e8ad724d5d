"""An engine of more layers than its models have, in which every stack up to its depth runs.

vLLM builds and compiles a model of one depth. A stack takes the first layers of it; in those that
are left every tensor is zero, so that they add nothing to the stream, which goes through them as it
is. That holds for the architectures whose layers' outputs are known (``merging.stack``), and where
all layers are of one kind, since a layer's kind is part of what the engine compiled. It knows
configs, layouts and plans; it starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.parents.configs import class_config
from agentmerge.parents.depth import at_layers, followed
from agentmerge.parents.headers import num_layers, read_config
from agentmerge.recipe import Recipe

if TYPE_CHECKING:  # read where no weights are
    from agentmerge.merging.family import Family
    from agentmerge.merging.plan import MergePlan, TensorPlan

#: ``WorkerSpec.options``: how many layers beyond its models' the engine has; None: no stacks.
OPTION = "extra_layers"


def extra_layers(spec: WorkerSpec) -> int | None:
    found = spec.options.get(OPTION)
    return None if found is None else int(found)


def stack_faults(spec: WorkerSpec) -> list[str]:
    """Why one engine of these models cannot run stacks; empty where it can, or is not to."""
    if extra_layers(spec) is None:
        return []
    text = class_config(_config(spec)).text
    depth = num_layers(_config(spec))
    return [
        "genome.layers is not possible with worker.kind vllm: layers of these models are of "
        f"several kinds ({key}), and each layer of an engine stays of one; use hf or disk"
        for key, kinds in followed(text, depth, range(depth)).items()
        if isinstance(kinds, list) and len(set(kinds)) > 1
    ]


def overrides(spec: WorkerSpec) -> dict[str, Any]:
    """What makes ``vllm.LLM`` build the deep model; empty where its models' depth is enough.

    It starts with random weights, since no file has so many layers: every tensor is written and
    read back before anything is asked of it.
    """
    config, deep = _config(spec), deep_config(spec)
    if deep == config:
        return {}
    asked = (spec.options.get("engine_args") or {}).get("hf_overrides") or {}
    changed = {key: value for key, value in deep.items() if config.get(key) != value}
    return {"hf_overrides": {**asked, **changed}, "load_format": "dummy"}


def deep_config(spec: WorkerSpec) -> Mapping[str, Any]:
    """The config of the engine's model."""
    config, extra = _config(spec), extra_layers(spec)
    if not extra:
        return config
    depth = num_layers(config)
    return at_layers(config, (*range(depth), *[depth - 1] * extra))


def _config(spec: WorkerSpec) -> Mapping[str, Any]:
    return read_config(Path(dict(spec.parents)[spec.template_model]))


class Depth:
    """The layers of an engine, and what stands in those that a merge leaves empty.

    test: a recipe that fills them all, with the layers of one parent, each once or several times in
        a row. tensors: its tensors, which are the engine's.
    """

    def __init__(self, family: Family, extra: int | None) -> None:
        layers, first = family.layout.num_layers, family.layout.parents[0]
        self.layers = layers + (extra or 0)
        spread = [place * layers // self.layers for place in range(self.layers)]
        self.test = _copies(first, spread).canonical(layers)
        self.tensors = family.plan(self.test).tensors
        self._nothing: tuple[TensorPlan, ...] = ()
        if extra is not None:
            zeros = _copies(first, spread, scale=0.0).canonical(layers)
            self._nothing = family.plan(zeros).tensors

    def filling(self, merge_plan: MergePlan) -> tuple[TensorPlan, ...]:
        """What is written beside a merge, so that the engine's other layers do nothing."""
        made = {item.spec.layer for item in merge_plan.tensors} | {None}
        return tuple(item for item in self._nothing if item.spec.layer not in made)


def _copies(model: str, layers: Sequence[int], **parameters: float) -> Recipe:
    pieces = [{"sources": [{"model": model, "layer_range": [k, k + 1]}]} for k in layers]
    body = {"merge_method": "passthrough", "slices": pieces, "parameters": parameters}
    return Recipe.parse(body)
