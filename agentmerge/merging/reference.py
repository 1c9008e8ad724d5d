"""Oracles: mergekit's own merge, and each method's formula in float64.

What is made here is compared with, never searched with. mergekit is imported only when asked for,
and never its ``evo`` part.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmerge.errors import CandidateFailed
from agentmerge.merging.export import default_card
from agentmerge.parents.chat_templates import recipe_template
from agentmerge.parents.writing import copy_side_files, directory_at_once
from agentmerge.recipe import CANCEL_SHARE, Recipe


def mergekit_merge(
    recipe: Recipe,
    paths: Mapping[str, Path],
    out_dir: Path,
    *,
    template_model: str,
    card: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Merge by mergekit into ``out_dir``, as its command line would.

    Its DARE and DELLA draw masks of their own from ``merge_seed``, not ours, and it rounds after
    every operation, so its weights differ from ours in the last bits (theirs: in what is dropped).

    paths: the recipe's model names -> local directories.
    template_model, card, overwrite, finish: as in ``export_checkpoint`` (mergekit would take the
        tokenizer of the base).

    Raises:
        UserError: ``out_dir`` holds something, or cannot be written.
        CandidateFailed: mergekit could not merge, with its reason.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge

    out_dir = out_dir.expanduser().absolute()
    places = {name: str(Path(path).absolute()) for name, path in paths.items()}
    body = _relocated(recipe.to_dict(), places)
    seed = body.pop("merge_seed", None)
    body.pop("tokenizer_source", None)  # what comes here is aligned, and mergekit would cut rows
    template = recipe_template(body.pop("chat_template", None))
    options = MergeOptions(
        random_seed=seed,
        quiet=True,
        copy_tokenizer=False,
        write_model_card=False,
        trust_remote_code=trust_remote_code,
    )
    with directory_at_once(out_dir, overwrite=overwrite) as scratch, _generators_kept():
        try:
            config = MergeConfiguration.model_validate(body)
            run_merge(config, str(scratch), options=options)
        except Exception as error:  # mergekit raises plain RuntimeError and ValueError
            raise CandidateFailed(f"mergekit could not merge this recipe: {error}") from error
        finally:
            LoaderCache().flush_all()
            LoaderCache().loaders.clear()
        copy_side_files(paths[template_model], scratch)
        if template is not None:
            (scratch / "chat_template.jinja").write_text(template, encoding="utf-8")
        (scratch / "mergekit_config.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        card = default_card(out_dir.name, recipe) if card is None else card
        (scratch / "README.md").write_text(card, encoding="utf-8")
        finish(scratch)


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


def _relocated(value: Any, places: Mapping[str, str]) -> Any:
    """The recipe with every model named by its absolute path."""
    if isinstance(value, dict):
        return {
            key: places.get(item, item)
            if key in ("model", "base_model", "tokenizer_source") and isinstance(item, str)
            else _relocated(item, places)
            for key, item in value.items()
        }
    return [_relocated(item, places) for item in value] if isinstance(value, list) else value


@contextmanager
def _generators_kept() -> Iterator[None]:
    """mergekit seeds every global generator; ours go on as if it had not."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
