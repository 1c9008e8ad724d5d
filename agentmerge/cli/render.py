"""How events and results look on a terminal. Prints progress only."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from agentmerge.agents.forecasts import Track
from agentmerge.cli.terminal import plain_line
from agentmerge.contracts.card import Card
from agentmerge.evaluation.statistics import duration, figure
from agentmerge.parents.cards import Licence
from agentmerge.recipe.names import short_name
from agentmerge.report.summary import tokens_text


def table(rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """Columns padded to their widest cell, the first row the head; numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(w) if i and numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "-" if value is None else figure(value)


def card_text(card: Card) -> str:
    """The closing table and what it means, for someone who has never merged a model."""
    tasks = list(card.answer.tasks)
    head = ["", *(["sealed"] if card.sealed else []), "search", *tasks]
    named = [(f"parent {short_name(row.name)}", row) for row in card.parents]
    if card.best_rival:
        named.append((f"best cheap merge ({card.best_rival.name})", card.best_rival))
    rows = [head]
    for name, row in [*named, ("this search's answer", card.answer)]:
        scores = [row.sealed_score, row.score] if card.sealed else [row.score]
        scores += [row.tasks.get(task) for task in tasks]
        rows.append([name, *map(number, scores)])
    lines = [_fitting(rows, tasks), ""]
    if card.sealed:
        lines.append(
            "search: weighted score on the items the search saw; sealed: on items it never saw."
        )
    if card.answer.interval:
        low, high = card.answer.interval
        lines.append(
            f"The answer's score lies between {figure(low)} and {figure(high)} (95 %, over items)."
        )
    lines += [
        f"Ahead of {short_name(d.against)} by {figure(d.mean, '+')} "
        f"({figure(d.low, '+')} to {figure(d.high, '+')})"
        for d in card.differences
    ]
    lines += [f"constraint: {constraint_text(row)}" for row in card.constraints]
    lines += [f"warning: {line}" for line in card.warnings]
    lines += [f"note: {note}" for note in card.notes]
    lines += [uplift_text(card.uplift)] if card.uplift else []
    return "\n".join([*lines, card.verdict])


def _fitting(rows: list[list[str]], tasks: Sequence[str]) -> str:
    """The table; on a terminal that is too narrow, tasks without what their names begin alike."""
    text = table(rows)
    room = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or max(map(len, text.splitlines())) <= room or len(tasks) < 2:
        return text
    words = [task.split("_") for task in tasks]
    firsts = zip(*(parts[:-1] for parts in words), strict=False)
    alike = len(list(takewhile(lambda first: len(set(first)) == 1, firsts)))
    short = [("…" if alike else "") + "_".join(parts[alike:]) for parts in words]
    return table([[*rows[0][: -len(tasks)], *short], *rows[1:]])


def depth_text(depths: Sequence[Mapping[str, Any]]) -> str:
    """What each layer of a stack buys and costs, one row a depth."""
    rows = [["layers", "parameters", "s an item", "search", "sealed", "ahead of the first"]]
    for row in depths:
        size, seconds = row["parameters"], row["seconds_per_item"]
        ahead = "-"
        if row["ahead"]:
            mean, low, high = (figure(end, "+") for end in row["ahead"])
            ahead = f"{mean} ({low} to {high}, 95 %)"
        mark = " (the answer)" if row["is_answer"] else ""
        rows.append(
            [
                f"{row['layers']}{mark}",
                "-" if size is None else f"{size / 1e6:,.2f} million",
                "-" if seconds is None else f"{seconds:.3g}",
                number(row["score"]),
                number(row["sealed_score"]),
                ahead,
            ]
        )
    return table(rows) + "\nagentmerge export --layers N writes another of these."


def front_text(front: Sequence[Mapping[str, Any]]) -> str:
    """What is worth choosing between a better and a shorter answer, one row a point."""
    sealed = any(row["sealed_score"] is not None for row in front)
    kind = "sealed" if sealed else "search"
    rows = [["point", f"{kind} score", "(95 %)", f"{kind} tokens an item", "(95 %)", "merge"]]
    for row in front:
        score, tokens = (
            row[f"sealed_{key}"] if sealed else row[key] for key in ("score", "tokens")
        )
        ends, lengths = row["interval"], row["tokens_interval"]
        rows.append(
            [
                f"{row['point']}{' (the answer)' if row['is_answer'] else ''}",
                number(score),
                f"{number(ends[0])} to {number(ends[1])}" if ends else "-",
                "-" if tokens is None else f"{tokens:.1f}",
                f"{lengths[0]:.1f} to {lengths[1]:.1f}" if lengths else "-",
                short_name(row["name"]),
            ]
        )
    return (
        f"{table(rows)}\nThe front, drawn by search items: agentmerge export --point N writes one, "
        '--prefer "score>=X" the shortest that keeps X.'
    )


