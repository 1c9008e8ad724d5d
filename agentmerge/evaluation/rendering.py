"""Renders a task's documents into lm-eval requests, once a run, and names each item by content.

A document's request does not depend on which others are asked: few-shot examples are drawn as in
lm-eval's own full run, in document order. Knows tokenizers only as what renders a chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from types import SimpleNamespace
from typing import Any

from agentmerge.config import ScorerCommand
from agentmerge.contracts.worker import ItemRef
from agentmerge.errors import TaskError
from agentmerge.evaluation.loading import FEWSHOT_SEED
from agentmerge.system.bounded import both_ends

Render = Callable[..., str]

#: Characters that are kept of what an item asks, its end, and of what is right, both ends.
MOST_SAID = 600

#: The function by which a chat template asks transformers for the date.
DATED = "strftime_now"


@dataclass(frozen=True)
class Asked:
    """A leaf task, ready to be put to a model: document number -> its requests, in order.

    script: the program that says what answers are worth, in place of the task's own code. chats:
    for that, a request's text -> the messages that it was made of.
    """

    task: Any
    metric: str
    filter: str
    requests: dict[int, tuple[Any, ...]]
    companion: bool
    after_template: bool
    script: ScorerCommand | None = None
    chats: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedTask:
    """A program's own task, which asks the live model itself (``served.py``). render: how a chat
    becomes text; None where no template is applied."""

    name: str
    scorer: ScorerCommand
    render: Render | None


def documents(task: Any) -> Any:
    """The documents lm-eval scores; as it made them once, where it keeps them."""
    return task.task_docs if hasattr(task, "task_docs") else task.eval_docs


def render(
    task: Any, wanted: Sequence[int], chat: Render | None, as_multiturn: bool
) -> dict[int, tuple[Any, ...]]:
    """The requests of some documents, by lm-eval's own ``build_all_requests``.

    Raises:
        TaskError: a document or the chat template does not render.
    """
    docs = documents(task)
    numbers = sorted(set(wanted))
    if task.get_config("num_fewshot"):
        numbers = list(range(numbers[-1] + 1))  # each draw moves the sampler on for the next
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.doc_iterator = lambda **_: ((number, docs[number]) for number in numbers)
    try:
        task.build_all_requests(
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=as_multiturn,
            chat_template=chat,
        )
    except Exception as error:  # documents, task code and templates are all the user's
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TaskError(f"task {task.task_name!r} cannot be rendered: {reason}") from error
    finally:
        del task.doc_iterator
    found: dict[int, list[Any]] = {number: [] for number in wanted}
    for instance in task.instances:
        if instance.doc_id in found:
            found[instance.doc_id].append(instance)
    task._instances = None
    return {
        number: tuple(sorted(instances, key=lambda instance: int(instance.idx)))
        for number, instances in found.items()
    }


def item_key(task: Any, instances: Sequence[Any]) -> str:
    """SHA-256, 16 hex digits, of what an item asks and of what is right; never its number."""
    doc = instances[0].doc
    asked: list[Any] = [
        [i.request_type, *(arg for arg in i.args if isinstance(arg, str))] for i in instances
    ]
    if callable(task.get_config("process_results")):
        asked.append(doc)  # its own code may read any field
    try:
        asked.append(task.doc_to_target(doc))
        if task.OUTPUT_TYPE == "multiple_choice":
            asked += [task.doc_to_choice(doc), task.doc_to_text(doc)]
    except Exception:  # tasks written in Python need not have these
        asked.append(doc)
    text = json.dumps(asked, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def said(asked: Asked, refs: Sequence[ItemRef]) -> dict[str, tuple[str, str]]:
    """Key -> what an item asks, of a long one the end, and what is right; for people to read."""
    return {ref.key: _said(asked.task, asked.requests[ref.index]) for ref in refs}


def _said(task: Any, instances: Sequence[Any]) -> tuple[str, str]:
    asks = str(instances[0].args[0])
    try:
        right = task.doc_to_target(instances[0].doc)
        if isinstance(right, int) and task.OUTPUT_TYPE == "multiple_choice":
            right = task.doc_to_choice(instances[0].doc)[right]
    except Exception:  # tasks written in Python need not have these
        right = ""
    asks = asks if len(asks) <= MOST_SAID else f"…{asks[-MOST_SAID:]}"
    return asks, "" if right is None else both_ends(str(right).strip(), MOST_SAID)


def chat_renderer(tokenizer: Any, day: date | None = None) -> Render:
    """lm-eval's own rendering of a chat with this tokenizer's template.

    day: what the template is told of today, where it asks; else it is the machine's own date.
    """
    from lm_eval.models.huggingface import HFLM

    told = {} if day is None else {DATED: datetime.combine(day, time()).strftime}
    holder = SimpleNamespace(tokenizer=tokenizer, chat_template_args=told)

    def render_chat(chat_history: Any, add_generation_prompt: bool = True) -> str:
        text: str = HFLM.apply_chat_template(holder, chat_history, add_generation_prompt)
        return text

    return render_chat
