"""YAML as a person wrote it: which line a key is on, which are written twice, which misspelt.

It knows text and keys. It does not know what any key means.
"""

from __future__ import annotations

import yaml


def key_lines(text: str) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Each dotted key's line, 1-based; and the first and last line of keys that are written twice
    in one mapping, of which YAML takes the last.

    Raises:
        yaml.YAMLError: it is no YAML.
        RecursionError: an alias that contains itself.
    """
    lines: dict[str, int] = {}
    twice: dict[str, tuple[int, int]] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
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

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
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
