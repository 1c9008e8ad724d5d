"""A model's config as its class in transformers reads it: with what the file leaves out.

It knows transformers' config classes and one config. It reads no files and runs no code of a
model's own: of a class that transformers has not, the config is what its file says.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LAYER_LIST_KEYS = ("layer_types", "layers_block_type")


@dataclass(frozen=True, slots=True)
class ClassConfig:
    """text: settings of the text model, defaults included, old spellings brought to today's.
    wraps: the text model is one part of several. layer_counts: how many layers it has, by each of
    the config's words for it (a class may count two a block); empty where nothing says.
    tied: whether the head is the embedding, as loading takes it; None where nothing says.
    """

    text: Mapping[str, Any]
    wraps: bool
    layer_counts: tuple[int, ...]
    tied: bool | None
    encodes: bool


def class_config(config: Mapping[str, Any]) -> ClassConfig:
    """What a ``config.json`` means."""
    try:
        key = json.dumps(config, sort_keys=True)
    except TypeError:
        return _as_written(config)
    return _class_config(key)


@lru_cache(maxsize=64)
def _class_config(key: str) -> ClassConfig:
    config = json.loads(key)
    made = _made(config)
    if made is None:
        return _as_written(config)
    text = made.get_text_config(decoder=True)
    return ClassConfig(
        text=text.to_dict(),
        wraps=_has_parts(made),
        layer_counts=_layer_counts(
            {**text.to_dict(), "num_hidden_layers": getattr(text, "num_hidden_layers", None)}
        ),
        tied=bool(getattr(made, "tie_word_embeddings", False)),
        encodes=bool(getattr(made, "is_encoder_decoder", False)),
    )


def _as_written(config: Mapping[str, Any]) -> ClassConfig:
    inner = config.get("text_config")
    text = dict(inner) if isinstance(inner, Mapping) else dict(config)
    says = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return ClassConfig(
        text=text,
        wraps=isinstance(inner, Mapping),
        layer_counts=_layer_counts(text),
        tied=None if says is None else bool(says),
        encodes=bool(config.get("is_encoder_decoder")),
    )


def _layer_counts(text: Mapping[str, Any]) -> tuple[int, ...]:
    counts = [text.get(key) for key in LAYER_COUNT_KEYS]
    kinds = [text.get(key) for key in _LAYER_LIST_KEYS]
    counts += [len(listed) for listed in kinds if isinstance(listed, list | tuple)]
    return tuple(dict.fromkeys(n for n in counts if type(n) is int and n > 0))


def _made(config: Mapping[str, Any]) -> Any:
    """The config as an object of its class; None where there is no class, or it refuses."""
    import transformers

    kind: Any = None
    if config.get("model_type") in transformers.CONFIG_MAPPING:
        kind = transformers.CONFIG_MAPPING[config["model_type"]]
    if kind is None or (isinstance(config.get("text_config"), Mapping) and not kind.sub_configs):
        return None
    try:
        with quiet_logs():
            return kind.from_dict(_in_todays_words(config))
    # A class may refuse a config in any way; transformers' own words come when it is loaded.
    except Exception:
        return None


def _in_todays_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy; longrope's first name, which Phi-3's class has a remedy for and refuses before."""
    body = copy.deepcopy(dict(config))
    scaling = body.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type", scaling.get("rope_type")) == "su":
        scaling.pop("rope_type", None)
        scaling["type"] = "longrope"
    return body


def _has_parts(made: Any) -> bool:
    """Whether the class is of several models: each part has a config of its own."""
    import transformers

    parts = [getattr(made, name, None) for name in type(made).sub_configs]
    return any(isinstance(part, transformers.PreTrainedConfig) for part in parts)


def live_name(config: Mapping[str, Any], name: str) -> str:
    """What transformers calls a tensor of a file, as far as its table of conversions renames it.

    One model's files may have either name. Tensors that the table fuses keep their own names.
    """
    for entry in _renamings(
        str(next(iter(config.get("architectures") or [""]), "")), str(config.get("model_type"))
    ):
        name, _ = entry.rename_source_key(name)
    return name


@lru_cache(maxsize=16)
def _renamings(architecture: str, model_type: str) -> tuple[Any, ...]:
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # a transformers that has moved it
        return ()
    known = get_checkpoint_conversion_mapping
    table = known(architecture) or known(model_type) or []
    entries = [*table, *(known("legacy") or [])]
    return tuple(entry for entry in entries if type(entry) is WeightRenaming)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings of a text model in one spelling; settings by kind of layer by its name."""
    now = config.get("rope_parameters")
    if isinstance(now, Mapping) and any(isinstance(value, Mapping) for value in now.values()):
        return {str(kind): _one_rope(value, {}) for kind, value in now.items() if value is not None}
    return _one_rope(dict(now or config.get("rope_scaling") or {}), config)


def _one_rope(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    body = {key: value for key, value in scaling.items() if value is not None}
    # 10000 is what every architecture with rope means by saying nothing.
    theta = body.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = body.pop("rope_type", None) or body.get("type") or "default"
    body.pop("type", None)
    body.pop("partial_rotary_factor", None)
    return {
        "rope_theta": float(theta),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **body},
    }


def turns_alike(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two models' classes make the same rotations of two configs, at every length."""
    first = _rotations(json.dumps(one, sort_keys=True, default=str))
    return first is not None and first == _rotations(json.dumps(two, sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _rotations(key: str) -> tuple[Any, ...] | None:
    """Frequencies and scale of attention of a text model; None where its class makes no such."""
    config = json.loads(key)
    made = _made(config)
    rope = getattr(made, "rope_parameters", None)
    if not isinstance(rope, Mapping) or any(isinstance(v, Mapping) for v in rope.values()):
        return None
    try:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        function = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        longest = int(made.max_position_embeddings)
        found = [function(made, "cpu", seq_len=length) for length in (1, longest, 4 * longest)]
        return tuple((tuple(turns.tolist()), float(scale)) for turns, scale in found)
    except Exception:  # of another kind of rope: what its settings say decides
        return None


@contextmanager
def quiet_logs(level: int = logging.WARNING) -> Iterator[None]:
    """Without what a library says in passing."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)
