"""What a search's judges will be asked and cost, as far as it can be known before an answer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmerge.agents.prices import cost_usd, price_of
from agentmerge.agents.providers import split_spec
from agentmerge.config import SearchConfig, TaskConfig
from agentmerge.evaluation.judged import judged_task
from agentmerge.evaluation.playing import JudgedTask
from agentmerge.evaluation.tasks import TaskSet

if TYPE_CHECKING:
    from agentmerge.contracts.worker import ItemRef

_CHARS_PER_TOKEN = 4
#: Of a judge's reply: a reason and a figure.
_REPLY_TOKENS = 100


@dataclass(frozen=True, slots=True)
class JudgeCost:
    """What the answers of one merge to one part of a judged task take, as long as they may be.

    verdicts: second opinions are in it. usd: None where the price is not known.
    """

    verdicts: int
    tokens_in: int
    tokens_out: int
    usd: float | None

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out

    @property
    def price(self) -> str:
        return (
            "at a price that is not known" if self.usd is None else f"up to {self.usd:.2g} dollars"
        )


def cost_of(judged: JudgedTask, refs: Sequence[ItemRef], prices: Mapping[str, Any]) -> JudgeCost:
    own = judged.settings
    share = 1 + own.twice
    verdicts = round(judged.verdicts(refs) * share)
    tokens_in = round(sum(_tokens(judged, ref) for ref in refs) * share)
    tokens_out = verdicts * _REPLY_TOKENS
    provider, model, server = split_spec(own.model, own.base_url)
    price = price_of(provider, model, server is not None, prices)
    return JudgeCost(verdicts, tokens_in, tokens_out, cost_usd(price, tokens_in, tokens_out))


def judge_notes(taskset: TaskSet, prices: Mapping[str, Any]) -> Iterator[str]:
    """One sentence a judged task: verdicts and dollars an evaluation, answers as long as may be."""
    for name, judged in taskset.judged.items():
        task = taskset.task(name)
        cost = cost_of(judged, task.part("search"), prices)
        sealed = judged.verdicts(task.part("sealed")) if task.sealed != task.search else 0
        yield (
            f"task {name!r}: {judged.settings.model} judges {cost.verdicts} answers an evaluation "
            f"({judged.settings.twice:.0%} of them twice), with up to {cost.tokens_in} tokens to "
            f"read, {cost.price}; in the end {sealed} sealed ones of each finalist"
        )


def judge_forecast(config: SearchConfig, entry: TaskConfig, merges: int) -> tuple[str, bool]:
    """What a task's judge will cost and how much of the budget that leaves, and whether the budget
    is enough for the end.

    merges: how many are asked the sealed items, at most.

    Raises:
        TaskError: the task's files cannot be read.
    """
    task, judged, _, _ = judged_task(entry, config.tasks)
    budget, prices = config.budget, config.budget.prices or {}
    each = cost_of(judged, task.part("search"), prices)
    sealed = task.part("sealed") if task.sealed != task.search else ()
    end = cost_of(judged, sealed, prices)
    told = (
        f"{judged.settings.model} is asked {each.verdicts} questions a candidate "
        f"({judged.settings.twice:.0%} of them twice), up to {each.tokens} tokens, {each.price}"
    )
    if not sealed:
        return f"{told}; nothing is kept back for the end, where nothing is sealed", True
    shares = {}
    if budget.max_tokens is not None:
        shares["max_tokens"] = merges * end.tokens / budget.max_tokens
    if budget.max_cost_usd and end.usd is not None:
        shares["max_cost_usd"] = merges * end.usd / budget.max_cost_usd
    kept = " and ".join(f"{share:.0%} of budget.{limit}" for limit, share in shares.items())
    kept = kept or "nothing, since no limit of the budget can be reckoned with"
    return (
        f"{told}; the end asks up to {merges * end.verdicts} more, of {merges} merges, for which "
        f"about {merges * end.tokens} tokens are reckoned (fewer once verdicts are known) and kept "
        f"back: {kept}"
    ), all(share <= 1 for share in shares.values())


def _tokens(judged: JudgedTask, ref: ItemRef) -> int:
    """Tokens that the verdicts on one conversation have to read, at most, or about."""
    from agentmerge.evaluation.tokens import answer_length  # needs lm-eval

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
