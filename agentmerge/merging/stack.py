"""By which tensors a layer adds to the stream that runs through a model, by architecture.

Where every layer normalizes what it reads, ``norm(c x) = norm(x)`` for c > 0: to scale the stream
before a layer is to divide what it and all later ones add, and a layer that adds nothing is none.
So every layer of a stack has one strength, and every stack is a model of its architecture. What
stands here was proved on transformers' own classes (``tests/merging/test_stack_outputs.py``); no
other architecture may be scaled so. It knows names and reasons, no weights but those it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from agentmerge.errors import ParentError


@dataclass(frozen=True, slots=True)
class Outputs:
    """attention, mlp: endings of the tensors by which either adds to the stream, biases too.

    offset: what a layer's norm adds to its weights; where the outputs are norms, whatever comes
        before them is normalized away, and their weights carry the scale. Only with 0 is a scale
        the ``scale`` of passthrough.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    offset: float = 0.0

    def scaled(self, tensor: torch.Tensor, scale: float) -> torch.Tensor:
        """An output as it is in a layer of that strength."""
        return (tensor + self.offset) * scale - self.offset


def _projections(attention: str, mlp: str) -> Outputs:
    one, two = ((f"{name}.weight", f"{name}.bias") for name in (attention, mlp))
    return Outputs(one, two)


#: As Llama has them.
_PLAIN = _projections("self_attn.o_proj", "mlp.down_proj")
_NORMED = Outputs(("post_attention_layernorm.weight",), ("post_feedforward_layernorm.weight",), 1.0)

#: By ``model_type`` of the text model.
OUTPUTS: Mapping[str, Outputs] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "granite"), _PLAIN),
    **dict.fromkeys(("phi3", "stablelm", "cohere", "olmo"), _PLAIN),
    "starcoder2": _projections("self_attn.o_proj", "mlp.c_proj"),
    "phi": _projections("self_attn.dense", "mlp.fc2"),
    "gpt2": _projections("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": _projections("attention.dense", "mlp.dense_4h_to_h"),
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
}
_NO_PRE_NORM = "its layers do not normalize what they read, so the stream's scale reaches them"
_REFUSED = {"olmo2": _NO_PRE_NORM, "olmo3": _NO_PRE_NORM}


def outputs_of(text_config: Mapping[str, Any]) -> Outputs:
    """The outputs of a text model's layers.

    Raises:
        ParentError: its stream cannot be scaled by them, or nobody has proved that it can.
    """
    kind = str(text_config.get("model_type"))
    if kind in OUTPUTS:
        return OUTPUTS[kind]
    why = _REFUSED.get(kind, f"that was proved for {', '.join(sorted(OUTPUTS))}")
    raise ParentError(f"the layers of a {kind} model cannot be scaled: {why}")
