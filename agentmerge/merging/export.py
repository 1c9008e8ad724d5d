"""Writes a merge to disk as an ordinary Hugging Face checkpoint, with bounded memory.

It uses the kernels and the plan that the search uses, so the bits are the ones that were scored;
it only reads the parents from their files, one tensor at a time, and writes each result as it
appears. It knows nothing of runs, tasks or scores: the model card's text is given to it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from agentmerge.errors import UserError
from agentmerge.merging.digests import digest
from agentmerge.merging.headers import (
    DTYPES,
    read_config,
    text_config,
)
from agentmerge.merging.parents import merged_tensor
from agentmerge.merging.plan import MergePlan, TensorPlan, plan, read_layout
from agentmerge.merging.weights import ParentFiles
from agentmerge.recipe import Recipe

SHARD_SIZE_BYTES = 2_000_000_000

#: Copied from the template model where they are there; patterns of names.
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
)
_STORED = {name: code for code, name in DTYPES.items()}


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
) -> Exported:
    """Write ``recipe``'s merge to ``out_dir``, which appears whole or not at all.

    The weights are, bit for bit, what a ``Family`` of the same ``paths``, ``dtype`` and ``device``
    merges. Memory: one tensor of each parent and the merged one, whatever the models' size.

    paths: the family's model names -> local directories, as the search had them.
    template_model: whose config, tokenizer, chat template and generation config go with it.
    card: the text of README.md; by default a few lines that say what this is.

    Raises:
        UserError: ``out_dir`` holds something, or cannot be written.
        ParentError: the parents cannot be merged.
        RunFailed: a parent's file was removed or changed meanwhile.
        CandidateFailed: the recipe is refused, or the merge is not finite.
    """
    out_dir = out_dir.expanduser().absolute()
    if template_model not in paths:
        raise UserError(f"template model {template_model!r} is not one of {', '.join(paths)}")
    template_text = _template_text(recipe)
    layout = read_layout(paths, base)
    canonical = recipe.canonical(layout.num_layers)
    merge_plan = plan(canonical, layout, dtype=dtype)
    shards = _shards(merge_plan.tensors, shard_size_bytes)
    size_bytes = sum(map(_size_bytes, merge_plan.tensors))
    config = _config_of(read_config(paths[template_model]), merge_plan, layout.tied)
    if dtype is not None and not (canonical.out_dtype or canonical.dtype):
        canonical = replace(canonical, out_dtype=dtype)  # the recipe as written says all there is
    with directory_at_once(out_dir) as scratch:
        free_bytes = shutil.disk_usage(scratch).free
        if free_bytes < size_bytes:
            raise UserError(
                f"{out_dir} needs {size_bytes / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free"
            )
        copy_side_files(paths[template_model], scratch)
        if template_text is not None:
            _write(scratch / "chat_template.jinja", template_text)
        _write(scratch / "mergekit_config.yml", canonical.to_yaml())
        _write(
            scratch / "README.md", default_card(out_dir.name, canonical) if card is None else card
        )
        _write_json(scratch / "config.json", config)
        source = ParentFiles({name: paths[name] for name in recipe.models}, device)
        fingerprint = digest(_written(scratch, shards, merge_plan.merge_seed, source))
        source.verify()
        _write_index(scratch, shards)
    return Exported(out_dir, fingerprint, len(merge_plan.tensors), size_bytes)


def _written(
    directory: Path,
    shards: Sequence[Sequence[TensorPlan]],
    merge_seed: int | None,
    source: ParentFiles,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge and write every shard; yields each tensor after it is written."""
    for file, items in zip(_shard_names(len(shards)), shards, strict=True):
        with (directory / file).open("wb") as stream:
            stream.write(_header(items))
            for item in items:
                tensor = merged_tensor(item, merge_seed, source)
                stream.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
                yield item.spec.name, tensor


def _header(items: Sequence[TensorPlan]) -> bytes:
    """Safetensors' header for tensors that follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for item in items:
        end = at + _size_bytes(item)
        entries[item.spec.name] = {
            "dtype": _STORED[item.dtype],
            "shape": list(item.spec.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shards(items: Sequence[TensorPlan], limit_bytes: int) -> list[list[TensorPlan]]:
    """Tensors in order, in files of at most ``limit_bytes`` (a larger tensor has its own)."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for item in items:
        size += _size_bytes(item)
        if shards[-1] and size > limit_bytes:
            shards.append([])
            size = _size_bytes(item)
        shards[-1].append(item)
    # Wide dtypes first, so that every tensor is aligned, as the format's own library does.
    return [sorted(shard, key=lambda item: -_itemsize(item.dtype)) for shard in shards]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _write_index(directory: Path, shards: Sequence[Sequence[TensorPlan]]) -> None:
    if len(shards) == 1:
        return
    names = _shard_names(len(shards))
    where = {
        item.spec.name: file for file, items in zip(names, shards, strict=True) for item in items
    }
    size = sum(_size_bytes(item) for items in shards for item in items)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    _write_json(directory / "model.safetensors.index.json", index)


def copy_side_files(template: Path, directory: Path) -> None:
    """Tokenizer, chat template, generation config and, where the config names any, Python files."""
    patterns = [*_COPIED, *(["*.py"] if "auto_map" in read_config(template) else [])]
    for file in sorted({file for pattern in patterns for file in template.glob(pattern)}):
        if file.is_dir():
            shutil.copytree(file, directory / file.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, directory / file.name)


def default_card(title: str, recipe: Recipe) -> str:
    """The README of a merge that has no other: what it is, and its recipe."""
    return (
        "---\nlibrary_name: transformers\ntags:\n- mergekit\n- merge\n---\n"
        f"# {title}\n\nA merge by {recipe.merge_method}, made with agentmerge:\n\n"
        f"```yaml\n{recipe.to_yaml()}```\n"
    )


def _template_text(recipe: Recipe) -> str | None:
    """The chat template that the recipe itself gives, if it does."""
    asked = recipe.chat_template
    if asked in (None, "", "auto"):
        return None
    if "{" not in str(asked):
        raise UserError(
            f"chat_template {asked!r} is a name, and only mergekit has the list of names; write "
            "the template's text, or leave it out to keep the parent's own"
        )
    return asked


def _config_of(config: Mapping[str, Any], merge_plan: MergePlan, tied: bool) -> dict[str, Any]:
    """The template's config, with the merge's own dtype and tying."""
    dtype = _main_dtype(merge_plan.tensors)
    result = _with_dtype(config, dtype)
    if not {"dtype", "torch_dtype"} & result.keys():
        result["torch_dtype"] = dtype
    if "tie_word_embeddings" not in {**text_config(result), **result}:
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


def _size_bytes(item: TensorPlan) -> int:
    return math.prod(item.spec.shape) * _itemsize(item.dtype)


def _itemsize(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def _write_json(file: Path, body: Mapping[str, Any]) -> None:
    _write(file, json.dumps(body, indent=2, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


@contextmanager
def directory_at_once(target: Path) -> Iterator[Path]:
    """A scratch directory beside ``target`` that becomes ``target`` when all went well.

    Raises:
        UserError: ``target`` holds something, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is already there; name a new or an empty directory")
    scratch = target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    try:
        yield scratch
        os.replace(scratch, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
