"""What a search's judges will be asked and cost, as far as it can be known before an answer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from agentmerge.agents.prices import cost_usd, price_of
from agentmerge.agents.providers import split_spec
from agentmerge.evaluation.playing import JudgedTask
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.evaluation.tokens import answer_length

if TYPE_CHECKING:
    from agentmerge.contracts.worker import ItemRef

_CHARS_PER_TOKEN = 4
#: Of a judge's reply: a reason and a figure.
_REPLY_TOKENS = 100


def judge_notes(taskset: TaskSet, prices: Mapping[str, Any]) -> Iterator[str]:
    """One sentence a judged task: verdicts and dollars an evaluation, answers as long as may be."""
    for name, judged in taskset.judged.items():
        own, task = judged.settings, taskset.task(name)
        refs = task.part("search")
        share = 1 + own.twice
        verdicts = round(judged.verdicts(refs) * share)
        tokens_in = round(sum(_tokens(judged, ref) for ref in refs) * share)
        provider, model, server = split_spec(own.model, own.base_url)
        price = price_of(provider, model, server is not None, prices)
        usd = cost_usd(price, tokens_in, verdicts * _REPLY_TOKENS)
        cost = "at a price that is not known" if usd is None else f"up to {usd:.2g} dollars"
        sealed = judged.verdicts(task.part("sealed")) if task.sealed != task.search else 0
        yield (
            f"task {name!r}: {own.model} judges {verdicts} answers an evaluation "
            f"({own.twice:.0%} of them twice), with up to {tokens_in} tokens to read, {cost}; in "
            f"the end {sealed} sealed ones of each finalist"
        )


def _tokens(judged: JudgedTask, ref: ItemRef) -> int:
    """Tokens that the verdicts on one conversation have to read, at most, or about."""
    conversation = judged.conversations[ref.index]
    most = min(judged.settings.answer_chars, answer_length(judged.generation) * _CHARS_PER_TOKEN)
    chars = 0
    for turn, (said, reference) in enumerate(
        zip(conversation.turns, conversation.references, strict=True)
    ):
        before = sum(len(text) + most for text in conversation.turns[:turn])
        answers = 2 * (before + most) if judged.baseline else before + most
        shown = len(judged.prompt) + len(said) + len(reference) + answers
        chars += shown * (2 if judged.baseline else 1)
    return chars // _CHARS_PER_TOKEN
