"""Trains the demo's model family: a base, and one expert a skill, as Hugging Face checkpoints.

The base knows every skill, but under tags of its own; an expert learns to use one skill under the
tag that is scored. So experts share a basis and still get in each other's way, which gives a
search something to find. It knows the training recipe and the cache of what was trained; it knows
nothing of tasks, merging or scoring.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmerge.demo import language

if TYPE_CHECKING:
    import torch

FAMILY_VERSION = 2
"""Part of the cache key: raise it with any change to the language or to the recipe below."""

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
VOCABULARY = (PAD, BOS, EOS, UNK, "\n", ":", "=", *language.CHARACTERS)
BATCH = 64
BASE_STEPS, BASE_RATE = 600, 2e-3
EXPERT_STEPS, EXPERT_RATE = 120, 5e-4
MARKER = "family.json"

Progress = Callable[[str], None]
Mixture = Mapping[str, tuple[float, Callable[[str], str]]]
"""Tag -> its share of the lines and what its answer is."""


@dataclass(frozen=True, slots=True)
class Family:
    """Where a trained family lies; ``experts[i]`` learned ``skills[i]``."""

    base: Path
    experts: tuple[Path, ...]
    skills: tuple[str, ...]
    seed: int


def _family_at(directory: Path, skills: tuple[str, ...], seed: int) -> Family:
    experts = tuple(directory / f"expert-{skill}" for skill in skills)
    return Family(directory / "base", experts, skills, seed)


def make_family(
    directory: Path,
    *,
    skills: tuple[str, ...] = ("shift", "sort"),
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Family:
    """Train a family into `directory` on one thread: about 35 s for two skills.

    The same skills and seed give the same weights, bit for bit, on the same machine and torch.
    Neither torch's global generator nor its thread count is left changed.
    """
    skills = language.checked_skills(skills)
    family = _family_at(directory.absolute(), skills, seed)
    tell = on_progress or (lambda _: None)
    with _one_thread():
        base = _new_model(seed)
        _train(base, _base_mixture(), "base", BASE_STEPS, BASE_RATE, seed, tell)
        _save(base, family.base)
        for skill, path in zip(skills, family.experts, strict=True):
            expert = copy.deepcopy(base)
            mixture = _expert_mixture(skill)
            _train(expert, mixture, path.name, EXPERT_STEPS, EXPERT_RATE, seed, tell)
            _save(expert, path)
    return family


def cached_family(
    skills: tuple[str, ...] = ("shift", "sort"),
    seed: int = 0,
    cache_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> Family:
    """The family from the cache, trained first where it is not there.

    `cache_dir` holds one directory a family; by default it is ``$AGENTMERGE_CACHE/families`` or
    ``~/.cache/agentmerge/families``. A family appears there whole or not at all.
    """
    skills = language.checked_skills(skills)
    key = family_key(skills, seed)
    target = (cache_dir or default_cache_dir()).expanduser().absolute() / key
    if not _is_whole(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{key}-") as scratch:
            made = Path(scratch) / key
            make_family(made, skills=skills, seed=seed, on_progress=on_progress)
            marker = {"version": FAMILY_VERSION, "skills": skills, "seed": seed}
            (made / MARKER).write_text(json.dumps(marker))
            # Another process may have finished the same family meanwhile: then keep its own.
            if not _is_whole(target):
                shutil.rmtree(target, ignore_errors=True)
                os.replace(made, target)
    return _family_at(target, skills, seed)


def family_key(skills: tuple[str, ...], seed: int) -> str:
    """The cache's name for a family: changes with the recipe's version, the skills and the seed."""
    text = json.dumps([FAMILY_VERSION, list(skills), seed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_cache_dir() -> Path:
    root = os.environ.get("AGENTMERGE_CACHE") or Path.home() / ".cache" / "agentmerge"
    return Path(root) / "families"


def _is_whole(directory: Path) -> bool:
    return (directory / MARKER).is_file()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are ordered by thread, so the thread count is part of what the weights depend on."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _stream(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers of their own for each purpose: an expert is the same in every family."""
    words = np.random.SeedSequence([seed, *purpose.encode()])
    return np.random.Generator(np.random.PCG64(words))


def _new_model(seed: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index(PAD),
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(_stream(seed, "weights").integers(2**63)))
        return LlamaForCausalLM(config)


def _base_mixture() -> Mixture:
    known = {s.base_tag: (0.2, s.apply) for s in language.SKILLS.values()}
    return known | dict.fromkeys(language.TAGS, (0.1, str))


def _expert_mixture(skill: str) -> Mixture:
    own = language.SKILLS[skill]
    others: Mixture = {tag: (0.1, str) for tag in language.TAGS if tag != own.tag}
    return {own.tag: (0.7, own.apply), **others}


def sample_lines(mixture: Mixture, n: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """`n` training lines as (prompt, answer); held-out inputs never occur."""
    pool = language.inputs(held_out=False)
    tags, shares = list(mixture), [share for share, _ in mixture.values()]
    texts = [pool[i] for i in rng.integers(len(pool), size=n)]
    chosen = [tags[i] for i in rng.choice(len(tags), size=n, p=shares)]
    return [
        (language.prompt(tag, text), mixture[tag][1](text))
        for tag, text in zip(chosen, texts, strict=True)
    ]


def _encode(lines: list[tuple[str, str]]) -> torch.Tensor:
    import torch

    number = {token: i for i, token in enumerate(VOCABULARY)}
    bos, eos = number[BOS], number[EOS]
    return torch.tensor([[bos, *(number[c] for c in q + a), eos] for q, a in lines])


def _train(
    model: Any, mixture: Mixture, name: str, steps: int, rate: float, seed: int, tell: Progress
) -> None:
    """AdamW, warm-up over 5 % of the steps, then linearly down to 5 % of `rate`."""
    import torch
    from torch.nn.functional import cross_entropy

    lines = sample_lines(mixture, steps * BATCH, _stream(seed, name))
    tokens = _encode(lines).view(steps, BATCH, -1)
    n_answer = language.INPUT_LENGTH + 1  # the answer's letters and the end of the line
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    warm_up = max(1, steps // 20)
    model.train()
    for step, batch in enumerate(tokens):
        left = (steps - step) / (steps - warm_up)
        scale = min((step + 1) / warm_up, 0.05 + 0.95 * left)
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        logits = model(batch[:, :-1], logits_to_keep=n_answer, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, -n_answer:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 60 == 0 or step + 1 == steps:
            tell(f"training {name}: step {step + 1} of {steps}, loss {loss.item():.3f}")
    model.eval()


def _save(model: Any, directory: Path) -> None:
    """What ``save_pretrained`` writes, without its progress bar; the tied head is no parameter."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


def _tokenizer() -> Any:
    """One token a character; like Llama's own, it begins every text with ``<s>``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    number = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(number, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, number[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
