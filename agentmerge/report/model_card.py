"""The model card of an exported merge: what it is, how it was found, and how to find it again.

The head is metadata that the Hugging Face Hub reads. Only what the Hub knows goes there: parents
that are local folders are named in the text, and nobody's paths are published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from agentmerge.config import SearchConfig
from agentmerge.contracts.card import Compared
from agentmerge.evaluation.statistics import figure
from agentmerge.ledger import Ledger, RunRow
from agentmerge.parents.cards import Licence, licence_notes
from agentmerge.recipe import Recipe
from agentmerge.recipe.copying import layers_read
from agentmerge.recipe.names import short_name
from agentmerge.report.content import shortened
from agentmerge.report.front import front_points
from agentmerge.report.items import asked
from agentmerge.report.summary import depth_rows

TAGS = ("merge", "mergekit", "agentmerge")


def model_card(
    ledger: Ledger, row: RunRow, found: Mapping[str, Any], licences: Sequence[Licence] = ()
) -> str:
    """The card as Markdown. found: as ``summary.best_recipe`` returns it. licences: those that the
    parents' cards name."""
    recipe = Recipe.parse(found["recipe"])
    config = SearchConfig.from_text(row.config, row.name)
    head = yaml.safe_dump(_metadata(recipe, row, found), sort_keys=False)
    parts = [
        f"---\n{head}---\n# {row.name}",
        _summary(row, recipe),
        "## Scores",
        _scores(ledger, row, config, found),
        "## Parents",
        _parents(row, recipe, licences),
        "## How to find it again",
        _again(row, config),
        "## Recipe",
        f"The file `mergekit_config.yml` beside this one, for mergekit and agentmerge:\n\n"
        f"```yaml\n{_public(found['recipe']).rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def on_the_hub(name: str) -> bool:
    """Whether a model's name can be a Hub id: ``owner/name`` or ``name``, and no local folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).expanduser().exists()


def _metadata(recipe: Recipe, row: RunRow, found: Mapping[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    published = [name for name in recipe.models if on_the_hub(name)]
    if published:
        body["base_model"] = published
    body |= {"library_name": "transformers", "tags": list(TAGS)}
    sealed = _told(row, found).sealed_tasks
    tasks = sealed or found["tasks"]
    part = "sealed items" if sealed else "search items"
    body["model-index"] = [
        {
            "name": row.name,
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": f"{task} ({part})", "type": task},
                    "metrics": [{"type": _metric(row, task), "value": value, "name": task}],
                }
                for task, value in tasks.items()
            ],
        }
    ]
    return body


def _told(row: RunRow, found: Mapping[str, Any]) -> Compared:
    """The row of the closing card that a merge has: the answer's, another depth's or a point's."""
    rows = (row.card.answer, *row.card.depths, *row.card.front)
    return next((r for r in rows if r.recipe_hash == found["recipe_hash"]), Compared())


def _metric(row: RunRow, task: str) -> str:
    config = SearchConfig.from_text(row.config, row.name)
    named = {entry.name: entry.metric for entry in config.tasks.tasks}
    return named.get(task, "score").partition(",")[0]


def _summary(row: RunRow, recipe: Recipe) -> str:
    names = ", ".join(short_name(name) for name in recipe.models)
    methods = [one.merge_method for one in (*dict(recipe.merges).values(), recipe)]
    how, depth = ", then ".join(methods), len(layers_read(recipe))
    if depth != row.facts["num_layers"]:
        how += f"; {depth} layers of models of {row.facts['num_layers']}"
    lines = [
        f"A merge ({how}) of {names}, found by agentmerge: search {row.algorithm}, seed {row.seed}."
    ]
    if row.card.verdict:
        lines += ["", shortened(row.card.verdict)]
    lines += [f"\nWarning: {shortened(line)}" for line in row.card.warnings]
    lines += [f"\nNote: {shortened(note)}" for note in row.card.notes]
    return "\n".join(lines)


def _scores(
    ledger: Ledger,
    row: RunRow,
    config: SearchConfig,
    found: Mapping[str, Any],
) -> str:
    """A row a task; sealed metrics with their interval where they are shares of right answers."""
    sealed = _told(row, found).sealed_tasks or {}
    weights = {task.name: task for task in config.tasks.tasks}
    intervals = _intervals(ledger, row, found["recipe_hash"]) if sealed else {}
    head = "| task | metric | weight | search items |" + (" sealed items |" if sealed else "")
    lines = [head, "|---" * (5 if sealed else 4) + "|"]
    for task, value in found["tasks"].items():
        entry = weights.get(task)
        metric, weight = (entry.metric, entry.weight) if entry else ("", "")
        cells = f"| {task} | {metric} | {weight} | {figure(value, digits=4)} |"
        if sealed:
            shown = "–" if sealed.get(task) is None else figure(sealed[task], digits=4)
            cells += f" {shown}{intervals.get(task, '')} |"
        lines.append(cells)
    total = f"| **weighted score** | | | {figure(found['score'], digits=4)} |"
    if sealed:
        total += f" {figure(_told(row, found).sealed_score or 0.0, digits=4)} |"
    lines.append(total)
    if sealed:
        lines += ["", "Sealed items were never seen by the search. Intervals are Wilson's, 95 %."]
    for d in row.card.differences if found["recipe_hash"] == row.card.answer.recipe_hash else ():
        lines.append(
            f"\nAgainst {short_name(d.against)}: {figure(d.mean, '+', 4)} "
            f"({figure(d.low, '+', 4)} to {figure(d.high, '+', 4)}, 95 %, paired by item)."
        )
    return "\n".join([*lines, *_depths(ledger, row, found), *_front(row, found)])


def _front(row: RunRow, found: Mapping[str, Any]) -> list[str]:
    """Where a merge stands between better and shorter, if its search had a front."""
    points = front_points(row)
    at = next((p for p in points if p["candidate"] == [found["generation"], found["slot"]]), None)
    if at is None:
        return []
    part = "" if at["sealed_tokens"] is None else "sealed_"
    where = "sealed" if part else "search"
    text = (
        f"Point {at['point']} of {len(points)} of its search's front: a score of "
        f"{figure(at[f'{part}score'], digits=4)} with {at[f'{part}tokens']:.1f} tokens an item on "
        f"{where} items. What is said of the answer above holds for "
        f"{'this merge' if at['is_answer'] else 'another merge'}."
    )
    return ["", text]


def _depths(ledger: Ledger, row: RunRow, found: Mapping[str, Any]) -> list[str]:
    """What each layer of a stack bought, where the search had a table of it."""
    rows = depth_rows(ledger, row)
    if not rows:
        return []
    lines = ["", "| layers | million parameters | search | sealed |", "|---|---|---|---|"]
    for depth in rows:
        own = depth["candidate"] == [found["generation"], found["slot"]]
        scores = (depth["score"], depth["sealed_score"])
        cells = ["" if score is None else figure(score, digits=4) for score in scores]
        size = "" if depth["parameters"] is None else f"{depth['parameters'] / 1e6:,.2f}"
        name = f"**{depth['layers']}**, this model" if own else str(depth["layers"])
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
    return lines


def _intervals(ledger: Ledger, row: RunRow, recipe_hash: str) -> dict[str, str]:
    from agentmerge.evaluation.statistics import MIN_ITEMS, wilson

    question = asked(ledger, row, "sealed")
    values = None if question is None else question.values(ledger, recipe_hash)
    found = {}
    for task, results in (values or {}).items():
        shown = [result.value for result in results.values()]
        if len(shown) >= MIN_ITEMS and all(value in (0.0, 1.0) for value in shown):
            _, low, high = wilson(shown)
            found[task] = f" ({low:.4f} to {high:.4f})"
    return found


def _parents(row: RunRow, recipe: Recipe, licences: Sequence[Licence]) -> str:
    identities = row.facts.get("identities", {})
    lines = []
    used = {part for name in recipe.models for part in (name, *name.split("+"))}
    licences = [one for one in licences if one.model in used]
    named = {one.model: one.name or "not named on a card here" for one in licences}
    for name in recipe.models:
        link = f"[{name}](https://huggingface.co/{name})" if on_the_hub(name) else short_name(name)
        lines.append(f"- {link}, weights SHA-256 `{identities.get(name, 'unknown')[:16]}…`")
        own = [named[part] for part in (name, *name.split("+")) if part in named]
        lines[-1] += f", licence {' + '.join(dict.fromkeys(own))}" if own else ""
    carried = [note for note in row.facts.get("notes", []) if "outside the text model" in note]
    lines += [f"\n{shortened(note)}." for note in carried]
    lines += ["", "Their licences hold for this merge: check each before you publish or use it."]
    notes = licence_notes(licences)
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines)


def _again(row: RunRow, config: SearchConfig) -> str:
    engine = row.facts.get("engine", {})
    command = f"agentmerge run config.yml --name {row.name}"
    if row.parent_run is not None:
        command = f"agentmerge branch ORIGIN --at {row.parent_generation} --as {row.name}"
    return (
        "Save this as `config.yml`, name the parents where they are on your machine, and run\n"
        f"`{command}`. Scored with {engine.get('engine', '?')} ({engine.get('version', '?')}), "
        f"{engine.get('dtype', '?')} on {engine.get('device', '?')}.\n\n"
        f"```yaml\n{_public(config.to_yaml()).rstrip()}\n```"
    )


def _public(text: str) -> str:
    """YAML with local folders cut to their names."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {cut(key): cut(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cut(item) for item in value]
        if isinstance(value, str) and value.startswith(("/", "~")):
            return short_name(value)
        return value

    documents = [cut(value) for value in yaml.safe_load_all(text)]
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True)
