"""A byte-level BPE tokenizer: merges over spaces, no BOS, no padding token, two EOS tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_equals_lm_eval import assert_equal, scored, simple
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [f"Question: what is {i} and {i}? Answer: {2 * i} or {i}!" for i in range(400)]


def bpe() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|stop|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, _one_thread: None) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "a"
    tokenizer = bpe()
    tiny.write_model(path, seed=11, vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0)
    generation = json.loads((path / "generation_config.json").read_text())
    generation.pop("pad_token_id", None)
    generation["eos_token_id"] = [0, 1]
    (path / "generation_config.json").write_text(json.dumps(generation))
    for file in path.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(path)
    return path


def test_equal_to_lm_eval_and_margins_of_what_is_generated(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    asked = [f"Question: what is {i} and {i}? Answer:" for i in range(40)]
    live = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = bpe()
    docs: list[dict[str, Any]] = []
    with torch.no_grad():
        for i, question in enumerate(asked):
            ids = torch.tensor([tokenizer.encode(question)])
            said = live(ids).logits[0, -1].topk(2).indices.tolist()
            gold = tokenizer.decode(said[i % 2])
            docs.append({"q": question, "gold": gold, "choices": [gold, " or", " 7 and", "x"]})
    common: dict[str, Any] = {"metric_list": tiny.metric_list("exact_match")}
    tiny.write_task(
        tmp_path, "said", docs, "generate_until", doc_to_target="gold",
        generation_kwargs={"until": ["!"], "max_gen_toks": 1}, **common,
    )  # fmt: skip
    tiny.write_task(
        tmp_path, "chosen", docs, "multiple_choice", doc_to_target=0, doc_to_choice="choices",
        metric_list=tiny.metric_list("acc"),
    )  # fmt: skip
    tiny.write_task(
        tmp_path, "spaced", [d | {"q": d["q"] + " "} for d in docs], "loglikelihood",
        doc_to_target="gold", metric_list=tiny.metric_list("acc"),
    )  # fmt: skip
    names = ("said=exact_match,none", "chosen=acc,none", "spaced=acc,none")
    spec = tiny.spec({"a": model}, tiny.tasks_config(tmp_path, *names))
    taskset, results = scored(spec)
    assert_equal(taskset, results, simple(spec))
    said_right = [results[ref] for ref in taskset.task("said").items]
    assert {result.value for result in said_right} == {0.0, 1.0}
    checked = [r for r in said_right if r.margin is not None]
    assert len(checked) > 20
    assert sum((r.margin > 0) == bool(r.value) for r in checked if r.margin) >= len(checked) - 2
