"""Trains one model of the demo on lines of its language until it has what is asked of it.

Knows the vocabulary, the training step and how a skill is measured; which models a family has, and
when each is done, is ``family``'s. What is measured, kept and saved are weights averaged over the
last steps: they have at a constant rate what a falling rate would give, so training can end at any
step, when a measurement says so. A count of steps would give another skill on every processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmerge.demo import language

if TYPE_CHECKING:
    import torch

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
VOCABULARY = (PAD, BOS, EOS, UNK, "\n", ":", "=", *language.CHARACTERS)
_PAD = VOCABULARY.index(PAD)
BATCH = 64
#: The share of the average that a step leaves as it was.
AVERAGED = 0.97
#: What comes before an answer.
N_PROMPT = 1 + len(language.prompt(language.COPY_TAG, "a" * language.INPUT_LENGTH))

Mixture = Mapping[str, tuple[float, Callable[[str], str]]]
"""Tag -> its share of the lines and what its answer is."""
Weights = dict[str, "torch.Tensor"]


def stream(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers of their own for each purpose: an expert sees the same in every family."""
    words = np.random.SeedSequence([seed, *purpose.encode()])
    return np.random.Generator(np.random.PCG64(words))


def sample_lines(mixture: Mixture, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`n` training lines as (prompt, answer); inputs held out or for validation never occur."""
    pool = language.inputs(held_out=False)
    tags, shares = list(mixture), [share for share, _ in mixture.values()]
    texts = [pool[i] for i in rng.integers(len(pool), size=n)]
    chosen = [tags[i] for i in rng.choice(len(tags), size=n, p=shares)]
    return [
        (language.prompt(tag, text), mixture[tag][1](text))
        for tag, text in zip(chosen, texts, strict=True)
    ]


def encode(lines: list[tuple[str, str]]) -> torch.Tensor:
    """(lines, tokens), padded on the right where answers differ in length."""
    import torch

    number = {token: i for i, token in enumerate(VOCABULARY)}
    bos, eos, longest = number[BOS], number[EOS], max(len(q + a) for q, a in lines)
    return torch.tensor([
        [bos, *(number[c] for c in q + a), eos, *[_PAD] * (longest - len(q + a))] for q, a in lines
    ])  # fmt: skip


class Learner:
    """A model in training: AdamW at a constant rate after a warm-up; ``weights`` are averaged."""

    def __init__(
        self, model: Any, mixture: Mixture, rng: np.random.Generator, rate: float, warm_up: int
    ) -> None:
        import torch

        self.model, self._mixture, self._rng = model, mixture, rng
        self._rate, self._warm_up = rate, warm_up
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
        self.weights: Weights = copied(model)
        self.steps, self.loss = 0, float("nan")

    def learn(self, steps: int) -> None:
        """So many steps more."""
        for batch in batches(self._mixture, steps, self._rng):
            self.step(batch)

    def next_batches(self, steps: int) -> torch.Tensor:
        return batches(self._mixture, steps, self._rng)

    def step(self, batch: torch.Tensor, more: Weights | None = None) -> None:
        """One step down the slope of a batch's loss, and of what has the slope `more`."""
        import torch

        self.steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * min(1.0, self.steps / self._warm_up)
        self.loss = backward(self.model, batch)
        for name, slope in (more or {}).items():
            self.model.get_parameter(name).grad += slope
        self._optimizer.step()
        # early on an average over what there is, since the beginning is no weight to keep
        left = min(AVERAGED, self.steps / (self.steps + 10))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.weights[name].lerp_(parameter, 1 - left)


def batches(mixture: Mixture, steps: int, rng: np.random.Generator) -> torch.Tensor:
    """(steps, BATCH, tokens)"""
    return encode(sample_lines(mixture, steps * BATCH, rng)).view(steps, BATCH, -1)


def backward(model: Any, batch: torch.Tensor) -> float:
    """The mean loss of the answers, its slope left in the parameters' ``grad``."""
    from torch.nn.functional import cross_entropy

    model.train()
    answers = batch[:, N_PROMPT:]
    logits = model(batch[:, :-1], logits_to_keep=answers.shape[1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=_PAD)
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def learn_together(
    learners: Sequence[Learner], base: Any, batches_of_all: torch.Tensor, weight: float
) -> None:
    """A step of every learner for each batch: down its own slope and that of their uniform merge.

    Their sum at `weight` is asked `batches_of_all`, each learner its own lines.
    """
    own = [learner.next_batches(len(batches_of_all)) for learner in learners]
    for step, batch in enumerate(batches_of_all):
        merge = uniform_merge(base, [copied(learner.model) for learner in learners], weight)
        with holding(base, merge):
            backward(base, batch)
        slopes = {name: value.grad for name, value in base.named_parameters()}
        for learner, lines in zip(learners, own, strict=True):
            learner.step(lines[step], slopes)
    base.zero_grad()


def uniform_merge(base: Any, experts: Sequence[Weights], weight: float) -> Weights:
    """Task arithmetic with one weight for every expert."""
    return {
        name: value + weight * sum(expert[name] - value for expert in experts)
        for name, value in copied(base).items()
    }


def copied(model: Any) -> Weights:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@contextmanager
def holding(model: Any, weights: Weights) -> Iterator[Any]:
    """The model with other weights, for as long as that."""
    own = copied(model)
    put(model, weights)
    try:
        yield model
    finally:
        put(model, own)


def put(model: Any, weights: Weights) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def share_right(model: Any, tag: str, apply: Callable[[str], str]) -> float:
    """The share of the validation inputs that the model answers under `tag` as `apply` does."""
    import torch

    texts = language.validation_inputs()
    rows = encode([(language.prompt(tag, text), apply(text)) for text in texts])
    model.eval()
    with torch.no_grad():
        answers = rows[:, N_PROMPT:]
        logits = model(rows[:, :-1], logits_to_keep=answers.shape[1], use_cache=False).logits
    return float((logits.argmax(-1) == answers).all(-1).double().mean())