def uplift_text(found: Mapping[str, Any]) -> str:
    """What the models' advice earned over an arm without it, and what it cost."""
    cost = found["cost"]
    price = f"{cost['calls']} calls, {cost['tokens_in'] + cost['tokens_out']} tokens, {_cost(cost)}"
    gap = found.get("difference")
    if gap is None:
        why = found.get("failure", "nothing to compare")
        return f"The models' advice ({price}) could not be judged: {why}."
    mean, low, high = (figure(gap[key], "+") for key in ("mean", "low", "high"))
    earned = f"{mean} ({low} to {high}, 95 %)"
    if gap["low"] <= 0 <= gap["high"]:
        earned += ", which is within the noise of the items"
    return (
        f"The models' advice: best of {found['evaluations']:g} evaluations with it minus best of "
        f"as many without, on {found['part']} items: {earned}. It cost {price}. One search does "
        "not show the spread over searches."
    )


def constraint_text(row: Mapping[str, Any]) -> str:
    """One constraint of the closing card: what is allowed, and whether it was kept."""

    def held(kept: bool, mine: float, best: float) -> str:
        return f"{'kept' if kept else 'BROKEN'} ({figure(mine)} against {figure(best)})"

    if "tokens" in row:
        most, times = row["tokens"]["most"], row["tokens"]["parents"]
        whose = "" if times is None else f", {times:g} times the parents' mean"
        text = f"answers may have {most:.1f} tokens an item{whose}"
        for part in ("", "sealed_"):
            if f"{part}answer" in row:
                held_so = held(row[f"{part}kept"], row[f"{part}answer"], most)
                text += f"{', ' if part else ': '}{part[:-1] or 'search'} items {held_so}"
        return text
    text = (
        f"{row['task']} may be {row['max_drop']:g} worse than the best parent: search items "
        f"{held(row['kept'], row['answer'], row['parent'])}"
    )
    if "sealed_kept" in row:
        sealed = held(row["sealed_kept"], row["sealed_answer"], row["sealed_parent"])
        text += f", sealed items {sealed}"
    return text


def summary_text(summary: Mapping[str, Any]) -> str:
    from agentmerge.report.summary import judge_sentences

    spent = summary["evaluations"]
    lines = [
        f"{summary['name']}: {summary['status']}"
        + (f" ({summary['stop_reason']})" if summary["stop_reason"] else ""),
        f"search {summary['search']}, seed {summary['seed']}, "
        f"{summary['generations']} generations, {spent['total']} evaluations "
        f"({spent['reused']} reused, {spent['failed']} failed"
        + (f", {spent['stopped']} stopped early)" if spent.get("stopped") else ")"),
    ]
    if summary["parent"]:
        origin = summary["parent"]
        left = origin["run"] or "a forgotten search"
        lines.append(f"branched from {left} at generation {origin['generation']}")
    if workers := summary.get("workers", {}).get("sentence"):
        lines.append(workers)
    agents = summary["agents"]
    if agents["calls"]:
        lines.append(
            f"agents: {agents['calls']} calls, {agents['failures']} failed, "
            f"{agents['tokens_in']} tokens in, {agents['tokens_out']} out, {_cost(agents)}"
        )
        lines.append(f"forecasts: {Track(**agents['forecasts']).sentence()}")
        if "curator_forecasts" in agents:
            told = Track(**agents["curator_forecasts"]).sentence()
            lines.append(f"the curator's forecasts: {told}")
    lines += judge_sentences(summary.get("judges", {}))
    for opening in summary["structure"]:
        end = f"not opened: {opening['refusal']}" if opening["refusal"] else "opened, on trial"
        where = f"after generation {opening['generation']}"
        lines.append(f"another search space {where}: {opening['move']}: {end}")
    if not summary["final"]:
        lines += [f"warning: {line}" for line in summary["warnings"]]
    if summary["final"]:
        lines += ["", card_text(Card.parse(summary["final"]))]
        if summary.get("depths"):
            lines += ["", depth_text(summary["depths"])]
        if summary.get("front"):
            lines += ["", front_text(summary["front"])]
    elif summary["best"]:
        tasks = list(summary["best"]["tasks"])
        rows = [["", "score", *tasks]]
        for row in [*summary["parents"], summary["best"]]:
            name = "best so far" if row is summary["best"] else short_name(row["label"])
            cells = [number(row["tasks"].get(task)) for task in tasks]
            rows.append([name, number(row["score"]), *cells])
        lines += ["", table(rows)]
    if told := tokens_text(summary):
        lines += ["", told]
    return "\n".join(lines)


def _cost(agents: Mapping[str, Any]) -> str:
    if agents["cost_usd"] is None:
        return "price unknown (budget.prices sets it)"
    unpriced = f", and {agents['unpriced']} calls of unknown price" if agents["unpriced"] else ""
    return f"${agents['cost_usd']:.4f}{unpriced}"


