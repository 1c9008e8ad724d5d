"""Puts items to a live model and turns its answers into item results.

Values come from lm-eval's own model class, filters and ``process_results``, so that they equal
``lm_eval.simple_evaluate`` on the same weights, item for item. Requests are tokenised once; no
answer is kept from one call to the next. Knows nothing of merging.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import AnswerRefused, CandidateFailed, TaskError
from agentmerge.evaluation import metrics
from agentmerge.evaluation.openai_server import ServedModel
from agentmerge.evaluation.playing import Answering, play
from agentmerge.evaluation.rendering import Asked
from agentmerge.evaluation.scorers import texts
from agentmerge.evaluation.scripts import Verdict, verdicts
from agentmerge.evaluation.served import ask_served
from agentmerge.evaluation.tasks import ScoredTask, TaskSet


def _is_told_in_results(record: logging.LogRecord) -> bool:
    """Drops what lm-eval and tokenizers log of each cut prompt at each scoring: a line an item,
    over the live screen. Results count them, and the closing card says how many there are."""
    text = record.getMessage()
    return not any(words in text for words in ("runcat", "Token indices sequence length"))


for _name in ("lm_eval.models.huggingface", "transformers.tokenization_utils_base"):
    logging.getLogger(_name).addFilter(_is_told_in_results)


class ScoringModel(Answering, ServedModel, Protocol):
    """What scoring asks of an engine; ``live.LiveLM`` says what each answer is."""

    def encode(self, instances: Sequence[Any]) -> list[Any]: ...
    def cut(self, context: Sequence[int], continuation: Sequence[int]) -> bool: ...
    def answer(self, requests: Sequence[Any]) -> list[tuple[float, bool]]: ...
    def rolling(self, instances: Sequence[Any]) -> list[float]: ...
    def said(self, tokens: Sequence[int], stopping: Any) -> str: ...
    def gold_tokens(
        self, context: str, gold: str, max_new: int
    ) -> tuple[list[int], list[int]] | None: ...
    def teacher_forced(
        self, requests: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, float]]: ...


@dataclass(frozen=True, slots=True)
class PreparedItem:
    """An item, tokenised, with everything about it that no model changes."""

    task: ScoredTask
    asked: Asked
    instances: tuple[Any, ...]
    encoded: tuple[Any, ...] = ()
    truncated: bool = False
    gold: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    companion: tuple[list[int], list[int]] | None = None


@dataclass(slots=True)
class _Answer:
    """What the model said to one item: a list of responses for each of its requests."""

    responses: list[list[Any]]
    cut_off: bool = False
    tokens: float = 0.0
    forced: tuple[float, float] | None = None


class ItemScorer:
    """Scores items of a TaskSet on whatever weights ``lm`` has at the time.

    recipe: the hash of what is live, by whose name it is served.

    Raises (on use):
        CandidateFailed: a log-likelihood or a value is not finite.
        AnswerRefused: the task's own code raised at an answer.
        TaskError: an item that this task set does not hold, or that cannot be tokenised.
    """

    def __init__(self, lm: ScoringModel, taskset: TaskSet) -> None:
        self._lm = lm
        self._taskset = taskset
        self._known = {ref: task for task in taskset.tasks for ref in task.items}
        self._prepared: dict[ItemRef, PreparedItem] = {}
        self.recipe = ""

    def score(self, refs: Sequence[ItemRef]) -> list[ItemResult]:
        """One result an item, in the order asked.

        All requests of one type go to the engine in one call, task by task in document order:
        the batches are those of ``simple_evaluate`` on the same documents.
        """
        chats = [ref for ref in refs if ref.task in self._taskset.judged]
        self._refuse_unknown([ref for ref in refs if ref.task not in self._taskset.asked])
        results = play(self._lm, self._taskset.judged, chats)
        for name, served in self._taskset.served.items():
            if asked := [ref for ref in refs if ref.task == name]:
                results |= ask_served(served, self._lm, self.recipe, asked)
        items = self.prepared([ref for ref in refs if ref not in results])
        answers = self._ask(items)
        for task in self._taskset.tasks:
            own = {ref: item for ref, item in items.items() if ref.task == task.name}
            if own:
                results.update(_judged(own, answers))
        return [results[ref] for ref in refs]

    def prepared(self, refs: Sequence[ItemRef]) -> dict[ItemRef, PreparedItem]:
        """Each item once, tokenised, task by task in document order."""
        place = {task.name: i for i, task in enumerate(self._taskset.tasks)}
        self._refuse_unknown(refs)
        wanted = sorted(set(refs), key=lambda ref: (place[ref.task], ref.index))
        return {ref: self._prepare(ref) for ref in wanted}

    def _refuse_unknown(self, refs: Sequence[ItemRef]) -> None:
        for ref in refs:
            if ref not in self._known:
                raise TaskError(
                    f"item {ref.index} of task {ref.task!r} ({ref.key}) is not asked here; "
                    "the task's file or data has changed since"
                )

    def _prepare(self, ref: ItemRef) -> PreparedItem:
        if ref not in self._prepared:
            task = self._known[ref]
            asked = self._taskset.asked[ref.task]
            instances = asked.requests[ref.index]
            kind = instances[0].request_type
            if kind == "loglikelihood":
                item = self._with_tokens(task, asked, instances)
            elif kind == "generate_until":
                item = self._with_gold(task, asked, instances)
            else:
                item = PreparedItem(task, asked, instances)
            self._prepared[ref] = item
        return self._prepared[ref]

    def _with_tokens(self, task: ScoredTask, asked: Asked, instances: Any) -> PreparedItem:
        encoded = self._lm.encode(instances)
        truncated = any(self._lm.cut(context, more) for _, context, more in encoded)
        gold: tuple[int, ...] = ()
        scales: tuple[float, ...] = ()
        if task.margin_kind == "choice":
            doc = instances[0].doc
            gold = metrics.gold_choices(asked.task, doc)
            scales = metrics.choice_scales(asked.task, doc, task.metric)
        return PreparedItem(task, asked, instances, tuple(encoded), truncated, gold, scales)

    def _with_gold(self, task: ScoredTask, asked: Asked, instances: Any) -> PreparedItem:
        context, kwargs = instances[0].args[:2]
        stopping = self._lm.stopping(kwargs)
        truncated = self._lm.prompt_cut(context, stopping.max_new)
        companion = None
        if asked.companion and len(instances) == 1:
            for gold in _gold_texts(asked, instances[0].doc):
                tokens = self._lm.gold_tokens(context, gold, stopping.max_new)
                if tokens and _accepted(asked, instances, self._lm.said(tokens[1], stopping)):
                    companion = tokens
                    break
        return PreparedItem(task, asked, instances, truncated=truncated, companion=companion)

    def _ask(self, items: dict[ItemRef, PreparedItem]) -> dict[ItemRef, _Answer]:
        """Every request of every item, by type."""
        answers = {ref: _Answer([[] for _ in item.instances]) for ref, item in items.items()}
        places = [
            (ref, item, i, repeat)
            for ref, item in items.items()
            for i, instance in enumerate(item.instances)
            for repeat in range(instance.repeats or 1)
        ]
        by_type: dict[str, list[tuple[ItemRef, PreparedItem, int]]] = {}
        for ref, item, i, _ in places:
            by_type.setdefault(item.instances[i].request_type, []).append((ref, item, i))
        for kind, requests in by_type.items():
            instances = [item.instances[i] for _, item, i in requests]
            said: Iterable[Any]
            if kind == "loglikelihood":
                said = self._lm.answer([item.encoded[i] for _, item, i in requests])
            elif kind == "loglikelihood_rolling":
                said = self._lm.rolling(instances)
            else:
                made = self._lm.generate(instances)
                for (ref, _, _), one in zip(requests, made, strict=True):
                    answers[ref].cut_off |= one.cut_off
                    answers[ref].tokens += one.tokens
                said = [one.text for one in made]
            for (ref, _, i), response in zip(requests, said, strict=True):
                answers[ref].responses[i].append(response)
        forced = [(ref, item.companion) for ref, item in items.items() if item.companion]
        margins = self._lm.teacher_forced([tokens for _, tokens in forced]) if forced else []
        for (ref, _), margin in zip(forced, margins, strict=True):
            answers[ref].forced = margin
        return answers


def _judged(
    items: dict[ItemRef, PreparedItem], answers: dict[ItemRef, _Answer]
) -> dict[ItemRef, ItemResult]:
    """Items of one task -> results, by the task's own filter and ``process_results``."""
    first = next(iter(items.values()))
    asked = first.asked
    instances = [instance for item in items.values() for instance in item.instances]
    responses = [r for ref in items for r in answers[ref].responses]
    if first.task.output_type != "generate_until":
        _refuse_infinite(items, answers)
    try:
        kept = iter(metrics.filtered(asked.task, asked.filter, instances, responses))
        said = {ref: [next(kept) for _ in item.instances] for ref, item in items.items()}
    except CandidateFailed:
        raise
    except Exception as error:  # a filter is the task's own code, and saw all answers at once
        for ref, item in items.items():
            _alone(ref, item, answers[ref])
        raise AnswerRefused(
            f"filter {asked.filter!r} of task {first.task.name!r} raised "
            f"{type(error).__name__}: {error}, at all answers together and at none alone"
        ) from error
    found = _by_script(items, said) if asked.script else {}
    results = {}
    for ref, item in items.items():
        answer = answers[ref]
        if ref in found:
            value, log_likelihood, margin = found[ref].score, None, found[ref].margin
            gave, why = "", found[ref].details
        else:
            value, gave = _value(ref, item, said[ref])
            why = ""
            log_likelihood, margin = _evidence(item, answer)
        for number in (log_likelihood, margin):
            if number is not None and not math.isfinite(number):
                raise CandidateFailed(
                    f"the gold answer's log-likelihood is not finite ({log_likelihood}, margin "
                    f"{margin}) for document {ref.index} of task {ref.task!r}"
                )
        results[ref] = ItemResult(
            value, log_likelihood, margin, item.truncated, answer.cut_off,
            tokens=round(answer.tokens), whole=gave, answers=_said(item, answer),
            reasons=(why,) if why else (),
        )  # fmt: skip
    return results


