"""What pydantic finds wrong with values, in our words: what, which value, what it may be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

#: What pydantic calls the kinds that a value may be of (a number or a word), as if they were keys.
_OF_A_UNION = re.compile(r"constrained-|literal\[|scorer-")


def said_of(error: ValidationError, section: str) -> Iterator[tuple[str, str]]:
    """(key, what follows its name in a sentence) of each fault of a section's values."""
    problems = [(_place(problem), problem) for problem in error.errors()]
    words = {
        place: problem["ctx"]["expected"]
        for place, problem in problems
        if problem["type"] == "literal_error" and place != problem["loc"]
    }
    for place, problem in problems:
        if problem["type"] == "too_short" and len(problems) > 1:
            continue  # what was left after faulty entries were dropped
        if problem["type"] == "literal_error" and place in words:
            continue  # said with the number that may stand there
        path = ".".join(str(part) for part in (section, *place) if part != "")
        yield path, _in_our_words(problem, words.get(place, ""))


def _place(problem: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(part for part in problem["loc"] if not _OF_A_UNION.match(str(part)))


#: pydantic's kinds of faults, by how their names begin, and what to say instead.
_WORDS = {
    "missing": "is missing",
    "extra_forbidden": "is not a known key",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be below {lt:g}",
    "literal_error": "must be {expected}",
    "too_short": "needs {min_length} entries or more",
    "too_long": "takes {max_length} entries at most",
    "finite_number": "must be a finite number",
    "tuple": "must be a list, as in [a, b]",
    "list": "must be a list, as in [a, b]",
    "dict": "must be a mapping, as in {{key: value}}",
    "model": "must be a mapping, as in {{key: value}}",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text",
}


def _in_our_words(problem: Mapping[str, Any], word: str) -> str:
    """What follows the key's name. word: that may stand there too."""
    kind = problem["type"]
    if kind in ("value_error", "assertion_error"):
        return ": " + str(problem["msg"]).partition(", ")[2]
    words = next((text for name, text in _WORDS.items() if kind.startswith(name)), None)
    said = words.format(**problem.get("ctx", {})) if words else f": {problem['msg']}"
    said += f", or {word}" if word else ""
    return said if not words else f" {said}" + ("" if kind == "missing" else _got(problem))


def _got(problem: Mapping[str, Any]) -> str:
    text = repr(problem["input"])
    return f", not {text if len(text) <= 80 else text[:77] + '...'}"
