"""Adapters: what they are, and what speaks against applying one to a model.

Faults are found from ``adapter_config.json`` and the headers of both. It knows no torch;
``applying.py`` is what makes the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agentmerge.parents.headers import (
    TensorHeader,
    file_digest,
    file_headers,
    files_fingerprint,
    read_json,
)
from agentmerge.parents.naming import NameIndex
from agentmerge.parents.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLED_ADAPTER

#: peft's names of the adapters that are tested to be merged bit for bit as peft merges them.
MERGEABLE = ("LORA", "LOHA", "LOKR", "IA3", "OFT")
#: Settings of peft that our way through its layers does not cover.
_NOT_COVERED = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
)
#: Settings by which a LoRA adapter adds something else than the product of its two matrices.
_NO_FACTORS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
#: What the settings that are read here are, where they are there.
_SETTINGS: dict[str, Any] = {
    "peft_type": str,
    "r": int,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "modules_to_save": list | tuple,
    "target_modules": list | str,
}
_PREFIX = "base_model.model."
_PART = re.compile(
    r"\.(lora_[A-Za-z_]+|hada_\w+|lokr_\w+|ia3_l|oft_R|modules_to_save)(?:\.[\w-]+?)??(\.weight)?$"
)
_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")


def adapter_fingerprint(adapter: Path) -> str:
    """What an adapter does: its weights and its settings, not what its base was called."""
    config = read_json(adapter / ADAPTER_CONFIG)
    config.pop("base_model_name_or_path", None)
    safe, pickled = adapter / ADAPTER_WEIGHTS, adapter / PICKLED_ADAPTER
    weights = files_fingerprint([safe]) if safe.is_file() else file_digest(pickled)
    text = json.dumps([weights, config], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def adapter_note(name: str, adapter: Path, model: str) -> str | None:
    """What to say where an adapter was trained on a model of another name."""
    trained = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not trained or Path(str(trained)).name.casefold() == Path(model).name.casefold():
        return None
    return f"{name}: the adapter was trained on {trained!r}, and is applied to {model!r}"


def adapter_faults(adapter: Path, tensors: Mapping[str, TensorHeader], tied: bool) -> Iterator[str]:
    """Why an adapter cannot be applied to a model with these tensors: the first of each kind.

    tied: the model's head is its embedding.

    Raises:
        ParentError: the adapter cannot be read.
    """
    config = read_json(adapter / ADAPTER_CONFIG)
    for key, kinds in _SETTINGS.items():
        if not isinstance(config.get(key), kinds | None):
            yield (
                f"{adapter / ADAPTER_CONFIG}: {key} cannot be {str(config[key])[:80]!r}; correct it"
            )
            return
    kind = str(config.get("peft_type", "")).upper()
    if kind not in MERGEABLE:
        yield (
            f"the adapter is of peft type {kind or 'unknown'!r}, and only "
            f"{', '.join(MERGEABLE)} are merged into a model"
        )
        return
    for key in _NOT_COVERED:
        if config.get(key):
            yield f"the adapter uses {key}, which is not supported; merge it with peft yourself"
    parts = _parts(_headers(adapter))
    if not parts:
        yield f"the adapter holds no tensor that {kind} has"
    known = NameIndex(tensors)
    found = {module: known.find(f"{module}.weight") for module in parts}
    lost = sorted(module for module, name in found.items() if name is None)
    if lost:
        yield (f"{len(lost)} modules of the adapter are not in the model, the first is {lost[0]}")
    yield from _shape_faults(config, parts, found, tensors)
    if tied and (name := _breaks_the_tie(config, parts)):
        yield (
            f"the adapter changes {name} by itself, and embedding and head are one tensor in this "
            "model; untie them first"
        )


def low_rank_bytes(adapter: Path, tensors: Mapping[str, TensorHeader]) -> int | None:
    """What an adapter takes beside its model's tensors where both are in memory: its factors, or a
    weight where that is less than twice as large. None where it has anything but factors.

    Raises:
        ParentError: the adapter cannot be read.
    """
    config, total = read_json(adapter / ADAPTER_CONFIG), 0
    if any(map(config.get, _NO_FACTORS)) or config.get("init_lora_weights") == "mica":
        return None
    known = NameIndex(tensors)
    for module, part in _parts(_headers(adapter)).items():
        name = known.find(f"{module}.weight")
        if set(part) != {"lora_A", "lora_B"} or name is None:
            return None
        factors = 4 * sum(math.prod(header.shape) for header in part.values())
        weight = tensors[name].end - tensors[name].start
        total += factors if 2 * factors < weight else weight
    return total


def _breaks_the_tie(config: Mapping[str, Any], parts: Mapping[str, Any]) -> str | None:
    """Embedding or head, where the adapter makes two of them."""
    whole = [str(name).rpartition(".")[2] for name in config.get("modules_to_save") or ()]
    changed = [module.rpartition(".")[2] for module in parts]
    both = [name for name in whole if name in _HEADS + _EMBEDDINGS]
    return next(iter(both + [name for name in changed if name in _HEADS]), None)


def _headers(adapter: Path) -> Mapping[str, TensorHeader]:
    if (adapter / ADAPTER_WEIGHTS).is_file():
        return file_headers(adapter / ADAPTER_WEIGHTS)
    from agentmerge.parents.pickled import pickled_headers  # needs torch, and is seldom needed

    return pickled_headers([adapter / PICKLED_ADAPTER])


def _parts(headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
    """The adapter's tensors by module and part: ``{"…q_proj": {"lora_A": …}}``."""
    parts: dict[str, dict[str, TensorHeader]] = {}
    for key, header in headers.items():
        module = key.removeprefix(_PREFIX)
        match = _PART.search(module)
        if match:
            parts.setdefault(module[: match.start()], {})[match[1]] = header
        elif module.endswith(".weight"):
            module = module.removesuffix(".weight").removesuffix(".base_layer")
            parts.setdefault(module, {})["whole"] = header
    return parts


