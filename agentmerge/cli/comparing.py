"""``tree`` and ``compare``: how searches descend from one another, and what sets them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result

#: Longest value of a config key that is shown whole.
MAX_VALUE = 60


def tree(
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
) -> int:
    """Draw the searches and their branches."""
    from agentmerge.ledger.folder import opened
    from agentmerge.report.compare import lineage

    with opened(runs_dir) as ledger:
        found = lineage(ledger)
    show_result(found, as_json, tree_text(found))
    return 0


def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME", help="Searches to compare.", autocompletion=options.searches
        ),
    ],
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
) -> int:
    """Compare searches by scores, items, recipes, settings and cost."""
    from agentmerge.errors import UserError
    from agentmerge.ledger.folder import opened
    from agentmerge.report.compare import compare as compared

    if len(dict.fromkeys(names)) < 2:
        raise UserError(f"compare needs two searches, and {names[0]!r} is one; name another")
    with opened(runs_dir) as ledger:
        found = compared(ledger, names)
    show_result(found, as_json, compare_text(found))
    return 0


def tree_text(nodes: Sequence[Mapping[str, Any]]) -> str:
    """An indented drawing, a line a search; branches hang from the search they left."""
    lines: list[str] = []

    def walk(parent: str | None, stem: str) -> None:
        children = [node for node in nodes if node["parent"] == parent]
        for index, node in enumerate(children):
            last = index == len(children) - 1
            joint = "" if parent is None else ("└─ " if last else "├─ ")
            lines.append(f"{stem}{joint}{_node_text(node)}")
            walk(node["name"], stem + ("" if parent is None else ("   " if last else "│  ")))

    walk(None, "")
    return "\n".join(lines)


def _node_text(node: Mapping[str, Any]) -> str:
    from agentmerge.cli.render import number

    at = "" if node["generation"] is None else f" (from generation {node['generation']})"
    answer = "" if node["answer"] is None else f", answer {number(node['answer'])}"
    return (
        f"{node['name']}{at}: {node['status']}, {node['search']}, "
        f"{node['evaluations']} evaluations, best seen {number(node['best'])}{answer}"
    )


def compare_text(found: Mapping[str, Any]) -> str:
    parts = [_searches_text(found["searches"])]
    parts += [_difference_text(difference) for difference in found["differences"]]
    return "\n\n".join(parts)


def _searches_text(searches: Sequence[Mapping[str, Any]]) -> str:
    from agentmerge.cli.render import number, table
    from agentmerge.evaluation.statistics import duration

    sealed = any(row["sealed_score"] is not None for row in searches)
    tasks = list(dict.fromkeys(task for row in searches for task in row["tasks"]))
    rows = [["", *(row["name"] for row in searches)]]

    def add(name: str, cells: Sequence[str]) -> None:
        rows.append([name, *cells])

    add("search", [f"{row['search']}, seed {row['seed']}" for row in searches])
    add("status", [row["status"] for row in searches])
    add("score", [number(row["score"]) for row in searches])
    if sealed:
        add("score, sealed", [number(row["sealed_score"]) for row in searches])
    for task in tasks:
        add(task, [number(row["tasks"].get(task)) for row in searches])
        if sealed:
            add(f"{task}, sealed", [number(row["sealed_tasks"].get(task)) for row in searches])
    add("evaluations", [str(row["evaluations"]["total"]) for row in searches])
    add("  reused", [str(row["evaluations"]["reused"]) for row in searches])
    add("worker time", [duration(row["seconds"]) for row in searches])
    if any(row["agents"]["calls"] for row in searches):
        for key, name in (("calls", "agents' calls"), ("tokens_in", "tokens in")):
            add(name, [str(row["agents"][key]) for row in searches])
        add("tokens out", [str(row["agents"]["tokens_out"]) for row in searches])
    return table(rows)


def _difference_text(found: Mapping[str, Any]) -> str:
    one, other = found["of"], found["against"]
    lines = [f"{one} against {other}", _score_text(found["score"])]
    lines += ["", *_recipe_lines(found["recipe"], one, other)]
    lines += ["", *_config_lines(found["config"], one, other)]
    for prompt in found["prompts"]:
        lines += ["", f"the {prompt['role']}'s prompt differs:", prompt["diff"]]
    return "\n".join(lines)


def _score_text(score: Mapping[str, Any]) -> str:
    from agentmerge.cli.render import table
    from agentmerge.evaluation.statistics import figure

    if "reason" in score:
        return f"  scores cannot be compared item by item: {score['reason']}"
    low, high = score["low"], score["high"]
    apart = "" if low > 0 or high < 0 else "; they cannot be told apart"
    rows = [["task", "items", "gained", "lost"]]
    rows += [
        [task["task"], str(task["items"]), str(task["gained"]), str(task["lost"])]
        for task in score["tasks"]
    ]
    head = (
        f"  on {score['items']} {score['part']} items: {figure(score['mean'], '+', 4)} "
        f"({figure(low, '+', 4)} to {figure(high, '+', 4)}, 95 %, paired by item){apart}"
    )
    return "\n".join([head, *(f"  {line}" for line in table(rows).splitlines())])


def _recipe_lines(recipe: Mapping[str, Any], one: str, other: str) -> list[str]:
    from agentmerge.cli.render import number, table

    if not recipe["columns"]:
        return ["  their recipes cannot be laid side by side"]
    if not recipe["rows"]:
        return ["  their recipes have the same values"]
    rows = [["value", *recipe["columns"]]]
    for row in recipe["rows"]:
        name = " ".join(part for part in (row["model"], row["parameter"], row["filter"]) if part)
        pairs = zip(row["of"], row["against"], strict=True)
        rows.append(
            [name, *("=" if a == b else f"{number(a)} → {number(b)}" for a, b in pairs)]
        )  # fmt: skip
    return [f"  recipe, {one} → {other}:", *(f"  {line}" for line in table(rows).splitlines())]


def _config_lines(changes: Sequence[Mapping[str, Any]], one: str, other: str) -> list[str]:
    if not changes:
        return ["  their configs are the same"]
    lines = [f"  config, {one} → {other}:"]
    for change in changes:
        lines.append(f"    {change['key']}: {_short(change['of'])} → {_short(change['against'])}")
    return lines


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"
