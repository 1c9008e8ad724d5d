"""A judged task in the shape of LogicKor: six categories, two turns each, ten points, in Korean.

The questions are a few of our own, to try it with; LogicKor's, or yours, go into their place
(LogicKor's own file of questions is read as it is). The judge's prompt is in our words. Both are
resources, in ``prompts/logickor/``.
"""

from __future__ import annotations

from pathlib import Path

from agentmerge.errors import UserError
from agentmerge.system.bundled import bundled
from agentmerge.system.temporary import write_at_once

NAME = "logickor"
_FILES = ("questions.jsonl", "judge.md")


def write_task(folder: Path) -> list[Path]:
    """The files of the task in a folder, made if need be: questions and prompt.

    Raises:
        UserError: one is there already, or the folder cannot be written.
    """
    files = [folder / NAME / name for name in _FILES]
    for file in files:
        if file.exists():
            raise UserError(f"{file} is there already, and perhaps yours; name another folder")
    try:
        (folder / NAME).mkdir(parents=True, exist_ok=True)
        for file in files:
            write_at_once(file, (bundled("prompts") / NAME / file.name).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    return files
