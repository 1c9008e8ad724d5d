"""A first config for a family of models, chosen from their headers, with a reason for each choice.

Reads headers and task files, no weights. What it writes passes ``check``: it is tried before it is
written. Without a task it also writes a small one of the user's own to begin with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from agentmerge.config import SearchConfig
from agentmerge.errors import UserError
from agentmerge.evaluation.catalogue import TaskEntry, task_entries
from agentmerge.methods import METHODS
from agentmerge.preflight.anchoring import anchored
from agentmerge.preflight.models import family_layout
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe.names import short_name
from agentmerge.system.temporary import write_at_once

#: More axes than this need more evaluations than a first search should cost.
MAX_DIMENSIONS = 16
MAX_GROUPS = 8
FILTERS = ("self_attn", "mlp")
STARTER = "my_first_task"
STARTER_ITEMS = 400


@dataclass(frozen=True, slots=True)
class Start:
    """What ``init`` chose: the config's text, what it was tried as, and where it is."""

    path: Path
    text: str
    prepared: Prepared
    made_task: Path | None


def write_start(
    models: Sequence[str],
    base: str | None,
    tasks: Sequence[str],
    to: Path,
    *,
    task_search_path: Sequence[str] = (),
    allow_benchmarks: bool = False,
) -> Start:
    """Choose, try and write a config for these models.

    Raises:
        ConfigError: the models cannot be merged or a task cannot be asked; nothing is written.
        UserError: the file exists, or cannot be written.
    """
    models = [model for model in dict.fromkeys(models) if model != base]
    if to.exists():
        raise UserError(f"{to} exists; name another file with --to, or move it away")
    if len(models) + (base is not None) < 2:
        raise UserError(f"a merge needs two models, and {models or [base]} is one; name another")
    starter = None
    made: list[Path] = []
    if not tasks:
        starter = to.parent / "tasks"
        made = [folder for folder in (starter, *starter.parents) if not folder.exists()]
        if (starter / f"{STARTER}.yaml").exists():
            raise UserError(f"{starter / STARTER}.yaml exists; use --task {STARTER}, or move it")
        _write_starter(starter)
        tasks, task_search_path = [STARTER], [*task_search_path, str(starter.absolute())]
    try:
        text = config_text(models, base, tasks, task_search_path)
        config = anchored(SearchConfig.from_text(text, str(to)))
        prepared = prepare(config, allow_benchmarks=allow_benchmarks, fresh=True, weights=False)
        to.parent.mkdir(parents=True, exist_ok=True)
        write_at_once(to, text)
    except BaseException:
        if starter is not None:
            for path in starter.glob(f"{STARTER}.*"):
                path.unlink()
        for folder in made:
            folder.rmdir()
        raise
    return Start(to, text, prepared, starter and starter / f"{STARTER}.yaml")


def config_text(
    models: Sequence[str], base: str | None, tasks: Sequence[str], task_search_path: Sequence[str]
) -> str:
    """The config as YAML with a comment a choice."""
    method, why_method, merged = _method(models, base)
    draft: dict[str, Any] = {"models": list(merged), "merge_method": method}
    needs_base = METHODS[method].needs_base
    if needs_base:
        draft["base_model"] = base
    layout = family_layout(
        SearchConfig.from_text(yaml.safe_dump({"genome": draft, "tasks": ["none"]}))
    )
    experts = len(merged)
    step, why_step = _granularity(layout.num_layers, experts)
    groups = layout.num_layers // step
    names = [tensor.name for tensor in layout.tensors]
    filters, why_filters = _filters(names, groups * experts)
    dimensions = groups * experts * (1 + len(filters))
    budget = min(200, max(60, 10 * dimensions))
    entries = task_entries(tasks, task_search_path)
    lines = [
        f"# A first search over {', '.join(short_name(model) for model in merged)}"
        + (f" from {short_name(base)}" if base else ""),
        f"# ({layout.num_layers} layers, {layout.parameters / 1e6:,.1f} million parameters, "
        f"{layout.dtype}).",
        "#   agentmerge check THIS_FILE    finds every fault before anything is paid for",
        "#   agentmerge run THIS_FILE      searches",
        "genome:",
        "  models:",
        *(f"    - {_quoted(model)}" for model in merged),
    ]
    if "base_model" in draft:
        lines.append(f"  base_model: {_quoted(str(base))}")
    lines += [
        f"  # {why_method}",
        f"  merge_method: {method}",
        f"  # {why_step}",
        f"  layer_granularity: {step}",
    ]
    if needs_base:
        lines += [
            "  # not normalised: how much of the task vectors goes in is searched, too",
            "  normalize: false",
        ]
    lines += [
        f"  # {why_filters}",
        f"  filters: [{', '.join(filters)}]",
        "  # once weights are done, up to four layers of the models beside the merge's own; a",
        f"  # token then costs up to {1 + 4 / layout.num_layers:.2g} times as much",
        "  # layers: 4",
        "tasks:",
    ]
    for name in tasks:
        lines += _task_lines(name, next((e for e in entries if e.name == name), None))
    if task_search_path:
        lines += ["task_search_path:", *(f"  - {_quoted(path)}" for path in task_search_path)]
    lines += [
        "# items a task that the search may see; sealed ones for the last word come from beyond",
        "limit: 200",
        "search:",
        "  # all randomness derives from it",
        "  seed: 0",
        "budget:",
        f"  # about ten merges an axis ({dimensions} axes), 60 to 200 in all",
        f"  max_evaluations: {budget}",
    ]
    return "\n".join(lines) + "\n"


