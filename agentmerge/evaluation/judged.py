"""A judged task, put together from its files (``playing.py`` has it answered)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from agentmerge.config import JudgeSettings, TaskConfig, TasksConfig
from agentmerge.contracts.worker import ItemRef
from agentmerge.errors import TaskError
from agentmerge.evaluation.conversations import (
    PROMPTS,
    located,
    read_answers,
    read_conversations,
)
from agentmerge.evaluation.playing import JudgedTask
from agentmerge.evaluation.protocol import protocol_hash
from agentmerge.evaluation.splitting import numbered
from agentmerge.evaluation.tasks import ScoredTask
from agentmerge.system.bounded import read_text
from agentmerge.system.bundled import bundled

#: Tokens of an answer where nothing is said.
ANSWER_TOKENS = 1024
#: What ends an answer where there is no chat template.
_PLAIN_STOP = "\nUser:"
#: What lm-eval calls an answer's length; the first outranks the others.
_LENGTHS = frozenset({"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"})


def judged_task(
    entry: TaskConfig,
    config: TasksConfig,
    *,
    tokenizer: str = "",
    template: str | None = None,
    chat: Callable[..., str] | None = None,
    context: int | None = None,
    day: date | None = None,
) -> tuple[ScoredTask, JudgedTask, dict[str, Any], str | None]:
    """(the task, how it is played, its protocol, a note) of a config's entry with a judge.

    The rest: as ``protocol.protocol`` has it; for a worker without a model nothing is needed.

    Raises:
        TaskError: a file that is missing or cannot be read, or a chat that cannot be rendered.
    """
    assert entry.judge is not None
    name, own = entry.name, entry.judge
    path = located(name, own.conversations, config.task_search_path)
    found = read_conversations(name, path)
    baseline = {} if own.against is None else read_answers(name, own.against, found)
    prompt_path = prompt_file(own, path)
    generation = {"until": []} | own.generation | config.gen_kwargs
    if _LENGTHS.isdisjoint(generation):
        generation["max_gen_toks"] = ANSWER_TOKENS
    if chat is None:
        generation["until"] = [*_texts(generation["until"]), _PLAIN_STOP]
    judged = JudgedTask(
        name, own, read_text(prompt_path, TaskError), prompt_path, dict(enumerate(found)), baseline,
        generation, chat,
    )  # fmt: skip
    items, search, sealed, note = numbered(
        name, len(found), config, lambda n: found[n].key(baseline.get(found[n].id, ()))
    )
    _try_out(judged, items)
    if context is not None:
        _refuse_no_room(judged, context)
    record: dict[str, Any] = {
        "judge": judged.judge,
        "generation": generation,
        "template": template,
        "tokenizer": tokenizer,
        "context": context,
    }
    if template is not None and day is not None:
        record["day"] = day.isoformat()
    scored = ScoredTask(
        name=name,
        weight=entry.weight,
        metric=entry.metric.partition(",")[0],
        filter=entry.metric.partition(",")[2],
        higher_is_better=own.higher_is_better,
        output_type="generate_until",
        margin_kind=None,
        protocol_hash=protocol_hash(record),
        items=items,
        search=search,
        sealed=sealed,
        objective=name,
    )
    return scored, judged, record, note


def prompt_file(own: JudgeSettings, conversations: Path) -> Path:
    """What a judge is asked with: the config's, else the conversations' own, else ours."""
    if own.prompt is not None:
        return Path(own.prompt).expanduser()
    name = PROMPTS[own.against is not None]
    folder = conversations if conversations.is_dir() else conversations.parent
    beside = folder / name
    return beside if beside.is_file() else bundled("prompts") / name


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _try_out(judged: JudgedTask, items: Sequence[ItemRef]) -> None:
    """Templates and messages are the user's: what does not render is found before it is asked."""
    for ref in items:
        turns = judged.conversations[ref.index].turns
        try:
            judged.rendered(ref, [""] * (len(turns) - 1))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise TaskError(
                f"task {judged.name!r}: conversation {judged.conversations[ref.index].id!r} does "
                f"not go through the chat template ({reason}); leave its system message out, or "
                "set apply_chat_template: false"
            ) from error


def _refuse_no_room(judged: JudgedTask, context: int) -> None:
    from agentmerge.evaluation.tokens import answer_length, refuse_no_room

    try:
        refuse_no_room(answer_length(judged.generation), context)
    except TaskError as error:
        told = str(error).replace("the task's generation_kwargs", "judge.generation")
        raise TaskError(f"task {judged.name!r}: {told}") from None