def _shape_faults(
    config: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, TensorHeader]],
    found: Mapping[str, str | None],
    tensors: Mapping[str, TensorHeader],
) -> Iterator[str]:
    """The first module whose matrices do not fit together, and the first that do not fit theirs."""
    ranks = {config.get("r"), *dict(config.get("rank_pattern") or {}).values()}
    odd: dict[str, str] = {}
    for module, part in sorted(parts.items()):
        embedding = "lora_embedding_A" in part or "lora_embedding_B" in part
        letter = "lora_embedding_" if embedding else "lora_"
        pair = [part.get(letter + side) for side in "AB"]
        name = found[module]
        whole = part.get("whole") or part.get("modules_to_save")
        if whole is not None and name and whole.shape != tensors[name].shape:
            odd.setdefault(
                "whole",
                f"the adapter's {module} has shape {list(whole.shape)}, and "
                f"{list(tensors[name].shape)} in the model{_way_out(whole, tensors[name])}",
            )
        if pair == [None, None]:
            continue
        if pair[0] is None or pair[1] is None:
            odd.setdefault("half", f"the adapter has only half of {module} (A or B is missing)")
            continue
        if len(pair[0].shape) != 2 or len(pair[1].shape) != 2:
            odd.setdefault("half", f"the adapter's {module} is no pair of matrices; save it again")
            continue
        (rank, width), (height, other) = pair[0].shape, pair[1].shape
        if rank != other or rank not in ranks:
            odd.setdefault(
                "rank",
                f"the adapter's {module} has ranks {rank} and {other}, and "
                f"{ADAPTER_CONFIG} says {config.get('r')}",
            )
        shape = [width, height] if embedding else [height, width]
        if name and sorted(shape) != sorted(tensors[name].shape[:2]):
            odd.setdefault(
                "shape",
                f"the adapter's {module} is for a weight of shape {shape}, and it is "
                f"{list(tensors[name].shape)} in the model",
            )
    yield from odd.values()


def _way_out(own: TensorHeader, model: TensorHeader) -> str:
    """What to do about rows that an adapter's training added for new tokens."""
    if len(own.shape) != 2 or own.shape[1:] != model.shape[1:] or own.shape[0] <= model.shape[0]:
        return ""
    rows = own.shape[0]
    return (
        f": it was trained with added tokens; resize_token_embeddings({rows}) of the model, peft's "
        "merge_and_unload and save_pretrained make a whole model of the two, and "
        "tokenizer_source: union merges that with the others"
    )
