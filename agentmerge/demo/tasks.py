"""Writes lm-eval tasks that score a demo family, and a search config over family and tasks.

An exact-match generation task a skill, and one multiple-choice task over all of them. It knows
lm-eval's task format and which held-out inputs each task asks about (no two tasks share one); it
knows nothing of models, nor of how items are split into search and sealed ones. Families with other
items write theirs by ``write_task`` and ``search_config``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agentmerge.demo import language
from agentmerge.demo.family import TinyFamily
from agentmerge.errors import UserError
from agentmerge.system.temporary import write_at_once

CHOICE_TASK = "agentmerge_demo_choice"
N_ITEMS = 1200
SEARCH_LIMIT = 200
"""Items a task that a search sees; the other thousand of `N_ITEMS` are there to be sealed."""
#: Three sealed items a search item: enough to tell 2 points apart.
SEALED_SHARE = 0.75

Doc = dict[str, Any]


def skill_task(skill: str) -> str:
    """The name of a skill's exact-match task."""
    return f"agentmerge_demo_{skill}"


def write_tasks(
    directory: Path, skills: Sequence[str], *, n_items: int = N_ITEMS, seed: int = 0
) -> Path:
    """Write every task of a family with these skills; returns the directory for lm-eval.

    Each task has `n_items` items in an order fixed by `seed`.
    """
    skills = language.checked_skills(skills)
    write_skill_tasks(directory, skills, n_items=n_items, seed=seed)
    docs = list(_choice_docs(skills, n_items, seed))
    write_task(directory, CHOICE_TASK, docs, MULTIPLE_CHOICE)
    return directory


def write_skill_tasks(
    directory: Path, skills: Sequence[str], *, n_items: int = N_ITEMS, seed: int = 0
) -> Path:
    """Write the exact-match tasks only: one a skill, with one gold string an item."""
    for skill in language.checked_skills(skills):
        tag, answer = language.SKILLS[skill].tag, language.SKILLS[skill].apply
        texts = skill_inputs(skill, n_items, seed)
        docs = [{"prompt": language.prompt(tag, text), "answer": answer(text)} for text in texts]
        write_task(directory, skill_task(skill), docs, exact_match(8))
    return directory


def skill_inputs(skill: str, n_items: int = N_ITEMS, seed: int = 0) -> list[str]:
    """The held-out inputs that a skill's exact-match task asks about, in its order."""
    return _texts(list(language.SKILLS).index(skill), n_items, seed)


def demo_config(family: TinyFamily, tasks_dir: Path) -> dict[str, Any]:
    """A mergekit-evolve config that searches `family`, scored by the tasks in `tasks_dir`.

    The weights add up to one, so that a score reads as a share of right answers.
    """
    weights = {skill_task(skill): 0.8 / len(family.skills) for skill in family.skills}
    tasks = [
        {"name": name, "weight": round(weight, 4), "metric": "exact_match,none"}
        for name, weight in weights.items()
    ]
    tasks.append({"name": CHOICE_TASK, "weight": 0.2, "metric": "acc,none"})
    for task in tasks:
        path = tasks_dir / f"{task['name']}.yaml"
        if not path.is_file():
            raise UserError(f"no task file {path}; write_tasks(tasks_dir, family.skills) makes it")
    return search_config(family.base, family.experts, tasks, limit=SEARCH_LIMIT)


def demo_search(
    family: TinyFamily, directory: Path, *, max_evaluations: int, seed: int, worker: str
) -> Path:
    """Write tasks and config of what ``agentmerge demo`` searches; returns the config."""
    tasks = write_tasks(directory / "tasks", family.skills)
    body = demo_config(family, tasks) | {
        "task_search_path": [str(tasks)],
        "budget": {"max_evaluations": max_evaluations},
        "search": {"seed": seed, "sealed_share": SEALED_SHARE},
        "worker": {"kind": worker, "batch_size": 200, "options": {"threads": 1}},
    }
    path = directory / "config.yml"
    write_at_once(path, yaml.safe_dump(body, sort_keys=False))
    return path


