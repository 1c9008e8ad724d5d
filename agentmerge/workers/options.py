"""``worker.options``: what each kind of worker takes, so that ``check`` can say what it does not.

Knows names and values; builds no worker and reads no model. A plugin's class may have its own, as
``options``: a model like these, or names alone.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
)

from agentmerge import plugins
from agentmerge.config import MOST_S, WorkerSettings
from agentmerge.errors import ConfigError, UserError
from agentmerge.system.value_faults import said_of


def _one_of_the_models(value: str, info: ValidationInfo) -> str:
    parents = (info.context or {}).get("parents", (value,))
    if value not in parents:
        raise ValueError(f"{value!r} is not one of the models; use {', '.join(parents)}")
    return value


def _writable_folder(value: str) -> str:
    if not (Path(value).is_dir() and os.access(value, os.W_OK | os.X_OK)):
        raise ValueError(f"{value!r} is no folder that can be written; make it, or leave it out")
    return value


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that have a value: one that is null is not given."""
    return {key: value for key, value in options.items() if value is not None}


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EngineArgs(_Options):
    """What the search itself reads of ``worker.engine_args``; the rest is vLLM's to refuse."""

    model_config = ConfigDict(extra="allow")
    tensor_parallel_size: int | None = Field(None, ge=1)
    max_model_len: int | None = Field(None, ge=1)
    max_num_batched_tokens: int | None = Field(None, ge=1)
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)


class HfOptions(_Options):
    attn_implementation: str | None = None
    base: Annotated[str, AfterValidator(_one_of_the_models)] | None = None
    max_length: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)


class VllmOptions(_Options):
    base: Annotated[str, AfterValidator(_one_of_the_models)] | None = None
    engine_args: EngineArgs | None = None
    engine_process: StrictBool | None = None
    in_place: StrictBool | None = None
    max_length: int | None = Field(None, ge=1)
    threads: int | None = Field(None, ge=1)
    way: Literal["reload"] | None = None


class DiskOptions(VllmOptions, HfOptions):
    evaluate_with: Literal["hf", "vllm"] | None = None
    storage: Annotated[str, AfterValidator(_writable_folder)] | None = None


@dataclass(frozen=True, slots=True)
class Where:
    """Which candidates: those of these recipe hashes, or whose ``figure`` is beyond ``bound``."""

    hashes: frozenset[str] = frozenset()
    figure: Literal["", "max_weight", "min_weight", "mean_weight"] = ""
    above: bool = True
    bound: float = 0.0


def _where(value: Any) -> Where:
    if isinstance(value, str):
        match = re.fullmatch(
            r"(max_weight|min_weight|mean_weight)\s*([<>])\s*(-?(?:\d+\.?\d*|\.\d+))", value.strip()
        )
        if match is not None:
            figure: Any = match[1]
            return Where(figure=figure, above=match[2] == ">", bound=float(match[3]))
    elif isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return Where(frozenset(value))
    raise ValueError(
        f"{value!r} is not understood; write e.g. 'max_weight>0.95' (min_weight, mean_weight; <), "
        "or a list of recipe hashes"
    )


_Where = Annotated[Any, AfterValidator(_where)]


class FakeOptions(_Options):
    """See ``workers/fake.py``. Tests give a fake worker names that only a real one reads."""

    model_config = ConfigDict(extra="allow")
    base: str | None = None
    num_layers: Annotated[int, Field(strict=True, ge=1)] | None = None
    delay_s: float | None = Field(None, ge=0, le=MOST_S)
    documents: int | None = Field(None, ge=1, le=1_000_000)
    groups: dict[str, Annotated[int, Field(ge=1, le=1000)]] | None = None
    scales: list[float] | None = Field(None, min_length=1)
    fail_when: _Where = None
    fail_items: list[int] | None = None
    fail_items_when: _Where = None
    die_when: _Where = None
    die_at: int | None = Field(None, ge=0)
    die_hard: StrictBool | None = None
    hang_when: _Where = None
    no_gradient: Literal["failed", "lost"] | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> FakeOptions:
        """
        Raises:
            ConfigError: a value that is not understood.
        """
        try:
            return cls.model_validate(given(options))
        except ValidationError as error:
            said = said_of(error, "worker.options")
            raise ConfigError([key + words for key, words in said]) from error


OPTIONS: dict[str, type[_Options]] = {
    "hf": HfOptions,
    "vllm": VllmOptions,
    "disk": DiskOptions,
    "fake": FakeOptions,
}


def option_faults(
    worker: WorkerSettings, parents: Sequence[str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """What is wrong with ``worker.options`` and ``worker.engine_args``, and those of the two that
    have wrong values, without them."""
    try:
        own = plugins.load("agentmerge.workers", worker.kind)
    except UserError:
        return [], {}  # said by whoever looks for the worker
    taken = getattr(own, "options", OPTIONS.get(worker.kind))
    faults, readable = _unknown(worker, taken), {}
    for section, model in (("options", taken), ("engine_args", EngineArgs)):
        values = getattr(worker, section)
        if isinstance(model, type) and issubclass(model, BaseModel):
            wrong = dict(_misread(model, values, f"worker.{section}", parents))
            faults += wrong.values()
            if wrong:
                readable[section] = {k: v for k, v in values.items() if k not in wrong}
    return faults, readable


def _unknown(worker: WorkerSettings, taken: Any) -> list[str]:
    if isinstance(taken, type) and issubclass(taken, BaseModel):
        taken = None if taken.model_config.get("extra") == "allow" else taken.model_fields
    faults = []
    for key in worker.options if taken is not None else ():
        if key in taken:
            continue
        near = difflib.get_close_matches(key, taken, 1, 0.6)
        others = [name for name, model in OPTIONS.items() if key in model.model_fields]
        hint = f"the {worker.kind} worker knows {', '.join(sorted(taken))}"
        if near:
            hint = f"did you mean {near[0]!r}?"
        elif others:
            hint = f"it is one of the {others[0]} worker's; {hint}"
        faults.append(f"worker.options.{key} is not a known option; {hint}")
    return faults


def _misread(
    model: type[BaseModel], values: Mapping[str, Any], section: str, parents: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """(name, sentence) of each value that the worker would not understand."""
    known = {key: value for key, value in given(values).items() if key in model.model_fields}
    try:
        model.model_validate(known, context={"parents": parents})
    except ValidationError as error:
        for key, words in said_of(error, section):
            yield key.split(".")[section.count(".") + 1], key + words
