"""Writes a checkpoint's files: safetensors shards tensor by tensor, and what belongs beside them.

Memory: one tensor. It knows the layout of the files; it knows no recipes and no merging.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from agentmerge.errors import ParentError, UserError
from agentmerge.parents.headers import COPIED, DTYPES, TensorHeader, read_config
from agentmerge.system.bounded import refuse_odd_file
from agentmerge.system.temporary import TemporaryFolder, swap_in

if TYPE_CHECKING:
    import torch

SHARD_SIZE_BYTES = 2_000_000_000

_STORED = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written; ``dtype`` as ``TensorHeader`` has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int


def entry_of(name: str, header: TensorHeader) -> Entry:
    """A tensor as a file has it, to be written under ``name``."""
    return Entry(name, header.shape, header.dtype, header.end - header.start)


def stored_tensor(header: TensorHeader, name: str) -> torch.Tensor:
    """A tensor of a file, of any dtype. name: in that file."""
    with safe_open(header.file, framework="pt") as stream:
        tensor: torch.Tensor = stream.get_tensor(name)
    return tensor


def write_weights(
    directory: Path,
    entries: Sequence[Entry],
    tensor_of: Callable[[str], torch.Tensor],
    shard_size_bytes: int = SHARD_SIZE_BYTES,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Write ``entries`` in order, with an index where they need several files; yields each tensor
    after it is written. Nothing is whole before the iterator has ended."""
    import torch

    shards = _shards(entries, shard_size_bytes)
    names = _shard_names(len(shards))
    for file, part in zip(names, shards, strict=True):
        with (directory / file).open("wb") as stream:
            stream.write(_header(part))
            for entry in part:
                tensor = tensor_of(entry.name)
                flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                if flat.size != entry.size_bytes:
                    raise ValueError(f"{entry.name} has {flat.size} bytes, not {entry.size_bytes}")
                stream.write(flat.data)
                yield entry.name, tensor
    if len(shards) > 1:
        where = {e.name: file for file, part in zip(names, shards, strict=True) for e in part}
        size = sum(entry.size_bytes for entry in entries)
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_json(directory / "model.safetensors.index.json", index)


def copy_side_files(template: Path, directory: Path) -> None:
    """Tokenizer, chat template, generation config and, where the config names any, Python files.

    Folders are not copied: a link in one may lead to the whole disk.

    Raises:
        ParentError: one of them is a pipe or a device, which would be copied for ever.
    """
    patterns = [*COPIED, *(["*.py"] if "auto_map" in read_config(template) else [])]
    for file in sorted({file for pattern in patterns for file in template.glob(pattern)}):
        if not file.is_dir():
            refuse_odd_file(file, ParentError)
            copy = directory / file.relative_to(template)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def refuse_full_disk(directory: Path, size_bytes: int, target: Path) -> None:
    """Raises UserError where ``size_bytes`` do not fit beside ``directory``."""
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < size_bytes:
        raise UserError(
            f"{target} needs {size_bytes / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free"
        )


def write_json(file: Path, body: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def directory_at_once(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch directory beside ``target`` that becomes ``target`` when all went well.

    overwrite: in place of the directory that is there, which goes once this one is written.

    Raises:
        UserError: ``target`` holds something, or cannot be written.
    """
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken and not overwrite:
        raise UserError(f"{target} is already there; name a new or an empty directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryFolder(f".{target.name}", target.parent, private=False)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None
    try:
        yield scratch.path
        swap_in(scratch.path, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    finally:
        scratch.close()


def _header(entries: Sequence[Entry]) -> bytes:
    """Safetensors' header for tensors that follow in this order."""
    body: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        end = at + entry.size_bytes
        body[entry.name] = {
            "dtype": _STORED.get(entry.dtype, entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _shards(entries: Sequence[Entry], limit_bytes: int) -> list[list[Entry]]:
    """Tensors in order, in files of at most ``limit_bytes`` (a larger tensor has its own)."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        size += entry.size_bytes
        if shards[-1] and size > limit_bytes:
            shards.append([])
            size = entry.size_bytes
        shards[-1].append(entry)
    # Wide dtypes first, so that every tensor is aligned, as the format's own library does.
    return [sorted(shard, key=lambda entry: -_itemsize(entry.dtype)) for shard in shards]


def _itemsize(dtype: str) -> int:
    """Bytes an element; 64-bit integers are among what a wrapper carries along."""
    known = {"float64": 8, "I64": 8, "U64": 8, "float32": 4, "I32": 4, "U32": 4}
    return known.get(dtype, 1 if dtype.startswith(("F8", "BOOL")) or dtype in ("I8", "U8") else 2)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