def _layers_row(layers: Any) -> list[list[str]]:
    if layers is None:
        return []
    text = (
        f"{layers.dimensions} dimensions once weights are done; at most {layers.deepest} layers "
        f"for {layers.num_layers}, {layers.cost_a_token:.2g} times the cost a token"
    )
    if layers.scaled_bytes is not None:
        text += f" and {layers.scaled_bytes / 1e6:,.1f} MB more memory"
    return [["layers", text]]


def plan_text(plan: Any) -> str:
    seconds = plan.seconds_per_candidate
    time_text = "unknown (this ledger has not run these settings)"
    if seconds is not None:
        time_text = (
            f"about {duration(seconds * plan.max_evaluations)} ({seconds:.2f} s a candidate)"
        )
    rows = [
        ["plan", ""],
        ["dimensions", f"{plan.dimensions} ({plan.freedoms} change the merge)"],
        *_layers_row(plan.layers),
        ["search", plan.algorithm],
        ["population", str(plan.population)],
        ["evaluations", f"at most {plan.max_evaluations}"],
        ["items", f"{plan.items} to search on, {plan.sealed_items} sealed"],
        ["time", time_text],
    ]
    if plan.live_model:
        rows.append(["merges have", f"config and tokenizer of {plan.live_model}"])
        rows.append(["chat template", plan.chat_template or "none is applied"])
    if plan.made_bytes:
        disk = f"up to {plan.made_bytes / 1e9:.2f} GB in the cache, for parents that are made once"
        rows.append(["disk", disk])
    if plan.licences:
        rows.append(["licences", licences_text(plan.licences)])
    width = max(len(row[0]) for row in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows[1:]]
    lines += [f"note: {plain_line(line)}" for line in plan.notes]
    warnings = [f"warning: {line}" for line in plan.warnings]
    return "\n".join(["no faults found", *warnings, *lines])


def licences_text(licences: Sequence[Licence]) -> str:
    """Each licence that cards name, and of whom."""
    owners: dict[str, list[str]] = {}
    for one in licences:
        owners.setdefault(one.name or "not named", []).append(one.owner)
    said = (f"{name} ({', '.join(models)})" for name, models in owners.items())
    return plain_line("; ".join(said))


def replay_text(found: Any) -> str:
    """How a replay ended, in one or two lines."""
    size = f"{found.generations} generations, {found.candidates} candidates"
    if found.identical:
        so_far = " as far as it went" if found.stopped else ""
        return f"{found.run}: the same again{so_far} ({size}, {found.replies} stored replies)"
    why = f": {found.stopped}" if found.stopped else ""
    cause = f"; {found.cause}" if found.cause else ""
    return f"{found.run}: differs from generation {found.differs_from} on{why}{cause}"


def methods_text(methods: Sequence[Mapping[str, Any]]) -> str:
    """Each merge method in a paragraph: what it is, then a line a parameter."""
    parts = []
    for method in methods:
        paper = str(method["paper"])
        paper = paper if "://" in paper else f"arXiv {paper}"
        facts = [f"computed by {method['engine']}", f"base_model {method['base_model']}"]
        least, most = method["models"]["least"], method["models"]["most"]
        if most:
            facts.append(f"{most} {'model' if most == 1 else 'models'} a slice")
        elif least > 1:
            facts.append(f"{least} models or more")
        facts += ["random masks"] if method["random"] else []
        lines = [f"{method['name']}: {method['doc']}", f"  {'; '.join(facts)}; {paper}"]
        rows = [_parameter_row(parameter) for parameter in method["parameters"]]
        widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
        for *short, doc in rows:
            cells = [cell.ljust(width) for cell, width in zip(short, widths, strict=True)]
            lines.append(f"    {'  '.join(cells)}  {doc}")
        parts.append("\n".join(lines))
    parts.append(
        "Parameters marked * are searched where genome.evolve names them (normalize: where "
        "genome.normalize says); the others always."
    )
    return "\n\n".join(parts)


def _parameter_row(parameter: Mapping[str, Any]) -> list[str]:
    scope = "a model" if parameter["scope"] == "source" else "shared"
    default = parameter["default"]
    if parameter["kind"] == "bool":
        span, default = "true or false", None if default is None else str(bool(default)).lower()
    else:
        span = f"{parameter['low']:g} to {parameter['high']:g}"
        span += {"log": " (log)", "int": " (whole)"}.get(parameter["kind"], "")
        default = None if default is None else f"{default:g}"
    said = f"{span}, default {default}" if default is not None else span
    searched = parameter.get("search_default", parameter["default"])
    if searched != parameter["default"]:
        said += f" ({str(bool(searched)).lower()} in a search)"
    return [
        parameter["name"] + ("" if parameter["searched"] else "*"),
        scope,
        said,
        parameter["doc"],
    ]
