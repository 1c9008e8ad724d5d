"""Trains the demo's model family: a base, and one expert a skill, as Hugging Face checkpoints.

The base knows every skill, but under tags of its own; an expert learns to use one skill under the
tag that is scored. So experts share a basis and still get in each other's way, which gives a
search something to find. How much they do is measured, not hoped for: an expert trains until it has
its skill and kept the rest, and then all of them a few steps together, in which their uniform merge
is asked too, until it keeps a part of every skill. Weights differ by processor; this does not by
much. It knows the schedule and the cache of what was trained; it knows nothing of tasks, merging or
scoring.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentmerge.demo import language
from agentmerge.demo.training import (
    BATCH,
    BOS,
    EOS,
    PAD,
    UNK,
    VOCABULARY,
    Learner,
    Mixture,
    Weights,
    batches,
    holding,
    learn_together,
    put,
    share_right,
    stream,
    uniform_merge,
)
from agentmerge.system.temporary import cache_dir, temporary_folder

FAMILY_VERSION = 3
"""Part of the cache key: raise it with any change to the language or to how a family is trained."""

MARKER = "family.json"
#: Settings from outside that choose the processor's kernels, and with them the weights.
KERNEL_SETTINGS = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a family is trained: rates, what ends it (shares of validation inputs), and bounds.

    merge_goal: what the best uniform merge answers of all skills together. Below a half a parent
    alone may be as good, near one there is nothing left to find. Few steps lie between the two, so
    it is looked at often.
    """

    batch: int = BATCH
    base_rate: float = 2e-3
    base_goal: float = 0.97
    base_every: int = 40
    base_steps: int = 1500
    expert_rate: float = 4e-4
    expert_goal: float = 0.97
    expert_every: int = 20
    expert_steps: int = 400
    merge_goal: float = 0.6
    merge_every: int = 2
    merge_steps: int = 200
    merge_weight: float = 0.85
    merge_weights: tuple[float, ...] = (0.55, 0.7, 0.85, 1.0)


SCHEDULE = Schedule()

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TinyFamily:
    """Where a trained family lies; ``experts[i]`` learned ``skills[i]``."""

    base: Path
    experts: tuple[Path, ...]
    skills: tuple[str, ...]
    seed: int


def _family_at(directory: Path, skills: tuple[str, ...], seed: int) -> TinyFamily:
    experts = tuple(directory / f"expert-{skill}" for skill in skills)
    return TinyFamily(directory / "base", experts, skills, seed)


def make_family(
    directory: Path,
    *,
    skills: tuple[str, ...] = ("shift", "sort"),
    seed: int = 0,
    on_progress: Progress | None = None,
) -> TinyFamily:
    """Train a family into `directory` on one thread: about half a minute for two skills.

    The same skills and seed give the same weights, bit for bit, on the same machine and torch.
    A goal that is not reached within its bound is said, and the family is what it is by then.
    ``family.json`` there says how it was made and what was measured. Neither torch's global
    generator nor its thread count is left changed.
    """
    skills = language.checked_skills(skills, language.EXPERTS)
    family = _family_at(directory.absolute(), skills, seed)
    tell = on_progress or (lambda _: None)
    with _one_thread():
        base = _new_model(seed)
        learner = Learner(base, _base_mixture(), stream(seed, "base"), SCHEDULE.base_rate, 30)
        measured = {"base": _train_base(learner, tell)}
        put(base, learner.weights)
        _save(base, family.base)
        learners = []
        for skill, path in zip(skills, family.experts, strict=True):
            rng = stream(seed, path.name)
            expert = copy.deepcopy(base)
            learners.append(Learner(expert, _expert_mixture(skill), rng, SCHEDULE.expert_rate, 10))
            measured[skill] = _train_expert(learners[-1], skill, tell)
        if len(skills) > 1:
            measured["merge"] = _train_together(learners, base, skills, seed, tell)
        for learner, path in zip(learners, family.experts, strict=True):
            put(learner.model, learner.weights)
            _save(learner.model, path)
    made = {"made": how_made(skills, seed), "measured": measured}
    (family.base.parent / MARKER).write_text(json.dumps(made, indent=1))
    return family


def _train_base(learner: Learner, tell: Progress) -> dict[str, float]:
    """Until it has every skill under its own tag; returns steps and the least skill."""
    found = 0.0
    while found < SCHEDULE.base_goal and learner.steps < SCHEDULE.base_steps:
        learner.learn(min(SCHEDULE.base_every, SCHEDULE.base_steps - learner.steps))
        with holding(learner.model, learner.weights) as model:
            found = min(share_right(model, s.base_tag, s.apply) for s in language.SKILLS.values())
        if learner.steps % 120 == 0 or found >= SCHEDULE.base_goal:
            tell(
                f"training base: step {learner.steps}, loss {learner.loss:.3f}, "
                f"least of its skills {found:.3f}"
            )
    _say_if_short("base", found, SCHEDULE.base_goal, learner.steps, tell)
    return {"steps": learner.steps, "right": found}


