"""What a gradient is of: the loss of items on a live model, in pieces that fit in memory.

An item's loss is a function of the log-likelihoods and margins of a few (context, gold) pairs, all
teacher-forced, so every kind of task goes through the same forward pass, generation through its
companion request. Where both are defined, it is the loss of the very log-likelihood or margin that
scoring stores of the item. Knows no merges; items are prepared by ``scoring.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from agentmerge.contracts.worker import ItemRef, Loss
from agentmerge.errors import CandidateFailed
from agentmerge.evaluation import metrics
from agentmerge.evaluation.scoring import ItemScorer, PreparedItem

if TYPE_CHECKING:
    from agentmerge.evaluation.hf_lm import LiveLM, TokenPair

#: (log-likelihoods, margins) of an item's pairs, each (pairs,), in nats -> its loss.
Value = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Term:
    """A part of the loss that cannot be divided: ``share`` times ``value`` of its pairs."""

    share: float
    pairs: tuple[TokenPair, ...]
    value: Value


@dataclass(frozen=True, slots=True)
class ItemLoss:
    """The weighted mean of items' losses. items: how many have one."""

    terms: tuple[Term, ...]
    items: int

    def parts(self, lm: LiveLM, size: int) -> Iterator[torch.Tensor]:
        """Scalars that add up to the loss, each on a graph of its own, about ``size`` sequences at
        a time; longest first, so that what does not fit is known at once.

        Raises:
            CandidateFailed: one is not finite.
        """
        terms = sorted(self.terms, key=lambda term: -_length(term))
        while terms:
            batch, terms = _batch(terms, size)
            lls, margins = lm.differentiable([pair for term in batch for pair in term.pairs])
            total, start = lls.new_zeros(()), 0
            for term in batch:
                own = slice(start, start + len(term.pairs))
                total = total + term.share * term.value(lls[own], margins[own])
                start = own.stop
            if not torch.isfinite(total):
                raise CandidateFailed(f"the loss is not finite ({float(total.detach())})")
            yield total


def item_loss(
    scorer: ItemScorer,
    lm: LiveLM,
    refs: Sequence[ItemRef],
    loss: Loss,
    weights: Sequence[float] | None = None,
) -> ItemLoss:
    """The loss of these items; those without a gold answer are left out.

    Raises:
        CandidateFailed: none has one.
        TaskError: an item that is not asked here.
    """
    prepared = scorer.prepared(refs)
    given = [1.0] * len(refs) if weights is None else list(weights)
    found = [
        (weight, values)
        for ref, weight in zip(refs, given, strict=True)
        if (values := _values(prepared[ref], lm, loss))
    ]
    total = sum(abs(weight) for weight, _ in found)
    if not total:
        raise CandidateFailed("no item has a gold answer and a weight to take a gradient of")
    terms = tuple(
        Term(weight / total, pairs, value) for weight, values in found for pairs, value in values
    )
    return ItemLoss(terms, len(found))


def _values(
    item: PreparedItem, lm: LiveLM, loss: Loss
) -> list[tuple[tuple[TokenPair, ...], Value]]:
    """What is added up to an item's loss; nothing where it has no gold answer."""
    kind = item.task.output_type
    if kind == "loglikelihood_rolling":
        return _text(item, lm, loss)
    if item.task.margin_kind == "choice":
        return _choice(item, lm, loss)
    pair = item.companion
    if kind == "loglikelihood":
        pair = lm.fitted(*item.encoded[0][1:])
    if pair is None:
        return []
    value: Value = _likelihood if loss == "log_likelihood" else _ahead
    return [((pair,), value)]


def _choice(
    item: PreparedItem, lm: LiveLM, loss: Loss
) -> list[tuple[tuple[TokenPair, ...], Value]]:
    pairs = tuple(lm.fitted(context, more) for _, context, more in item.encoded)
    if loss == "log_likelihood":
        return [((pairs[item.gold[0]],), _likelihood)] if len(item.gold) == 1 else []
    if not 0 < len(item.gold) < len(item.scales):
        return []
    mutual = item.task.metric == "acc_mutual_info"

    def ahead_of_others(lls: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        margin = metrics.choice_margin(list(lls), item.gold, item.scales, mutual)[1]
        assert margin is not None  # there is a wrong choice
        return softplus(-margin)

    return [(pairs, ahead_of_others)]


def _text(item: PreparedItem, lm: LiveLM, loss: Loss) -> list[tuple[tuple[TokenPair, ...], Value]]:
    windows = lm.windows(item.instances[0].args[0])
    tokens = sum(len(gold) for _, gold in windows) if loss == "margin" else 1
    return [((window,), lambda lls, _: -lls.sum() / tokens) for window in windows]


def _likelihood(lls: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return -lls.sum()


def _ahead(_: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    return softplus(-margins).sum()


def _length(term: Term) -> int:
    return max(len(context) + len(gold) for context, gold in term.pairs)


def _batch(terms: Sequence[Term], size: int) -> tuple[list[Term], list[Term]]:
    """Terms of about ``size`` pairs, at least one term; and the rest."""
    count, pairs = 1, len(terms[0].pairs)
    while count < len(terms) and pairs + len(terms[count].pairs) <= size:
        pairs += len(terms[count].pairs)
        count += 1
    return list(terms[:count]), list(terms[count:])
