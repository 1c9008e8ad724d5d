"""Judged tasks: conversations that a candidate answers turn by turn, for a judge to grade.

They are played on a live model, each prompt holding the model's own answers before it. What an
answer is worth is not known here: results carry the answers to whoever asks the judge
(``search/judging.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agentmerge.config import JudgeSettings
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.conversations import Conversation
from agentmerge.evaluation.protocol import protocol_hash

if TYPE_CHECKING:
    from agentmerge.evaluation.tokens import Generated

#: Raised with any change of how conversations are played or put to a judge.
JUDGING = 1
#: What comes before each message where there is no chat template.
_SPEAKERS = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}


class Answering(Protocol):
    """What playing asks of an engine; ``live.LiveLM`` says what each answer is."""

    def prompt_cut(self, context: str, max_new: int) -> bool: ...
    def generate(self, instances: Sequence[Any]) -> list[Generated]: ...
    def stopping(self, generation_kwargs: dict[str, Any]) -> Any: ...
    def forget(self, texts: Sequence[str]) -> None: ...


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


def play(
    lm: Answering, tasks: Mapping[str, JudgedTask], refs: Sequence[ItemRef]
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
