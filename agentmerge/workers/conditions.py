"""The conditions under which an engine answers: all that can change an answer and is neither a
weight, nor part of the question (``evaluation.protocol``), nor named by ``EngineInfo`` itself.

They are the live model's settings (its config and its ends of text), the code that it brings along,
arithmetic and environment of the process, and the versions of our own code. A hash of them is part
of every result's key; the record itself is kept with a search, so that a change can be named. It
reads small files and no weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import ParentError
from agentmerge.evaluation.loading import quiet
from agentmerge.evaluation.version import SCORING
from agentmerge.merging.version import MERGING
from agentmerge.parents.checkpoint import Checkpoint
from agentmerge.parents.headers import file_digest, read_config, read_json

#: Of a config: names, places and labels; the dtype is the search's own.
_NO_SETTINGS = frozenset(
    ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")
)
_NO_SETTINGS |= {"id2label", "label2id", "name_or_path"}
#: What of a generation config an answer may depend on; the rest is never used (``neutral``).
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: Variables by which libraries choose other kernels or other precision.
_NUMERIC = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
)
#: Of vLLM's own variables, those whose names hold one of these change no number.
_NO_NUMBERS = (
    "API_KEY", "ASSETS", "AUDIO", "CACHE_ROOT", "CONFIG_ROOT", "DEBUG", "DIST_IDENT",
    "DO_NOT_TRACK", "DP_MASTER", "ENABLE_V1_MULTIPROCESSING", "FETCH", "HOST_IP",
    "HTTP", "IMAGE", "KEEP_ALIVE", "KVCACHE_SPACE", "LOG", "MEDIA", "MODELSCOPE",
    "MULTIPROC_METHOD", "OMP_THREADS_BIND", "PORT", "RINGBUFFER", "RPC", "SECRET", "SERVER",
    "SHM_BUFFER", "TIMEOUT", "TOKEN", "TRACE", "USAGE_STATS", "VIDEO",
)  # fmt: skip

#: vLLM's variables as the user has set them, once vLLM was imported (``remember_environment``).
_before_vllm: list[dict[str, str]] = []


def conditions(spec: WorkerSpec, *, vllm: bool = False) -> dict[str, Any]:
    """The record: one entry for each thing, nested mappings of plain values.

    vllm: it is what answers, so its variables count.

    Raises:
        ParentError: the live model's config cannot be read.
    """
    import torch

    path = Path(dict(spec.parents)[live_parent(spec)])
    template = Path(dict(spec.parents)[spec.template_model])
    config = _config(path, spec.trust_remote_code)
    record: dict[str, Any] = {
        "config": _settings(config.to_dict()),
        "ends": ends_of(path, config),
        "attention": str(
            spec.options.get("attn_implementation")
            or getattr(config, "_attn_implementation", None)
            or "as the model's class has it"
        ),
        "code": _code((path, template)) if spec.trust_remote_code else {},
        "float32_matmul_precision": spec.matmul_precision,
        "environment": _environment(vllm=vllm),
        "merging": MERGING,
        "scoring": SCORING,
    }
    if spec.device == "cpu":
        record["processor"] = torch.backends.cpu.get_cpu_capability()
    return record


def conditions_hash(spec: WorkerSpec, *, vllm: bool = False) -> str:
    """SHA-256 of the record, 16 hex digits."""
    text = json.dumps(conditions(spec, vllm=vllm), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def live_parent(spec: WorkerSpec) -> str:
    """Whose config the live model has: the template's; of wrappers around a text model the one
    that all are compared with, since what is outside the text model is its own."""
    paths = dict(spec.parents)
    base = spec.options.get("base")
    first = base if base in paths else next(iter(paths))
    try:
        wraps = bool(Checkpoint.read(Path(paths[first])).carried)
    except ParentError:  # its weights are still to be made
        wraps = Checkpoint(read_config(Path(paths[first])), {}).wraps
    return first if wraps else spec.template_model


def ends_of(path: Path, config: Any) -> dict[str, Any]:
    """The token ids by which generation begins, ends and pads, as the model's folder has them:
    all that is taken from its generation config.

    Raises:
        ParentError: they are no token ids.
    """
    from transformers import GenerationConfig

    why = ""
    try:
        with quiet():
            try:
                found = GenerationConfig.from_pretrained(str(path))
            except OSError:  # none there: as transformers and vLLM make one
                found = GenerationConfig.from_model_config(config)
        ends = {key: getattr(found, key, None) for key in _ENDS}
        for key, value in ends.items():
            ids = value if isinstance(value, list) else [value]
            if not all(one is None or type(one) is int for one in ids):
                why = f"{key} is {str(value)[:80]}"
    except Exception as error:  # the class raises what it likes at a file that it cannot use
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if why:
        raise ParentError(f"{path}: its generation_config.json cannot be used ({why}); correct it")
    return ends


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two records, one phrase for each kind of thing."""
    names = {
        "config": "the live model's config",
        "ends": "the live model's generation config",
        "attention": "the attention implementation",
        "code": "the model's own code",
        "float32_matmul_precision": "torch's float32_matmul_precision",
        "environment": "the environment",
        "merging": "agentmerge's version of merging",
        "scoring": "agentmerge's version of scoring",
        "processor": "the processor's instruction set",
    }
    found = []
    for key in {**old, **new}:
        before, after = _flat(old.get(key)), _flat(new.get(key))
        differing = [n for n in {**before, **after} if before.get(n) != after.get(n)]
        if not differing:
            continue
        parts = [
            f"{name} from {_shown(before, name)} to {_shown(after, name)}".strip()
            for name in differing[:3]
        ]
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        colon = ":" if differing != [""] else ""
        found.append(f"{names.get(key, key)} changed{colon} {', '.join(parts)}{more}")
    return found


