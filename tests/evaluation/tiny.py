"""A random model family of a few thousand parameters, and local tasks of every type.

Half of the gold answers are what parent ``a`` itself says, so that scores are neither 0 nor 1
without a minute of training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.recipe import Recipe

LETTERS = "abcdefghij"
TOKENS = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789:=[]#?,. \n"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'][0] + ']' + m['content'] + '#' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[a]' }}{% endif %}"
)
CONTEXT = 96
#: Heads of a size that vLLM's CPU build has.
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    number = {token: i for i, token in enumerate(TOKENS)}
    backend = Tokenizer(models.WordLevel(number, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def config(**changes: Any) -> LlamaConfig:
    body = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(TOKENS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return LlamaConfig(**(body | changes))


def write_model(
    path: Path, seed: int, near: Path | None = None, template: str | None = None, **changes: Any
) -> Path:
    """A random checkpoint; ``near`` another one: that one's weights with noise added."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config(**changes))
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    if near is not None:
        for name, value in load_file(near / "model.safetensors").items():
            weights[name] = value + 0.05 * torch.randn(value.shape, generator=generator)
    weights = {name: value.to(model.config.dtype) for name, value in weights.items()}
    path.mkdir(parents=True, exist_ok=True)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(path)
    model.generation_config.save_pretrained(path)
    tokenizer(template).save_pretrained(path)
    return path


def write_family(root: Path, **changes: Any) -> dict[str, Path]:
    """A base and two experts near it."""
    shape = HEADS | changes
    base = write_model(root / "base", seed=3, **shape)
    experts = {
        name: write_model(root / name, seed=seed, near=base, **shape)
        for name, seed in (("b", 4), ("c", 5))
    }
    return {"base": base} | experts


def greedy(path: Path, prompts: Sequence[str], steps: int) -> list[str]:
    """What a model says after each prompt, up to a line end, as lm-eval reads it."""
    said = raw(path, prompts, steps)
    for token in TOKENS[:4]:
        said = [text.replace(token, "") for text in said]
    return [text.split("\n")[0] for text in said]


def raw(path: Path, prompts: Sequence[str], steps: int) -> list[str]:
    """The same with special tokens."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = tokenizer()(list(prompts), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return [tokenizer().decode(row[-steps:]) for row in ids]


def write_task(
    directory: Path, name: str, docs: Sequence[dict[str, Any]], output_type: str, **body: Any
) -> Path:
    """One lm-eval task over local JSON lines."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory.absolute() / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": output_type,
        "target_delimiter": "",
        "doc_to_text": "q",
        **body,
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False))
    return path


def metric_list(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name} for name in names]


def prompts(count: int, seed: int, length: int = 5) -> list[str]:
    rng = random.Random(seed)
    made: dict[str, None] = {}
    while len(made) < count:
        made["s:" + "".join(rng.choices(LETTERS, k=length)) + "="] = None
    return list(made)


def write_tasks(directory: Path, parent: Path, count: int = 60) -> Path:
    """One task of each output type, by name: choice, binary, cloze, text, answer, filtered."""
    rng = random.Random(7)
    asked = prompts(count, 1)
    said = [text or "ab" for text in greedy(parent, asked, 4)]
    gold = [text if i % 2 else text[::-1] + "a" for i, text in enumerate(said)]
    answers = [{"q": q, "gold": g} for q, g in zip(asked, gold, strict=True)]
    choices = [
        {"q": q, "choices": [g, g + "abc", g[:1] + "c", "dig"], "gold": rng.randrange(4)}
        for q, g in zip(asked, said, strict=True)
    ]
    write_task(
        directory, "tiny_choice", choices, "multiple_choice", doc_to_choice="choices",
        doc_to_target="gold", metric_list=metric_list("acc", "acc_norm", "acc_bytes"),
    )  # fmt: skip
    binary = [{"q": q, "gold": int(rng.random() < 0.5)} for q in asked]
    write_task(
        directory, "tiny_binary", binary, "multiple_choice", doc_to_choice=["b", "t"],
        doc_to_target="gold", metric_list=metric_list("acc", "f1", "mcc"),
    )  # fmt: skip
    write_task(
        directory, "tiny_cloze", answers, "loglikelihood", doc_to_target="gold",
        metric_list=metric_list("acc", "perplexity"),
    )  # fmt: skip
    texts = [{"t": " ".join(rng.choices(asked, k=1 + i % 20))} for i in range(count // 2)]
    write_task(
        directory, "tiny_text", texts, "loglikelihood_rolling", doc_to_text="",
        doc_to_target="t",
        metric_list=metric_list("word_perplexity", "byte_perplexity", "bits_per_byte"),
    )  # fmt: skip
    kwargs = {"until": ["\n"], "do_sample": False, "max_gen_toks": 4}
    write_task(
        directory, "tiny_answer", answers, "generate_until", doc_to_target="gold",
        generation_kwargs=kwargs, metric_list=metric_list("exact_match"),
    )  # fmt: skip
    first = [{"regex_pattern": "([a-z])"}]
    write_task(
        directory, "tiny_filtered", [{"q": d["q"], "gold": d["gold"][:1]} for d in answers],
        "generate_until", doc_to_target="gold", generation_kwargs=kwargs, num_fewshot=2,
        fewshot_split="test", metric_list=metric_list("exact_match"),
        filter_list=[
            {"name": "first", "filter": [
                {"function": "regex", **first[0]}, {"function": "take_first"}]},
            {"name": "none", "filter": [{"function": "take_first"}]},
        ],
    )  # fmt: skip
    return directory


METRICS = {
    "tiny_choice": "acc_norm,none",
    "tiny_binary": "f1,none",
    "tiny_cloze": "perplexity,none",
    "tiny_text": "word_perplexity,none",
    "tiny_answer": "exact_match,none",
    "tiny_filtered": "exact_match,first",
}


def tasks_config(tasks_dir: Path, *names: str, **changes: Any) -> TasksConfig:
    """A config over some of the tasks above; ``name=metric`` for another metric."""
    entries = []
    for name in names:
        task, _, metric = name.partition("=")
        entries.append({"name": task, "metric": metric or METRICS[task]})
    body: dict[str, Any] = {
        "tasks": entries,
        "task_search_path": (str(tasks_dir),),
        "apply_chat_template": False,
        "sealed_share": 0.0,
    }
    return TasksConfig(**(body | changes))


def spec(
    parents: dict[str, Path], tasks: TasksConfig, kind: str = "hf", **changes: Any
) -> WorkerSpec:
    body: dict[str, Any] = {
        "kind": kind,
        "parents": tuple((name, str(path)) for name, path in parents.items()),
        "template_model": next(iter(parents)),
        "tasks": tasks,
        "dtype": "float32",
        "batch_size": 16,
    }
    return WorkerSpec(**(body | changes))


def recipe(b: Any, c: Any, method: str = "task_arithmetic", **more: Any) -> Recipe:
    """A merge of the family's two experts onto its base."""
    models = [
        {"model": "b", "parameters": {"weight": b, **more}},
        {"model": "c", "parameters": {"weight": c, **more}},
    ]
    body = {"merge_method": method, "base_model": "base", "models": models}
    return Recipe.parse(body).canonical(2)


A, B = recipe(0.9, 0.2), recipe(0.1, 1.4)