def _method(models: Sequence[str], base: str | None) -> tuple[str, str, Sequence[str]]:
    if base is None:
        why = "no base was named, so there are no task vectors: a weighted mean of the models"
        return "linear", why, models
    if len(models) == 1:
        why = "one model and its base: a weighted mean of the two"
        return "linear", why, [*models, base]
    why = "a base is named: each model's change from it, weighted and added up"
    return "task_arithmetic", why, models


def _granularity(num_layers: int, experts: int) -> tuple[int, str]:
    legal = [step for step in range(1, num_layers + 1) if num_layers % step == 0]
    fits = [
        step
        for step in legal
        if num_layers // step <= MAX_GROUPS and num_layers // step * experts <= MAX_DIMENSIONS
    ]
    step = fits[0] if fits else num_layers
    why = (
        f"layers that share their weights; {num_layers} layers can be grouped by {legal}: "
        f"{num_layers // step} groups of {experts} models are {num_layers // step * experts} axes"
    )
    return step, why


def _filters(names: Sequence[str], dimensions: int) -> tuple[list[str], str]:
    known = [text for text in FILTERS if any(text in name for name in names)]
    if not known:
        return [], "weights of their own for parts of a layer; these tensors have no usual parts"
    wide = dimensions * (1 + len(known))
    if wide > MAX_DIMENSIONS:
        each = ", ".join(known)
        return [], f"weights of their own for [{each}] would make {wide} axes; try it later"
    return known, "attention, MLP and everything else get weights of their own: few axes as it is"


def _task_lines(name: str, entry: TaskEntry | None) -> list[str]:
    metrics = list(entry.metrics) if entry else []
    metric, higher = metrics[0] if metrics else ("acc,none", True)
    lines = [f"  - name: {_quoted(name)}"]
    others = [other for other, _ in metrics[1:]]
    if others:
        lines.append(f"    # or one of: {', '.join(others)}")
    lines.append(f'    metric: "{metric}"')
    note = "" if higher else "  # lower is better, so it counts against"
    return [*lines, f"    weight: 1.0{note}"]


def _quoted(text: str) -> str:
    dumped = yaml.safe_dump(text, default_flow_style=True, allow_unicode=True, width=10_000)
    return dumped.splitlines()[0]


def _write_starter(folder: Path) -> None:
    """A task to begin with: sums with four choices, one line of JSON an item."""
    rng = np.random.default_rng(0)
    pairs = [divmod(int(n), 90) for n in rng.permutation(8100)[:STARTER_ITEMS]]
    lines = []
    for first, second in pairs:
        total = first + second
        wrong = [total + int(d) for d in rng.permutation([-10, -2, -1, 1, 2, 10])[:3]]
        choices = [str(c) for c in rng.permutation([total, *wrong])]
        item = {"question": f"{first} + {second} =", "choices": choices}
        lines.append(json.dumps(item | {"answer": choices.index(str(total))}))
    path = folder / f"{STARTER}.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        (folder / f"{STARTER}.yaml").write_text(
            "# A task of your own: put your items into the .jsonl file, one a line. Sums are only\n"
            "# here so that the config works at once; they say little about what you want.\n"
            f"task: {STARTER}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {json.dumps(str(path.absolute()))}}}}}\n"
            "output_type: multiple_choice\n"
            "test_split: test\n"
            'doc_to_text: "{{question}}"\n'
            'doc_to_choice: "{{choices}}"\n'
            'doc_to_target: "{{answer}}"\n'
            "metric_list:\n"
            "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
            "metadata: {version: 1}\n"
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
