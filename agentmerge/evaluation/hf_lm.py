"""lm-eval's own Hugging Face model class around a live model whose weights change under it.

It keeps what does not depend on weights (tokenised requests) and nothing that does. Knows batches;
tokens are ``tokens.py``, and what an answer is worth is ``scoring.py``.
"""

from __future__ import annotations

import inspect
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from agentmerge.errors import CandidateFailed
from agentmerge.evaluation.loading import quiet
from agentmerge.evaluation.openai_server import Sampling, Traced
from agentmerge.evaluation.tokens import Encoded, Ended, Generated, Stopping, Tokenised

#: Context tokens and the gold tokens that should follow them.
TokenPair = tuple[list[int], list[int]]

#: The seed of torch's generator before sampled generation, as ``simple_evaluate`` has it.
TORCH_SEED = 1234
_KEPT_BATCHES = 2000


class _RefuseNaN(transformers.LogitsProcessor):  # type: ignore[misc]
    """Argmax over NaN picks a token, and the answer would look like any other."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if torch.isnan(scores).any():
            raise CandidateFailed("the model's logits are not numbers (NaN) while it generates")
        return scores


class LiveLM(Tokenised, HFLM):  # type: ignore[misc]
    """HFLM on a model that is already built, without progress bars, tokenising each text once.

    model: a causal language model in eval mode. batch_size: requests a forward pass.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_length: int) -> None:
        self._begin()
        self._padded: dict[Any, Any] = {}
        self._rows: list[str] = []
        self._ended: dict[tuple[str, Stopping], Ended] = {}
        self.embedding_rows = model.get_input_embeddings().weight.shape[0]
        with quiet():
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
            )

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        self._rows = list(strings)
        key = (tuple(strings), args, tuple(sorted(kwargs.items())))
        if key not in self._padded:
            if len(self._padded) > _KEPT_BATCHES:  # subsets of items make ever new batches
                self._padded.clear()
            self._padded[key] = super().tok_batch_encode(list(strings), *args, **kwargs)
        return self._padded[key]

    def forget(self, texts: Sequence[str]) -> None:
        super().forget(texts)
        gone = set(texts)
        for key in [key for key in self._padded if not gone.isdisjoint(key[0])]:
            del self._padded[key]

    # --- answers --------------------------------------------------------------------------------

    def answer(self, requests: Sequence[Encoded]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation."""
        return list(self._loglikelihood_tokens(list(requests)))

    def rolling(self, instances: Sequence[Any]) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context."""
        return list(self.loglikelihood_rolling(list(instances), disable_tqdm=True))

    def generate(self, instances: Sequence[Any]) -> list[Generated]:
        self._ended = {}
        stops = [self.stopping(instance.args[1]) for instance in instances]
        with _sampling(any(stop.sampled for stop in stops)), _no_warnings():
            texts = self.generate_until(list(instances), disable_tqdm=True)
        return [
            self._ended[instance.args[0], stop].said(text)
            for text, instance, stop in zip(texts, instances, stops, strict=True)
        ]

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Any:
        generation_kwargs.setdefault(
            "logits_processor", transformers.LogitsProcessorList([_RefuseNaN()])
        )
        sampled = bool(generation_kwargs.get("do_sample"))
        out = super()._model_generate(context, max_length, stop, **generation_kwargs)
        width = context.shape[1]
        stopping = Stopping(tuple(stop), max_length - width, sampled)
        ends = self._ends
        for text, row in zip(self._rows, out[:, width:].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(row) if token in ends), None)
            stopped = self._stopped(row[:length], stop)
            whole = length is None and stopped is None and len(row) >= stopping.max_new
            ended = self._ended.setdefault((text, stopping), Ended())
            ended.tell(whole, stopped or length or len(row))
        return out

    def _stopped(self, row: Sequence[int], stop: Sequence[str]) -> int | None:
        """How many of the tokens hold the first stop; None where there is none. The others of its
        batch may have gone on for longer."""

        def holds(count: int) -> bool:
            said = self.tok_decode(row[:count], skip_special_tokens=False)
            return any(term and term in said for term in stop)

        if not holds(len(row)):
            return None
        return bisect_left(range(1, len(row)), True, key=holds) + 1

    # --- served (``openai_server.ServedModel``) -------------------------------------------------

    def continued(
        self, prompt: list[int], max_new: int, stop: Sequence[str], sampling: Sampling
    ) -> tuple[list[int], bool]:
        context = torch.tensor([prompt], device=self.device)
        sampled = sampling.temperature > 0
        how: dict[str, Any] = {"do_sample": sampled}
        if sampled:
            # Of all tokens: unasked, transformers leaves out all but 50.
            how |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with _sampling(sampled, sampling.seed), _no_warnings(), torch.no_grad():
            out = super()._model_generate(
                context,
                len(prompt) + max_new,
                list(stop),
                attention_mask=torch.ones_like(context),
                logits_processor=transformers.LogitsProcessorList([_RefuseNaN()]),
                **how,
            )
        tokens = out[0, len(prompt) :].tolist()
        ended = not self._ends.isdisjoint(tokens) or self._stopped(tokens, stop) is not None
        return tokens, ended

    def traced(self, tokens: list[int]) -> list[Traced]:
        with torch.no_grad():
            logits = self._model_call(torch.tensor([tokens], device=self.device))[0, :-1]
        logits = logits if logits.dtype is torch.float64 else logits.float()
        logprobs = logits.log_softmax(-1)
        if not torch.isfinite(logprobs.amax(-1)).all():
            raise CandidateFailed("the model's logits are not numbers (NaN)")
        best, place = logprobs.max(-1)
        own = logprobs.gather(-1, torch.tensor(tokens[1:], device=logprobs.device)[:, None])[:, 0]
        rows = zip(own.tolist(), place.tolist(), best.tolist(), strict=True)
        return [Traced(*row) for row in rows]

    @property
    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())

    # --- the companion request ------------------------------------------------------------------

    def teacher_forced(self, requests: Sequence[TokenPair]) -> list[tuple[float, float]]:
        """(log-likelihood, margin) of each gold answer after its context, in nats.

        The margin is the least, over the answer's tokens, of gold minus best other logit.
        """
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
        found: list[tuple[float, float]] = [(0.0, 0.0)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            answers = self._forced([requests[i] for i in batch])
            for i, answer in zip(batch, answers, strict=True):
                found[i] = answer
        return found

    def _forced(self, requests: Sequence[TokenPair]) -> list[tuple[float, float]]:
        batch = _Batch.of(requests, self.device)
        with torch.no_grad():
            lls, margins = batch.judged(self._model_call(batch.rows), batch.places)
        return list(zip(lls.tolist(), margins.tolist(), strict=True))

    # --- gradients ------------------------------------------------------------------------------

    def fitted(self, context: Sequence[int], gold: Sequence[int]) -> TokenPair:
        """The pair without the beginning that lm-eval drops where it does not fit."""
        room = int(self.max_length) + 1 - len(gold)
        return list(context[-room:]), list(gold)

    def windows(self, text: str) -> list[TokenPair]:
        """A whole text as lm-eval cuts it: pairs in which each of its tokens is gold once."""
        cut = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(list(context), list(gold)) for context, gold in map(make_disjoint_window, cut)]

    def differentiable(self, requests: Sequence[TokenPair]) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-likelihoods, margins), each (requests,), as ``teacher_forced``, on one graph.

        Logits are made only where an answer's tokens are, if the model can do that.
        """
        batch = _Batch.of(requests, self.device)
        extra, places = {}, batch.places
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            extra["logits_to_keep"], places = torch.unique(batch.places, return_inverse=True)
        logits = self.model(batch.rows, use_cache=False, **extra).logits
        return batch.judged(logits, places)


@dataclass(frozen=True, slots=True)
class _Batch:
    """(context, gold) pairs, padded on the right: what a causal model sees of each is the same.

    rows: (pairs, tokens) input. places, golds, real: (pairs, gold tokens) where each gold token is
    predicted, which it is, and whether it is one.
    """

    rows: torch.Tensor
    places: torch.Tensor
    golds: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of(cls, pairs: Sequence[TokenPair], device: torch.device) -> _Batch:
        lengths = [len(context) + len(gold) - 1 for context, gold in pairs]
        rows = torch.zeros((len(pairs), max(lengths)), dtype=torch.long)
        spans = max(len(gold) for _, gold in pairs)
        places = torch.zeros((len(pairs), spans), dtype=torch.long)
        golds = torch.zeros((len(pairs), spans), dtype=torch.long)
        real = torch.zeros((len(pairs), spans), dtype=torch.bool)
        for i, (context, gold) in enumerate(pairs):
            rows[i, : lengths[i]] = torch.tensor((context + gold)[:-1])
            places[i, : len(gold)] = torch.arange(len(context) - 1, lengths[i])
            places[i, len(gold) :] = lengths[i] - 1
            golds[i, : len(gold)] = torch.tensor(gold)
            real[i, : len(gold)] = True
        return cls(*(part.to(device) for part in (rows, places, golds, real)))

    def judged(
        self, logits: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-likelihood, margin) of each gold; ``places``: of gold tokens among the logits."""
        logits = logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
        logits = logits if logits.dtype is torch.float64 else logits.float()
        index = self.golds.unsqueeze(-1)
        own = logits.gather(-1, index).squeeze(-1)
        lls = own - logits.logsumexp(-1)
        others = logits.scatter(-1, index, -torch.inf).amax(-1)
        total = torch.where(self.real, lls, 0.0).sum(-1)
        return total, torch.where(self.real, own - others, torch.inf).amin(-1)


@contextmanager
def _sampling(sampled: bool, seed: int = TORCH_SEED) -> Iterator[None]:
    """Sampled answers from one seed, by default lm-eval's own; the caller's generators are left as
    they were."""
    if not sampled:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
