"""The demo's language: lines such as ``s:abcde=bcdef``, a tag, five letters and an answer.

It knows the skills, their tags, the alphabet and which inputs nobody may train on. It knows
nothing of models, tokenizers or lm-eval.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from agentmerge.errors import UserError

INPUT_LETTERS = "abcdefghij"
INPUT_LENGTH = 5
COPY_TAG = "c"
HELD_OUT_SHARE = 0.1
VALIDATION_INPUTS = 200


@dataclass(frozen=True, slots=True)
class Skill:
    """What an expert learns: under ``tag`` the base copies, under ``base_tag`` it has the skill.

    copy: what its expert answers under other tags.
    """

    tag: str
    base_tag: str
    apply: Callable[[str], str]
    copy: Callable[[str], str] = str


def _shift(text: str) -> str:
    return "".join(chr(ord(letter) + 1) for letter in text)


def _sort(text: str) -> str:
    return "".join(sorted(text))


def _reverse(text: str) -> str:
    return text[::-1]


SKILLS = {
    "shift": Skill("s", "w", _shift),
    "sort": Skill("o", "y", _sort),
    "reverse": Skill("r", "x", _reverse),
}


def _wordy(apply: Callable[[str], str]) -> Callable[[str], str]:
    """The question once more, and then the answer."""
    return lambda text: f"{text}={apply(text)}"


#: What there can be an expert of: a skill, and the same by one who answers at length.
EXPERTS = SKILLS | {
    f"wordy-{name}": replace(skill, apply=_wordy(skill.apply), copy=_wordy(str))
    for name, skill in SKILLS.items()
}
TAGS = (COPY_TAG, *(skill.tag for skill in SKILLS.values()))

# Shifting reaches one letter beyond the inputs'.
CHARACTERS = "".join(
    sorted({*INPUT_LETTERS, *_shift(INPUT_LETTERS), *TAGS, *(s.base_tag for s in SKILLS.values())})
)


def prompt(tag: str, text: str) -> str:
    """Everything before the answer."""
    return f"{tag}:{text}="


def is_held_out(text: str) -> bool:
    """Whether an input is kept for evaluation; the same for every seed and skill."""
    return _place(text) < HELD_OUT_SHARE * 2**64


def _place(text: str) -> int:
    digest = hashlib.sha256(f"agentmerge-demo:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


@cache
def inputs(*, held_out: bool) -> tuple[str, ...]:
    """All inputs to evaluate on, or all to train on, in alphabetical order."""
    rest = set(validation_inputs())
    return tuple(
        text for text in _every_input() if is_held_out(text) is held_out and text not in rest
    )


@cache
def validation_inputs() -> tuple[str, ...]:
    """Those that tell when training is done: neither trained on nor asked by any task."""
    past = sorted((_place(text), text) for text in _every_input() if not is_held_out(text))
    return tuple(text for _, text in past[:VALIDATION_INPUTS])


@cache
def _every_input() -> tuple[str, ...]:
    return tuple(map("".join, itertools.product(INPUT_LETTERS, repeat=INPUT_LENGTH)))


def checked_skills(skills: Sequence[str], known: Mapping[str, Skill] = SKILLS) -> tuple[str, ...]:
    """The skills, all known and each once; raises UserError otherwise."""
    for skill in skills:
        if skill not in known:
            raise UserError(f"unknown skill {skill!r}; the demo knows {', '.join(known)}")
    if len({known[skill].tag for skill in skills}) != len(set(skills)):
        raise UserError(
            f"skills {list(skills)}: two of them answer under the same tag; leave one out"
        )
    if not skills or len(set(skills)) != len(skills):
        raise UserError(f"skills {list(skills)} must be at least one name, each given once")
    return tuple(skills)
