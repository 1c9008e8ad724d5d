"""lm-eval's own vLLM model class around an engine whose weights change under it.

lm-eval recomputes the whole prompt for each choice of a question. Here a context is computed once:
    one token      all one-token continuations of a context are one request for their
                   log-probabilities as the next token;
    several        lm-eval's own request, reading the prefix cache; what the cache hid of the
                   continuation is asked again without it.
Everything else is lm-eval's. It knows tokens and log-probabilities; what an answer is worth is
``evaluation.scoring``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import configure_pad_token
from lm_eval.models.vllm_causallms import VLLM
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from agentmerge.errors import CandidateFailed
from agentmerge.evaluation.hf_lm import TORCH_SEED
from agentmerge.evaluation.loading import quiet
from agentmerge.evaluation.openai_server import Sampling, Traced
from agentmerge.evaluation.tokens import Encoded, Ended, Generated, Stopping, Tokenised

#: Continuations of one token that one request may ask for; vLLM's own bound is 128.
_MOST_CHOICES = 100

#: (prompts as tokens, settings of each) -> vLLM's outputs, in order.
Ask = Callable[[Sequence[list[int]], Sequence[SamplingParams]], list[Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One token of a continuation: its log-probability and the best of all others', in nats.

    greedy: it is what decoding takes; of equally likely tokens (at half precision they are common)
    that is the first of the vocabulary, as for the ``hf`` worker.
    """

    own: float
    other: float
    greedy: bool


