"""What a layer adds goes through two outputs: proved on transformers' own classes, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

from agentmerge.errors import ParentError
from agentmerge.merging.stack import OUTPUTS, Outputs, outputs_of
from agentmerge.parents.depth import at_layers
from agentmerge.parents.naming import at_layer, layer_of
from tests.merging.stack_cases import random_model

#: No epsilon, which alone keeps the identities from being exact.
_NO_EPS = {"rms_norm_eps": 0.0, "layer_norm_eps": 0.0, "norm_epsilon": 0.0}
_KINDS_OF_FOUR = ["sliding_attention", "full_attention"] * 2
_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.5},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 64, "layer_norm_epsilon": 0.0},
    "gemma2": {"sliding_window": 3},
    "gemma3_text": {
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "cohere": {"use_qk_norm": False},
}
HOPS, FACTORS = (0, 1, 0, 2, 1), (1.0, 0.7, 2.5, 0.4, 1.6)
TOKENS = torch.arange(3, 17).reshape(2, 7)


def model_of(kind: str) -> Any:
    changes = _NO_EPS | _CHANGES.get(kind, {})
    if kind == "gemma3_text":
        changes["num_hidden_layers"] = 4
    return random_model(kind, 0, **changes).double()


def stacked(model: Any, hops: Sequence[int], scales: Sequence[tuple[float, float]]) -> Any:
    """A model of those layers, attention and mlp of each so strong."""
    kind = model.config.model_type
    outputs = OUTPUTS.get(kind, OUTPUTS["llama"])
    config = type(model.config).from_dict(at_layers(model.config.to_dict(), hops))
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    weights = {k: v for k, v in model.state_dict().items() if layer_of(k) is None}
    for place, (hop, (attention, mlp)) in enumerate(zip(hops, scales, strict=True)):
        for name, tensor in model.state_dict().items():
            if layer_of(name) == hop:
                at = 1.0
                at = attention if name.endswith(outputs.attention) else at
                at = mlp if name.endswith(outputs.mlp) else at
                weights[at_layer(name, place)] = tensor if at == 1 else outputs.scaled(tensor, at)
    made.load_state_dict(weights)
    return made.eval()


def layers_of(model: Any, count: int) -> torch.nn.ModuleList:
    (found,) = [
        m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count
    ]
    return found


class _InDoubles(TorchFunctionMode):
    """Within: norms and softmaxes stay in float64, which models would leave for float32, and no
    norm has an epsilon that its config cannot take away."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in args):
            return args[0]
        if func is torch.nn.functional.layer_norm and "eps" in kwargs:
            kwargs["eps"] = 0.0  # OLMo's has one of its own
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    with _InDoubles():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@torch.no_grad()
def stream_scaled(model: Any, factors: Sequence[float]) -> torch.Tensor:
    """Logits with the stream multiplied by a factor before each layer."""

    def times(factor: float) -> Any:
        return lambda module, args: (args[0] * factor, *args[1:])

    layers = layers_of(model, len(factors))
    hooks = [
        layer.register_forward_pre_hook(times(f)) for layer, f in zip(layers, factors, strict=True)
    ]
    try:
        return logits(model)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_layer_whose_outputs_are_nothing_is_none(kind: str) -> None:
    model = model_of(kind)
    absent = stacked(model, (0, 1, 2), ((1.0, 1.0), (0.0, 0.0), (1.0, 1.0)))
    assert torch.equal(logits(absent), logits(stacked(model, (0, 2), ((1.0, 1.0),) * 2)))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_to_scale_the_stream_is_to_divide_what_layers_add(kind: str) -> None:
    model = model_of(kind)
    plain = stacked(model, HOPS, ((1.0, 1.0),) * len(HOPS))
    scaled = stream_scaled(plain, FACTORS)
    divided = stacked(model, HOPS, [(1 / c, 1 / c) for c in accumulate(FACTORS, mul)])
    torch.testing.assert_close(logits(divided), scaled, rtol=1e-9, atol=1e-9)
    assert (logits(plain) - scaled).abs().max() > 1e-3


def test_where_layers_read_the_stream_as_it_is_the_identity_does_not_hold() -> None:
    model = model_of("olmo2")
    plain = stacked(model, HOPS, ((1.0, 1.0),) * len(HOPS))
    scaled = stream_scaled(plain, FACTORS)
    norms = Outputs(("post_attention_layernorm.weight",), ("post_feedforward_layernorm.weight",))
    for outputs in (OUTPUTS["llama"], norms):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(OUTPUTS, "olmo2", outputs)  # type: ignore[arg-type]
            divided = stacked(model, HOPS, [(1 / c, 1 / c) for c in accumulate(FACTORS, mul)])
        assert (logits(divided) - scaled).abs().max() > 1e-3


def test_what_was_not_proved_is_refused() -> None:
    assert outputs_of({"model_type": "qwen2"}).mlp == ("mlp.down_proj.weight", "mlp.down_proj.bias")
    with pytest.raises(ParentError, match="do not normalize what they read"):
        outputs_of({"model_type": "olmo2"})
    with pytest.raises(ParentError, match="that was proved for cohere, gemma, gemma2"):
        outputs_of({"model_type": "mixtral"})
