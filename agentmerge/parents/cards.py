"""What a parent's model card says of itself in its metadata: licence, languages, what it came from.

The card is the ``README.md`` beside the weights, and its metadata the YAML between two lines of
dashes at its top, as the Hub reads it. Others wrote it: values are cut to short plain words, and a
card that cannot be read says nothing. Of licences this knows names and a few families of terms; it
is no lawyer, and says where somebody has to read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmerge.errors import ParentError
from agentmerge.parents.sources import CARD, Parent
from agentmerge.system.bounded import read_text
from agentmerge.system.yaml_text import read_yaml

#: Of a value and of a list in the metadata.
_LONGEST, _MOST = 60, 6
_ODD = re.compile(r"[^\w.+:/@ -]+")
#: Of a card's text: what is no sentence -> what stands in its place.
_MARKUP = (
    (re.compile(r"(?s)```.*?(```|\Z)|<!--.*?(-->|\Z)"), " "),
    (re.compile(r"!\[[^\]]{0,300}\]\([^)]{0,300}\)|<[^<>]{0,300}>|https?://\S+"), " "),
    (re.compile(r"\[([^\]]{0,300})\]\([^)]{0,300}\)"), r"\1"),
    (re.compile(r"[^\w.,:;+%/()'\" -]+"), " "),
)
_WORD = re.compile(r"\w")
#: Characters of a card's text that are looked at.
_READ = 20_000
#: Names of the Hub that name no licence.
_UNSAID = ("unknown", "none", "null", "other", "")
#: What is in a licence's name -> what its terms ask of whoever publishes a merge.
_TERMS = (
    (re.compile(r"(^|-)nc(-|$)|non-?commercial|research"), "no commercial use"),
    (re.compile(r"(^|-)nd(-|$)"), "no derivatives, and a merge is one"),
    (re.compile(r"(^|-)sa(-|$)|gpl"), "what is made of it keeps this licence"),
    (re.compile(r"^(llama|gemma|qwen|deepseek|openrail|.*openrail|bigscience|falcon)"),
     "terms of its own, of use and of naming"),
)  # fmt: skip
_SHARE_ALIKE = _TERMS[2][1]


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What one card's metadata says; "" and () where it says nothing, or there is no card."""

    licence: str = ""
    languages: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Licence:
    """The licence that a parent's card names, "" where it names none. terms: what it asks."""

    model: str
    name: str
    terms: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """The model, without the folders of one machine."""
        return self.model.rstrip("/").rpartition("/")[2]


def card_of(folder: Path) -> CardFacts:
    """What the card beside a model or an adapter says."""
    try:
        text = read_text(folder / CARD, ParentError)
        head, closing = text.removeprefix("---\n"), "\n---"
        if head == text or closing not in head:
            return CardFacts()
        body = read_yaml(head.partition(closing)[0], CARD, ParentError).value
    except ParentError:
        return CardFacts()
    if not isinstance(body, Mapping):
        return CardFacts()
    licence = _words(body.get("license"))
    named = _words(body.get("license_name"))
    said = licence[0].casefold() if licence else ""
    return CardFacts(
        named[0].casefold() if named and said in _UNSAID else said if said not in _UNSAID else "",
        _words(body.get("language")),
        _words(body.get("base_model")),
        _words(body.get("datasets")),
    )


def card_text(folder: Path, most: int) -> str:
    """The beginning of what the card says below its metadata, as one plain line: no markup, no
    links, no code, and nothing that a chat template takes for a turn of its own."""
    try:
        text = read_text(folder / CARD, ParentError)
    except ParentError:
        return ""
    if text.startswith("---\n"):
        text = text.partition("\n---")[2]
    text = text[:_READ]
    for pattern, instead in _MARKUP:
        text = pattern.sub(instead, text)
    text = " ".join(word for word in text.split() if _WORD.search(word))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def cards_of(parent: Parent) -> CardFacts:
    """What the cards of a parent say: an adapter's own, and its model's licence beside it."""
    model = card_of(parent.model)
    if parent.adapter is None:
        return model
    own = card_of(parent.adapter)
    both = dict.fromkeys([own.licence or "not named", model.licence or "not named"])
    licence = "" if not own.licence and not model.licence else "+".join(both)
    return CardFacts(licence, own.languages or model.languages, own.base_models, own.datasets)


def licences_of(parents: Iterable[Parent]) -> tuple[Licence, ...]:
    """The licence of each model and each adapter, once."""
    found: dict[str, Licence] = {}
    for parent in parents:
        name, _, adapter = parent.name.partition("+") if parent.adapter else (parent.name, "", "")
        folders = {name: parent.model} | ({adapter: parent.adapter} if parent.adapter else {})
        for model, folder in folders.items():
            licence = card_of(folder).licence
            found[model] = Licence(model, licence, _terms(licence))
    return tuple(found.values())


def licence_notes(licences: Iterable[Licence]) -> list[str]:
    """Where licences conflict, differ or are missing: a sentence each; none where all are one."""
    licences = list(licences)
    missing = [one.owner for one in licences if not one.name]
    names = list(dict.fromkeys(one.name for one in licences if one.name))
    found = []
    if missing:
        found.append(f"no card here names a licence of {', '.join(missing)}: read its page")
    for one in licences:
        found += [f"{one.name} of {one.owner}: {term}" for term in one.terms]
    sharing = list(dict.fromkeys(one.name for one in licences if _SHARE_ALIKE in one.terms))
    if sharing and len(names) > 1:
        others = ", ".join(name for name in names if name != sharing[0])
        found.append(
            f"{sharing[0]} wants to be the licence of what is made of it, and others are {others}: "
            "they may not fit together, so read them before you publish"
        )
    elif len(names) > 1:
        found.append(f"the licences differ ({', '.join(names)}): read them before you publish")
    return list(dict.fromkeys(found))


def _terms(licence: str) -> tuple[str, ...]:
    return tuple(term for pattern, term in _TERMS if pattern.search(licence))


def _words(value: Any) -> tuple[str, ...]:
    """Short plain words out of what a card may say: a text, or a list of texts."""
    values = value if isinstance(value, list) else [value]
    cut = (_ODD.sub(" ", v).strip()[:_LONGEST] for v in values if isinstance(v, str))
    return tuple(word for word in cut if word)[:_MOST]
