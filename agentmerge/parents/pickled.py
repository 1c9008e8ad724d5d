"""Pickled checkpoints (``pytorch_model.bin``), for users who allow them: shapes, and a conversion.

Only tensors are unpickled (``weights_only``); a file that asks for more is refused. It knows files
of one model, and nothing of other models.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from agentmerge.errors import ParentError
from agentmerge.parents.headers import TensorHeader
from agentmerge.parents.writing import Entry, refuse_full_disk, write_weights


def pickled_headers(files: Sequence[Path]) -> dict[str, TensorHeader]:
    """Every tensor, without reading weights; its bytes have no place of their own in the file.

    Raises:
        ParentError: a file that cannot be read, or that holds more than tensors.
    """
    return {
        name: TensorHeader(tuple(tensor.shape), _dtype(tensor), file, 0, _size_bytes(tensor))
        for file in files
        for name, tensor in _load(file, "meta")
    }


def convert(files: Sequence[Path], out_dir: Path) -> None:
    """Write the same weights as safetensors into ``out_dir``, which is there.

    Memory: one of the files at a time, mapped.
    """
    headers = pickled_headers(files)
    entries = [Entry(name, h.shape, h.dtype, h.end) for name, h in headers.items()]
    refuse_full_disk(out_dir, sum(entry.size_bytes for entry in entries), out_dir.parent)
    loaded: dict[Path, dict[str, torch.Tensor]] = {}

    def tensor_of(name: str) -> torch.Tensor:
        file = headers[name].file
        if file not in loaded:
            loaded.clear()
            loaded[file] = dict(_load(file, "cpu"))
        return loaded[file][name]

    for _ in write_weights(out_dir, entries, tensor_of):
        pass


def _load(file: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        found: Any = torch.load(file, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ParentError(
            f"{file} holds more than tensors, and would run code when read; convert it yourself"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ParentError(f"{file} cannot be read: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise ParentError(f"{file} is no table of tensors; name a whole Hugging Face model")
    yield from found.items()


def _dtype(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return {"int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8", "bool": "BOOL"}.get(
        name, name
    )


def _size_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
