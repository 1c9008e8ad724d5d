"""A task that is somebody else's harness: a user's program asks the live candidate over HTTP
(``openai_server.py``) and says what each item is worth.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from agentmerge.config import ScorerCommand, TaskConfig, TasksConfig
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import AnswerRefused
from agentmerge.evaluation import metrics
from agentmerge.evaluation.openai_server import ServedModel, Server, Waiting
from agentmerge.evaluation.protocol import protocol_hash
from agentmerge.evaluation.rendering import Render, ServedTask
from agentmerge.evaluation.scripts import read_verdicts, refuse_failed
from agentmerge.evaluation.splitting import numbered
from agentmerge.evaluation.tasks import ScoredTask
from agentmerge.system.commands import (
    MOST_SAID,
    Running,
    described_command,
    open_environment,
    refuse_missing,
)
from agentmerge.system.temporary import temporary_folder

#: Raised with any change of what is answered.
_SERVING = 2
#: What of a command's words is replaced.
ITEMS, RESULTS = "{items}", "{results}"


def served_task(
    entry: TaskConfig, config: TasksConfig, asking: Mapping[str, Any], render: Render | None
) -> tuple[ScoredTask, ServedTask, dict[str, Any], str | None]:
    """The task, how it is asked, its protocol, and a note. asking: what the answers depend on
    besides the program: template, tokenizer, context.

    Raises:
        UserError: there is no such program.
    """
    scorer, name = entry.scorer, entry.name
    assert isinstance(scorer, ScorerCommand)
    refuse_missing(scorer.command, f"the scorer of task {name!r}")
    metric, filter_name = metrics.parse_metric(entry.metric, name)
    items, search, sealed, note = numbered(name, scorer.items or 1, config, lambda n: _key(name, n))
    record: dict[str, Any] = {
        "served": _SERVING,
        "task": name,
        "command": described_command(scorer.command),
        "range": list(scorer.range),
        "items": scorer.items,
        **asking,
    }
    task = ScoredTask(
        name=name,
        weight=entry.weight,
        metric=metric,
        filter=filter_name,
        higher_is_better=scorer.higher_is_better,
        output_type="served",
        margin_kind=None,
        protocol_hash=protocol_hash(record),
        items=items,
        search=search,
        sealed=sealed,
        objective=name,
    )
    return task, ServedTask(name, scorer, render), record, note


def _key(name: str, number: int) -> str:
    return hashlib.sha256(f"served:{name}:{number}".encode()).hexdigest()[:16]


def ask_served(
    task: ServedTask, model: ServedModel, recipe_hash: str, refs: Sequence[ItemRef]
) -> dict[ItemRef, ItemResult]:
    """What the task's program makes of the live model. No request is open after this, and the model
    of another hash is asked nothing.

    Raises:
        AnswerRefused: the program failed, was late, or said something else than a score an item.
        CandidateFailed, WorkerLost: as the engine does.
        TaskError: the program's command is too long with all of these items.
    """
    scorer, whose = task.scorer, f"the scorer of task {task.name!r}"
    waiting: SimpleQueue[Waiting | None] = SimpleQueue()
    to_file = any(RESULTS in word for word in scorer.command)
    name = f"agentmerge-{recipe_hash}"
    with (
        temporary_folder("agentmerge-served") if to_file else nullcontext(Path()) as folder,
        Server(name, waiting) as server,
    ):
        numbers = ",".join(str(ref.index) for ref in refs)
        told = {"{base_url}": server.base_url, "{model}": name, ITEMS: numbers}
        told[RESULTS] = str(folder / "results.jsonl")
        command = [_filled(word, told) for word in scorer.command]
        env = open_environment(scorer.env) | _client(server)
        with Running(command, b"", env, ended=lambda: waiting.put(None)) as running:
            in_time = _answer_all(running, waiting, task, model)
        refuse_failed(running, whose, None if in_time else scorer.timeout_s)
        said = _read(folder / "results.jsonl", whose) if to_file else running.said
    every = any(ITEMS in word for word in scorer.command)
    found = read_verdicts(
        said.decode(errors="replace").split("\n"),
        [ref.index for ref in refs],
        scorer.range,
        whose,
        also=range(0 if every else scorer.items or 1),
        only=None if scorer.items else 0,
    )
    results = {}
    for ref in refs:
        own = found[ref.index]
        why = (own.details,) if own.details else ()
        results[ref] = ItemResult(own.score, None, own.margin, reasons=why)
    return results


def _answer_all(
    running: Running, waiting: SimpleQueue[Waiting | None], task: ServedTask, model: ServedModel
) -> bool:
    """Answers requests until the program has ended; False where that takes too long."""
    end = time.monotonic() + task.scorer.timeout_s
    while (left := end - time.monotonic()) > 0:
        try:
            request = waiting.get(timeout=left)
        except Empty:
            break
        if request is None or running.wait(0):
            return True
        request.answer(model, task.render)
    return False


def _filled(word: str, told: Mapping[str, str]) -> str:
    for name, value in told.items():
        word = word.replace(name, value)
    return word


def _client(server: Server) -> dict[str, str]:
    """What OpenAI's clients read; a proxy would not find this machine."""
    around = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
    return {
        "OPENAI_API_KEY": server.token,
        "OPENAI_BASE_URL": server.base_url,
        "NO_PROXY": around,
        "no_proxy": around,
    }


def _read(file: Path, whose: str) -> bytes:
    try:
        with file.open("rb") as opened:
            said = opened.read(MOST_SAID + 1)
    except OSError as error:
        raise AnswerRefused(f"{whose} wrote no results ({error.strerror}: {RESULTS})") from None
    if len(said) > MOST_SAID:
        raise AnswerRefused(f"{whose} wrote more than {MOST_SAID >> 20} MB of results")
    return said
