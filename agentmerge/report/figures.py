"""The report's charts as plotly figures: plain {data, layout}, drawn by plotly.js in the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentmerge.report.content import MAX_ITEMS, MAX_POINTS, Contender, Content, Point, comparisons
from agentmerge.report.items import ItemsAsked, goodness

Figure = dict[str, Any]

INK, GREY, PALE = "#1f2933", "#5f6b7a", "#d9dee5"
BLUE, ORANGE, GREEN, PURPLE, RED, TEAL = (
    "#0b5cad", "#b35300", "#1b7f4b", "#7a3fb0", "#b3261e", "#0f7285",
)  # fmt: skip
LINES = (ORANGE, GREEN, PURPLE, TEAL, RED, INK)
DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")


def layout(x: str, y: str, height: int = 380, **more: Any) -> dict[str, Any]:
    axis = {"gridcolor": "#e8ebf0", "zerolinecolor": PALE, "linecolor": GREY, "automargin": True}
    return {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "xaxis": axis | {"title": {"text": x}},
        "yaxis": axis | {"title": {"text": y}},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        "uniformtext": {"minsize": 10, "mode": "hide"},
        "hoverlabel": {"font": {"size": 13}},
    } | more


def progress(content: Content) -> Figure:
    """Best so far against evaluations; ``customdata`` has the cost and the candidate's place."""
    points = _sampled(content.points)
    spans = [point.evaluations for point in content.points] or [0]
    costs = [point.cost_s for point in content.points] or [0.0]
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": "candidates",
        "x": [p.evaluations for p in points],
        "y": [p.candidate.score for p in points],
        "meta": {"costs": [p.cost_s for p in points]},
        "customdata": [f"{p.candidate.generation}.{p.candidate.slot}" for p in points],
        "text": [p.name for p in points],
        "hovertemplate": "%{text}<br>score %{y:.4f}<extra></extra>",
        "marker": {"size": 7, "color": BLUE, "opacity": 0.45},
    }
    best = {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": [p.evaluations for p in points],
        "y": [p.best_score for p in points],
        "meta": {"costs": [p.cost_s for p in points]},
        "line": {"color": BLUE, "width": 3, "shape": "hv"},
        "hovertemplate": "best so far %{y:.4f}<extra></extra>",
    }
    lines = [
        _reference(contender, index, (min(spans), max(spans)), (min(costs), max(costs)))
        for index, contender in enumerate(content.reference_lines)
    ]
    return {"data": [dots, best, *lines], "layout": layout("evaluations", "score", 420)}


def _reference(
    contender: Contender, index: int, span: tuple[float, float], cost: tuple[float, float]
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": contender.name,
        "x": list(span),
        "y": [contender.search] * 2,
        "meta": {"costs": list(cost)},
        "line": {
            "color": LINES[index % len(LINES)],
            "width": 2,
            "dash": DASHES[index % len(DASHES)],
        },
        "hovertemplate": f"{contender.name} %{{y:.4f}}<extra></extra>",
    }


def _sampled(points: Sequence[Point]) -> list[Point]:
    """All points, or those that became the best and an even sample of the others."""
    if len(points) <= MAX_POINTS:
        return list(points)
    step = len(points) / MAX_POINTS
    kept = {int(index * step) for index in range(MAX_POINTS)} | {len(points) - 1}
    best = float("-inf")
    for index, point in enumerate(points):
        if point.best_score > best:
            best = point.best_score
            kept.add(index)
    return [points[index] for index in sorted(kept)]


def distribution(content: Content) -> Figure:
    """Every generation's scores as a box with its points."""
    points = _sampled(content.points)
    box = {
        "type": "box",
        "x": [p.candidate.generation for p in points],
        "y": [p.candidate.score for p in points],
        "text": [p.name for p in points],
        "boxpoints": "all" if len(points) <= 600 else "outliers",
        "jitter": 0.4,
        "pointpos": 0,
        "marker": {"color": BLUE, "size": 5, "opacity": 0.55},
        "line": {"color": BLUE, "width": 1.5},
        "fillcolor": "rgba(11,92,173,0.10)",
        "name": "score",
        "hovertemplate": "%{text}<br>score %{y:.4f}<extra></extra>",
    }
    figure: Figure = {"data": [box], "layout": layout("generation", "score", showlegend=False)}
    figure["layout"]["xaxis"]["dtick"] = max(1, len({p.candidate.generation for p in points}) // 20)
    return figure


def depths(content: Content) -> Figure:
    """Scores of the answer's table against layers; the answer is filled."""
    lines = []
    for key, name, color in (("sealed_score", "sealed", BLUE), ("score", "search", ORANGE)):
        rows = [row for row in content.depths if row[key] is not None]
        if not rows:
            continue
        marks = ["circle" if row["is_answer"] else "circle-open" for row in rows]
        lines.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [row["layers"] for row in rows],
                "y": [row[key] for row in rows],
                "marker": {"size": 10, "symbol": marks, "color": color},
                "line": {"color": color},
                "hovertemplate": "%{x} layers<br>" + name + " %{y:.4f}<extra></extra>",
            }
        )
    figure: Figure = {"data": lines, "layout": layout("layers", "score")}
    figure["layout"]["xaxis"]["dtick"] = 1
    return figure


