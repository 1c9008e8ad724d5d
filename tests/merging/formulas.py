"""Each method's formula, written plainly in float64: what kernels are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from agentmerge.recipe import CANCEL_SHARE


def float64_reference(
    method: str,
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    weights: Sequence[float] = (),
    densities: Sequence[float] = (),
    gammas: Sequence[float] = (),
    shared: Mapping[str, float],
    masks: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """A method's formula, written plainly in float64; the rules at the edges are the kernels'.

    masks: what the random methods keep of each tensor, of the tensor's shape; ignored by others.
    Of the methods that mergekit computes for us there is no second formula here.
    """
    exact = [tensor.double() for tensor in tensors]
    if method == "passthrough":  # at its own scale
        return exact[0]
    if method == "slerp":
        return _slerp(_given(base), exact[0], shared["t"])
    if method == "linear":
        total = sum(
            (w * x for w, x in zip(weights, exact, strict=True)), torch.zeros_like(exact[0])
        )
        return total / _sum_or_one(weights) if shared["normalize"] else total
    origin = _given(base)
    deltas = [tensor - origin for tensor in exact]
    if method == "task_arithmetic":
        total = _weighted_sum(weights, deltas)
        total = total / _sum_or_one(weights) if shared["normalize"] else total
        return origin + shared["lambda"] * total
    if method == "ties":
        masks = [_largest(d, density) for d, density in zip(deltas, densities, strict=True)]
    if method in ("breadcrumbs", "breadcrumbs_ties"):
        rows = zip(deltas, densities, gammas, strict=True)
        masks = [_between(delta, density, gamma) for delta, density, gamma in rows]
    if masks is None:
        raise TypeError(f"{method} needs masks")
    trimmed = []
    for delta, mask, density in zip(deltas, masks, densities, strict=True):
        kept = delta * mask
        if shared["rescale"] and density < 1:
            before, after = delta.abs().sum(), kept.abs().sum()
            kept = kept if before < 1e-7 or after < 1e-7 else kept * (before / after)
        trimmed.append(kept)
    if method in ("dare_linear", "breadcrumbs", "della_linear"):
        total = _weighted_sum(weights, trimmed)
        total = total / _sum_or_one(weights) if shared["normalize"] else total
        return origin + shared["lambda"] * total
    row = torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * origin.ndim)
    weighted = torch.stack(trimmed) * row
    positive = weighted.sum(0) >= 0
    agrees = torch.where(positive, weighted > 0, weighted < 0)
    total = (weighted * agrees).sum(0)
    if shared["normalize"]:
        divisor, size = (row * agrees).sum(0), (row.abs() * agrees).sum(0)
        total = total / torch.where(divisor.abs() <= CANCEL_SHARE * size, 1.0, divisor)
    return origin + shared["lambda"] * total


def _slerp(start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    lengths = [float(x.norm()) for x in (start, end)]
    a, b = (
        x / length if length > 1e-8 else x for x, length in zip((start, end), lengths, strict=True)
    )
    cosine = (a * b).sum().clamp(-1, 1)
    if abs(cosine) > 0.9995:
        return (1 - t) * start + t * end
    angle = torch.acos(cosine)
    result: torch.Tensor = (
        torch.sin((1 - t) * angle) * start + torch.sin(t * angle) * end
    ) / torch.sin(angle)
    return result


def _largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    count = delta.numel()
    if density >= 1 or count == 0:
        return torch.ones_like(delta)
    mask = torch.zeros(count, dtype=delta.dtype)
    if density > 0:
        order = torch.argsort(delta.abs().reshape(-1), descending=True, stable=True)
        mask[order[: max(1, int(density * count))]] = 1
    return mask.reshape(delta.shape)


def _between(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """What breadcrumbs keeps: below the outliers, above the smallest."""
    count = delta.numel()
    if density >= 1:
        return torch.ones_like(delta)
    keep, outliers = int(density * count), int(gamma * count)
    order = torch.argsort(delta.abs().reshape(-1), descending=True, stable=True)
    start = min(outliers, count - keep)
    mask = torch.zeros(count, dtype=delta.dtype)
    mask[order[start : start + keep]] = 1
    return mask.reshape(delta.shape)


def _weighted_sum(weights: Sequence[float], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(tensors[0])
    for weight, tensor in zip(weights, tensors, strict=True):
        total += weight * tensor
    return total


def _sum_or_one(weights: Sequence[float]) -> float:
    total = sum(weights)
    return 1.0 if abs(total) <= CANCEL_SHARE * sum(map(abs, weights)) else total


def _given(base: torch.Tensor | None) -> torch.Tensor:
    if base is None:
        raise TypeError("this method needs a base")
    return base.double()
