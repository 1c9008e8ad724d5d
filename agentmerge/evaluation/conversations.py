"""Conversations of a judged task: their files, read once and within bounds, and what each asks.

A line of JSON is a conversation: what the user says turn by turn, and perhaps a system message,
reference answers, a category and an id. LogicKor's and MT-Bench's own names of these are read too.
Knows no model and no judge.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmerge.errors import TaskError
from agentmerge.system.bounded import read_text

#: Of one conversation.
MOST_TURNS = 32
#: Our prompts for a judge, and a folder's own: for points, and for two answers.
PROMPTS = ("judge.md", "judge_pair.md")
_NAMES = {
    "id": ("id", "question_id"),
    "turns": ("turns", "questions"),
    "references": ("references", "reference"),
    "category": ("category",),
    "system": ("system",),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """references: a good answer to each turn, "" where there is none."""

    id: str
    turns: tuple[str, ...]
    references: tuple[str, ...]
    category: str = ""
    system: str = ""

    def messages(self, said: Sequence[str]) -> list[dict[str, str]]:
        """All up to the next turn. said: the model's answers to the turns before it."""
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn, answer in zip(self.turns, said, strict=False):
            found.append({"role": "user", "content": turn})
            found.append({"role": "assistant", "content": answer})
        return [*found, {"role": "user", "content": self.turns[len(said)]}]

    def key(self, more: Sequence[str] = ()) -> str:
        """SHA-256, 16 hex digits, of what is asked and what is right; never its number.

        more: what else a verdict on it depends on.
        """
        body = [self.system, self.turns, self.references, self.category, list(more)]
        return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]


def located(name: str, given: str | None, search_path: Sequence[str]) -> Path:
    """The file or folder of a task's conversations.

    given: where the config says that they are; else NAME.jsonl or NAME/ in the search path.

    Raises:
        TaskError: there is none.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise TaskError(
                f"task {name!r}: there is no {given}; name a JSONL file or a folder of them in "
                "judge.conversations"
            )
        return path
    places = [
        Path(root).expanduser() / end for root in search_path for end in (f"{name}.jsonl", name)
    ]
    for place in places:
        if place.is_file() or (place.is_dir() and any(place.glob("*.jsonl"))):
            return place
    where = ", ".join(map(str, search_path)) or "no task_search_path"
    raise TaskError(
        f"task {name!r} has a judge, and neither {name}.jsonl nor {name}/ with such files is in "
        f"{where}; name its conversations in judge.conversations"
    )


def read_conversations(name: str, path: Path) -> tuple[Conversation, ...]:
    """Every conversation, in the order of files and lines.

    Raises:
        TaskError: the first line that is none, or that asks what one before it asks.
    """
    found: list[Conversation] = []
    known: dict[tuple[str, str], str] = {}
    for where, row in rows(path):
        one = _conversation(f"task {name!r}: {where}", row, str(len(found) + 1))
        for same in (("asks the same as", one.key()), (f"has the id {one.id!r} of", one.id)):
            if same in known:
                raise TaskError(
                    f"task {name!r}: {where} {same[0]} {known[same]}; change one of them"
                )
            known[same] = where
        found.append(one)
    if not found:
        raise TaskError(f"task {name!r}: {path} holds no conversation; write one a line, as JSON")
    return tuple(found)


def read_answers(name: str, path: str, asked: Sequence[Conversation]) -> dict[str, tuple[str, ...]]:
    """A fixed model's answers, by the id of the conversation.

    Raises:
        TaskError: one that is asked has none there, or too few.
    """
    found: dict[str, tuple[str, ...]] = {}
    for where, row in rows(Path(path).expanduser()):
        answers = row.get("answers", row.get("outputs"))
        if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
            raise TaskError(
                f'task {name!r}: {where} needs "answers", a list of texts, one for each turn'
            )
        found[str(row.get("id", row.get("question_id")))] = tuple(answers)
    for one in asked:
        if len(found.get(one.id, ())) != len(one.turns):
            raise TaskError(
                f"task {name!r}: {path} has {len(found.get(one.id, ()))} answers to conversation "
                f"{one.id!r}, which has {len(one.turns)} turns; judge.against needs one for each"
            )
    return {one.id: found[one.id] for one in asked}


def rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line, in words; the object there) of every line that is not empty."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    for file in files:
        missing = f"there is no {file}; name an existing JSONL file"
        for number, line in enumerate(read_text(file, TaskError, missing=missing).split("\n"), 1):
            if not line.strip():
                continue
            where = f"line {number} of {file}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{where} is no JSON ({error}); write one object a line") from None
            if not isinstance(row, dict):
                raise TaskError(f"{where} is no JSON object; write one a line")
            yield where, row


def _conversation(where: str, row: Mapping[str, Any], number: str) -> Conversation:
    given = {key: next((row[n] for n in names if n in row), None) for key, names in _NAMES.items()}
    turns, references = given["turns"], given["references"]
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(_is_text(turn) for turn in turns):
        raise TaskError(
            f'{where} needs "turns", a list of what the user says, each a text that is not empty'
        )
    if len(turns) > MOST_TURNS:
        raise TaskError(f"{where} has {len(turns)} turns, and {MOST_TURNS} are possible; cut it")
    references = [references] if isinstance(references, str) else references or []
    if not isinstance(references, list) or not all(
        r is None or isinstance(r, str) for r in references
    ):
        raise TaskError(f'{where}: "references" must be a list of texts, or null for a turn')
    if len(references) > len(turns):
        raise TaskError(f"{where} has {len(references)} references and {len(turns)} turns")
    for key in ("category", "system"):
        if given[key] is not None and not isinstance(given[key], str):
            raise TaskError(f"{where}: {key!r} must be a text")
    padded = [*(r or "" for r in references), *[""] * (len(turns) - len(references))]
    named = given["id"] if given["id"] is not None else number
    return Conversation(
        str(named)[:200],
        tuple(turns),
        tuple(padded),
        given["category"] or "",
        given["system"] or "",
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