def front(content: Content) -> Figure:
    """The front with its intervals, over everything that was tried; the answer is filled."""
    rows = content.summary["front"]
    sealed = any(row["sealed_score"] is not None for row in rows)
    seen = [p for p in _sampled(content.points) if p.candidate.tokens is not None]
    dots = {
        "type": "scatter",
        "mode": "markers",
        "name": "tried (search items)",
        "x": [p.candidate.tokens for p in seen],
        "y": [p.candidate.score for p in seen],
        "text": [p.name for p in seen],
        "marker": {"size": 6, "color": GREY, "opacity": 0.4},
        "hovertemplate": "%{text}<br>%{x:.1f} tokens, score %{y:.4f}<extra></extra>",
    }
    lines: list[Figure] = [dots]
    for part, name, color in (("sealed_", "front, sealed items", BLUE), ("", "front", ORANGE)):
        told = [row for row in rows if row[f"{part}score"] is not None]
        told = [row for row in told if row[f"{part}tokens"] is not None]
        line: Figure = {
            "type": "scatter",
            "mode": "lines+markers+text" if part or not sealed else "lines",
            "name": name,
            "x": [row[f"{part}tokens"] for row in told],
            "y": [row[f"{part}score"] for row in told],
            "text": [str(row["point"]) for row in told],
            "textposition": "top left",
            "marker": {
                "size": 9,
                "color": color,
                "symbol": ["circle" if row["is_answer"] else "circle-open" for row in told],
            },
            "line": {"color": color} | ({"dash": "dot"} if sealed and not part else {}),
            "hovertemplate": "point %{text}<br>%{x:.1f} tokens, score %{y:.4f}<extra></extra>",
        }
        if told and bool(part) == sealed:
            line |= {
                "error_x": _ends(line["x"], [row["tokens_interval"] for row in told]),
                "error_y": _ends(line["y"], [row["interval"] for row in told]),
            }
        lines += [line] if told else []
    return {"data": lines, "layout": layout("tokens an item", "score")}


def _ends(middle: Any, intervals: Sequence[Sequence[float] | None]) -> dict[str, Any]:
    ends = [
        (0.0, 0.0) if span is None else (max(0.0, at - span[0]), max(0.0, span[1] - at))
        for at, span in zip(middle, intervals, strict=True)
    ]
    low, high = zip(*ends, strict=True)
    error = {"type": "data", "symmetric": False, "thickness": 1, "width": 3}
    return error | {"array": list(high), "arrayminus": list(low)}


def per_task(content: Content) -> Figure:
    """Each task's metric: the answer beside the parents and the cheap merges."""
    sealed = any(c.sealed_tasks for c in content.contenders)
    bars = []
    for index, contender in enumerate(content.contenders):
        values = contender.sealed_tasks if sealed else dict(contender.candidate.tasks)
        bars.append(
            {
                "type": "bar",
                "name": contender.name if contender.kind != "answer" else "this search's answer",
                "x": content.tasks,
                "y": [values.get(task) for task in content.tasks],
                "marker": {"color": BLUE if index == 0 else LINES[(index - 1) % len(LINES)]}
                | ({} if index == 0 else {"opacity": 0.55}),
                "hovertemplate": "%{fullData.name}<br>%{x}: %{y:.4f}<extra></extra>",
            }
        )
    return {
        "data": bars,
        "layout": layout("", "metric", barmode="group", bargap=0.25),
    }


