"""What the merging tests share: families, recipes, and the measure of nearness."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agentmerge.merging.engines import KERNELS, merge_tensor
from agentmerge.merging.kernels import Operand
from agentmerge.merging.loops.remembered import Statistics

LAYERS = 2


def make_family(root: Path, tied: bool, dtype: torch.dtype) -> dict[str, Path]:
    """base, a and b, two layers each; the experts differ from the base everywhere."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype=str(dtype).removeprefix("torch."),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        paths = {}
        for name in ("base", "a", "b"):
            weights = {
                key: (value.detach().float() + (name != "base") * 0.02 * torch.randn(value.shape))
                for key, value in model.named_parameters()
            }
            paths[name] = root / name
            paths[name].mkdir(parents=True)
            save_file(
                {key: value.to(dtype) for key, value in weights.items()},
                paths[name] / "model.safetensors",
                metadata={"format": "pt"},
            )
            config.save_pretrained(paths[name])
    model.generation_config.save_pretrained(paths["a"])
    _tokenizer().save_pretrained(paths["a"])
    return paths


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(24)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def edit_config(directory: Path, **changes: Any) -> None:
    """Change ``config.json``; a value of ``...`` removes the key."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(directory: Path, **changes: Any) -> None:
    """Change tensors; a value of None removes one. Dots are written as double underscores."""
    weights = load_all(directory)
    for name, value in changes.items():
        if value is None:
            del weights[name.replace("__", ".")]
        else:
            weights[name.replace("__", ".")] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    return weights


@contextmanager
def masks_given(masks: list[torch.Tensor]) -> Iterator[None]:
    """Inside, mergekit's random masks are these, in order: its own formula on our masks."""
    original, left = torch.bernoulli, list(masks)

    def next_mask(probabilities: torch.Tensor) -> torch.Tensor:
        mask = left.pop(0).reshape(probabilities.shape).to(probabilities.dtype)
        assert abs(float(probabilities.reshape(-1)[0])) <= 1
        return mask

    torch.bernoulli = next_mask  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.bernoulli = original
    assert not left, "mergekit asked for fewer masks"


def assert_at_least_as_near(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    *,
    slack: torch.Tensor,
    excluded: torch.Tensor | None = None,
    what: str = "",
) -> None:
    """Every element of ``ours`` is no farther from ``exact`` than mergekit's, within ``slack``."""
    ours_off, theirs_off = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
    worse = ours_off > theirs_off + slack
    if excluded is not None:
        worse &= ~excluded
    assert not worse.any(), (
        f"{what}: {int(worse.sum())} of {worse.numel()} elements are farther, by up to "
        f"{float((ours_off - theirs_off)[worse].max()):.3g}"
    )


def near_a_threshold(
    base: torch.Tensor, tensor: torch.Tensor, density: float, rounding: float
) -> torch.Tensor:
    """Elements whose magnitude is so near to the cut that rounding decides about them."""
    size = (tensor.double() - base.double()).abs()
    if density >= 1 or density <= 0 or not size.numel():
        return torch.zeros_like(size, dtype=torch.bool)
    keep = max(1, int(density * size.numel()))
    cut = size.reshape(-1).sort(descending=True).values[keep - 1]
    return (size - cut).abs() <= rounding * cut


def merged(
    method: str,
    base: torch.Tensor | None,
    operands: Sequence[Operand],
    shared: Mapping[str, float],
    dtype: torch.dtype,
    *,
    fused: bool,
) -> torch.Tensor:
    """One tensor's merge, by the torch kernel or by what a search would use."""
    if not fused:
        return KERNELS[method](base, operands, shared, dtype)
    target = torch.empty(operands[0].tensor.shape, dtype=dtype)
    finite = merge_tensor(method, base, operands, shared, target, Statistics())
    assert finite == bool(target.isfinite().all())
    return target


def rounding_of(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


def recipes(method: str) -> dict[str, str]:
    """Recipes of two layers that use all that mergekit's YAML can say of a method."""
    if method == "slerp":
        head = "merge_method: slerp\nbase_model: a\n"
        both = "[{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]"
        return {
            "smooth": head + "models: [{model: a}, {model: b}]\nparameters: {t: [0.2, 0.9]}",
            "filters": head + "models: [{model: a}, {model: b}]\nparameters: "
            "{t: [{filter: mlp, value: 0.3}, {filter: norm, value: 1}, {value: [0.1, 0.6]}]}",
            "slices": head + f"slices:\n- sources: {both}\n  parameters: {{t: 0.7}}\n"
            f"- sources: {both.replace('[0, 1]', '[1, 2]')}\n  parameters: {{t: 0.0}}",
        }
    base = "" if method == "linear" else "base_model: base\n"
    head = f"merge_method: {method}\n{base}"
    density = "" if method in ("linear", "task_arithmetic") else "density: 0.4, "
    return {
        "smooth": head + "models:\n"
        f"- {{model: a, parameters: {{{density}weight: [0.3, 0.9]}}}}\n"
        f"- {{model: b, parameters: {{{density}weight: [0.8, -0.2, 0.5]}}}}\n"
        "parameters: {normalize: true, int8_mask: true}",
        "filters": head + "models:\n"
        "- {model: a, parameters: {weight: "
        f"[{{filter: self_attn, value: 0.2}}, {{value: 0.7}}]}}}}\n"
        f"- {{model: b, parameters: {{{density}weight: [{{filter: mlp, value: [0.1, 0.9]}}, "
        "{filter: embed, value: 0}, {value: 0.6}]}}\n"
        "parameters: {normalize: false, lambda: 0.8, rescale: true, density: 0.7}",
        "slices": head + "slices:\n"
        "- sources:\n"
        f"  - {{model: a, layer_range: [0, 1], parameters: {{{density}weight: 1.0}}}}\n"
        f"  - {{model: b, layer_range: [1, 2], parameters: {{{density}weight: 0.35}}}}\n"
        + ("  - {model: base, layer_range: [0, 1]}\n" if base else "")
        + "- sources:\n"
        f"  - {{model: b, layer_range: [1, 2], parameters: {{{density}weight: 0.25}}}}\n"
        f"  - {{model: a, layer_range: [1, 2], parameters: {{{density}weight: 0.5}}}}\n"
        + ("  - {model: base, layer_range: [1, 2]}\n" if base else "")
        + "parameters: {normalize: 1.0}",
    }


METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")
