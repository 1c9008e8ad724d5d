"""The configuration of a search: what a user writes, validated and frozen.

``genome`` and the task fields are mergekit-evolve's and LLM-Evo-Merge's own, and their files load
unmodified: unknown keys there are a note, as the old programs ignore them, and a warning where
they are a known key but for a letter or two. ``search``, ``agents``, ``worker`` and ``budget`` are
ours; unknown keys there are faults that name the nearest known key and the line. Knows nothing of
models on disk: that is ``preflight/``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from agentmerge.errors import ConfigError, UserError
from agentmerge.methods import METHODS, Method, Parameter, divides_by_agreeing
from agentmerge.system.bounded import read_text
from agentmerge.system.redaction import PREFIX, hidden, references
from agentmerge.system.value_faults import said_of
from agentmerge.system.yaml_text import misspelt, read_yaml, twice_text

Role = Literal["critic", "controller", "proposer", "curator"]
ROLES: tuple[Role, ...] = get_args(Role)


#: Candidates from one asking of the models to the next, at least.
ADVISED_EVERY = 4
#: What is waited for at most (three years: a system's clock has an end), tried again, and begun.
MOST_S, MOST_RETRIES, MOST_WORKERS = 1e8, 1000, 1024
#: Layers that a search may add to a model's, and how often it may run through all of them.
MOST_EXTRA, MOST_REPEATS = 1000, 16
#: How strongly a layer of a stack may run, in either direction: beyond it values overflow.
MOST_SCALE = 10.0
#: What "today" is in a chat template that prints the date: what one asks may not change overnight.
#: Llama 3's templates fall back to this day themselves.
DATE = date(2024, 7, 26)
#: Whose key a server gets, besides the name of a variable: the provider's own, or nobody's.
DEFAULT_KEY, NO_KEY = "default", "none"
#: Of a program's own task.
MOST_ITEMS = 1_000_000
#: The chat template of the first expert that has one, chosen in so many words.
FIRST = "first"
#: What a judge's verdicts are called: points of its scale, or the share of comparisons won.
JUDGED = ("points,none", "win_rate,none")


#: Models of a pool, and how many of them a merge may have.
MOST_EXPERTS, MOST_AT_ONCE = 64, 16


class _Frozen(BaseModel):
    """younger: fields that older versions did not know. Where they are not set they are not stored,
    so that what is stored, and hashed, stays what it was."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    younger: ClassVar[tuple[str, ...]] = ()

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Else true is 1 wherever a number may stand."""
        wanted = str(cls.model_fields[info.field_name or ""].annotation)
        number = re.search(r"\b(int|float)\b", wanted)
        if isinstance(value, bool) and number and "bool" not in wanted:
            raise PydanticKnownError("int_type" if number[1] == "int" else "float_type")
        return value

    @model_serializer(mode="wrap")
    def _as_before(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body: dict[str, Any] = plainly(self)
        return {k: v for k, v in body.items() if v is not None or k not in self.younger}


class LayersConfig(_Frozen):
    """A search over layers: which run beside the merge's own, and how strongly (docs/search.md).

    insert: what may stand after each layer of the merge: ``merge`` (that layer once more),
        ``experts`` (each expert's), ``base`` (the base's), or models by name. most: layers beyond
        the models' depth. scales: the range of each layer's two outputs; at 0 it is absent. skip:
        the merge's own layers, but the first and the last, have scales too and may be left out.
    path: the layers of all of these one after another instead, ``repeats`` times, each with a
        switch and one scale (arXiv 2403.13187); any of them may go, with ``skip`` or without.
    """

    insert: tuple[str, ...] = Field(("experts",), min_length=1)
    most: int = Field(4, ge=0, le=MOST_EXTRA)
    scales: tuple[float, float] = (-0.5, 1.5)
    skip: bool = False
    path: bool = False
    repeats: int | None = Field(None, ge=1, le=MOST_REPEATS)
    younger = ("repeats",)

    @field_validator("insert", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> LayersConfig:
        low, high = self.scales
        if not low <= 0.0 < 1.0 <= high:
            raise ValueError(
                f"scales {list(self.scales)} must go from 0 or below to 1 or above: at 0 a layer "
                "is absent, and at 1 as it is"
            )
        if max(-low, high) > MOST_SCALE:
            raise ValueError(
                f"scales {list(self.scales)} must lie between {-MOST_SCALE:g} and {MOST_SCALE:g}"
            )
        for name in sorted({name for name in self.insert if self.insert.count(name) > 1}):
            raise ValueError(f"insert names {name!r} twice; name each once")
        if self.repeats is not None and not self.path:
            raise ValueError("repeats is read with path: true; set that or remove it")
        if not (self.most or self.skip or self.path):
            raise ValueError("most 0 leaves nothing to search; set skip: true or a larger one")
        return self


class PoolConfig(_Frozen):
    """A search among experts of which a few are merged. most: at a time."""

    most: int = Field(ge=2, le=MOST_AT_ONCE)


class GenomeConfig(_Frozen):
    """The search space, in mergekit-evolve's words.

    chat_template: as ``LmEvalArgs`` has it; what mergekit could read of it is in every recipe.
    space: what the axes are (``contracts.space.SpaceForm``); by default what the method has.
    layers: what is searched over layers once weights have nothing more to give; None: nothing.
    pool: how many of the models a merge has; None: all.
    """

    models: tuple[str, ...]
    merge_method: str
    base_model: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    layer_granularity: int = Field(0, ge=0)
    normalize: bool | None = None
    allow_negative_weights: bool = False
    smooth: bool = False
    filters: tuple[str, ...] = ()
    evolve: tuple[str, ...] = ()
    space: str | None = None
    layers: LayersConfig | None = None
    pool: PoolConfig | None = None
    younger = ("space", "layers", "pool")

    @property
    def form(self) -> str:
        """The name of the space's form: by default the method's."""
        return self.space or ("slerp" if METHODS[self.merge_method].pairwise else "weights")

    @field_validator("filters", mode="before")
    @classmethod
    def _no_filters(cls, value: Any) -> Any:
        return () if value is None else value

    @field_validator("layers", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """A switch, or a number: how many more layers."""
        if isinstance(value, bool):
            return LayersConfig() if value else None
        return {"most": value} if isinstance(value, int) else value

    @field_validator("pool", mode="before")
    @classmethod
    def _short_pool(cls, value: Any) -> Any:
        """A number: how many at a time."""
        return {"most": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> GenomeConfig:
        faults, method = [], None
        try:
            method = METHODS.get(self.merge_method)
        except UserError as error:  # of a package's method
            raise ValueError(str(error)) from error
        if method is None:
            known = ", ".join(sorted(METHODS))
            faults.append(f"merge_method {self.merge_method!r} is not known; use one of {known}")
        elif method.needs_base and not self.base_model:
            faults.append(f"base_model is missing, and {self.merge_method} needs one")
        faults += self._method_faults(method) if method else []
        if self.pool is not None and len(self.models) > MOST_EXPERTS:
            faults.append(f"models has {len(self.models)}; a pool has at most {MOST_EXPERTS}")
        onto_base = method is not None and method.most == 1 and self.base_model not in self.models
        if len(self.models) < (1 if onto_base else 2):
            faults.append(f"models has {len(self.models)} entry; a merge needs at least two")
        for name in sorted({name for name in self.models if self.models.count(name) > 1}):
            faults.append(f"models names {name!r} twice; name each model once")
        if method is not None and method.pairwise and (self.smooth or self.filters):
            key = "smooth" if self.smooth else "filters"
            faults.append(f"{key} is not possible with {self.merge_method}; remove it")
        if "" in self.filters:
            faults.append("filters holds an empty text, which is in every name; remove it")
        if len(set(self.filters)) != len(self.filters):
            faults.append(f"filters {list(self.filters)} names one twice")
        for name in self.layers.insert if self.layers else ():
            if name not in ("merge", "experts", "base", *self.parents):
                known = ", ".join(("merge", "experts", "base", *self.parents))
                faults.append(f"layers.insert names {name!r}; use one of {known}")
            if name == "base" and self.base_model is None:
                faults.append("layers.insert names the base, and there is no base_model")
            if self.pool is not None and name in self.models and name != self.base_model:
                faults.append(
                    f"layers.insert names {name!r}, which a merge of genome.pool may not have; use "
                    "merge or experts"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _method_faults(self, method: Method) -> Iterator[str]:
        """What the method cannot do with these models and settings."""
        name, experts = method.name, self.experts
        if self.pool is not None:  # so many are merged
            experts = experts[: self.pool.most]
        count = str(len(experts))
        if method.sets_apart(self.base_model):
            count += " besides the base"
        if method.most is not None and method.most > 1 and len(experts) != method.most:
            yield f"models has {count}, and {name} merges exactly {method.most}"
        elif len(experts) < method.least and self.models:
            yield f"models has {count}, and {name} needs at least {method.least}"
        if self.normalize is not None and method.normalize_param is None and not method.pairwise:
            yield f"normalize is not possible with {name}; remove it"
        possible = {p.name: p for p in method.shared if p.name != method.normalize_param}
        for asked in self.evolve:
            if asked not in possible or method.pairwise:
                known = ", ".join(possible) if possible and not method.pairwise else "nothing"
                yield f"evolve names {asked!r}, and {name} can evolve {known}"
        if not (method.pairwise or method.source or self.evolved) and len(experts) < 2:
            yield f"{name} of one model has nothing to search; add a model to models"
        stepped = [p.name for p in self.evolved if p.whole]
        if self.smooth and (stepped or (method.most == 1 and len(experts) > 1)):
            what = f"{stepped[0]}, a whole number" if stepped else "a choice between models"
            yield f"smooth is not possible with {name}: {what}, cannot be interpolated; remove it"
        if self.filters and not (method.pairwise or method.source or self.evolved):
            yield f"filters is not possible with {name}; remove it"

    @property
    def at_a_time(self) -> int | None:
        """How many parents a merge of a pool has at most, the base among them; None without one."""
        return None if self.pool is None else self.pool.most + (self.base_model is not None)

    @property
    def recipe_template(self) -> str | None:
        """The chat template as a recipe may say it: by mergekit's name or as a text."""
        asked = self.chat_template
        if asked is None or "{" in asked:
            return asked
        return None if asked in self.parents or Path(asked).is_file() else asked

    @property
    def experts(self) -> tuple[str, ...]:
        """The models that a method merges: not the base where it sets that apart."""
        method = METHODS[self.merge_method]
        if method.sets_apart(self.base_model):
            return tuple(model for model in self.models if model != self.base_model)
        return self.models

    @property
    def evolved(self) -> tuple[Parameter, ...]:
        """The parameters of the whole merge that are searched; a share of two models has rules of
        its own."""
        method = METHODS[self.merge_method]
        shared = () if method.pairwise else method.shared
        return tuple(
            p
            for p in shared
            if p.name != method.normalize_param and (p.searched or p.name in self.evolve)
        )

    @property
    def parents(self) -> tuple[str, ...]:
        """Every model of the genome, the base last where it is not among ``models``."""
        outside = self.base_model is not None and self.base_model not in self.models
        return (*self.models, str(self.base_model)) if outside else self.models

    @property
    def normalizes(self) -> bool:
        """Upstream's default: on for linear, ties and dare_ties; for others, mergekit's own."""
        if self.normalize is not None:
            return self.normalize
        return METHODS[self.merge_method].search_normalizes


