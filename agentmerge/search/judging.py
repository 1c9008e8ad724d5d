"""Answers to verdicts: what a judge is shown, asked at most once, and what becomes of it.

A judge runs where the search does, never where workers are. A verdict is in the ledger as soon as
it is there, under a hash of the judge and all that it was shown, so that no search, branch or life
of one asks it again. An answer without a valid verdict leaves its item missing. Knows no candidate.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from agentmerge.agents.judge import (
    Exhibit,
    Judgement,
    better_schema,
    pair_messages,
    points_messages,
    points_schema,
    read_better,
    read_points,
)
from agentmerge.agents.models import AgentModel
from agentmerge.agents.prompts import Message, Prompt, judge_prompt
from agentmerge.agents.roles import model_for
from agentmerge.config import SearchConfig
from agentmerge.contracts.calls import Call
from agentmerge.contracts.events import Event, Note
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import (
    BudgetReached,
    ModelReplyError,
    PromptError,
    RunFailed,
    TaskError,
    UserError,
)
from agentmerge.evaluation.conversations import located
from agentmerge.evaluation.judged import prompt_file
from agentmerge.evaluation.playing import JudgedTask
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.ledger import Ledger
from agentmerge.ledger.verdicts import VerdictKey
from agentmerge.search.purse import Purse
from agentmerge.system.bounded import read_text

#: Of a task's items that are asked at a time, the share that may be left without a verdict.
_MOST_MISSING = 0.5
#: Questions in a row that a server leaves unanswered before it is given up.
_PATIENCE = 3


@dataclass(frozen=True, slots=True)
class _Question:
    """One question to a judge. swapped: the baseline's answer stands first."""

    task: str
    ref: ItemRef
    turn: int
    messages: list[Message]
    key: VerdictKey
    swapped: bool = False

    @property
    def again(self) -> _Question:
        return replace(self, key=replace(self.key, nonce=1))


