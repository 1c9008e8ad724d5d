"""What a model directory says about itself: its config, its safetensors headers, its fingerprint.

It knows the files of one model in one directory. It reads no weights, except to hash them or to
compare two tensors' bytes; it knows no torch, and nothing of other models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmerge.errors import ParentError, RunFailed
from agentmerge.parents.configs import class_config, live_name, rope_of
from agentmerge.system import bounded
from agentmerge.system.temporary import cache_dir, is_believed, write_at_once

#: Safetensors' names of dtypes -> torch's; others (integers, 8-bit floats) keep their own.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_CHUNK = 1 << 22
_MAX_HEADER = 100_000_000  # the limit of the format's own library
_MOST_TENSORS = 300_000  # the largest mixtures of experts have 100,000
#: Bits of an element, by the format's names of dtypes.
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
#: What transformers takes for JSON objects where they are.
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "adapter_config.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
#: What is read of a model's folder, and how many bytes such a file may have.
_SIDE_FILES = dict.fromkeys(("*.json", "*.model", "*.txt", "*.tiktoken"), bounded.MOST_JSON) | {
    "*.jinja": bounded.MOST_TEXT,
    "*.safetensors": None,
    "*.bin": None,
}
#: Copied from a model to what is made of it, where they are there.
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.tiktoken", "spiece.model", "sentencepiece*.model", "chat_template*",
    "additional_chat_templates/*.jinja", "generation_config.json", "*processor_config.json",
)  # fmt: skip
#: What a config says of a model's sizes, and how much it may say: a class makes lists of a layer's
#: length, and forecasts multiply the others.
_SIZES = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10**4) | (
    dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
         "num_key_value_heads", "max_position_embeddings", "n_embd", "n_head", "n_positions"),
        10**10,
    )
)  # fmt: skip
_CACHED_FINGERPRINTS = 2000
#: Size in bytes, time of change in ns, time of the entry's change in ns, inode.
Stamp = tuple[int, int, int, int]
#: The file by which a checkpoint says that it was made from others.
MADE = "agentmerge_made_from.json"
#: Each user's own: one cache directory may serve several.
_FINGERPRINTS = f"fingerprints-{os.geteuid()}.json"
_SHA256 = re.compile("[0-9a-f]{64}")


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
        for name, header in file_headers(file).items():
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
            f"{directory} is an adapter, not a whole model; name it with its model, as "
            f"MODEL+{directory}"
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
            f"{directory} has only pickled weights (.bin or .pth), not safetensors; convert them "
            "(save_pretrained does), or set worker.allow_pickle: true to have pytorch_model.bin "
            "converted"
        )
    raise ParentError(f"{directory} has no safetensors files; name a whole Hugging Face model")


def read_config(directory: Path) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        ParentError: there is none, or it is not JSON.
    """
    adapter = directory / "adapter_config.json"
    if adapter.is_file() and not (directory / "config.json").exists():
        trained = read_json(adapter).get("base_model_name_or_path") or "MODEL"
        raise ParentError(
            f"{directory} is an adapter without its model; name both, as in {trained}+{directory}"
        )
    file = directory / "config.json"
    config = read_json(file, f"{directory} has no config.json; name a model")
    for part in (config, config.get("text_config")):
        for key, most in _SIZES.items():
            size = part.get(key) if isinstance(part, dict) else None
            odd = isinstance(size, str | dict)
            if isinstance(size, int | float):
                odd = not 0 <= size <= most or size != int(size)  # NaN is odd, too
            if odd:
                raise ParentError(
                    f"{file}: {key} is {str(size)[:80]}, which no model has; correct it"
                )
    try:  # what everybody else takes from it
        rope_of(text_config(config))
        live_name(config, "model.norm.weight")
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise ParentError(
            f"{file} has a value that is not what its key says ({error}); correct it"
        ) from None
    return config


