"""What an item's result carries besides the metric's value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from agentmerge.contracts.worker import ItemRef, ItemResult, WorkerSpec
from agentmerge.errors import TaskError
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.hf_lm import LiveLM
from agentmerge.evaluation.scoring import ItemScorer
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.evaluation.tokenizers import context_length, tokenizer_of

Results = dict[ItemRef, ItemResult]


def open_scorer(spec: WorkerSpec) -> tuple[TaskSet, ItemScorer, Any]:
    taskset = tasks_for(spec, check_built_ins=False)
    tokenizer = tokenizer_of(spec)
    path = dict(spec.parents)[spec.template_model]
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    lm = LiveLM(model, tokenizer, spec.batch_size, context_length(spec, tokenizer))
    return taskset, ItemScorer(lm, taskset), model


def score(parent: Path, config: Any, **changes: Any) -> tuple[TaskSet, Results, Any]:
    taskset, scorer, model = open_scorer(tiny.spec({"a": parent}, config, **changes))
    refs = taskset.refs()
    return taskset, dict(zip(refs, scorer.score(refs), strict=True)), model


def logits_after(model: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tiny.tokenizer().encode(text)])).logits[0]


def test_choice_margins(parent: Path, tasks_dir: Path) -> None:
    for metric in ("acc", "acc_norm"):
        config = tiny.tasks_config(tasks_dir, f"tiny_choice={metric},none")
        taskset, results, model = score(parent, config)
        assert taskset.tasks[0].margin_kind == "choice"
        for result in results.values():
            assert result.margin is not None
            assert (result.margin > 0) == bool(result.value)
        for ref, result in results.items():
            doc = taskset.asked["tiny_choice"].requests[ref.index][0].doc
            picked = [c.strip() for c in doc["choices"]].index(result.answers[0])
            assert (picked == doc["gold"]) == bool(result.value)
        ref = taskset.refs()[0]
        doc = taskset.asked["tiny_choice"].requests[ref.index][0].doc
        lls = []
        for choice in doc["choices"]:
            ids = tiny.tokenizer().encode(choice, add_special_tokens=False)
            rows = logits_after(model, doc["q"] + choice).log_softmax(-1)[-len(ids) - 1 : -1]
            lls.append(float(rows.gather(1, torch.tensor(ids)[:, None]).sum()))
        scale = [len(c) if metric == "acc_norm" else 1 for c in doc["choices"]]
        scaled = [ll / s for ll, s in zip(lls, scale, strict=True)]
        gold = scaled.pop(doc["gold"])
        assert results[ref].margin == pytest.approx(gold - max(scaled), abs=1e-4)
        assert results[ref].log_likelihood == pytest.approx(lls[doc["gold"]], abs=1e-4)


def test_token_margins_are_what_generation_decides_on(parent: Path, tasks_dir: Path) -> None:
    taskset, results, model = score(parent, tiny.tasks_config(tasks_dir, "tiny_answer"))
    assert taskset.tasks[0].margin_kind == "token"
    asked = tiny.prompts(60, 1)
    said = [
        tiny.tokenizer().encode(t, add_special_tokens=False) for t in tiny.raw(parent, asked, 4)
    ]
    right = 0
    for ref, result in results.items():
        doc = taskset.asked["tiny_answer"].requests[ref.index][0].doc
        ids = tiny.tokenizer().encode(doc["gold"], add_special_tokens=False)
        if len(ids) > 4:  # more than max_gen_toks: no model could say it
            assert result.margin is None
            continue
        rows = logits_after(model, doc["q"] + doc["gold"])[-len(ids) - 1 : -1]
        index = torch.tensor(ids)[:, None]
        best = rows.scatter(1, index, -torch.inf).amax(-1)
        expected = float((rows.gather(1, index)[:, 0] - best).min())
        ll = float(rows.log_softmax(-1).gather(1, index).sum())
        assert result.margin == pytest.approx(expected, abs=1e-4)
        assert result.log_likelihood == pytest.approx(ll, abs=1e-4)
        if ids == said[ref.index]:  # and not by way of tokens that leave no text
            assert result.value == 1.0
            assert result.margin > 0
            right += 1
    assert right > 10


def test_the_companion_can_be_switched_off(parent: Path, tasks_dir: Path) -> None:
    config = tiny.tasks_config(tasks_dir, "tiny_answer", "tiny_choice", companion=False)
    taskset, results, _ = score(parent, config)
    assert [task.margin_kind for task in taskset.tasks] == [None, "choice"]
    for ref, result in results.items():
        assert (result.margin is None) == (ref.task == "tiny_answer")


def generation(directory: Path, docs: list[dict[str, Any]], **changes: Any) -> Any:
    body: dict[str, Any] = {
        "doc_to_target": "gold",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": tiny.metric_list("exact_match"),
    }
    tiny.write_task(directory, "g", docs, "generate_until", **(body | changes))
    return tiny.tasks_config(directory, "g=exact_match,none")


def test_gold_answers_as_the_metric_takes_them(parent: Path, tmp_path: Path) -> None:
    """Several golds have no margin; a delimiter is part of the answer only if the metric is."""
    several = [{"q": "ab=", "gold": ["ab", "ba"]}, {"q": "ba=", "gold": ["a", "b"]}]
    _, results, _ = score(parent, generation(tmp_path / "several", several))
    assert [result.margin for result in results.values()] == [None, None]

    one = [{"q": "ab=", "gold": "ab"}]
    strict = generation(tmp_path / "strict", one, target_delimiter=" ")
    _, _, model = score(parent, strict)
    lax = generation(
        tmp_path / "lax",
        one,
        target_delimiter=" ",
        filter_list=[
            {
                "name": "none",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
    )
    for config, answer in ((strict, "ab"), (lax, " ab")):
        _, results, _ = score(parent, config)
        ids = tiny.tokenizer().encode(answer, add_special_tokens=False)
        rows = logits_after(model, "ab=" + answer).log_softmax(-1)[-len(ids) - 1 : -1]
        ll = float(rows.gather(1, torch.tensor(ids)[:, None]).sum())
        assert next(iter(results.values())).log_likelihood == pytest.approx(ll, abs=1e-4)


def test_an_answers_tokens_are_counted_up_to_its_end(parent: Path, tmp_path: Path) -> None:
    """Whatever the others of its batch go on for; what only likelihoods are asked of has none."""
    docs = [{"q": q, "gold": "a"} for q in tiny.prompts(8, 4)]
    said = tiny.raw(parent, [doc["q"] for doc in docs], 9)
    plain = [text.replace("<pad>", "P").replace("<s>", "S").replace("<unk>", "U") for text in said]
    stop = max("abc0123\n", key=lambda c: sum(0 < text.find(c) < 8 for text in plain))
    config = generation(
        tmp_path, docs, generation_kwargs={"until": [stop], "max_gen_toks": 9}
    )  # fmt: skip
    ends = [text.replace("</s>", stop).find(stop) + 1 or 9 for text in plain]
    for size in (8, 1):
        taskset, results, _ = score(parent, config, batch_size=size)
        assert [results[ref].tokens for ref in taskset.refs()] == ends
    assert len(set(ends)) > 2
    assert taskset.tokens(results) == sum(ends) / 8


def test_truncated_prompts_and_cut_off_answers_are_counted(parent: Path, tmp_path: Path) -> None:
    docs = [{"q": q, "gold": "a"} for q in ("ab=", "ab" * 60 + "=", "c" * 88 + "=", "c" * 89 + "=")]
    config = generation(tmp_path, docs)
    taskset, results, _ = score(parent, config)
    truncated = [results[ref].truncated for ref in taskset.refs()]
    assert truncated == [False, True, False, True]  # context 96 - 6 new: 90 tokens with <s>
    for ref in taskset.refs():
        said = tiny.greedy(parent, [docs[ref.index]["q"][-89:]], 6)[0] if ref.index == 0 else None
        if said is not None:
            assert results[ref].cut_off == (len(said) == 6)
    short = generation(tmp_path / "one", docs[:1], generation_kwargs={"max_gen_toks": 1})
    _, results, _ = score(parent, short)
    assert next(iter(results.values())).cut_off
    stops = list(tiny.TOKENS[4:])
    ends = generation(
        tmp_path / "ends", docs[:1], generation_kwargs={"until": stops, "max_gen_toks": 1}
    )
    _, results, _ = score(parent, ends)
    assert not next(iter(results.values())).cut_off

    docs = [{"q": "a" * n + "=", "gold": "ab"} for n in (93, 94)]
    tiny.write_task(
        tmp_path / "ll", "l", docs,
        "loglikelihood", doc_to_target="gold", metric_list=tiny.metric_list("acc"),
    )  # fmt: skip
    taskset, results, _ = score(parent, tiny.tasks_config(tmp_path / "ll", "l=acc,none"))
    assert [results[ref].truncated for ref in taskset.refs()] == [False, True]


def test_a_shorter_context_is_honoured(
    parent: Path, tasks_dir: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    config = tiny.tasks_config(tasks_dir, "tiny_answer")
    _, results, _ = score(parent, config, options={"max_length": 11})
    assert all(result.truncated for result in results.values())
    assert "runcat" not in capfd.readouterr().err + caplog.text, "not a line an item"


def test_answers_that_do_not_fit(parent: Path, tmp_path: Path) -> None:
    config = generation(
        tmp_path, [{"q": "ab=", "gold": "a"}], generation_kwargs={"max_gen_toks": 96}
    )
    with pytest.raises(TaskError, match="task 'g': max_gen_toks 96 leaves no room"):
        tasks_for(tiny.spec({"a": parent}, config))  # found before anything is asked
    tiny.write_task(
        tmp_path / "ll", "l", [{"q": "ab=", "gold": ""}], "loglikelihood", doc_to_target="gold",
        metric_list=tiny.metric_list("acc"),
    )  # fmt: skip
    with pytest.raises(TaskError, match="has 0 tokens"):
        score(parent, tiny.tasks_config(tmp_path / "ll", "l=acc,none"))


def test_nothing_of_an_answer_is_kept(parent: Path, tasks_dir: Path) -> None:
    """FIELD 2: after the weights change, every answer is the new model's."""
    config = tiny.tasks_config(tasks_dir, *tiny.METRICS)
    taskset, scorer, model = open_scorer(tiny.spec({"a": parent}, config))
    refs = taskset.refs()
    before = scorer.score(refs)
    kept = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(0.0)
    zero = scorer.score(refs)
    flat = [r.log_likelihood for r, ref in zip(zero, refs, strict=True) if ref.task == "tiny_cloze"]
    golds = [taskset.asked["tiny_cloze"].requests[i][0].args[1] for i in range(len(flat))]
    uniform = torch.tensor(len(tiny.TOKENS)).log().item()
    assert flat == pytest.approx([-uniform * len(gold) for gold in golds], rel=1e-5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(kept[name])
    assert scorer.score(refs) == before


def test_parts_and_order_do_not_matter(parent: Path, tasks_dir: Path) -> None:
    config = tiny.tasks_config(tasks_dir, "tiny_choice", "tiny_answer", "tiny_text")
    taskset, scorer, _ = open_scorer(tiny.spec({"a": parent}, config))
    refs = taskset.refs()
    whole = dict(zip(refs, scorer.score(refs), strict=True))
    asked = [refs[70], refs[3], refs[70], refs[130]]
    for ref, result in zip(asked, scorer.score(asked), strict=True):
        assert result.value == pytest.approx(whole[ref].value, rel=1e-6)
        if result.log_likelihood is not None:
            assert result.log_likelihood == pytest.approx(whole[ref].log_likelihood, rel=1e-6)
    assert scorer.score([]) == []
    with pytest.raises(TaskError, match="has changed since"):
        scorer.score([ItemRef("tiny_choice", 0, "0" * 16)])


def test_sampled_generation_is_repeatable(parent: Path, tmp_path: Path) -> None:
    docs = [{"q": f"{a}b=", "gold": "a"} for a in "abcdefgh"]
    kwargs = {"until": ["\n"], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0}
    config = generation(tmp_path, docs, generation_kwargs=kwargs, repeats=3)
    taskset, scorer, _ = open_scorer(tiny.spec({"a": parent}, config))
    state = torch.get_rng_state()
    first = scorer.score(taskset.refs())
    torch.rand(7)
    assert scorer.score(taskset.refs()) == first
    torch.set_rng_state(state)
