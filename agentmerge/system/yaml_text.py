"""YAML as a person wrote it: its values, which line a key is on, which are written twice, which
misspelt.

It knows text and keys. It does not know what any key means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import yaml

from agentmerge.errors import UserError
from agentmerge.system.bounded import MOST_TEXT, is_text

#: Levels of a YAML text, values with every alias written out, characters of one of them.
MOST_LEVELS = 100
MOST_VALUES = 100_000
MOST_CHARACTERS = 200_000
_LONGEST_KEY = 500
#: Lines that are shorter are folded by nobody.
_FOLDED = 70
_Parser: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Written:
    """A YAML text. value: what it says. lines: each dotted key's line, 1-based. twice: the first
    and last line of keys that are written twice in one mapping, of which YAML takes the last."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    twice: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_yaml(text: str, source: str, error: type[UserError]) -> Written:
    """What a YAML text says.

    source: what to call it where something is wrong.

    Raises:
        error: it is not YAML, or more (bytes, levels, values, digits) than anybody writes.
    """
    node = compose_yaml(text, source, error)
    return Written(None) if node is None else _written(node, source, error)


def read_documents(text: str, source: str, error: type[UserError]) -> list[Written]:
    """What each document of a YAML text says, empty ones left out; one at least.

    Raises:
        error: as ``read_yaml`` says.
    """
    nodes = _composed(lambda: [*yaml.compose_all(text, Loader=_Parser)], text, source, error, error)
    found = [_written(node, source, error) for node in nodes if node is not None]
    return [written for written in found if written.value is not None] or [Written(None)]


def _written(node: yaml.Node, source: str, error: type[UserError]) -> Written:
    lines, twice = _key_lines(node)
    try:
        return Written(_Values("").construct_document(node), lines, twice)
    except yaml.MarkedYAMLError as why:
        line = why.problem_mark.line + 1 if why.problem_mark else 1
        raise error(f"{source} is not YAML: line {line}: {why.problem}") from None
    # What a tag or the form of a value promises (a date, a number), and the value is not.
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as why:
        raise error(f"{source} holds a value that is not what its form says: {why}") from None


def compose_yaml(
    text: str | bytes, source: str, error: type[UserError], broken: type[UserError] | None = None
) -> yaml.Node | None:
    """The nodes of a YAML text of any tags, found to be within bounds; None of an empty one.

    Raises:
        broken: it is not YAML; by default ``error``.
        error: as ``read_yaml`` says.
    """

    def read() -> list[yaml.Node | None]:
        return [yaml.compose(text, Loader=_Parser)]

    return _composed(read, text, source, error, broken or error)[0]


def dump_yaml(documents: Sequence[Any]) -> str:
    """As ``yaml.safe_dump_all``, without sorting keys; by libyaml, ten times as fast, where nothing
    in the text is written in two ways (quotes, folded lines, other alphabets)."""
    settings: Any = {"sort_keys": False, "allow_unicode": True}
    if fast := getattr(yaml, "CSafeDumper", None):
        text: str = yaml.dump_all(documents, Dumper=fast, **settings)
        plain = text.isascii() and not {"'", '"', "?"} & set(text)
        if plain and all(len(line) < _FOLDED for line in text.splitlines()):
            return text
    found: str = yaml.safe_dump_all(documents, **settings)
    return found


def _composed(
    read: Callable[[], list[yaml.Node | None]],
    text: str | bytes,
    source: str,
    error: type[UserError],
    broken: type[UserError],
) -> list[yaml.Node | None]:
    if len(text) > MOST_TEXT:
        raise error(f"{source} has more than {MOST_TEXT:,} bytes, and no file of its kind has")
    try:
        nodes = read()
    except (yaml.YAMLError, UnicodeDecodeError) as why:
        raise broken(f"{source} is not YAML: {' '.join(str(why).split())}") from None
    except RecursionError:
        raise error(f"{source} is nested more than {MOST_LEVELS} levels deep") from None
    for node in nodes:
        if node is not None:
            _refuse_huge(node, source, error)
    return nodes


def _refuse_huge(root: yaml.Node, source: str, error: type[UserError]) -> None:
    sizes: dict[int, int] = {}  # by a node's id: values, with aliases written out
    above: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        where = f"{source}:{node.start_mark.line + 1}"
        if id(node) in above:
            raise error(f"{where} has an alias (*name) that contains itself")
        if len(above) > MOST_LEVELS:
            raise error(f"{where} is nested more than {MOST_LEVELS} levels deep")
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > MOST_CHARACTERS:
                raise error(f"{where} has a value of more than {MOST_CHARACTERS:,} characters")
            if "\0" in node.value or not is_text(node.value):
                raise error(f"{where} has a value that is not text (a NUL, half a character)")
            return 1
        above.add(id(node))
        pairs = isinstance(node, yaml.MappingNode)
        inner = chain.from_iterable(node.value) if pairs else node.value
        total = 1 + sum(map(size, inner))
        above.remove(id(node))
        if total > MOST_VALUES:
            raise error(f"{where} stands for more than {MOST_VALUES:,} values (aliases: *name)")
        sizes[id(node)] = total
        return total

    size(root)


class _Values(yaml.SafeLoader):
    """Makes the values of nodes."""

    def whole(self, node: yaml.ScalarNode) -> int:
        value: int = self.construct_yaml_int(node)
        if not -(2**63) <= value < 2**64:
            raise yaml.MarkedYAMLError(
                problem="a whole number of more than 64 bits", problem_mark=node.start_mark
            )
        return value


_Values.add_constructor("tag:yaml.org,2002:int", _Values.whole)


def _key_lines(root: yaml.Node) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    lines: dict[str, int] = {}
    twice: dict[str, tuple[int, int]] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if len(prefix) > _LONGEST_KEY:
            return  # nobody asks for its line
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                dotted, line = f"{prefix}{key.value}", key.start_mark.line + 1
                if dotted in first and key.value != "<<":
                    twice[dotted] = (first[dotted], line)
                first.setdefault(dotted, line)
                lines[dotted] = line
                walk(value, f"{dotted}.")
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[f"{prefix}{index}"] = value.start_mark.line + 1
                walk(value, f"{prefix}{index}.")

    walk(root, "")
    return lines, twice


def twice_text(key: str, lines: tuple[int, int]) -> str:
    """What to tell of a key that is written twice."""
    first, last = lines
    if first == last:
        return f"{key} is written twice on line {first}: the last one counts; remove one"
    return f"{key} is written on lines {first} and {last}: the last one counts; remove one"


def misspelt(written: str, known: str) -> bool:
    """Whether a key is another one but for a letter or two, so that it was most likely meant."""
    reach = min(2, len(known) // 3)
    if written.lower() == known.lower():
        return True
    row = list(range(len(known) + 1))  # Levenshtein's distance to each beginning of ``known``
    for index, letter in enumerate(written, 1):
        previous, row[0] = row[0], index
        for place, other in enumerate(known, 1):
            cost = min(row[place] + 1, row[place - 1] + 1, previous + (letter != other))
            previous, row[place] = row[place], cost
    return row[-1] <= reach