def _said(item: PreparedItem, answer: _Answer) -> tuple[str, ...]:
    """What the model said, or the choice that it made; nothing where it only weighed a text."""
    if item.task.output_type == "generate_until":
        return (str(answer.responses[0][0]),)
    if item.task.margin_kind != "choice" or item.task.metric == "acc_mutual_info":
        return ()
    lls = [responses[0][0] / scale if scale else -math.inf
           for responses, scale in zip(answer.responses, item.scales, strict=False)]  # fmt: skip
    return (str(item.instances[lls.index(max(lls))].args[1]).strip(),) if lls else ()


def _by_script(
    items: Mapping[ItemRef, PreparedItem], said: Mapping[ItemRef, Sequence[Any]]
) -> dict[ItemRef, Verdict]:
    """What the user's program makes of the answers."""
    told = {}
    for ref, item in items.items():
        first = item.instances[0]
        chat = item.asked.chats.get(first.args[0])
        told[ref.index] = {
            "prompt": first.args[0],
            **({} if chat is None else {"messages": chat}),
            "answers": list(texts(said[ref])),
            "document": first.doc,
        }
    script = next(iter(items.values())).asked.script
    assert script is not None
    found = verdicts(script, next(iter(items)).task, told)
    return {ref: found[ref.index] for ref in items}


