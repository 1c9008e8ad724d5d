"""Foreign text in a prompt: quoted between marks that it cannot hold, cut, and fit for a server.

A mark is a hash of all that is quoted, so that nobody can close a quote from within. Knows no
prompt and no role.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from agentmerge.agents.schemas import clean_text


def mark_of(material: Any) -> str:
    """What ends the material, a JSON value: nobody can write a hash of what they are writing."""
    return hashlib.sha256(json.dumps(material).encode()).hexdigest()[:12]


def quoted(what: str, text: str, mark: str, most_chars: int) -> str:
    """A text between marks, cut to a length; what: one word for what it is."""
    if not text.strip():
        return f"<{what} {mark}>\n</{what} {mark}>"
    # A lone surrogate or a control character is no text that a server takes.
    kept = clean_text(text.replace("\t", "    "), len(text) + 1)
    return f"<{what} {mark}>\n{cut(kept, most_chars)}\n</{what} {mark}>"


def cut(text: str, most: int) -> str:
    """A text within a length: its beginning and its end, with how much is left out between."""
    if len(text) <= most:
        return text
    head = most * 2 // 3
    tail = text[len(text) - most + head :]
    return f"{text[:head]}\n[... {len(text) - most} characters left out ...]\n{tail}"