def refuse_odd_files(directory: Path) -> None:
    """Raises ParentError where transformers, given this folder, would read something that is no
    file, or no JSON object, or larger than any of its kind; or where we would copy no file, or a
    link leads to none: transformers then goes on as if there were no such file."""
    for pattern, most in (dict.fromkeys(COPIED) | _SIDE_FILES).items():
        for file in sorted(directory.glob(pattern)):
            if not file.exists():
                raise ParentError(
                    f"{file} is a link to {os.readlink(file)}, which is not there; put that file "
                    "there, or remove the link"
                )
            if pattern in _SIDE_FILES or not file.is_dir():
                bounded.refuse_odd_file(file, ParentError, most=most)
    for name in _OBJECTS:
        if (directory / name).exists():
            read_json(directory / name)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the text model, with what the file leaves to its class."""
    return dict(class_config(config).text)


def chat_template(directory: Path) -> str | None:
    """The chat template beside a model or an adapter, in any of the places where it may be.

    Of several, transformers' choice: what is tried out here is what will ask.
    """
    more = directory / "additional_chat_templates"
    for file in (directory / "chat_template.jinja", more / "default.jinja"):
        with suppress(ParentError):
            return bounded.read_text(file, ParentError)
    if any(more.glob("*.jinja")):  # several by name, and none for a chat without tools
        return None
    names = ("tokenizer_config.json", "chat_template.json")  # the latter is of processors
    for file in (directory / name for name in names):
        template = None
        with suppress(ParentError):
            template = read_json(file).get("chat_template")
        if isinstance(template, list):  # several, by name; the last of a name counts
            named = [entry for entry in template if isinstance(entry, dict)]
            template = {str(entry.get("name")): entry.get("template") for entry in named}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template:
            return template
    return None


def num_layers(config: Mapping[str, Any]) -> int:
    """How many layers the text model has.

    Raises:
        ParentError: the config does not say.
    """
    counts = class_config(config).layer_counts
    if not counts:
        raise ParentError(
            "config.json does not say num_hidden_layers, nor does a class of transformers; the "
            "number of layers is unknown"
        )
    return counts[0]


def same_bytes(first: TensorHeader, second: TensorHeader) -> bool:
    """Whether two tensors are equal bit for bit; stops reading at the first difference."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    pairs = zip(_chunks(first), _chunks(second), strict=True)
    return all(a == b for a, b in pairs)


def made_dir() -> Path:
    """Where made checkpoints are."""
    return cache_dir() / "parents"


def content_fingerprint(directory: Path) -> str:
    """SHA-256 over every tensor's name, shape, dtype and bytes, in order of names; 64 hex digits.

    The same weights have the same fingerprint wherever they lie and however they are sharded. It
    is remembered by the files' paths, sizes and times in the cache directory, where that can be
    written. A checkpoint that was made from others (``made.py``) is known by those: what it is
    does not depend on how the machine that made it rounds.

    Raises:
        ParentError: the model cannot be read.
    """
    whole = files_fingerprint(safetensors_files(directory))
    made = made_from(directory)
    if made is None:
        return whole
    if made.get("content") != whole:
        raise ParentError(
            f"{directory} is not what agentmerge wrote there; delete it, and it is made again"
        )
    return str(made["identity"])


def made_from(directory: Path) -> dict[str, Any] | None:
    """What ``made.py`` wrote into a checkpoint that it made for this user: identity, content,
    ingredients."""
    marker = directory / MADE
    # Anywhere else a marker is a file of somebody's model, and may claim to be any other model.
    ours = directory.resolve().parent == made_dir().resolve() and is_believed(directory)
    return read_json(marker) if ours and marker.is_file() else None


def files_fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 over the tensors of some safetensors files, as in ``content_fingerprint``."""
    files = [file.resolve() for file in files]
    key, newest_ns = _stamp(files)
    known = _cached_fingerprints()
    if key in known:
        return known[key]
    tensors = {name: header for file in files for name, header in file_headers(file).items()}
    lines = {}
    for name, header in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        digest = hashlib.sha256()
        for chunk in _chunks(header):
            digest.update(chunk)
        lines[name] = f"{name} {header.dtype} {list(header.shape)} {digest.hexdigest()}\n"
    whole = "".join(lines[name] for name in sorted(lines))
    fingerprint = hashlib.sha256(whole.encode()).hexdigest()
    # A file written in the last moments could change again within the clock's resolution.
    if newest_ns < time.time_ns() - 2_000_000_000:
        _remember_fingerprint(key, fingerprint)
    return fingerprint


def known_fingerprint(directory: Path) -> str | None:
    """``content_fingerprint`` where it is remembered, without reading a weight; else None."""
    key, _ = _stamp([file.resolve() for file in safetensors_files(directory)])
    return _cached_fingerprints().get(key)


def stamp_of(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def stamps_of(directory: Path) -> list[tuple[str, Stamp]]:
    """What tells whether a model's weights and settings are still the files that they are now."""
    settings = (directory / name for name in ("config.json", "generation_config.json"))
    files = [*safetensors_files(directory), *(file for file in settings if file.is_file())]
    return [(str(file), stamp_of(file.stat())) for file in files]