def _alone(ref: ItemRef, item: PreparedItem, answer: _Answer) -> None:
    """One document by itself: raises at the one that a filter stumbles over."""
    with _its_own_code(ref, "the filter", answer.responses):
        metrics.filtered(item.asked.task, item.asked.filter, item.instances, answer.responses)


def _value(ref: ItemRef, item: PreparedItem, filtered: Sequence[Any]) -> tuple[float, str]:
    """What a document is worth by the task's own ``process_results``, and what it gives to a metric
    of whole answers.

    Raises:
        AnswerRefused: it raised, or gave no number, for these answers.
        CandidateFailed: the value is not finite.
    """
    metric = item.asked.metric
    with _its_own_code(ref, "process_results", filtered):
        found = item.asked.task.process_results(item.instances[0].doc, filtered)
        if metric not in found:
            raise KeyError(f"no {metric!r} in {sorted(found)}")
        value, gave = metrics.stored_value(
            item.asked.task, item.task.rebuild, metric, found[metric]
        )
    if not math.isfinite(value):
        raise CandidateFailed(f"{metric} of document {ref.index}, {ref.task}: {value}")
    return value, gave


@contextmanager
def _its_own_code(ref: ItemRef, what: str, answers: Sequence[Any]) -> Iterator[None]:
    """Within: code of the task's author, which may raise anything at an answer that it did not
    expect. That is this candidate's failure, not the search's."""
    try:
        yield
    except CandidateFailed:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise AnswerRefused(
            f"{what} of task {ref.task!r} raised {reason}, at document {ref.index} and the answer "
            f"{str(list(answers))[:200]}"
        ) from error


def _evidence(item: PreparedItem, answer: _Answer) -> tuple[float | None, float | None]:
    """(log-likelihood of the gold answer, margin), None where there is no such thing."""
    kind = item.task.output_type
    if item.task.margin_kind == "choice":
        lls = [responses[0][0] for responses in answer.responses]
        mutual = item.task.metric == "acc_mutual_info"
        return metrics.choice_margin(lls, item.gold, item.scales, mutual)
    if kind == "loglikelihood":
        return answer.responses[0][0][0], None
    if kind == "loglikelihood_rolling":
        return answer.responses[0][0], None
    return answer.forced or (None, None)


def _refuse_infinite(items: dict[ItemRef, PreparedItem], answers: dict[ItemRef, _Answer]) -> None:
    for ref in items:
        for responses in answers[ref].responses:
            for response in responses:
                number = response[0] if isinstance(response, tuple) else response
                if not math.isfinite(number):
                    raise CandidateFailed(
                        f"log-likelihood {number} for document {ref.index} of task {ref.task!r}"
                    )


def _gold_texts(asked: Asked, doc: Any) -> list[str]:
    """The one declared gold answer, as a model might begin it; none where there are several."""
    task = asked.task
    gold = task.doc_to_target(doc)
    if isinstance(gold, list):
        gold = gold[0] if len(gold) == 1 else None
    elif isinstance(gold, int) and task.get_config("doc_to_choice") is not None:
        gold = task.doc_to_choice(doc)[gold]
    if gold is None or gold == "":
        return []
    delimiter = "" if asked.after_template else task.get_config("target_delimiter") or ""
    return list(dict.fromkeys([f"{delimiter}{gold}", str(gold)]))


def _accepted(asked: Asked, instances: Sequence[Any], text: str) -> bool:
    """Whether the task's own filter and metric call this answer right."""
    responses = [[text] * (instance.repeats or 1) for instance in instances]
    try:
        kept = metrics.filtered(asked.task, asked.filter, instances, responses)
        value = asked.task.process_results(instances[0].doc, kept)[asked.metric]
        return bool(value == 1)
    except Exception:  # the task's own code; real answers will tell
        return False