class ScorerCommand(_Frozen):
    """A program that says what answers are worth (docs/objectives.md).

    range: of each item's score. timeout_s: for all items that a candidate is asked at a time. env:
    variables that it may have although they are secrets.
    serve: it asks the live candidate itself, over HTTP, so that the task is its own. items: how
        many of its items there are; not set, it gives one score.
    """

    command: tuple[str, ...]
    range: tuple[float, float] = (0.0, 1.0)
    timeout_s: float = Field(600.0, gt=0, le=MOST_S)
    higher_is_better: bool = True
    env: tuple[str, ...] = ()
    serve: bool = False
    items: int | None = Field(None, ge=1, le=MOST_ITEMS)

    @model_validator(mode="after")
    def _consistent(self) -> ScorerCommand:
        if self.items is not None and not self.serve:
            raise ValueError("items is read with serve: true; set that or remove it")
        if not self.command:
            raise ValueError("command is empty; name a program")
        if hidden(self.command) != self.command:
            raise ValueError(
                "command has a secret in it, and every user of a machine can read command lines; "
                "name its variable in env, and read that in the program"
            )
        if not self.range[0] < self.range[1]:
            raise ValueError(f"range {list(self.range)} must go from a lower to a higher number")
        return self


_Scorer = Annotated[
    Annotated[str, Tag("scorer-name")] | Annotated[ScorerCommand, Tag("scorer-program")],
    Discriminator(lambda given: "scorer-name" if isinstance(given, str) else "scorer-program"),
]


