"""Whether the layers of a config's models can be searched, and by which tensors they are scaled.

Reads what the first stages of a look have found; no weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agentmerge.errors import ParentError
from agentmerge.parents.configs import class_config
from agentmerge.preflight.faults import Look
from agentmerge.preflight.models import Models
from agentmerge.space.grouped import SearchSpace

if TYPE_CHECKING:  # read only where models are
    from agentmerge.parents.layout import Layout

_WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def outputs_of_names(look: Look) -> tuple[str, str] | None:
    """Of a worker that reads no model and says itself what it scales; None where layers are not
    searched."""
    if look.config.genome.layers is None:
        return None
    look.faults.extend(_faults(look))
    outputs: tuple[str, str] | None = getattr(look.kind, "outputs", None)
    if outputs is None:
        look.faults.append(
            f"genome.layers is not possible with worker.kind {look.config.worker.kind}, which has "
            "no layers to scale; remove it"
        )
    return outputs


def outputs_of_models(look: Look, models: Models, layout: Layout) -> tuple[str, str] | None:
    """What is in the names of the tensors by which a layer's attention and its mlp add to the
    stream; None where layers are not searched, or cannot be."""
    from agentmerge.merging.stack import outputs_of

    if look.config.genome.layers is None:
        return None
    look.faults.extend(_faults(look))
    checkpoint = models.survey.checkpoints[layout.first]
    text = class_config(checkpoint.config).text
    try:
        found = outputs_of(text)
    except ParentError as error:
        look.faults.append(f"genome.layers is not possible: {error}")
        return None
    if layout.fixed:
        look.faults.append(f"genome.layers is not possible: {layout.fixed}")
    if found.offset:
        look.faults.append(
            f"genome.layers is not possible: the layers of a {text.get('model_type')} model are "
            "scaled by their norms, which no merge recipe says"
        )
    attention, mlp = ({n.rpartition(".")[0] for n in part} for part in (found.attention, found.mlp))
    return attention.pop(), mlp.pop()


@dataclass(frozen=True, slots=True)
class LayersPlan:
    """What a search over layers may make, beside models of ``num_layers``.

    dimensions: of its space. deepest: the layers of the deepest stack. cost_a_token: its layers'
    share of a token's cost, as a multiple of the models' own. scaled_bytes: what it keeps in memory
    beside the parents, at most; None where no model is read.
    """

    dimensions: int
    num_layers: int
    deepest: int
    cost_a_token: float
    scaled_bytes: int | None


def layers_plan(space: SearchSpace, layout: Layout | None = None) -> LayersPlan | None:
    """None where layers are not searched."""
    if space.outputs is None:
        return None
    over = replace(space, under=space.uniform()[0])
    if over.stacks is None:
        return None
    deepest = over.stacks.depth
    scaled = None
    if layout is not None:
        sizes = [0] * space.num_layers
        for spec in layout.tensors:
            if spec.layer is not None and any(name in spec.name for name in space.outputs):
                sizes[spec.layer] += math.prod(spec.shape) * _WIDTHS[space.dtype]
        free = len({axis.group for axis in over.axes})
        scaled = max(sizes) * min(deepest, free)
    return LayersPlan(
        over.dimensions, space.num_layers, deepest, deepest / space.num_layers, scaled
    )


def _faults(look: Look) -> Iterator[str]:
    config = look.config
    if config.search.structure == "fixed":
        yield "genome.layers opens another search space; set search.structure to advised or free"
    if look.kind is not None and not getattr(look.kind, "runs_stacks", False):
        yield (
            f"genome.layers is not possible with worker.kind {config.worker.kind}, which runs no "
            "stacks of layers; use hf, disk or vllm"
        )
