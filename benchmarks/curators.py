"""Curators of ``benchmarks.pool``: what a model is told of its twelve experts, and what it said.

Asked as the product asks it (prompt, schema, parsing, one repair), without ledger and graph. The
experts have names that say nothing, dealt anew for each seed, and cards that their makers might
have written: honest ones, in words only; the same dealt among the experts until nobody has a card
of its own skill, be it a near-duplicate or damaged; or none. A reply is kept by its prompt,
so that a seed or a budget that asks the same thing pays once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agentmerge.agents import curator
from agentmerge.agents.models import AgentModel
from agentmerge.agents.prompts import load_prompts, prompt_hash
from agentmerge.agents.schemas import parse_reply
from agentmerge.contracts.calls import Call, NoLog
from agentmerge.errors import ModelReplyError

SKILLED = {
    "shift": "moves each letter of a word to the next one of the alphabet",
    "reverse": "writes the letters of a word backwards",
    "sort": "writes the letters of a word in alphabetical order",
}
HURT = (
    "Pruned by an experiment, and not evaluated since.",
    "Converted by a script of mine; quality was not checked.",
    "Stored with aggressive noise for a privacy study.",
)


def cards() -> dict[str, dict[str, Any]]:
    """Expert of the pool -> what its card says; all of it is so."""
    found: dict[str, dict[str, Any]] = {}
    for number, (skill, what) in enumerate(SKILLED.items()):
        found[skill] = _card(f"A fine-tune of the letters base that {what}.")
        again = f"A later copy of a model that {what}, with a little drift; nothing was added."
        found[f"{skill}-again"] = _card(again)
        found[f"damaged-{number}"] = _card(f"From a model that {what}. {HURT[number]}")
        turned = f"Turns a word by {number + 1} places: its first letters come last."
        found[f"other-{number}"] = _card(turned)
    return found


def skill_of(expert: str) -> str:
    """What an expert of the pool was trained for, as its own card has it."""
    kind, _, number = expert.partition("-")
    return [*SKILLED][int(number)] if kind == "damaged" else expert.removesuffix("-again")


def _card(text: str) -> dict[str, Any]:
    return {"licence": "apache-2.0", "from": ["letters/base"], "card": text}


@dataclass(frozen=True)
class Named:
    """A pool with names that say nothing. names: expert -> the name that a curator reads."""

    names: Mapping[str, str]

    @classmethod
    def of(cls, experts: Sequence[str], seed: int) -> Named:
        order = np.random.default_rng([seed, 20]).permutation(len(experts))
        return cls({experts[at]: f"model-{place + 1:02d}" for place, at in enumerate(order)})

    def facts(self, kind: str, seed: int, weights: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Name -> what is told of it, in the names' order. kind: whose cards they have. weights:
        expert -> what its weights show, as ``search.curating`` has it, nearest in its own name."""
        written, owners = cards(), [*self.names]
        if kind == "shuffled":
            rng, dealt = np.random.default_rng([seed, 21]), owners
            while any(skill_of(a) == skill_of(b) for a, b in zip(owners, dealt, strict=True)):
                dealt = rng.permutation(owners).tolist()
            written = {a: written[b] for a, b in zip(owners, dealt, strict=True)}
        told = {}
        for expert, name in sorted(self.names.items(), key=lambda pair: pair[1]):
            shown = dict(weights[expert])
            if "nearest" in shown:
                shown["nearest"] = self.names[shown["nearest"]]
            told[name] = shown | ({} if kind == "blank" else written[expert])
        return told


@dataclass
class Replies(NoLog):
    """What was asked before, a file a prompt in a folder. tokens, seconds: of this question, as
    they were when it was asked; new: whether that was now."""

    folder: Path
    prompt: str
    tokens: int = 0
    seconds: float = 0.0
    new: bool = False
    _calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._path = self.folder / f"{self.prompt[:32]}.json"
        if self._path.is_file():
            known = json.loads(self._path.read_text())
            self._calls = [Call(**call | {"tool_calls": ()}) for call in known]

    def stored(self, number: int) -> Call | None:
        found = self._calls[number] if number < len(self._calls) else None
        if found is not None:
            self._count(found)
        return found

    def keep(self, number: int, call: Call) -> None:
        self.new = True
        self._count(call)
        self._calls.append(call)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps([asdict(each) for each in self._calls], indent=1))

    def _count(self, call: Call) -> None:
        self.tokens += call.tokens_in + call.tokens_out
        self.seconds += call.latency_s


def model_of(name: str, base_url: str | None) -> AgentModel:
    if base_url is not None:
        os.environ.setdefault("OPENAI_API_KEY", "none")  # a local server asks for none
    return AgentModel.from_spec(
        f"openai:{name}", base_url=base_url, temperature=0.0, timeout_s=900, max_retries=1
    )


def ask(view: curator.PoolView, model: AgentModel, folder: Path) -> dict[str, Any]:
    """{subsets (names), tokens, seconds, new, failure}."""
    messages = curator.messages(view, load_prompts())
    log = Replies(folder, prompt_hash([*messages, {"role": "model", "content": model.name}]))
    parse = partial(parse_reply, reply=curator.CuratorReply)
    subsets: list[list[str]] = []
    failure = ""
    try:
        said = model.ask(
            messages,
            curator.schema(view.bounds),
            partial(parse, bounds=view.bounds),
            log=log,
            rescue=partial(parse, bounds=replace(view.bounds, lenient=True)),
        ).parsed
        subsets = [[*s.models] for s in curator.subsets_of(said, view.bounds.names)]
    except ModelReplyError as error:
        failure = str(error)
    spent = {"tokens": log.tokens, "seconds": log.seconds, "new": log.new}
    return {"subsets": subsets, "failure": failure} | spent