def _train_expert(learner: Learner, skill: str, tell: Progress) -> dict[str, float]:
    """Until it has its skill under its tag, and copies under the others as the base does."""
    name, found = f"expert-{skill}", 0.0
    while found < SCHEDULE.expert_goal and learner.steps < SCHEDULE.expert_steps:
        learner.learn(min(SCHEDULE.expert_every, SCHEDULE.expert_steps - learner.steps))
        with holding(learner.model, learner.weights) as model:
            found = min(
                share_right(model, tag, apply) for tag, (_, apply) in _expert_mixture(skill).items()
            )
    tell(f"training {name}: step {learner.steps}, loss {learner.loss:.3f}, skill {found:.3f}")
    _say_if_short(name, found, SCHEDULE.expert_goal, learner.steps, tell)
    return {"steps": learner.steps, "right": found}


def _train_together(
    learners: Sequence[Learner], base: Any, skills: Sequence[str], seed: int, tell: Progress
) -> dict[str, float]:
    """Until the best uniform merge has a part of every skill; returns steps, and its part."""
    rng, mixture = stream(seed, "merge"), _merge_mixture(skills)
    steps, found = 0, _best_uniform(base, [one.weights for one in learners], skills)
    while found < SCHEDULE.merge_goal and steps < SCHEDULE.merge_steps:
        more = min(SCHEDULE.merge_every, SCHEDULE.merge_steps - steps)
        learn_together(learners, base, batches(mixture, more, rng), SCHEDULE.merge_weight)
        steps += more
        found = _best_uniform(base, [one.weights for one in learners], skills)
    tell(f"training the experts together: step {steps}, best uniform merge {found:.3f}")
    _say_if_short("the best uniform merge", found, SCHEDULE.merge_goal, steps, tell)
    return {"steps": steps, "right": found}


def _say_if_short(name: str, found: float, goal: float, steps: int, tell: Progress) -> None:
    if found < goal:
        tell(f"{name} has {found:.3f} after {steps} steps, where {goal:g} was wanted: going on")


def _best_uniform(base: Any, experts: Sequence[Weights], skills: Sequence[str]) -> float:
    """The share of all skills' validation inputs that the best uniform merge answers."""
    best = 0.0
    for weight in SCHEDULE.merge_weights:
        with holding(base, uniform_merge(base, experts, weight)) as model:
            shares = [
                share_right(model, language.EXPERTS[s].tag, language.EXPERTS[s].apply)
                for s in skills
            ]
        best = max(best, sum(shares) / len(shares))
    return best


def cached_family(
    skills: tuple[str, ...] = ("shift", "sort"),
    seed: int = 0,
    cache_dir: Path | None = None,
    on_progress: Progress | None = None,
) -> TinyFamily:
    """The family from the cache, trained first where it is not there.

    `cache_dir` holds one directory a family; by default it is ``$AGENTMERGE_CACHE/families`` or
    ``~/.cache/agentmerge/families``. A family appears there whole or not at all.
    """
    skills = language.checked_skills(skills, language.EXPERTS)
    key = family_key(skills, seed)
    target = (cache_dir or default_cache_dir()).expanduser().absolute() / key
    if not _is_whole(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(f".{key}", target.parent) as scratch:
            made = scratch / key
            make_family(made, skills=skills, seed=seed, on_progress=on_progress)
            # Another process may have finished the same family meanwhile: then keep its own.
            if not _is_whole(target):
                shutil.rmtree(target, ignore_errors=True)
                os.replace(made, target)
    return _family_at(target, skills, seed)


def family_key(skills: tuple[str, ...], seed: int) -> str:
    """The cache's name for a family: changes with everything that ``how_made`` says."""
    text = json.dumps(how_made(skills, seed), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def how_made(skills: tuple[str, ...], seed: int) -> dict[str, Any]:
    """What a family's weights depend on, the processor itself aside."""
    return {
        "version": FAMILY_VERSION,
        "schedule": asdict(SCHEDULE) | {"merge_weights": list(SCHEDULE.merge_weights)},
        "skills": list(skills),
        "seed": seed,
        "torch": importlib.metadata.version("torch"),
        "kernels": {name: os.environ.get(name, "") for name in KERNEL_SETTINGS},
    }


def default_cache_dir() -> Path:
    return cache_dir() / "families"


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
        torch.manual_seed(int(stream(seed, "weights").integers(2**63)))
        return LlamaForCausalLM(config)


def _base_mixture() -> Mixture:
    known = {s.base_tag: (0.2, s.apply) for s in language.SKILLS.values()}
    return known | dict.fromkeys(language.TAGS, (0.1, str))


def _expert_mixture(skill: str) -> Mixture:
    own = language.EXPERTS[skill]
    others: Mixture = {tag: (0.1, own.copy) for tag in language.TAGS if tag != own.tag}
    return {own.tag: (0.7, own.apply), **others}


def _merge_mixture(skills: Sequence[str]) -> Mixture:
    """Every skill under its tag, the same share of each; under the other tags, a copy."""
    known = [language.EXPERTS[skill] for skill in skills]
    own = {skill.tag: (0.8 / len(skills), skill.apply) for skill in known}
    rest = [tag for tag in language.TAGS if tag not in own]
    others: Mixture = {tag: (0.2 / len(rest), str) for tag in rest}
    return {**own, **others}


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
