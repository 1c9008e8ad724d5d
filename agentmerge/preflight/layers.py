"""Whether the layers of a config's models can be searched, and by which tensors they are scaled.

Reads what the first stages of a look have found; no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from agentmerge.errors import ParentError
from agentmerge.parents.configs import class_config
from agentmerge.preflight.faults import Look
from agentmerge.preflight.models import Models

if TYPE_CHECKING:  # read only where models are
    from agentmerge.parents.layout import Layout


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


def _faults(look: Look) -> Iterator[str]:
    config = look.config
    if config.search.structure == "fixed":
        yield "genome.layers opens another search space; set search.structure to advised or free"
    if not getattr(look.kind, "runs_stacks", False):
        yield (
            f"genome.layers is not possible with worker.kind {config.worker.kind}, which runs no "
            "stacks of layers; use hf or disk"
        )