def search_config(
    base: Path,
    experts: Sequence[Path],
    tasks: Sequence[Mapping[str, Any]],
    *,
    limit: int,
    layer_granularity: int = 1,
) -> dict[str, Any]:
    """A mergekit-evolve config: task arithmetic over `experts`, `tasks` without examples."""
    return {
        "genome": {
            "models": [str(expert) for expert in experts],
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "layer_granularity": layer_granularity,
            "normalize": False,
            "allow_negative_weights": False,
        },
        "tasks": list(tasks),
        "limit": limit,
        "num_fewshot": 0,
        "apply_chat_template": False,
    }


# An empty delimiter: a character more before the answer would not be what was trained on.
_COMMON: Mapping[str, Any] = {
    "test_split": "test",
    "doc_to_text": "prompt",
    "target_delimiter": "",
    "num_fewshot": 0,
    "metadata": {"version": 1},
}
MULTIPLE_CHOICE: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def exact_match(max_gen_toks: int) -> dict[str, Any]:
    """What is special to a task of generated answers, which end with the line."""
    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": max_gen_toks},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def write_task(
    directory: Path,
    name: str,
    docs: Sequence[Doc],
    kind: Mapping[str, Any],
    home: Path | None = None,
) -> None:
    """Write `docs` and the task that asks them, to be read in `directory`, or once moved to `home`.

    kind: `MULTIPLE_CHOICE`, or `exact_match`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    items = f"{name}.jsonl"
    write_at_once(directory / items, "".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"test": str((home or directory).absolute() / items)}
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    task = {"task": name, **source, **_COMMON, **kind}
    write_at_once(directory / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False))


def _texts(slot: int, n: int, seed: int) -> list[str]:
    """`n` held-out inputs that no other slot has; no skill's answer is the copy or another's."""
    pool = [
        text
        for text in language.inputs(held_out=True)
        if len({text, *(skill.apply(text) for skill in language.SKILLS.values())})
        == 1 + len(language.SKILLS)
    ]
    size = len(pool) // (len(language.SKILLS) + 1)
    if n > size:
        raise UserError(f"{n} items a task; the held-out inputs are enough for {size} at most")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(pool))
    return [pool[i] for i in order[slot * size : slot * size + n]]


def _choice_docs(skills: Sequence[str], n: int, seed: int) -> Iterator[Doc]:
    """Skills in turn; the wrong choices are three answers with one letter from elsewhere.

    It comes from the copy, from another skill's answer, and from beside it in the alphabet. Whole
    wrong answers would be too easy: uniform merges that fail on exact match still refuse them all.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 1])))
    for i, text in enumerate(_texts(len(language.SKILLS), n, seed)):
        skill = language.SKILLS[skills[i % len(skills)]]
        answer = skill.apply(text)
        others = [s.apply(text) for s in language.SKILLS.values() if s != skill]
        choices = [answer]
        for rival in (text, others[rng.integers(len(others))], _neighbours(answer, rng)):
            choices.append(_slip(answer, rival, choices, rng))
        order = rng.permutation(len(choices))
        yield {
            "prompt": language.prompt(skill.tag, text),
            "choices": [choices[j] for j in order],
            "gold": order.tolist().index(0),
        }


def _neighbours(answer: str, rng: np.random.Generator) -> str:
    """Each letter moved one up or down the alphabet, within the letters that inputs have."""
    moves = rng.choice([-1, 1], size=len(answer))
    low, high = ord(language.INPUT_LETTERS[0]), ord(language.INPUT_LETTERS[-1])
    return "".join(
        chr(ord(c) + (int(m) if low <= ord(c) + m <= high else -int(m)))
        for c, m in zip(answer, moves, strict=True)
    )


def _slip(answer: str, rival: str, taken: Sequence[str], rng: np.random.Generator) -> str:
    """The answer with one letter of its rival's; a copy that differs from those already taken."""
    slips = [answer[:i] + rival[i] + answer[i + 1 :] for i in range(len(answer))]
    fresh = [slip for slip in slips if slip not in taken]
    return fresh[rng.integers(len(fresh))]