def item_changes(content: Content) -> Figure:
    """Items gained, lost and unchanged against each other contender, all tasks together."""
    found = comparisons(content)
    names = [row["name"] for row in found]
    bars = []
    for key, label, colour in (
        ("both", "right in both", PALE),
        ("gained", "gained", GREEN),
        ("lost", "lost", RED),
        ("neither", "wrong in both", GREY),
    ):
        counts = [sum(task[key] for task in row["tasks"]) for row in found]
        bars.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label,
                "y": names,
                "x": counts,
                "text": [str(count) if count else "" for count in counts],
                "textposition": "inside",
                "textangle": 0,
                "insidetextanchor": "middle",
                "textfont": {"color": INK if colour == PALE else "#ffffff"},
                "marker": {"color": colour},
                "hovertemplate": "%{y}: %{x} " + label + "<extra></extra>",
            }
        )
    figure: Figure = {
        "data": bars,
        "layout": layout("", "", 150 + 44 * len(names), barmode="stack", bargap=0.35),
    }
    figure["layout"]["yaxis"]["autorange"] = "reversed"
    figure["layout"]["legend"]["y"] = -0.35 if len(names) < 5 else -0.2
    figure["layout"]["legend"]["traceorder"] = "normal"
    return figure


def item_matrix(content: Content) -> Figure:
    """One column an item, one row a contender: right, wrong, or how good within the task."""
    question = content.asked
    rows = [c for c in content.contenders if c.values is not None]
    if question is None or not rows:
        return {"data": [], "layout": layout("", "")}
    columns: list[tuple[str, str]] = []
    for task, keys in question.keys.items():
        columns += [(task, key) for key in _ordered(rows, question, task, keys)]
    if len(columns) > MAX_ITEMS:
        step = len(columns) / MAX_ITEMS
        columns = [columns[int(index * step)] for index in range(MAX_ITEMS)]
    z = [[_level(row, question, task, key) for task, key in columns] for row in rows]
    names = ["this search's answer" if c.kind == "answer" else c.name for c in rows]
    heat = {
        "type": "heatmap",
        "z": z,
        "y": names,
        "customdata": [[[task, key] for task, key in columns]] * len(rows),
        "colorscale": [[0, "#f3d9d7"], [0.5, "#f2f0e6"], [1, GREEN]],
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "xgap": 0,
        "ygap": 3,
        "hovertemplate": "%{y}<br>%{customdata[0]}, item %{customdata[1]}: %{z}<extra></extra>",
    }
    figure: Figure = {"data": [heat], "layout": layout("", "", 130 + 34 * len(rows))}
    edges, labels = _task_edges(columns)
    figure["layout"]["xaxis"] |= {"tickvals": labels[0], "ticktext": labels[1], "showgrid": False}
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    figure["layout"]["shapes"] = [
        {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1}
        | {"line": {"color": INK, "width": 1}}
        for x in edges
    ]
    return figure


def _level(row: Contender, question: ItemsAsked, task: str, key: str) -> float:
    """1 for right, 0 for wrong; other values by their place between the task's extremes."""
    assert row.values is not None
    good = goodness(question, task)
    result = row.values[task].get(key)  # none where a judge gave no verdict
    value = None if result is None else good(result)
    if value is None:
        return 0.5
    if value in (0.0, 1.0):
        return value
    found = [v for result in row.values[task].values() if (v := good(result)) is not None]
    low, high = min(found), max(found)
    return (value - low) / (high - low) if high > low else 0.5


def _ordered(
    rows: Sequence[Contender], question: ItemsAsked, task: str, keys: Sequence[str]
) -> list[str]:
    """Items with the same pattern side by side, those that the answer solves first."""
    return sorted(
        keys, key=lambda key: ([-_level(row, question, task, key) for row in rows], key)
    )  # fmt: skip


def _task_edges(
    columns: Sequence[tuple[str, str]],
) -> tuple[list[float], tuple[list[float], list[str]]]:
    edges, middles, names, start = [], [], [], 0
    for index in range(1, len(columns) + 1):
        if index == len(columns) or columns[index][0] != columns[start][0]:
            middles.append((start + index - 1) / 2)
            names.append(columns[start][0])
            if index < len(columns):
                edges.append(index - 0.5)
            start = index
    return edges, (middles, names)


def overview(contents: Sequence[Content]) -> Figure:
    """Several searches' best so far in one picture."""
    lines = []
    for index, content in enumerate(contents):
        points = _sampled(content.points)
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": content.row.name,
                "x": [p.evaluations for p in points],
                "y": [p.best_score for p in points],
                "meta": {"costs": [p.cost_s for p in points]},
                "line": {
                    "color": (BLUE, *LINES)[index % (1 + len(LINES))],
                    "width": 3,
                    "shape": "hv",
                    "dash": ("solid", *DASHES)[index // (1 + len(LINES)) % 6],
                },
                "hovertemplate": f"{content.row.name} %{{y:.4f}}<extra></extra>",
            }
        )
    return {"data": lines, "layout": layout("evaluations", "best so far")}