@dataclass(frozen=True)
class Judges:
    """The judges of a search's tasks; called with items and what was answered to them.

    configured: the config as of now. run_id: "" where no search asks. merges: how many are asked
    the sealed items in the end. ready: a chat model in the place of every judge's.
    """

    configured: Callable[[], SearchConfig]
    taskset: TaskSet
    ledger: Ledger
    run_id: str = ""
    purse: Purse = field(default_factory=Purse)
    emit: Callable[[Event], None] = lambda event: None
    seconds_left: Callable[[], float] = lambda: math.inf
    merges: Callable[[], int] = lambda: 0
    ready: Any = None
    _models: dict[str, tuple[AgentModel, Prompt]] = field(default_factory=dict)
    _asking: dict[VerdictKey, Future[float | None]] = field(default_factory=dict)
    _silence: Counter[str] = field(default_factory=Counter)
    _why: dict[VerdictKey, str] = field(default_factory=dict)
    _turns: dict[str, threading.BoundedSemaphore] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __call__(self, refs: Sequence[ItemRef], rows: Sequence[ItemResult]) -> list[ItemResult]:
        """The results, each answer judged; an item of which any turn has no verdict is missing.

        Raises:
            BudgetReached: the next verdict cannot be paid; those before it are kept.
            RunFailed: a judge does not answer any more.
            TaskError: a judge gave no valid verdict on most of a task's items.
        """
        own = self.taskset.judged
        judged = [(r, row) for r, row in zip(refs, rows, strict=True) if r.task in own]
        questions = [q for ref, row in judged for q in self._questions(ref, row.answers)]
        values = self._all(questions)
        by_item: dict[ItemRef, list[float | None]] = {}
        reasons: dict[ItemRef, list[str]] = {}
        for question, value in zip(questions, values, strict=True):
            by_item.setdefault(question.ref, []).append(value)
            if not question.swapped:
                reasons.setdefault(question.ref, []).append(self.ledger.reason(question.key))
        found = {ref: _result(row, by_item[ref], reasons[ref]) for ref, row in judged}
        self._refuse_most_missing(found)
        return [found.get(ref, row) for ref, row in zip(refs, rows, strict=True)]

    # --- questions ------------------------------------------------------------------------------

    def _questions(self, ref: ItemRef, answers: Sequence[str]) -> list[_Question]:
        task = self.taskset.judged[ref.task]
        _, prompt = self._of(ref.task)
        conversation, most = task.conversations[ref.index], task.settings.answer_chars
        baseline = task.baseline.get(conversation.id, ())

        def shown(said: Sequence[str], turn: int) -> Exhibit:
            return Exhibit(
                conversation.turns[turn],
                conversation.references[turn],
                conversation.category,
                tuple(zip(conversation.turns[:turn], said[:turn], strict=True)),
                said[turn],
            )

        found = []
        for turn in range(len(conversation.turns)):
            if baseline:
                mine, theirs = shown(answers, turn), shown(baseline, turn)
                asked = [
                    pair_messages(prompt, mine, theirs, most),
                    pair_messages(prompt, theirs, mine, most),
                ]
            else:
                asked = [points_messages(prompt, shown(answers, turn), task.settings.scale, most)]
            for messages, swapped in zip(asked, (False, True), strict=False):
                key = VerdictKey(_hashed(task, messages, turn), 0, task.judge_hash)
                found.append(_Question(ref.task, ref, turn, messages, key, swapped))
        return found

    def _all(self, questions: Sequence[_Question]) -> list[float | None]:
        """The verdict on each, in order; those that the share draws are asked a second time."""
        if not questions:
            return []
        again = [q.again for q in questions if self._drawn(q)]
        given_up = self._given_up(questions, again)
        at_once = max(self.taskset.judged[q.task].settings.at_once for q in questions)
        with ThreadPoolExecutor(at_once, "judge") as pool:
            asked = [q for q in (*questions, *again) if q.key not in given_up]
            turns = {q.key: pool.submit(self._verdict, q) for q in asked}
            try:
                values = {key: turn.result() for key, turn in turns.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        found = self._once_more(questions, [values.get(q.key) for q in questions])
        return [
            1 - value if q.swapped and value is not None else value
            for q, value in zip(questions, found, strict=True)
        ]

    def _given_up(
        self, questions: Sequence[_Question], again: Sequence[_Question]
    ) -> frozenset[VerdictKey]:
        """What this search asked before, in whatever life, and gets no verdict on. Where that is
        most of a task's items, the judge may have been mended since: they are asked anew."""
        found = {
            q.key
            for q in (*questions, *again)
            if self.ledger.verdict(q.key) is None and self.ledger.refused(self.run_id, q.key)
        }
        for name in {q.task for q in questions}:
            items = {q.ref for q in questions if q.task == name}
            missing = {q.ref for q in questions if q.task == name and q.key in found}
            if len(missing) > _MOST_MISSING * len(items):
                found -= {q.key for q in (*questions, *again) if q.task == name}
        return frozenset(found)

    def _once_more(
        self, questions: Sequence[_Question], found: Sequence[float | None]
    ) -> list[float | None]:
        """With what was not answered asked again, now that all others are done.

        Where that is in vain too, it is this answer only if the judge answers to another: a second
        opinion is asked, or it is given up. So an outage leaves no item missing.
        """
        known = [q for q, value in zip(questions, found, strict=True) if not _is_open(value)]
        values: list[float | None] = []
        for question, value in zip(questions, found, strict=True):
            if _is_open(value):
                value = self._verdict(question)
            if _is_open(value) and self._answers_to_others(question, known):
                value = self._verdict(question)
            if _is_open(value):
                value = None
                self._without_verdict(question, self._why[question.key], final=False)
            values.append(value)
        return values

    def _answers_to_others(self, question: _Question, known: Sequence[_Question]) -> bool:
        """Raises RunFailed where it answers to nothing more."""
        for other in (q.again for q in known if q.task == question.task):
            if self.ledger.verdict(other.key) is None and not _is_open(self._verdict(other)):
                return True
        return False

    def _without_verdict(self, question: _Question, why: str, *, final: bool) -> None:
        if self.run_id:
            asked = (question.task, question.ref.key, question.turn)
            self.ledger.save_unjudged(self.run_id, question.key, asked, why, final=final)
        told = f"no verdict on turn {question.turn + 1} of item {question.ref.index}"
        self.emit(Note(text=f"task {question.task!r}: {told}: {why}"))

    def _drawn(self, question: _Question) -> bool:
        share = int(question.key.question[:8], 16) / 16**8
        return share < self.taskset.judged[question.task].settings.twice

    def _verdict(self, question: _Question) -> float | None:
        """From the ledger, or from whoever asks it just now, or from the judge; None where its
        reply is of no use, NaN where it does not answer."""
        with self._lock:
            known = self.ledger.verdict(question.key)
            if known is not None:
                return known
            turn = self._asking.get(question.key)
            mine = turn is None
            if turn is None:
                turn = self._asking[question.key] = Future()
        if not mine:
            return turn.result()
        try:
            turn.set_result(self._ask(question))
        except BaseException as error:
            turn.set_exception(error)
        finally:
            with self._lock:
                del self._asking[question.key]
        return turn.result()

    def _ask(self, question: _Question) -> float | None:
        task = self.taskset.judged[question.task]
        model, _ = self._of(question.task)
        if task.baseline:
            schema, parse = better_schema(), read_better
        else:
            schema = points_schema(task.settings.scale)
            parse = partial(read_points, scale=task.settings.scale)
        try:
            with self._turn(question.task):
                reply = model.ask(
                    question.messages,
                    schema,
                    parse,
                    log=_Kept(self, question, parse),
                    limit_s=self.seconds_left(),
                )
        except ModelReplyError as error:
            if self.seconds_left() <= 0:
                raise BudgetReached("timeout") from None
            row = self._silence[question.task] + 1 if error.unanswered else 0
            self._silence[question.task] = row
            if row >= _PATIENCE:
                raise RunFailed(
                    f"the judge of task {question.task!r} does not answer: {error}; mend that, "
                    "and resume: every verdict so far is kept"
                ) from None
            if error.unanswered:
                self._why[question.key] = str(error)
                return math.nan
            # The same again would be refused again, whether it was too long or not to be judged.
            self._without_verdict(question, str(error), final=True)
            return None
        self._silence[question.task] = 0
        return reply.parsed.value

    def _of(self, name: str) -> tuple[AgentModel, Prompt]:
        """A task's judge and its prompt, made when they are first asked for."""
        with self._lock:
            if name not in self._models:
                task, config = self.taskset.judged[name], self.configured()
                prompt = judge_prompt(task.prompt, task.prompt_path, paired=bool(task.baseline))
                own = task.settings
                model = model_for(config, own.role, own.model, _whose(name), self.ready)
                model.spares = False
                self._models[name] = model, prompt
            return self._models[name]

    def _turn(self, name: str) -> threading.BoundedSemaphore:
        """One of the questions that a task's judge is asked at once, by all evaluations."""
        with self._lock:
            most = self.taskset.judged[name].settings.at_once
            return self._turns.setdefault(name, threading.BoundedSemaphore(most))

    # --- what it costs --------------------------------------------------------------------------

    @cached_property
    def _costs(self) -> Counter[str]:
        """What this search's verdicts took, those of earlier lives too."""
        return Counter(self.ledger.verdict_costs(self.run_id))

    @cached_property
    def _sealed(self) -> frozenset[ItemRef]:
        return frozenset(self.taskset.refs("sealed")) - frozenset(self.taskset.refs("search"))

    def _left(self, question: _Question, most: tuple[int, float]) -> tuple[int, float]:
        """(tokens, dollars) that the end's verdicts are likely to take; nothing where they are
        asked now. most: what one of them can cost, which is promised to each under way."""
        tokens, usd = self.kept_back()
        if question.ref in self._sealed or not tokens:
            return 0, 0.0
        at_once = self.taskset.judged[question.task].settings.at_once
        return tokens + at_once * most[0], usd + at_once * most[1]

    def kept_back(self) -> tuple[int, float]:
        """(tokens, dollars) of the end's verdicts, by what those so far took."""
        with self._lock:
            verdicts, tokens, usd = (self._costs[k] for k in ("verdicts", "tokens", "microusd"))
        if not verdicts:
            return 0, 0.0
        ending = self.merges() * sum(
            (1 + task.settings.twice)
            * task.verdicts([ref for ref in self._sealed if ref.task == name])
            for name, task in self.taskset.judged.items()
        )
        return math.ceil(ending * tokens / verdicts), ending * usd / verdicts / 1e6

    def reserve(self, question: _Question, tokens: int, usd: float) -> None:
        limits = self.configured().budget
        with self._lock:
            left = self._left(question, (tokens, usd))
        self.purse.reserve(question.key, tokens, usd, limits, left)
        if self.seconds_left() <= 0:
            raise BudgetReached("timeout")

    def settle(self, question: _Question, call: Call) -> None:
        self.purse.settle(question.key, call)
        if call.ending == "answered":
            with self._lock:
                self._costs["verdicts"] += 1
                self._costs["tokens"] += call.tokens_in + call.tokens_out
                self._costs["microusd"] += round((call.cost_usd or 0.0) * 1e6)

    def _refuse_most_missing(self, found: Mapping[ItemRef, ItemResult]) -> None:
        for name in self.taskset.judged:
            own = [row.missing for ref, row in found.items() if ref.task == name]
            if sum(own) > _MOST_MISSING * len(own):
                raise TaskError(
                    f"the judge of task {name!r} gave no valid verdict on {sum(own)} of "
                    f"{len(own)} conversations; see what it says in the log, and change "
                    "judge.model or judge.prompt"
                )


def judge_faults(config: SearchConfig, ready: Any = None) -> Iterator[str]:
    """Judges that cannot be had, and prompts that cannot be read or filled in."""
    for entry in config.tasks.tasks:
        own = entry.judge
        if own is None:
            continue
        try:
            model_for(config, own.role, own.model, _whose(entry.name), ready)
        except UserError as error:
            yield str(error)
        try:
            place = located(entry.name, own.conversations, config.tasks.task_search_path)
            file = prompt_file(own, place)
            judge_prompt(read_text(file, PromptError), file, paired=own.against is not None)
        except PromptError as error:
            yield str(error)
        except TaskError:
            continue  # said by whoever reads the conversations


def _whose(name: str) -> str:
    return f"the judge of task {name!r}"


@dataclass
class _Kept:
    """The requests of one question, in the ledger with what came of them."""

    judges: Judges
    question: _Question
    parse: Callable[[str], Judgement]
    _first: int | None = None

    def stored(self, number: int) -> Call | None:
        return None  # the verdict would have been found

    def reserve(self, tokens_in: int, tokens_out: int, cost_usd: float | None) -> None:
        self.judges.reserve(self.question, tokens_in + tokens_out, cost_usd or 0.0)

    def keep(self, number: int, call: Call) -> None:
        judges, asked = self.judges, self.question
        model, prompt = judges._of(asked.task)
        if self._first is None:  # an earlier life may have asked in vain
            self._first = judges.ledger.judge_attempts(judges.run_id, asked.key)
        verdict = None
        if call.ending == "answered":
            said = self.parse(call.reply or "")
            verdict = (asked.task, asked.ref.key, asked.turn, said.value, said.reason)
        judges.ledger.save_call_and_verdict(
            judges.run_id,
            asked.key,
            self._first + number,
            replace(call, messages=()),  # long, and made again from the answers
            model=model.name,
            prompt_file=prompt.sha,
            verdict=verdict,
        )
        judges.settle(asked, call)


def _is_open(value: float | None) -> bool:
    return value is not None and math.isnan(value)


def _hashed(task: JudgedTask, messages: Sequence[Message], turn: int) -> str:
    body = [task.judge_hash, turn, [[m["role"], m["content"]] for m in messages]]
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:32]


def _result(row: ItemResult, values: Sequence[float | None], reasons: Sequence[str]) -> ItemResult:
    """The mean over turns, and over both orders of a comparison. reasons: of the first order."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return replace(row, value=math.nan, missing=True)
    return replace(row, value=sum(known) / len(known), reasons=tuple(reasons))