@cache
def _code_digest(file: Path, stamp: tuple[int, int]) -> str:
    return file_digest(file)


def _code(folders: tuple[Path, ...]) -> dict[str, str]:
    """Every Python file of models that name code of their own, by content."""
    found = {}
    for folder in dict.fromkeys(folders):
        for name in ("config.json", "tokenizer_config.json"):
            try:
                body = read_json(folder / name)
            except ParentError:
                continue
            if "auto_map" in body:
                found[f"{name}: auto_map"] = json.dumps(body["auto_map"], sort_keys=True)
                for file in sorted(folder.rglob("*.py")):
                    stat = file.stat()
                    digest = _code_digest(file, (stat.st_mtime_ns, stat.st_size))
                    found[str(file.relative_to(folder))] = digest
    return found


def _environment(*, vllm: bool) -> dict[str, str]:
    """Variables that are set and can change a number, with their values."""
    found = {name: os.environ[name] for name in _NUMERIC if name in os.environ}
    if vllm:
        found |= _before_vllm[0] if _before_vllm else _of_vllm()
    return found


def remember_environment() -> None:
    """Called before vLLM is imported: it sets variables of its own as it sees platform and model,
    and those are no user's."""
    if not _before_vllm:
        _before_vllm.append(_of_vllm())


def _of_vllm() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("VLLM_") and not any(part in name for part in _NO_NUMBERS)
    }


def _config(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:  # configs are checked by many hands, and raise as many kinds
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ParentError(f"{path}: its config cannot be used ({reason[0]})") from error


def _settings(body: Any) -> Any:
    """A config without names and labels, as plain values."""
    if isinstance(body, Mapping):
        return {str(k): _settings(v) for k, v in body.items() if k not in _NO_SETTINGS}
    if isinstance(body, list | tuple):
        return [_settings(value) for value in body]
    return body if isinstance(body, str | int | float | bool | None) else str(body)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names -> plain values; lists are values."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = str(values[name]) if values.get(name) is not None else "nothing"
    return text if len(text) <= 40 else f"{text[:37]}..."
