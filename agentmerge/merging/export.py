"""Writes a merge to disk as an ordinary Hugging Face checkpoint, with bounded memory.

It uses the kernels and the plan that the search uses, so the bits are the ones that were scored;
it only reads the parents from their files, one tensor at a time, and writes each result as it
appears. What is outside the text model is the first parent's, byte for byte. It knows nothing of
runs, tasks or scores: the model card's text is given to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agentmerge.errors import UserError
from agentmerge.merging.digests import digest
from agentmerge.merging.family import merged_tensor
from agentmerge.merging.plan import MergePlan, TensorPlan, plan
from agentmerge.merging.weights import ParentFiles
from agentmerge.parents.chat_templates import recipe_template
from agentmerge.parents.depth import at_layers
from agentmerge.parents.headers import read_config, read_headers
from agentmerge.parents.layout import read_layout
from agentmerge.parents.writing import (
    SHARD_SIZE_BYTES,
    Entry,
    copy_side_files,
    directory_at_once,
    entry_of,
    refuse_full_disk,
    stored_tensor,
    write_json,
    write_weights,
)
from agentmerge.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. ``digest`` is ``parents.digest`` of the merged tensors."""

    path: Path
    digest: str
    tensors: int
    size_bytes: int


def export_checkpoint(
    recipe: Recipe,
    paths: Mapping[str, Path],
    out_dir: Path,
    *,
    template_model: str,
    base: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    shard_size_bytes: int = SHARD_SIZE_BYTES,
    card: str | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Exported:
    """Write ``recipe``'s merge to ``out_dir``, which appears whole or not at all.

    The weights are, bit for bit, what a ``Family`` of the same ``paths``, ``dtype`` and ``device``
    merges. Memory: one tensor of each parent and the merged one, whatever the models' size.

    paths: the family's model names -> local directories, as the search had them.
    template_model: whose config, tokenizer, chat template and generation config go with it.
    card: the text of README.md; by default a few lines that say what this is.
    overwrite: in place of a directory that is there, which goes once this one is written.
    finish: told the folder with all that is written, before it appears.

    Raises:
        UserError: ``out_dir`` holds something, or cannot be written.
        ParentError: the parents cannot be merged.
        RunFailed: a parent's file was removed or changed meanwhile.
        CandidateFailed: the recipe is refused, or the merge is not finite.
    """
    out_dir = out_dir.expanduser().absolute()
    if template_model not in paths:
        raise UserError(f"template model {template_model!r} is not one of {', '.join(paths)}")
    template_text = recipe_template(recipe.chat_template)
    layout = read_layout(paths, base)
    canonical = recipe.canonical(layout.num_layers)
    merge_plan = plan(canonical, layout, dtype=dtype)
    entries = [_entry(item) for item in merge_plan.tensors]
    first = paths[layout.first]
    headers = read_headers(first) if layout.carried else {}
    entries += [entry_of(name, headers[name]) for name in layout.carried]
    size_bytes = sum(entry.size_bytes for entry in entries)
    # A wrapper around the text model is the first parent's, and so is its config.
    config = read_config(first if layout.carried else paths[template_model])
    if merge_plan.layers is not None:
        config = at_layers(config, merge_plan.layers)
    config = _config_of(config, merge_plan, layout.tied)
    if dtype is not None:
        canonical = canonical.written_at(dtype)  # the recipe as written says all there is
    with directory_at_once(out_dir, overwrite=overwrite) as scratch:
        refuse_full_disk(scratch, size_bytes, out_dir)
        if layout.carried:
            copy_side_files(first, scratch)
        copy_side_files(paths[template_model], scratch)
        if template_text is not None:
            _write(scratch / "chat_template.jinja", template_text)
        _write(scratch / "mergekit_config.yml", canonical.to_yaml())
        _write(
            scratch / "README.md", default_card(out_dir.name, canonical) if card is None else card
        )
        write_json(scratch / "config.json", config)
        plans = merge_plan.by_name
        source = ParentFiles({name: paths[name] for name in recipe.models}, device)

        def tensor_of(name: str) -> torch.Tensor:
            if name not in plans:
                return stored_tensor(headers[name], name)
            return merged_tensor(plans[name], merge_plan.merge_seed, source)

        written = write_weights(scratch, entries, tensor_of, shard_size_bytes)
        fingerprint = digest((name, tensor) for name, tensor in written if name in plans)
        source.verify()
        finish(scratch)
    return Exported(out_dir, fingerprint, len(merge_plan.tensors), size_bytes)


def default_card(title: str, recipe: Recipe) -> str:
    """The README of a merge that has no other: what it is, and its recipe."""
    return (
        "---\nlibrary_name: transformers\ntags:\n- mergekit\n- merge\n---\n"
        f"# {title}\n\nA merge by {recipe.merge_method}, made with agentmerge:\n\n"
        f"```yaml\n{recipe.to_yaml()}```\n"
    )


def _config_of(config: Mapping[str, Any], merge_plan: MergePlan, tied: bool) -> dict[str, Any]:
    """The template's config, with the merge's own dtype and tying."""
    dtype = _main_dtype(merge_plan.tensors)
    result = _with_dtype(config, dtype)
    if not {"dtype", "torch_dtype"} & result.keys():
        result["torch_dtype"] = dtype
    inner = result.get("text_config")
    if "tie_word_embeddings" not in {**(inner if isinstance(inner, Mapping) else {}), **result}:
        result["tie_word_embeddings"] = tied
    return result


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    result = dict(config)
    for key in {"dtype", "torch_dtype"} & result.keys():
        result[key] = dtype
    if isinstance(config.get("text_config"), Mapping):
        result["text_config"] = _with_dtype(config["text_config"], dtype)
    return result


def _main_dtype(items: Sequence[TensorPlan]) -> str:
    sizes: dict[str, int] = {}
    for item in items:
        sizes[item.dtype] = sizes.get(item.dtype, 0) + math.prod(item.spec.shape)
    return max(sizes, key=lambda name: sizes[name])


def _entry(item: TensorPlan) -> Entry:
    width = {"float64": 8, "float32": 4}.get(item.dtype, 2)
    return Entry(item.spec.name, item.spec.shape, item.dtype, math.prod(item.spec.shape) * width)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