class VllmLM(Tokenised, VLLM):  # type: ignore[misc]
    """lm-eval's VLLM on an engine that is already there.

    ask: puts prompts to the engine. max_length: tokens of a prompt and its answer.
    """

    room = -1  # vLLM generates one token after every prompt

    def __init__(self, ask: Ask, tokenizer: Any, max_length: int, max_gen_toks: int = 256) -> None:
        self._begin()
        TemplateLM.__init__(self)  # VLLM's own would start an engine
        self._ask = ask
        self._ended: dict[Any, Ended] = {}
        with quiet():
            self.tokenizer = configure_pad_token(tokenizer)
        self._max_length = max_length
        self._max_gen_toks = max_gen_toks

    # What VLLM's constructor would have left.
    batch_size = "auto"
    data_parallel_size = tensor_parallel_size = 1
    truncation_side = "left"
    add_bos_token = custom_prefix_token_id = None
    think_end_token = lora_request = hf_chat_template = None
    enable_thinking: bool | None = None
    chat_template_args: dict[str, Any] = {}  # noqa: RUF012

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def longest(self, requests: Sequence[Any]) -> int:
        """Tokens that the longest of these requests takes, its answer included."""
        longest = 2
        for instance in requests:
            kind, first = instance.request_type, instance.args[0]
            if kind == "loglikelihood":
                _, context, more = self.encode([instance])[0]
                length = len(context) + len(more) + 1
            elif kind == "generate_until":
                length = len(self.tok_encode(first)) + self.stopping(instance.args[1]).max_new + 1
            else:
                length = len(self.tok_encode(first)) + 2
            longest = max(longest, min(length, self.max_length))
        return longest

    # --- log-likelihoods ------------------------------------------------------------------------

    def answer(self, requests: Sequence[Encoded]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation."""
        single = [
            i
            for i, (_, context, more) in enumerate(requests)
            if len(more) == 1 and not self.cut(context, more)
        ]
        found: dict[int, tuple[float, bool]] = {}
        found.update(zip(single, self._next_tokens([requests[i] for i in single]), strict=True))
        rest = [i for i in range(len(requests)) if i not in found]
        for i, rows in zip(rest, self._rows([requests[i][1:] for i in rest]), strict=True):
            found[i] = (sum(row.own for row in rows), all(row.greedy for row in rows))
        return [found[i] for i in range(len(requests))]

    def _next_tokens(self, requests: Sequence[Encoded]) -> list[tuple[float, bool]]:
        """Continuations of one token, one request for all of a context's."""
        wanted: dict[tuple[int, ...], dict[int, None]] = {}
        for _, context, more in requests:
            wanted.setdefault(tuple(context), {})[more[0]] = None
        asked = [
            (context, tokens[start : start + _MOST_CHOICES])
            for context, tokens in sorted((c, list(t)) for c, t in wanted.items())
            for start in range(0, len(tokens), _MOST_CHOICES)
        ]
        settings = [_settings(logprob_token_ids=tokens) for _, tokens in asked]
        outputs = self._ask([list(context) for context, _ in asked], settings)
        known: dict[tuple[tuple[int, ...], int], tuple[float, bool]] = {}
        for (prompt, tokens), output in zip(asked, outputs, strict=True):
            said = output.outputs[0]
            for token in tokens:
                own = said.logprobs[0][token].logprob
                known[prompt, token] = (own, said.token_ids[0] == token)
        return [known[tuple(context), more[0]] for _, context, more in requests]

    def _rows(self, requests: Sequence[tuple[list[int], list[int]]]) -> list[list[Row]]:
        """The continuation's rows of each (context, continuation), cut as lm-eval cuts them."""
        longest = self.max_length - 1
        prompts = [(context + more)[-longest:] for context, more in requests]
        sizes = [len(more) for _, more in requests]
        order = sorted(range(len(prompts)), key=lambda i: prompts[i])
        outputs = dict(zip(order, self._scored([prompts[i] for i in order], True), strict=True))
        hidden = [i for i in order if outputs[i].num_cached_tokens > len(prompts[i]) - sizes[i] - 1]
        outputs |= zip(hidden, self._scored([prompts[i] for i in hidden], False), strict=True)
        return [
            [
                _row(row, token)
                for row, token in zip(
                    outputs[i].prompt_logprobs[-size:], prompts[i][-size:], strict=True
                )
            ]
            for i, size in enumerate(sizes)
        ]

    def _scored(self, prompts: Sequence[list[int]], cached: bool) -> list[Any]:
        # With 1 there would be no runner-up where the token itself is the likeliest.
        settings = _settings(prompt_logprobs=2, skip_reading_prefix_cache=not cached)
        return self._ask(prompts, [settings] * len(prompts))

    def teacher_forced(
        self, requests: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, float]]:
        """(log-likelihood, margin) of each gold answer after its context, in nats."""
        return [
            (sum(row.own for row in rows), min(row.own - row.other for row in rows))
            for rows in self._rows(requests)
        ]

    def rolling(self, instances: Sequence[Any]) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context."""
        return list(self.loglikelihood_rolling(list(instances), disable_tqdm=True))

    # --- generation -----------------------------------------------------------------------------

    def generate(self, instances: Sequence[Any]) -> list[Generated]:
        self._ended = {}
        texts = self.generate_until(list(instances), disable_tqdm=True)
        stops = [self.stopping(instance.args[1]) for instance in instances]
        return [
            self._ended[self._key(instance.args[0], stop)].said(text)
            for text, instance, stop in zip(texts, instances, stops, strict=True)
        ]

    # --- served (``openai_server.ServedModel``) ---------------------------------------------------

    def continued(
        self, prompt: list[int], max_new: int, stop: Sequence[str], sampling: Sampling
    ) -> tuple[list[int], bool]:
        settings = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed if sampling.temperature > 0 else None,
            max_tokens=max_new,
            stop=list(stop),
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        said = self._ask([prompt], [settings])[0].outputs[0]
        if said.token_ids and not math.isfinite(said.cumulative_logprob):
            raise CandidateFailed("the model's logits are not numbers (NaN) while it generates")
        return list(said.token_ids), said.finish_reason == "stop"

    def traced(self, tokens: list[int]) -> list[Traced]:
        (output,) = self._scored([tokens], False)
        return [_traced(row, token) for row, token in zip(
            output.prompt_logprobs[1:], tokens[1:], strict=True
        )]  # fmt: skip

    def _key(self, context: str, stop: Stopping) -> Any:
        prompt = self.tok_encode(context)[-(self.max_length - stop.max_new) :]
        return tuple(prompt), stop.max_new, stop.until

    def gold_tokens(
        self, context: str, gold: str, max_new: int
    ) -> tuple[list[int], list[int]] | None:
        found = super().gold_tokens(context, gold, max_new)
        if found is None:
            return None
        head, tail = found
        return head[-(self.max_length - 1 - len(tail)) :], tail

    def _model_generate(
        self, requests: Any, generate: bool = False, sampling_params: Any = None
    ) -> list[Any]:
        """What lm-eval's own methods ask with."""
        if not generate:
            settings = _settings(prompt_logprobs=1)
            return self._ask(requests, [settings] * len(requests))
        for each in sampling_params:
            each.logprobs = 0  # of the chosen token: not a number where the logits are none
            each.output_kind = RequestOutputKind.FINAL_ONLY
            if each.temperature > 0:
                each.seed = TORCH_SEED
        outputs = self._ask(requests, sampling_params)
        for prompt, settings, output in zip(requests, sampling_params, outputs, strict=True):
            said = output.outputs[0]
            if said.token_ids and not math.isfinite(said.cumulative_logprob):
                raise CandidateFailed("the model's logits are not numbers (NaN) while it generates")
            key = tuple(prompt), settings.max_tokens, tuple(settings.stop)
            ended = self._ended.setdefault(key, Ended())
            ended.tell(said.finish_reason == "length", len(said.token_ids))
        return outputs


def _settings(**more: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )


def _traced(found: Any, token: int) -> Traced:
    best = min(found, key=lambda other: (-found[other].logprob, other))
    return Traced(found[token].logprob, best, found[best].logprob)


def _row(found: Any, token: int) -> Row:
    own = found[token].logprob
    best = min(found, key=lambda other: (-found[other].logprob, other))
    return Row(own, max(e.logprob for other, e in found.items() if other != token), best == token)
