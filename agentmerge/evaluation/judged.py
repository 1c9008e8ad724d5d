"""Judged tasks: conversations that a candidate answers turn by turn, for a judge to grade.

Here a task is put together from its files and played on a live model, each prompt holding the
model's own answers before it. What an answer is worth is not known here: results carry the answers
to whoever asks the judge (``search/judging.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.config import JudgeSettings, TaskConfig, TasksConfig
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import TaskError
from agentmerge.evaluation.conversations import (
    PROMPTS,
    Conversation,
    located,
    read_answers,
    read_conversations,
)
from agentmerge.evaluation.protocol import protocol_hash
from agentmerge.evaluation.splitting import choose_documents, split
from agentmerge.evaluation.tasks import ScoredTask
from agentmerge.system.bounded import read_text
from agentmerge.system.bundled import bundled

if TYPE_CHECKING:
    from agentmerge.evaluation.scoring import ScoringModel

#: Raised with any change of how conversations are played or put to a judge.
JUDGING = 1
#: Tokens of an answer where nothing is said.
ANSWER_TOKENS = 1024
#: What comes before each message where there is no chat template, and ends an answer.
_SPEAKERS = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}
_PLAIN_STOP = "\nUser:"


@dataclass(frozen=True)
class JudgedTask:
    """One task, ready to be played and judged.

    prompt: the text that the judge is asked with, and prompt_path where it is from. conversations:
    by the number of the item. baseline: a fixed model's answers by a conversation's id; empty where
    there are points. chat: the chat template; None where there is none.
    """

    name: str
    settings: JudgeSettings
    prompt: str
    prompt_path: Path
    conversations: Mapping[int, Conversation]
    baseline: Mapping[str, tuple[str, ...]]
    generation: Mapping[str, Any]
    chat: Callable[..., str] | None

    def rendered(self, ref: ItemRef, said: Sequence[str]) -> str:
        """The prompt of the turn after these answers."""
        messages = self.conversations[ref.index].messages(said)
        if self.chat is not None:
            return self.chat(messages)
        lines = [f"{_SPEAKERS[m['role']]}{m['content']}" for m in messages]
        return "\n".join([*lines, _SPEAKERS["assistant"].rstrip()])

    @cached_property
    def judge(self) -> dict[str, Any]:
        """What a verdict depends on besides what is shown to the judge."""
        own = self.settings
        found: dict[str, Any] = {
            "judging": JUDGING,
            "model": own.model,
            "temperature": own.temperature,
            "max_tokens": own.max_tokens,
            "prompt": hashlib.sha256(self.prompt.encode()).hexdigest()[:16],
            "answer_chars": own.answer_chars,
        }
        return found | ({"paired": True} if self.baseline else {"scale": list(own.scale)})

    @cached_property
    def judge_hash(self) -> str:
        """SHA-256 of ``judge``, 16 hex digits."""
        return protocol_hash(self.judge)

    def verdicts(self, refs: Sequence[ItemRef]) -> int:
        """How many of a judge these items take, none asked twice."""
        turns = sum(len(self.conversations[ref.index].turns) for ref in refs)
        return turns * (2 if self.baseline else 1)


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
    generation = {"max_gen_toks": ANSWER_TOKENS, "until": []} | own.generation | config.gen_kwargs
    if chat is None:
        generation["until"] = [*_texts(generation["until"]), _PLAIN_STOP]
    judged = JudgedTask(
        name, own, read_text(prompt_path, TaskError), prompt_path, dict(enumerate(found)), baseline,
        generation, chat,
    )  # fmt: skip
    chosen = choose_documents(len(found), config, name)
    refs = {
        n: ItemRef(name, n, found[n].key(baseline.get(found[n].id, ())))
        for n in (*chosen.search, *chosen.beyond)
    }
    items, search, sealed, note = split(
        [refs[n] for n in chosen.search], [refs[n] for n in chosen.beyond], config
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


def play(
    lm: ScoringModel, tasks: Mapping[str, JudgedTask], refs: Sequence[ItemRef]
) -> dict[ItemRef, ItemResult]:
    """Every conversation answered, all at the same turn at a time; nothing is judged yet."""
    said: dict[ItemRef, list[str]] = {ref: [] for ref in refs}
    truncated, cut_off = set(), set()
    tokens = dict.fromkeys(said, 0.0)
    for turn in range(max((_turns(tasks, ref) for ref in refs), default=0)):
        going = [ref for ref in said if turn < _turns(tasks, ref)]
        requests = [
            request(tasks[ref.task], tasks[ref.task].rendered(ref, said[ref])) for ref in going
        ]
        for ref, asked in zip(going, requests, strict=True):
            if lm.prompt_cut(asked.args[0], lm.stopping(asked.args[1]).max_new):
                truncated.add(ref)
        for ref, made in zip(going, lm.generate(requests), strict=True):
            said[ref].append(made.text)
            tokens[ref] += made.tokens
            if made.cut_off:
                cut_off.add(ref)
        if turn:  # with a candidate's own words in it, no other will ask this
            lm.forget([asked.args[0] for asked in requests])
    return {
        ref: ItemResult(
            math.nan,
            truncated=ref in truncated,
            cut_off=ref in cut_off,
            tokens=round(tokens[ref]),
            answers=tuple(answers),
        )
        for ref, answers in said.items()
    }


def request(task: JudgedTask, context: str) -> Any:
    """One turn as a request of lm-eval's model classes."""
    from lm_eval.api.instance import Instance

    return Instance("generate_until", {}, (context, dict(task.generation)), 0)


def _turns(tasks: Mapping[str, JudgedTask], ref: ItemRef) -> int:
    return len(tasks[ref.task].conversations[ref.index].turns)


def prompt_file(own: JudgeSettings, conversations: Path) -> Path:
    """What a judge is asked with: the config's, else the conversations' own, else ours."""
    if own.prompt is not None:
        return Path(own.prompt).expanduser()
    name = PROMPTS[own.against is not None]
    beside = conversations / name
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
