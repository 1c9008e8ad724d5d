"""A reader of rules: what is wrong with an answer, from the same words that an agent is shown.

It knows faults of form (cut off, refused, repeated, ...), not knowledge: an answer that is well
formed and not right is "wrong". How many it names is measured (``benchmarks.failures``).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

#: Fault -> how a sentence counts it.
FAULTS: dict[str, str] = {
    "empty": "empty",
    "template": "with special tokens or turns of a chat in it",
    "repeats": "repeating itself",
    "refusal": "a refusal",
    "format": "right in another format",
    "extra": "right with words around it",
    "cut_off": "cut off",
    "language": "in another language",
    "other_item": "the answer to an item beside it",
    "wrong": "just another answer",
    "none": "without a fault",
}


@dataclass(frozen=True, slots=True)
class FailingItem:
    """One item and the answer to it. Each text is as an agent may see it: cut.

    right: "" where nobody said. answer: of a conversation every turn's. reason: a judge's or a
    program's, why it took points off. cut_off: the answer ended at its length limit. generated: it
    is words of the model, not a choice of given ones.
    """

    task: str
    index: int
    asks: str
    right: str
    answer: str
    reason: str = ""
    cut_off: bool = False
    generated: bool = True


def unspecial(text: str) -> str:
    """The text with a blank in each special token of a chat: to a server it is a word as others,
    and ends nobody's turn."""
    return _SPECIAL.sub(lambda found: f"{found[0][0]} {found[0][1:].lstrip()}", text)


def fault_of(item: FailingItem, rights: Mapping[tuple[str, int], str]) -> str:
    """A key of ``FAULTS``. rights: (task, number) -> what is right, of items beside it."""
    text, gold = item.answer, _core(item.right)
    if not re.search(r"\w", text):
        return "empty"
    if _TEMPLATE.search(text):
        return "template"
    if _repeats(text):
        return "repeats"
    if gold and _core(text) == gold:
        return "none"
    exact = bool(gold) and len(gold.split()) <= _EXACT_WORDS
    if exact and (how := _holds(text, gold, begun=item.cut_off)):
        return "language" if how == "extra" and _another_language(item) else how
    if _REFUSAL.search(text[:200]):
        return "refusal"
    if _another_language(item):
        return "language"
    if item.cut_off:
        return "cut_off"
    beside = (_core(rights.get((item.task, item.index + step), "")) for step in (-1, 1))
    if exact and any(other and _plain(text) == _plain(other) for other in beside):
        return "other_item"
    return "wrong"


#: A longer text is a reference, not the only right answer.
_EXACT_WORDS = 12
#: Letters of a right answer, and a space on each side, that may stand in a text by chance.
_SHORT = 5
#: What servers read as special tokens wherever it stands; also with the blank of ``unspecial``.
_TOKEN = (
    r"< ?[|｜][^|｜<>\n]{1,40}[|｜]>|< ?(?:start|end)_of_turn>|\[ ?/?INST\]"
    r"|\[ ?/?(?:SYSTEM_PROMPT|TOOL_RESULTS|AVAILABLE_TOOLS)\]|\[ ?TOOL_CALLS\]"
    r"|< ?</?SYS>>|< ?/?s>|< ?(?:pad|unk|bos|eos)>"
)
_SPECIAL = re.compile(_TOKEN, re.IGNORECASE)
_TEMPLATE = re.compile(
    rf"{_TOKEN}|^(?:user|assistant|human|system)\s*(?::|$)|^(?:question|q)\s*:"
    r"|^#+ *(?:instruction|response|input)\b",
    re.IGNORECASE | re.MULTILINE,
)
_REFUSAL = re.compile(
    r"\b(?:I(?:'m| am) (?:sorry|unable|not able)|I (?:can(?:no|')t|won't|will not|must decline)"
    r"|as an (?:AI|language model)|(?:not|un)able to (?:help|assist|answer))"
    r"|죄송|할 수 없|도와드릴 수 없|抱歉|无法|申し訳|できません",
    re.IGNORECASE,
)
_ANSWER_IS = re.compile(r"(?:answer|result)(?: is)?\s*[:=]?\s*(.{1,80})", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_WORDS)}
#: Enough of each to tell sentences of one script apart.
_COMMON = {
    "en": "the of and is to in that it for was are with not this answer so",
    "de": "der die das und ist nicht ein eine zu mit es auf den von wir antwort",
    "fr": "le la les et est des une pas pour dans que il sur nous donc réponse",
    "es": "el los las es una por para con que no se del respuesta son entonces en",
}


def _core(right: str) -> str:
    """What an answer is compared with: of a worked solution its last line."""
    return right.rpartition("####")[2].strip()


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _numbers(text: str) -> list[float]:
    for word, digit in _DIGITS.items():
        text = re.sub(rf"\b{word}\b", digit, text, flags=re.IGNORECASE)
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def _holds(text: str, gold: str, *, begun: bool) -> str:
    """ "format" or "extra" where the right answer is in a text, else "". begun: only where the text
    begins with it, since it was cut off later."""
    more = 0
    if _NUMBER.fullmatch(gold.strip("$€£% .")):
        value, found = _numbers(gold)[0], _numbers(text)
        named = [n for said in _ANSWER_IS.findall(text) for n in _numbers(said)[:1]]
        # Of a calculation the last number is the answer.
        right = bool(found) and value in (found[:1] if begun else [*found[-1:], *named])
        more = len(found) - 1
    else:
        said, wanted = f" {_plain(text)} ", f" {_plain(gold)} "
        named = [f" {_plain(rest)} ".startswith(wanted) for rest in _ANSWER_IS.findall(text)]
        right = wanted.strip() != "" and (said.startswith(wanted) or any(named))
        if not begun and len(wanted) > _SHORT:  # "no" and "a" are in many a sentence
            right |= wanted in said
    if not right:
        return ""
    words = [w for w in re.findall(r"[^\W\d_]+", text.casefold()) if w not in _DIGITS]
    around = Counter(words) - Counter(_plain(gold).split()) - Counter(["answer"])
    return "extra" if around.total() >= 2 or more else "format"


def _repeats(text: str) -> bool:
    """Whether a piece follows itself at least twice, through a good part of the text."""
    text = re.sub(r"\d+[.)]? *", "", text[:1_000])  # a list that says the same at every number
    for found in re.finditer(r"(\S.{0,150}?)\s*(?:\1\s*){2,}", text, re.DOTALL):
        whole, piece = found[0], found[1]
        if len(whole) >= max(16, 0.3 * len(text)) and re.search(r"[^\W\d_]", piece):
            return True
    return False


def _another_language(item: FailingItem) -> bool:
    expected = item.right if len(item.right) >= 20 else f"{item.asks} {item.right}"
    said = _scripts(item.answer)
    if said.total() < 3:
        return False
    main, letters = said.most_common(1)[0]
    known = _scripts(expected)
    if known and letters > said.total() / 2 and known[main] < known.total() / 10:
        return True
    mine, theirs = _language(item.answer), _language(expected)
    return bool(mine and theirs and mine != theirs)


def _scripts(text: str) -> Counter[str]:
    return Counter(_script(c) for c in text if c.isalpha())


@lru_cache(maxsize=10_000)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").partition(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA") else name


def _language(text: str) -> str:
    """Of the few that are known here, the one whose common words are most; "" for too few."""
    words = _plain(text).split()
    found = Counter({name: sum(words.count(w) for w in _COMMON[name].split()) for name in _COMMON})
    (first, most), (_, second) = found.most_common(2)
    return first if most >= 3 and most > 1.5 * second else ""
