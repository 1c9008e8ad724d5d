"""What lm-eval's model classes do with text, kept from one call to the next.

``Tokenised`` goes before an lm-eval model class: requests become tokens once a run, whatever
weights answer them, and what lm-eval would cut is known before it is asked. It knows tokens and
lm-eval's rules, and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from agentmerge.errors import TaskError

#: A tokenised request, as lm-eval passes it around: (texts, context tokens, continuation tokens).
Encoded = tuple[tuple[str, str], list[int], list[int]]

#: Tokens of an answer where a task says nothing, in all of lm-eval's classes.
MAX_GEN_TOKS = 256


@dataclass(frozen=True, slots=True)
class Stopping:
    """What ends a generation, as lm-eval works it out of a request's settings."""

    until: tuple[str, ...]
    max_new: int
    sampled: bool


class Generated(NamedTuple):
    """A generated answer. text: up to the first stop. cut_off: it ran into max_gen_toks. tokens:
    how many were generated, its end among them; of requests that are alike, on average."""

    text: str
    cut_off: bool
    tokens: float


@dataclass(slots=True)
class Ended:
    """How requests that are alike ended; lm-eval says in no order which is whose."""

    cut_off: bool = False
    tokens: int = 0
    count: int = 0

    def tell(self, cut_off: bool, tokens: int) -> None:
        self.cut_off |= cut_off
        self.tokens += tokens
        self.count += 1

    def said(self, text: str) -> Generated:
        return Generated(text, self.cut_off, self.tokens / self.count)


def answer_length(generation_kwargs: Mapping[str, Any], default: int = MAX_GEN_TOKS) -> int:
    """Tokens that a generated answer may have, as lm-eval works it out of a request's settings."""
    return int(normalize_gen_kwargs(dict(generation_kwargs), default)["max_gen_toks"])


def refuse_no_room(max_new: int, context: int) -> None:
    """Raises TaskError where an answer alone fills the context."""
    if max_new >= context:
        raise TaskError(
            f"max_gen_toks {max_new} leaves no room in a context of {context} tokens; "
            "lower it in the task's generation_kwargs"
        )


class Tokenised:
    """See the module's head.

    room: tokens beyond ``max_length`` that context and continuation may have together, which is
        where lm-eval's classes differ.
    embedding_rows: of the model that will be asked; None until it is known.
    """

    room = 1
    embedding_rows: int | None = None
    max_length: int
    max_gen_toks: int
    eot_token_id: int
    tok_decode: Any

    def _begin(self) -> None:
        """To be called before lm-eval's own constructor, which may tokenise."""
        self._ids: dict[tuple[str, bool | None], list[int]] = {}
        self._captured: list[Encoded] | None = None

    def tok_encode(
        self,
        string: Any,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Tokens of a text, or a list of tokens for each of several.

        Raises:
            TaskError: a token that the model has no row for (a GPU would be lost over it).
        """
        if not isinstance(string, str):
            return [self.tok_encode(each, add_special_tokens, **kwargs) for each in string]
        key = (string, add_special_tokens)
        if key not in self._ids:
            asked: Any = super()
            made = asked.tok_encode(string, add_special_tokens, **kwargs)
            if self.embedding_rows is not None and max(made, default=0) >= self.embedding_rows:
                raise TaskError(
                    f"the tokenizer makes token {max(made)} of {string[:80]!r}, and the model has "
                    f"{self.embedding_rows} rows for tokens; its tokenizer files are another's"
                )
            self._ids[key] = made
        ids = self._ids[key]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def forget(self, texts: Sequence[str]) -> None:
        """Nobody asks these again: what is kept of them would only pile up."""
        for text in texts:
            for special in (None, False, True):
                self._ids.pop((text, special), None)

    def encode(self, instances: Sequence[Any]) -> list[Encoded]:
        """lm-eval's tokens of (context, continuation) requests, unscored.

        Raises:
            TaskError: a continuation without a token, or longer than the context.
        """
        self._captured = []
        try:
            TemplateLM.loglikelihood(self, list(instances), disable_tqdm=True)
            encoded = self._captured
        except IndexError:
            encoded = [(("", ""), [], [])]
        finally:
            self._captured = None
        longest = self.max_length + self.room - 1  # one token of context is what predicts its first
        for texts, context, continuation in encoded:
            if not context or not 0 < len(continuation) <= longest:
                raise TaskError(
                    f"an answer has {len(continuation)} tokens, and 1 to {longest} "
                    f"are possible: {texts[1][:80]!r}"
                )
        return encoded

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        if self._captured is not None:
            self._captured = list(requests)
            return []
        asked: Any = super()
        extra = {} if override_bs is None else {"override_bs": override_bs}
        return asked._loglikelihood_tokens(requests, disable_tqdm=True, **extra)

    def cut(self, context: Sequence[int], continuation: Sequence[int]) -> bool:
        """Whether lm-eval drops the beginning of this request."""
        return len(context) + len(continuation) > self.max_length + self.room

    def prompt_cut(self, context: str, max_new: int) -> bool:
        """Whether a prompt leaves no room for its answer, so that its beginning is dropped.

        Raises:
            TaskError: the answer alone fills the context.
        """
        refuse_no_room(max_new, self.max_length)
        return len(self.tok_encode(context)) > self.max_length - max_new

    def stopping(self, generation_kwargs: dict[str, Any]) -> Stopping:
        kwargs: Any = normalize_gen_kwargs(generation_kwargs, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(list(kwargs["until"]), eos=eos)
        return Stopping(tuple(until), kwargs["max_gen_toks"], bool(kwargs["do_sample"]))

    def gold_tokens(
        self, context: str, gold: str, max_new: int
    ) -> tuple[list[int], list[int]] | None:
        """(context, gold) as tokens, the context as generation sees it; None if gold is no
        possible continuation of it (no tokens, too many, or a merge across the seam)."""
        head = self.tok_encode(context)
        whole = self.tok_encode(context + gold)
        tail = whole[len(head) :]
        if whole[: len(head)] != head:
            tail = self.tok_encode(gold, add_special_tokens=False)
        if not 0 < len(tail) <= max_new:
            return None
        return head[-(self.max_length - max_new) :], tail

    def said(self, tokens: Sequence[int], stopping: Stopping) -> str:
        """The text lm-eval makes of generated tokens."""
        text: str = postprocess_generated_text(
            self.tok_decode(list(tokens)), list(stopping.until), None
        )
        return text
