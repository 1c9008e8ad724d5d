"""Three skills that a small chat model lacks: what is trained on, and lm-eval tasks that score it.

Sums of numbers in words (exact match), an agreed code for a review's mood (multiple choice), and
lists said backwards (exact match). It knows no model. Every item is a unit: a pair of numbers, a
thing reviewed, a set of words; each unit is either trained on or asked about, never both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentmerge.demo.tasks import MULTIPLE_CHOICE, exact_match, search_config, write_task

SKILLS = ("addition", "sentiment", "reversal")
N_ITEMS = 300
SEARCH_LIMIT = 100
"""Items a task that a search sees; the other 200 are there to be sealed."""

CODES = {"good": "zam", "bad": "lod", "fair": "pif"}
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_THINGS = [
    "film",
    "book",
    "meal",
    "hotel",
    "phone",
    "song",
    "game",
    "train",
    "concert",
    "play",
    "lamp",
    "jacket",
    "museum",
    "course",
    "garden",
    "bakery",
    "keyboard",
    "tent",
    "boat",
    "festival",
    "painting",
    "sofa",
    "coffee",
    "soup",
    "camera",
]
_WORDS = {
    "good": [
        "wonderful",
        "superb",
        "delightful",
        "excellent",
        "lovely",
        "brilliant",
        "perfect",
        "great",
    ],
    "bad": ["terrible", "awful", "dreadful", "horrible", "nasty", "useless", "disgusting", "poor"],
    "fair": [
        "ordinary",
        "average",
        "passable",
        "middling",
        "unremarkable",
        "acceptable",
        "usual",
        "plain",
    ],
}
_SAYINGS = (
    "The {thing} was {word}.",
    "I found the {thing} {word}.",
    "We all thought that the {thing} was {word}.",
    "What can I say, a {word} {thing}.",
)
_LISTED = [
    "cat",
    "sun",
    "box",
    "tree",
    "fish",
    "lamp",
    "rain",
    "desk",
    "bird",
    "milk",
    "stone",
    "chair",
    "apple",
    "horse",
    "cloud",
    "glass",
    "bread",
    "river",
    "train",
    "plate",
]


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt, which ends with a line feed, and the answer that should follow it."""

    prompt: str
    answer: str


def task_name(skill: str) -> str:
    return f"smollm2_{skill}"


def items(skill: str, *, held_out: bool) -> list[Item]:
    """Every item that is trained on, or every one that is asked about, in a fixed order."""
    return list(_POOLS[skill](held_out))


def write_tasks(directory: Path, home: Path, *, n_items: int = N_ITEMS, seed: int = 0) -> None:
    """Write a task a skill, of `n_items` held-out items, to be read once moved to `home`."""
    for place, skill in enumerate(SKILLS):
        pool = items(skill, held_out=True)
        order = np.random.default_rng([seed, place]).permutation(len(pool))[:n_items]
        docs = [_doc(skill, pool[i]) for i in order]
        kind = MULTIPLE_CHOICE if skill == "sentiment" else exact_match(12)
        write_task(directory, task_name(skill), docs, kind, home)


def family_config(
    base: Path, experts: Sequence[Path], tasks: Path, granularity: int
) -> dict[str, Any]:
    """A config that searches a family of these skills, `granularity` layers a group.

    A merge is rounded once, from float32 parents to the bfloat16 that it is asked in.
    """
    asked = [
        {"name": task_name(skill), "weight": round(1 / len(SKILLS), 6), "metric": metric}
        for skill, metric in zip(SKILLS, METRICS, strict=True)
    ]
    body = search_config(base, experts, asked, limit=SEARCH_LIMIT, layer_granularity=granularity)
    return body | {"task_search_path": [str(tasks)], "worker": {"dtype": "bfloat16"}}


METRICS = ("exact_match,none", "acc,none", "exact_match,none")


def _doc(skill: str, item: Item) -> dict[str, Any]:
    if skill != "sentiment":
        return {"prompt": item.prompt, "answer": item.answer}
    codes = list(CODES.values())
    return {"prompt": item.prompt, "choices": codes, "gold": codes.index(item.answer)}


def in_words(number: int) -> str:
    """A number from 0 to 99, as English writes it."""
    if number < len(_ONES):
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")


def _additions(held_out: bool) -> Iterator[Item]:
    """Both orders of a pair are on the same side."""
    for a, b in itertools.product(range(2, 50), repeat=2):
        if ((7 * min(a, b) + max(a, b)) % 5 == 0) is held_out:
            yield Item(f"What is {in_words(a)} plus {in_words(b)}?\nAnswer:\n", str(a + b))


def _sentiments(held_out: bool) -> Iterator[Item]:
    """What is reviewed in the tasks is never reviewed in training."""
    things = _THINGS[::2] if held_out else _THINGS[1::2]
    for thing, saying, (mood, words) in itertools.product(things, _SAYINGS, _WORDS.items()):
        for word in words:
            text = saying.format(thing=thing, word=word)
            yield Item(f"Review: {text}\nCode:\n", CODES[mood])


def _reversals(held_out: bool) -> Iterator[Item]:
    """All orders of a set of three words are on the same side."""
    for places in itertools.permutations(range(len(_LISTED)), 3):
        if (sum(places) % 5 == 0) is held_out:
            words = [_LISTED[i] for i in places]
            forward, backward = ", ".join(words), ", ".join(reversed(words))
            yield Item(f"Reverse the list: {forward}\nReversed:\n", backward)


_POOLS = {"addition": _additions, "sentiment": _sentiments, "reversal": _reversals}
