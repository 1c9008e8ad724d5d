"""The layer in a tensor's name; and a tensor under another program's name for it, found by the
longest ending both have in common.

``language_model.model.layers.0.mlp.up_proj.weight`` in a file is
``model.language_model.layers.0.mlp.up_proj.weight`` in a live model. It knows names and nothing
else; whoever asks proves that shapes and values agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: The first part of a name that is a number.
LAYER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name: its first part that is a number."""
    match = LAYER.search(name)
    return int(match[1]) if match else None


def at_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    return LAYER.sub(str(layer), name, count=1)


class NameIndex:
    """Names that can be found by their endings, which are cut at dots."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_ending: dict[str, list[str]] = {}
        for name in names:
            for ending in _endings(name):
                self._by_ending.setdefault(ending, []).append(name)

    def find(self, name: str) -> str | None:
        """The name with the longest common ending and, of several, most other parts in common;
        None where there is none, or several are left."""
        for ending in _endings(name):
            found = self._by_ending.get(ending)
            if found is None:
                continue
            if name in found:
                return name
            parts = set(name.split("."))
            shared = [len(parts & set(other.split("."))) for other in found]
            return found[shared.index(max(shared))] if shared.count(max(shared)) == 1 else None
        return None


def _endings(name: str) -> Iterable[str]:
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name