def refuse_replaced(stamps: Iterable[tuple[str, Stamp]]) -> None:
    """Raises RunFailed where a file is gone, or another one than when it was stamped."""
    for name, stamp in stamps:
        try:
            found = stamp_of(Path(name).stat())
        except OSError as error:
            raise RunFailed(
                f"{name} was there when the search began and cannot be read now: "
                f"{error.strerror}; put it back and resume"
            ) from None
        if found != stamp:
            raise RunFailed(
                f"{name} was changed after the search had looked at it, so its merges would not be "
                "of the parents that it began with; put the old file back and resume, or begin "
                "another search"
            )


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes; 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _weight_map(directory: Path) -> dict[str, str]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file() or (directory / "model.safetensors").is_file():
        return {}
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise ParentError(f"{index} has no 'weight_map'; download the model again")
    for shard in shards.values():
        if Path(shard).name != shard:
            raise ParentError(f"{index} names {shard!r}, which is not a file beside it")
    return shards


def file_headers(file: Path) -> dict[str, TensorHeader]:
    """A safetensors file's tensors by name.

    Raises:
        ParentError: it breaks a rule of the format, by which its tensors' bytes follow each other
            without gap or overlap from the header to the end of the file.
    """
    broken = f"{file} is not a whole safetensors file"
    bounded.refuse_odd_file(file, ParentError)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if not 0 < length <= min(size - 8, _MAX_HEADER):
                raise ParentError(
                    f"{file} is not a whole safetensors file; download the model again"
                )
            content = stream.read(length)
    except OSError as error:
        raise ParentError(f"{file} cannot be read: {error.strerror}") from None
    if content.count(b"{") > _MOST_TENSORS:
        raise ParentError(f"{file} holds more than {_MOST_TENSORS:,} tensors; name another model")
    raw = bounded.parse_json(content, f"the header of {file}", ParentError)
    headers: dict[str, TensorHeader] = {}
    for name, entry in raw.items() if isinstance(raw, dict) else [("", raw)]:
        if name == "__metadata__":
            continue
        found = _tensor_header(entry, file, 8 + length)
        if found is None:
            raise ParentError(
                f"{broken}: its entry {name[:80]!r} is no tensor's; download it again"
            )
        headers[name] = found
    end = 8 + length
    for name, header in sorted(headers.items(), key=lambda item: (item[1].start, item[1].end)):
        if header.start != end:
            raise ParentError(
                f"{broken}: the bytes of tensor {name[:80]!r} do not follow those before them; "
                "download it again"
            )
        end = header.end
    if end != size:
        raise ParentError(f"{broken}: it has {size:,} bytes, not {end:,}; download it again")
    return headers


def _tensor_header(entry: Any, file: Path, begin: int) -> TensorHeader | None:
    """An entry of a header, or None where it is not what the format has there."""
    if not isinstance(entry, dict):
        return None
    shape: Any = entry.get("shape")
    places: Any = entry.get("data_offsets")
    dtype: Any = entry.get("dtype")
    for numbers in (shape, places):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            return None
    if not isinstance(dtype, str) or dtype not in _BITS or len(places) != 2:
        return None
    start, end = places
    if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        return None
    return TensorHeader(tuple(shape), DTYPES.get(dtype, dtype), file, begin + start, begin + end)


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


def read_json(file: Path, missing: str = "") -> dict[str, Any]:
    """A file's JSON object; ``missing`` is what to say where there is no file.

    Raises:
        ParentError: there is none, or it is not a JSON object.
    """
    raw = bounded.read_json(file, ParentError, missing=missing)
    if not isinstance(raw, dict):
        raise ParentError(f"{file} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _stamp(files: Sequence[Path]) -> tuple[str, int]:
    """A hash of the files' paths, sizes and times, and the newest time in ns.

    Also of when the system last changed its entry: a copy may keep another file's size and time.
    """
    found = [(str(file), file.stat()) for file in files]
    stats = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    return key, max((stat.st_mtime_ns for _, stat in found), default=0)


def _cached_fingerprints() -> dict[str, str]:
    """What this user's own runs read; another's file says nothing of weights."""
    file = cache_dir() / _FINGERPRINTS
    if not is_believed(file):
        return {}
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    known = raw.items() if isinstance(raw, dict) else ()
    return {key: text for key, text in known if isinstance(text, str) and _SHA256.fullmatch(text)}


def _remember_fingerprint(key: str, fingerprint: str) -> None:
    known = {**_cached_fingerprints(), key: fingerprint}
    newest = dict(list(known.items())[-_CACHED_FINGERPRINTS:])
    directory = cache_dir()
    with suppress(OSError):  # where it cannot be remembered, the next call reads the weights again
        directory.mkdir(parents=True, exist_ok=True)
        write_at_once(directory / _FINGERPRINTS, json.dumps(newest))