def _server(value: str | None) -> str | None:
    """A server's address, which a misprint would otherwise leave unreached to the end."""
    if value is None or re.fullmatch(r"\$\{\w+\}", value):
        return value
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or any(map(str.isspace, value)):
        raise ValueError(f"{value!r} is no address of a server; write http://HOST:PORT/v1")
    address: str = hidden(value, "base_url")
    return address


def _named_model(value: str) -> str:
    if not value.strip():
        raise ValueError("it is empty; write none, or provider:model such as openai:gpt-4o")
    return value


def _key_variable(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z_]\w*", value):
        raise ValueError(
            "it is no name of an environment variable; write the name and not the key, as in "
            f"OPENAI_API_KEY, or {DEFAULT_KEY}, or {NO_KEY}"
        )
    return value


ModelName = Annotated[str, AfterValidator(_named_model)]
BaseUrl = Annotated[str | None, AfterValidator(_server)]
KeyVariable = Annotated[str | None, AfterValidator(_key_variable)]


class JudgeSettings(_Frozen):
    """Who grades a task's answers, and how (docs/judging.md).

    model, base_url, api_key_env, temperature, timeout_s, max_retries, max_tokens: as agents have
        them. at_once: requests at a time.
    conversations: a JSONL file, or a folder of them; by default NAME.jsonl or NAME/ in
        ``task_search_path``. prompt: a file in place of ours.
    scale: the least and the most points of an answer. against: a JSONL file of a fixed model's
        answers, which each answer is compared with instead; then there are no points.
    twice: the share of verdicts that is asked for a second time, to measure the judge's noise.
    answer_chars: what the judge is shown of one answer. generation: lm-eval's generation_kwargs.
    """

    model: ModelName
    conversations: str | None = None
    prompt: str | None = None
    scale: tuple[float, float] = (1.0, 10.0)
    against: str | None = None
    higher_is_better: bool = True
    twice: float = Field(0.1, ge=0, le=1)
    answer_chars: int = Field(8000, ge=200, le=1_000_000)
    generation: dict[str, Any] = Field(default_factory=dict)
    base_url: BaseUrl = None
    api_key_env: KeyVariable = None
    temperature: float | None = Field(None, ge=0)
    timeout_s: float = Field(60.0, gt=0, le=MOST_S)
    max_retries: int = Field(3, ge=0, le=MOST_RETRIES)
    max_tokens: int | None = Field(None, gt=0)
    at_once: int = Field(4, ge=1, le=64)

    @model_validator(mode="before")
    @classmethod
    def _bare_model(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> JudgeSettings:
        low, high = self.scale
        if not low < high:
            raise ValueError(f"scale {list(self.scale)} must rise, as in [1, 10]")
        if self.model == "none":
            raise ValueError("model is none, and a judge is one; name it as provider:model")
        if self.against is not None and self.scale != (1.0, 10.0):
            raise ValueError("scale is read without against, where there are points; remove one")
        if self.against is not None and not self.higher_is_better:
            raise ValueError("against: more wins are better; remove higher_is_better")
        return self

    @property
    def role(self) -> RoleSettings:
        """The model as an agent's, for whoever makes chat models of such settings."""
        return RoleSettings(**{name: getattr(self, name) for name in RoleSettings.model_fields})


class TaskConfig(_Frozen):
    """One objective: an lm-eval task, its metric ("name,filter") and its weight in the score.

    scorer: who judges the answers in place of the task: a plugin's name, ``file.py:function``, or a
    program. The metric then has its name.
    judge: the task is no lm-eval task but conversations that a model grades; the metric is then
        what its verdicts are called.
    """

    name: str
    weight: float = 1.0
    metric: str = "acc,none"
    scorer: _Scorer | None = None
    judge: JudgeSettings | None = None
    younger = ("scorer", "judge")

    @property
    def served(self) -> bool:
        """Whether it is no lm-eval task but a program's own, which asks the live candidate."""
        return isinstance(self.scorer, ScorerCommand) and self.scorer.serve

    @property
    def scorer_file(self) -> str:
        """The Python file that the scorer is a function of; empty where it is none."""
        file = self.scorer.partition(":")[0] if isinstance(self.scorer, str) else ""
        return file if file.endswith(".py") else ""

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and (scorer := value.get("scorer")):
            name = "served" if isinstance(scorer, dict) and scorer.get("serve") else "command"
            name = scorer.rpartition(":")[2] if isinstance(scorer, str) else name
            return {"metric": f"{name},none"} | value
        if isinstance(value, dict) and (judge := value.get("judge")):
            paired = isinstance(judge, dict) and judge.get("against") is not None
            return {"metric": JUDGED[paired]} | value
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _named_by_the_judge(self) -> TaskConfig:
        if self.judge is None:
            return self
        if self.scorer is not None:
            raise ValueError("a task has a judge or a scorer; remove one of them")
        if self.metric != JUDGED[self.judge.against is not None]:
            raise ValueError(
                f"metric {self.metric!r} is not what this judge gives; leave it out, or write "
                f"{JUDGED[self.judge.against is not None]}"
            )
        return self


class TasksConfig(_Frozen):
    """Everything that decides what is asked of a model, and how."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    limit: int | None = Field(None, gt=0)
    num_fewshot: int | None = Field(None, ge=0)
    shuffle: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True
    task_search_path: tuple[str, ...] = ()
    sealed_share: float = Field(0.25, ge=0.0, lt=1.0)
    companion: bool = True
    seed: int = 0
    chat_template: str | None = None
    chat_date: date = DATE
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_task_twice(self) -> TasksConfig:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tasks names {', '.join(twice)} twice; give each task once")
        if not any(task.weight for task in self.tasks):
            raise ValueError("every task has weight 0, so every merge would score 0")
        return self


class RacingSettings(_Frozen):
    """When a candidate is dropped before it was asked every item (``evaluation/racing.py``).

    rungs: fractions of every task's items after which it is looked at. alpha: the largest chance
    that a candidate at least as good as the incumbent is dropped.
    """

    rungs: tuple[float, ...] = (0.125, 0.25, 0.5)
    alpha: float = Field(0.05, gt=0, lt=1)

    @field_validator("rungs")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        kept = tuple(rung for rung in value if rung != 1.0)  # everyone's last rung, unsaid
        if not kept or not all(0 < a < b for a, b in pairwise((*kept, 1.0))):
            raise ValueError(f"rungs {list(value)} must rise between 0 and 1, as in 0.125, 0.5")
        return kept


class TokenLimit(_Frozen):
    """How long answers may be: ``most`` tokens an item, or so many times the ``parents``' mean."""

    most: float | None = Field(None, gt=0)
    parents: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> TokenLimit:
        if (self.most is None) == (self.parents is None):
            raise ValueError(
                "tokens has either most (tokens an item) or parents (times their mean), as in "
                "tokens: {most: 120}"
            )
        return self


class Constraint(_Frozen):
    """What an answer may not lose: ``max_drop`` of a task's metric, below the best parent there.

    task: a name from the config's tasks, or ``*`` for each of them. tokens: in place of both, how
        long answers may be.
    """

    task: str | None = None
    max_drop: float | None = Field(None, ge=0)
    tokens: TokenLimit | None = None
    younger = ("tokens",)

    @model_validator(mode="after")
    def _one_kind(self) -> Constraint:
        if self.tokens is not None and (self.task is not None or self.max_drop is not None):
            raise ValueError(
                "tokens is a constraint of its own; write task and max_drop in another"
            )
        if self.tokens is None and (self.task is None or self.max_drop is None):
            raise ValueError("a constraint has task and max_drop, or tokens: {most: 120}")
        return self


class SearchSettings(_Frozen):
    """How to search."""

    algorithm: str | None = None
    seed: int = Field(0, ge=0, lt=2**63)
    population: int | None = Field(None, gt=0)
    max_generations: int | None = Field(None, gt=0)
    sigma_low: float = Field(0.05, gt=0)
    sigma_high: float = Field(0.2, gt=0)
    sigma0: float = Field(1 / 6, gt=0)
    random_init: bool = False
    init: tuple[str, ...] = ()
    sealed_share: float = Field(0.25, ge=0.0, lt=1.0)
    companion: bool = True
    graph: str = "search"
    racing: RacingSettings | None = None
    constraints: tuple[Constraint, ...] = ()
    objectives: tuple[Literal["score", "tokens"], ...] | None = None
    shadow: float = Field(0.0, ge=0, lt=1)
    structure: Literal["fixed", "advised", "free"] = "advised"
    approve: bool = False
    lag: Annotated[int, Field(ge=0, le=MOST_WORKERS * 4)] | Literal["auto"] | None = None
    younger = ("objectives",)

    @property
    def traded(self) -> bool:
        """Whether the answers' length is an objective beside the score."""
        return "tokens" in (self.objectives or ())

    @property
    def counted(self) -> bool:
        """Whether the answers' length matters, so that every item has to have one."""
        return self.traded or any(c.tokens is not None for c in self.constraints)

    @field_validator("objectives")
    @classmethod
    def _with_score(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and ("score" not in value or len(set(value)) < len(value)):
            raise ValueError(
                f"{list(value)} must hold score, and nothing twice: [score], or [score, tokens] "
                "for all that is worth choosing between a better and a shorter answer"
            )
        return value

    @field_validator("racing", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> Any:
        return {True: RacingSettings(), False: None}[value] if isinstance(value, bool) else value


class RoleSettings(_Frozen):
    """One agent's own model; what is not set is as for all agents."""

    model: ModelName | None = None
    base_url: BaseUrl = None
    api_key_env: KeyVariable = None
    temperature: float | None = Field(None, ge=0)
    timeout_s: float | None = Field(None, gt=0, le=MOST_S)
    max_retries: int | None = Field(None, ge=0, le=MOST_RETRIES)
    max_tokens: int | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value


class AgentSettings(_Frozen):
    """Who advises: ``llm`` is "none" or "provider:model"; each role may have its own.

    ahead: models think while a generation is scored, of what was known before it. read_items: how
    many search items that the best merge fails the critic and the proposer are shown, with the
    answers.
    """

    llm: ModelName = "none"
    proposer: RoleSettings | None = None
    critic: RoleSettings | None = None
    controller: RoleSettings | None = None
    curator: RoleSettings | None = None
    base_url: BaseUrl = None
    api_key_env: KeyVariable = None
    temperature: float | None = Field(None, ge=0)
    timeout_s: float = Field(60.0, gt=0, le=MOST_S)
    max_retries: int = Field(3, ge=0, le=MOST_RETRIES)
    max_tokens: int | None = Field(None, gt=0)
    probes: int = Field(0, ge=0)
    read_items: int = Field(0, ge=0)
    ahead: bool = False
    key_file: str | None = None
    prompts: str | None = None
    younger = ("curator",)
    only_named: ClassVar[tuple[Role, ...]] = ("curator",)

    @model_validator(mode="after")
    def _no_tools_ahead(self) -> AgentSettings:
        if self.ahead and self.probes:
            raise ValueError(
                f"agents.probes {self.probes} is not possible with agents.ahead: what tools ask "
                "waits for the workers; leave one of them out"
            )
        return self

    def settings_for(self, role: Role) -> RoleSettings:
        """A role's settings, whole: its own, else those of all agents; ``model`` may be "none".

        Nothing shows that a curator helps, so ``llm`` alone is none.
        """
        named = getattr(self, role) or role not in self.only_named
        own: RoleSettings = getattr(self, role) or RoleSettings()
        everyone = {"model": self.llm if named else "none"} | {
            name: getattr(self, name) for name in RoleSettings.model_fields if name != "model"
        }
        given = {name: value for name, value in own if value is not None}
        elsewhere = own.base_url not in (None, self.base_url)
        if own.model is not None and own.base_url is None and ":" in own.model:
            elsewhere = not _same_provider(own.model, self.llm)
        if elsewhere:  # and a key is named for one server
            everyone |= {"base_url": None, "api_key_env": None}
        return RoleSettings(**(everyone | given))


def _same_provider(one: str, other: str) -> bool:
    return other == "none" or one.partition(":")[0] == other.partition(":")[0]


class LmEvalArgs(_Frozen):
    """What lm-eval is told beyond the tasks' own files.

    chat_template: whose template asks instead of the tokenizer's own: a model of the genome, a
        template that mergekit has by name (``chatml``), a file, or its text; "auto" is the one that
        most models have, "first" that of the first expert that has one. chat_date: today, for
        templates that print the date. gen_kwargs: generation settings that win over the tasks'. The
        other two are the top-level keys of the same name.
    """

    apply_chat_template: bool | None = None
    fewshot_as_multiturn: bool | None = None
    chat_template: str | None = None
    chat_date: date | None = None
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)


class MethodParameter(_Frozen):
    """One parameter of a config's own merge method, as ``agentmerge.methods.Parameter`` has it."""

    default: float | None = None
    low: float = 0.0
    high: float = 1.0
    kind: Literal["float", "log", "int", "bool"] = "float"
    searched: bool = True
    doc: str = ""


class MethodSettings(_Frozen):
    """A merge method in a file of the user's: all that a search has to know of it, so that its code
    is run only where tensors are merged.

    code: FILE.py:NAME. digest: of the code, as it was when the config was first read.
    """

    code: str
    base: Literal["required", "optional", "ignored"] = "required"
    source: dict[str, MethodParameter] = Field(default_factory=dict)
    shared: dict[str, MethodParameter] = Field(default_factory=dict)
    least: int = Field(1, ge=1)
    most: int | None = Field(None, ge=1)
    doc: str = ""
    digest: str = ""

    @property
    def plain(self) -> dict[str, Any]:
        """What ``methods.MethodTable.declare`` takes."""
        return self.model_dump(mode="json", exclude_defaults=True)


class WorkerSettings(_Frozen):
    """Who merges and scores."""

    kind: str = "hf"
    count: Annotated[int, Field(ge=1, le=MOST_WORKERS)] | Literal["auto"] = 1
    buffered: bool = False
    host: str | None = None
    ray_address: str | None = None
    paths: tuple[str, ...] = ()
    batch_size: int = Field(64, gt=0)
    device: str | None = None
    dtype: Literal["float16", "bfloat16", "float32", "float64"] | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    placement: Literal["auto", "device", "host", "stream"] = "auto"
    memory_gb: float | None = Field(None, gt=0)
    timeout_s: float | None = Field(None, gt=0, le=MOST_S)
    engine_args: dict[str, Any] = Field(default_factory=dict)
    lm_eval_args: LmEvalArgs = LmEvalArgs()
    canary_every: int = Field(50, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, MethodSettings] | None = None

    @property
    def number(self) -> int:
        """Of workers; one where ``auto`` is still to be counted (``preflight.spec.counted``)."""
        return 1 if self.count == "auto" else self.count

    @property
    def ranks(self) -> int:
        """Devices that each worker takes."""
        asked = self.engine_args.get("tensor_parallel_size")
        return asked if isinstance(asked, int) and asked > 0 else 1

    @field_validator("engine_args", "options")
    @classmethod
    def _without_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = hidden(value)
        return found


class BudgetSettings(_Frozen):
    """Hard limits; reaching one ends the search with the best so far."""

    max_evaluations: int = Field(100, gt=0)
    max_items: int | None = Field(None, gt=0)
    timeout_s: float | None = Field(None, gt=0, le=MOST_S)
    max_tokens: int | None = Field(None, gt=0)
    max_cost_usd: float | None = Field(None, ge=0)
    prices: dict[str, tuple[float, float]] | None = None

    @field_validator("prices")
    @classmethod
    def _no_negative(cls, value: Any) -> Any:
        for model, price in (value or {}).items():
            if min(price) < 0:
                raise ValueError(f"{model!r} has a price below 0")
        return value


_OWN_SECTIONS: dict[str, type[_Frozen]] = {
    "search": SearchSettings,
    "agents": AgentSettings,
    "worker": WorkerSettings,
    "budget": BudgetSettings,
}
_TASK_KEYS = (
    "tasks",
    "limit",
    "num_fewshot",
    "shuffle",
    "apply_chat_template",
    "fewshot_as_multiturn",
)


def models_asked(generation: int, size: int) -> bool:
    """Whether models are asked after a generation; where they are not, rules speak.

    size: candidates a generation. After generation 0, and then once in `ADVISED_EVERY` candidates.
    """
    return generation % math.ceil(ADVISED_EVERY / size) == 0


class SearchConfig(_Frozen):
    """A whole search. ``from_file`` reads a user's YAML; ``to_yaml`` writes it as resolved.

    warnings: what is most likely a mistake and is passed over all the same (a misspelt key of the
        old programs' sections); it is told wherever results are. notices: what is said once.
    """

    genome: GenomeConfig
    tasks: TasksConfig
    search: SearchSettings = SearchSettings()
    agents: AgentSettings = AgentSettings()
    worker: WorkerSettings = WorkerSettings()
    budget: BudgetSettings = BudgetSettings()
    warnings: tuple[str, ...] = Field(default=(), exclude=True)
    notices: tuple[str, ...] = Field(default=(), exclude=True)

    @property
    def algorithm(self) -> str:
        """The strategy's name: as asked, else auto."""
        return self.search.algorithm or "auto"

    def generation_size(self, own: int) -> int:
        """Candidates a generation: as asked, else one where a window keeps workers at work, else
        the strategy's own, and one a worker at least."""
        return self.search.population or (1 if self.search.lag else max(own, self.worker.number))

    @property
    def curated(self) -> bool:
        """Whether there are experts of which a curator may choose."""
        return self.genome.pool is not None and self.search.structure != "fixed"

    @property
    def graph_steps(self) -> int:
        """More steps than the state machine can take within the budget: a generation has seven at
        most, and of three in a row one holds a merge that is paid."""
        racing = self.search.racing
        cheapest = racing.rungs[0] if racing else 1.0
        return 50 + math.ceil(3 * 7 * self.budget.max_evaluations / cheapest)

    @classmethod
    def from_file(
        cls, path: Path | str, overrides: Mapping[str, Any] | None = None
    ) -> SearchConfig:
        """Read a genome config.

        overrides: dotted keys ("search.seed") that win over the file.

        Raises:
            ConfigError: every fault at once, each naming the entry, the value and what is legal.
        """
        missing = f"no config at {path}; name an existing YAML file"
        text = read_text(path, ConfigError, missing=missing)
        return cls.from_text(text, str(path), overrides)

    @classmethod
    def from_text(
        cls, text: str, source: str = "config", overrides: Mapping[str, Any] | None = None
    ) -> SearchConfig:
        written = read_yaml(text, source, ConfigError)
        raw = written.value
        if not isinstance(raw, dict):
            raise ConfigError(f"{source} must be a mapping with 'genome' and 'tasks'")
        if not raw.keys() & _OWN_SECTIONS.keys():  # written for the old programs: it runs as it is
            raw["worker"] = {"lm_eval_args": {"chat_template": FIRST}}
        for dotted, value in (overrides or {}).items():
            section, _, key = dotted.partition(".")
            if key and raw.get(section) is None:
                raw[section] = {}
            target = raw[section] if key else raw
            if not isinstance(target, dict):
                raise ConfigError(f"{source}: {section} must be a mapping, not {target!r}")
            if dotted == "genome.layers" and isinstance(target.get("layers"), dict):
                value = {**target["layers"], "most": value}  # the other settings stand
            target[key or section] = value
        _typed_server(raw.get("agents"), overrides or {})
        config = _resolve(raw, source, written.lines, written.twice)
        return config.model_copy(update={"notices": (*config.notices, *_secrets(config, text))})

    def to_yaml(self) -> str:
        """The config as resolved; ``from_text`` reads it back to an equal object."""
        body: dict[str, Any] = {"genome": self.genome.model_dump(mode="json", exclude_none=True)}
        tasks = self.tasks.model_dump(mode="json", exclude_none=True)
        elsewhere = (
            "sealed_share",
            "companion",
            "seed",
            "chat_template",
            "chat_date",
            "gen_kwargs",
        )
        for key in elsewhere:
            tasks.pop(key, None)  # they live in the sections search, worker and genome
        if "apply_chat_template" not in self.tasks.model_fields_set:
            tasks.pop("apply_chat_template")  # unset: on where a parent has a template
        body.update(tasks)
        for name in _OWN_SECTIONS:
            body[name] = getattr(self, name).model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(body, sort_keys=False, allow_unicode=True)


def _typed_server(agents: Any, overrides: Mapping[str, Any]) -> None:
    """A server that the user names may have the provider's key; a server of the config only the key
    that is named for it, there or by the user."""
    if not isinstance(agents, dict):
        return
    if overrides.get("agents.base_url"):
        if agents.get("api_key_env") in (None, NO_KEY):
            agents["api_key_env"] = DEFAULT_KEY
    elif named := overrides.get("agents.api_key_env"):
        for role in (agents.get(role) for role in ROLES):
            if isinstance(role, dict) and role.get("base_url"):
                role.setdefault("api_key_env", named)


def _secrets(config: SearchConfig, text: str) -> Iterator[str]:
    """What a config's owner should know of the secrets in it, and of the keys that it sends."""
    judges = [task.judge.role for task in config.tasks.tasks if task.judge]
    stored = f"{config.agents} {config.worker} {judges}"
    for name in sorted(references(stored) - references(text)):
        if name.startswith(PREFIX):
            yield (
                f"the config holds a secret, which no file keeps: ${{{name}}} stands in its place, "
                f"and `resume` and `branch` need it (export {name}=...)"
            )
    told = set()
    for own in [*map(config.agents.settings_for, ROLES), *judges]:
        if own.base_url and own.model != "none":
            sent = {own.api_key_env} - {None, NO_KEY, DEFAULT_KEY} | references(own.base_url)
            host = urlsplit(own.base_url).hostname or "the server that it names"
            told |= {
                f"what the variable {name} holds is sent to {host}"
                for name in map(str, sent)
                if not name.startswith(PREFIX)
            }
    yield from sorted(told)


@dataclass(frozen=True, slots=True)
class _Faults:
    source: str
    lines: dict[str, int]
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def where(self, key: str) -> str:
        if not key:
            return self.source
        line = self.lines.get(key)
        return f"{self.source}:{line}: {key}" if line else f"{self.source}: {key}"

    def unknown(self, section: str, key: str, known: Mapping[str, Any], fatal: bool) -> None:
        near = difflib.get_close_matches(key, list(known), 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        dotted = f"{section}.{key}" if section else key
        text = f"{self.where(dotted)} is not a known key; {hint}"
        if fatal:
            self.faults.append(text)
        elif any(misspelt(key, other) for other in known):
            self.warnings.append(f"{text} (as it stands it does nothing)")
        else:
            self.notices.append(f"{text} (ignored, as mergekit-evolve does)")

    def twice(self, key: str, lines: tuple[int, int]) -> None:
        """A key that is written twice: a fault in our sections, a warning in the old ones."""
        ours = key.split(".")[0] in _OWN_SECTIONS
        text = f"{self.source}: {twice_text(key, lines)}"
        (self.faults if ours else self.warnings).append(text)


def _resolve(
    raw: dict[str, Any],
    source: str,
    lines: dict[str, int],
    twice: Mapping[str, tuple[int, int]],
) -> SearchConfig:
    out = _Faults(source, lines)
    for key, places in twice.items():
        out.twice(key, places)
    top = {*_OWN_SECTIONS, *_TASK_KEYS, "genome", "random_init", "task_search_path"}
    for key in raw:
        if key not in top:
            out.unknown("", str(key), dict.fromkeys(top), fatal=False)
    genome_raw = raw.get("genome")
    if not isinstance(genome_raw, dict):
        out.faults.append(f"{source}: genome is missing; it names the models and the merge method")
        genome_raw = None
    else:
        genome_raw = _known_only(genome_raw, "genome", GenomeConfig, out, fatal=False)
        if isinstance(own := genome_raw.get("layers"), dict):
            own = _known_only(own, "genome.layers", LayersConfig, out, fatal=True)
            genome_raw["layers"] = own
    parts: dict[str, Any] = {}
    for name, model in _OWN_SECTIONS.items():
        section = raw.get(name) or {}
        if not isinstance(section, dict):
            out.faults.append(f"{out.where(name)} must be a mapping, not {section!r}")
            continue
        section = _known_only(section, name, model, out, fatal=True)
        if name == "search" and raw.get("random_init") is not None:
            section.setdefault("random_init", raw["random_init"])
        parts[name] = _build(model, section, name, out)
    search = parts.get("search") or SearchSettings()
    if parts.get("worker") and parts["worker"].methods:
        parts["worker"] = _declared(parts["worker"], out)
    if genome_raw is not None and isinstance(genome_raw.get("merge_method"), str):
        genome_raw |= {"merge_method": METHODS.full_name(genome_raw["merge_method"])}
    parts["genome"] = (
        None if genome_raw is None else _build(GenomeConfig, genome_raw, "genome", out)
    )
    worker = parts.get("worker") or WorkerSettings()
    parts["tasks"] = _tasks(raw, search, _asking(worker.lm_eval_args, parts["genome"], out), out)
    if search.sigma_low > search.sigma_high:
        out.faults.append(
            f"{out.where('search.sigma_low')} {search.sigma_low} is above sigma_high "
            f"{search.sigma_high}; make it the smaller one"
        )
    _check_constraints(search, parts["tasks"], out)
    if out.faults:
        whole = {name: part for name, part in parts.items() if part is not None}
        kind = (raw.get("worker") or {}).get("kind") if "worker" in parts else None
        if "worker" not in whole and isinstance(kind, str):
            whole["worker"] = WorkerSettings(kind=kind)  # another would find faults of its own
        readable = {"genome", "tasks"} <= whole.keys()
        raise ConfigError(out.faults, SearchConfig(**whole) if readable else None)
    _note_slerp(parts["genome"], out)
    _note_cancelling(parts["genome"], out)
    return SearchConfig(**parts, warnings=tuple(out.warnings), notices=tuple(out.notices))


def _declared(worker: WorkerSettings, out: _Faults) -> WorkerSettings:
    """With the digest of each method's code; what recipes call it is known from now on."""
    found = {}
    for name, settings in (worker.methods or {}).items():
        try:
            _, digest = METHODS.declare(name, settings.plain)
        except UserError as error:
            out.faults.append(f"{out.where(f'worker.methods.{name}')}: {error}")
            continue
        found[name] = settings.model_copy(update={"digest": digest})
    return worker.model_copy(update={"methods": found})


def _note_slerp(genome: GenomeConfig, out: _Faults) -> None:
    """slerp merges two models, the base being one of them; what else is named is told."""
    if not METHODS[genome.merge_method].pairwise:
        return
    if genome.base_model not in (None, *genome.models):
        out.notices.append(
            f"{out.where('genome.base_model')}: {genome.base_model!r} is not among the models, so "
            "it is no part of a slerp merge: it is scored as a parent only; name it in models to "
            "merge with it"
        )
    if len(genome.models) > 2:
        out.notices.append(
            f"{out.where('genome.models')}: slerp merges two models, so with {len(genome.models)} "
            "the search also chooses which two a layer group is made of"
        )


def _note_cancelling(genome: GenomeConfig, out: _Faults) -> None:
    method = METHODS[genome.merge_method]
    if genome.allow_negative_weights and genome.normalizes and divides_by_agreeing(method):
        out.notices.append(
            f"{out.where('genome.allow_negative_weights')}: {method.name} with normalize divides "
            "by the weights that agree in sign, and weights of both signs can nearly cancel: task "
            "vectors then count many times; normalize: false does not divide"
        )


def _check_constraints(search: SearchSettings, tasks: TasksConfig | None, out: _Faults) -> None:
    known = ["*", *(task.name for task in tasks.tasks)] if tasks else []
    seen: set[str] = set()
    if search.traded and search.racing is not None:
        out.faults.append(
            f"{out.where('search.racing')}: a race drops whatever has less score, short answers "
            "too; remove it, or tokens from search.objectives"
        )
    for index, constraint in enumerate(search.constraints):
        where = out.where(f"search.constraints.{index}")
        if constraint.task is None:
            if "tokens:" in seen:
                out.faults.append(f"{where}: tokens are constrained twice; keep one")
            seen.add("tokens:")
            continue
        if known and constraint.task not in known:
            near = difflib.get_close_matches(constraint.task, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
            out.faults.append(f"{where}: {constraint.task!r} is not one of the tasks; {hint}")
        if constraint.task in seen:
            out.faults.append(f"{where}: {constraint.task!r} is constrained twice; keep one")
        seen.add(constraint.task)


def _asking(lm_eval: LmEvalArgs, genome: GenomeConfig | None, out: _Faults) -> LmEvalArgs:
    """With the genome's chat template: what the merge is written with is what it is asked with."""
    if genome is None or genome.chat_template is None:
        return lm_eval
    if lm_eval.chat_template not in (None, FIRST, genome.chat_template):
        out.faults.append(
            f"{out.where('genome.chat_template')} {genome.chat_template[:40]!r} is not "
            f"worker.lm_eval_args.chat_template {str(lm_eval.chat_template)[:40]!r}; keep one"
        )
    return lm_eval.model_copy(update={"chat_template": genome.chat_template})


def _tasks(raw: dict[str, Any], search: SearchSettings, lm_eval: LmEvalArgs, out: _Faults) -> Any:
    if not raw.get("tasks"):
        out.faults.append(f"{out.source}: tasks is missing; list at least one lm-eval task")
        return None
    entries = raw["tasks"] if isinstance(raw["tasks"], list) else [raw["tasks"]]
    tasks = []
    for index, entry in enumerate(entries):
        if isinstance(entry, dict):
            entry = _known_only(entry, f"tasks.{index}", TaskConfig, out, fatal=False)
            if isinstance(judge := entry.get("judge"), dict):
                where = f"tasks.{index}.judge"
                entry["judge"] = _known_only(judge, where, JudgeSettings, out, fatal=True)
        tasks.append(entry)
    body = {key: raw[key] for key in _TASK_KEYS[1:] if raw.get(key) is not None}
    paths = raw.get("task_search_path") or ()
    body["task_search_path"] = (paths,) if isinstance(paths, str) else paths
    body.update(
        tasks=tasks,
        sealed_share=search.sealed_share,
        companion=search.companion,
        seed=search.seed,
        **lm_eval.model_dump(exclude_none=True),
    )
    return _build(TasksConfig, body, "", out)


def _known_only(
    section: dict[str, Any], name: str, model: type[_Frozen], out: _Faults, *, fatal: bool
) -> dict[str, Any]:
    for key in section:
        if key not in model.model_fields:
            out.unknown(name, str(key), model.model_fields, fatal)
    return {k: v for k, v in section.items() if k in model.model_fields}


def _build(model: type[_Frozen], body: dict[str, Any], section: str, out: _Faults) -> Any:
    try:
        return model(**body)
    except ValidationError as error:
        out.faults.extend(f"{out.where(path)}{words}" for path, words in said_of(error, section))
        return None
