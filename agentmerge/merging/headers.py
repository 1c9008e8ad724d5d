"""What a model directory says about itself: its config, its safetensors headers, its fingerprint.

It knows the files of one model, and finds the directory from a name. It reads no weights, except
to hash them or to compare two tensors' bytes; it knows no torch, and nothing of other models.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agentmerge.errors import ParentError

#: Safetensors' names of dtypes -> torch's; others (integers, 8-bit floats) keep their own.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_CHUNK = 1 << 22
_MAX_HEADER = 100_000_000  # the limit of the format's own library
_CACHED_FINGERPRINTS = 2000
_LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file; its bytes are ``file[start:end]``."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    end: int


def read_headers(directory: Path) -> dict[str, TensorHeader]:
    """Every tensor of a model, single file or sharded, from the headers alone.

    Raises:
        ParentError: no safetensors files, a shard that is missing, or a file that is broken.
    """
    headers: dict[str, TensorHeader] = {}
    for file in safetensors_files(directory):
        for name, header in _file_headers(file).items():
            if name in headers:
                raise ParentError(
                    f"{directory}: tensor {name!r} is in {headers[name].file.name} and in "
                    f"{file.name}; remove one of the files"
                )
            headers[name] = header
    for name, shard in _weight_map(directory).items():
        if name not in headers or headers[name].file.name != shard:
            raise ParentError(
                f"{directory}: the index says tensor {name!r} is in {shard}, and it is not; "
                "download the model again"
            )
    return headers


def safetensors_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, by name.

    Raises:
        ParentError: there are none, with what is there instead.
    """
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    shards = sorted(set(_weight_map(directory).values()))
    if shards:
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise ParentError(
                f"{directory}: {len(missing)} of {len(shards)} shards are missing, the first is "
                f"{missing[0]}; download the model again"
            )
        return [directory / shard for shard in shards]
    if (directory / "adapter_config.json").is_file():
        raise ParentError(
            f"{directory} is a LoRA adapter, not a whole model; merge it into its base first "
            "(peft's merge_and_unload) and name the result"
        )
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise ParentError(
            f"{directory} has {len(files)} safetensors files and no model.safetensors.index.json "
            "to say how they belong together"
        )
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise ParentError(
            f"{directory} has only pickled weights (.bin or .pth), which can run code when read; "
            "convert them to safetensors (save_pretrained does)"
        )
    raise ParentError(f"{directory} has no safetensors files; name a whole Hugging Face model")


def read_config(directory: Path) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        ParentError: there is none, or it is not JSON.
    """
    return _read_json(directory / "config.json", f"{directory} has no config.json; name a model")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part that describes the text model: ``text_config`` where a wrapper has one."""
    inner = config.get("text_config")
    return dict(inner) if isinstance(inner, Mapping) else dict(config)


def num_layers(config: Mapping[str, Any]) -> int:
    """How many layers the text model has.

    Raises:
        ParentError: the config does not say.
    """
    text = text_config(config)
    for key in _LAYER_COUNT_KEYS:
        if isinstance(text.get(key), int):
            return int(text[key])
    raise ParentError(
        f"config.json has none of {', '.join(_LAYER_COUNT_KEYS)}; the number of layers is unknown"
    )


def same_bytes(first: TensorHeader, second: TensorHeader) -> bool:
    """Whether two tensors are equal bit for bit; stops reading at the first difference."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    pairs = zip(_chunks(first), _chunks(second), strict=True)
    return all(a == b for a, b in pairs)


def content_fingerprint(directory: Path) -> str:
    """SHA-256 over every tensor's name, shape, dtype and bytes, in order of names; 64 hex digits.

    The same weights have the same fingerprint wherever they lie and however they are sharded. It
    is remembered by the files' paths, sizes and times in the cache directory, where that can be
    written.

    Raises:
        ParentError: the model cannot be read.
    """
    files = [file.resolve() for file in safetensors_files(directory)]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    known = _cached_fingerprints()
    if key in known:
        return known[key]
    tensors = read_headers(directory)
    lines = {}
    for name, header in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        digest = hashlib.sha256()
        for chunk in _chunks(header):
            digest.update(chunk)
        lines[name] = f"{name} {header.dtype} {list(header.shape)} {digest.hexdigest()}\n"
    whole = "".join(lines[name] for name in sorted(lines))
    fingerprint = hashlib.sha256(whole.encode()).hexdigest()
    # A file written in the last moments could change again within the clock's resolution.
    if max(mtime for _, _, mtime in stats) < time.time_ns() - 2_000_000_000:
        _remember_fingerprint(key, fingerprint)
    return fingerprint


def cache_dir() -> Path:
    """``$AGENTMERGE_CACHE``, or ``~/.cache/agentmerge``."""
    return Path(os.environ.get("AGENTMERGE_CACHE") or Path.home() / ".cache" / "agentmerge")


def resolve_model(name: str, *, trust_remote_code: bool = False) -> Path:
    """The local directory of a model: a path, or a hub id that is cached or can be downloaded.

    trust_remote_code: also fetch the model's own Python files.

    Raises:
        ParentError: it cannot be found, or is not a whole safetensors model.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        directory = local.absolute()
    elif "+" in name:
        raise ParentError(
            f"{name!r} names a LoRA adapter (model+adapter), which is not supported yet; merge the "
            "adapter into its model (peft's merge_and_unload) and name the result"
        )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ParentError(f"{name!r} is not a directory; name a model's directory or a hub id")
    else:
        directory = _from_hub(name, trust_remote_code)
    read_config(directory)
    safetensors_files(directory)
    return directory


def _from_hub(name: str, trust_remote_code: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*_DOWNLOADED, *(["*.py"] if trust_remote_code else [])]
    ignored = ["original/*", "consolidated*"]  # a second copy of the weights in some repositories
    fetch = partial(
        huggingface_hub.snapshot_download, name, allow_patterns=patterns, ignore_patterns=ignored
    )
    try:
        try:
            cached = Path(fetch(local_files_only=True))
            safetensors_files(cached)
            return cached
        except (errors.LocalEntryNotFoundError, ParentError):
            return Path(fetch())
    except errors.HFValidationError:
        why = "is neither a directory nor a hub id; name a model's directory or a hub id"
    except errors.GatedRepoError:
        why = "is gated on the hub; ask for access there and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "is neither a directory nor a model on the hub (if it is private, set HF_TOKEN)"
    except Exception as error:  # the hub client's transport, and so its errors, vary by version
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        why = (
            "is not a directory, is not in the hub's local cache, and cannot be downloaded: "
            f"{reason}"
        )
    raise ParentError(f"{name!r} {why}")


def _weight_map(directory: Path) -> dict[str, str]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file() or (directory / "model.safetensors").is_file():
        return {}
    shards = _read_json(index, "").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ParentError(f"{index} has no 'weight_map'; download the model again")
    for shard in shards.values():
        if Path(shard).name != shard:
            raise ParentError(f"{index} names {shard!r}, which is not a file beside it")
    return shards


def _file_headers(file: Path) -> dict[str, TensorHeader]:
    broken = f"{file} is not a whole safetensors file; download the model again"
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= min(size - 8, _MAX_HEADER):
                raise ParentError(broken)
            raw = json.loads(stream.read(length))
        headers = {
            name: TensorHeader(
                tuple(entry["shape"]),
                DTYPES.get(entry["dtype"], entry["dtype"]),
                file,
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in raw.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise ParentError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ParentError(broken) from None
    if any(not 8 <= h.start <= h.end <= size for h in headers.values()):
        raise ParentError(broken)
    return headers


def _chunks(header: TensorHeader) -> Iterator[bytes]:
    left = header.end - header.start
    with header.file.open("rb") as stream:
        stream.seek(header.start)
        while left:
            chunk = stream.read(min(left, _CHUNK))
            if not chunk:
                raise ParentError(f"{header.file} ended while it was read")
            left -= len(chunk)
            yield chunk


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParentError(missing or f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise ParentError(f"{file} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ParentError(f"{file} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _cached_fingerprints() -> dict[str, str]:
    try:
        raw = json.loads((cache_dir() / "fingerprints.json").read_text())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _remember_fingerprint(key: str, fingerprint: str) -> None:
    known = {**_cached_fingerprints(), key: fingerprint}
    newest = dict(list(known.items())[-_CACHED_FINGERPRINTS:])
    directory = cache_dir()
    with suppress(OSError):  # where it cannot be remembered, the next call reads the weights again
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as stream:
            json.dump(newest, stream)
        os.replace(stream.name, directory / "fingerprints.json")
