"""The report: one HTML file that needs nothing else, not even a network.

plotly.js, style sheet, script and data are inside it. Everything a user or a model wrote is
escaped: the template escapes text, and data is JSON without ``<``.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.operators import PARENT
from agentmerge.errors import UserError
from agentmerge.evaluation.statistics import duration, figure
from agentmerge.ledger import Ledger
from agentmerge.ledger.words import own_words
from agentmerge.report import figures
from agentmerge.report.content import Content, comparisons, content, place, shortened
from agentmerge.report.grid import Grid
from agentmerge.report.summary import judge_sentences
from agentmerge.system.temporary import write_at_once

if TYPE_CHECKING:
    from jinja2 import Environment

#: What begins a tag, except those that our own charts are made with.
_MARKUP = re.compile(r"<(?!br>|extra>|/extra>)")


def write_report(ledger: Ledger, names: Sequence[str], to: Path) -> Path:
    """Write the report of one or more searches to ``to``, replaced in one step.

    Raises:
        NotFound: no such search.
        UserError: the file cannot be written, or plotly is missing.
    """
    rows = [ledger.run(name) for name in dict.fromkeys(names)]
    text = page([content(ledger, row) for row in rows])
    if to.is_dir():
        raise UserError(f"report {to} cannot be written: it is a directory; name a file")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_at_once(to, text)
    except OSError as error:
        raise UserError(f"report {to} cannot be written: {error.strerror}") from None
    return to


def templates(read: Callable[[str], str]) -> Environment:
    """Pages by what ``read`` has under their names; all text that is put into them is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"score": _score, "signed": _signed, "duration": duration}
    environment.filters["breakable"] = _breakable
    return environment


def page(contents: Sequence[Content], served: str = "") -> str:
    """The whole HTML text. served: from where a server has its parts, which are not inside then."""
    charts: dict[str, Any] = {}
    runs = []
    for index, found in enumerate(contents):
        key = f"run{index}"
        charts |= charts_of(found, key)
        runs.append(_section(found, key))
    if len(contents) > 1:
        charts["overview"] = figures.overview(contents)
    body = {
        "charts": charts,
        "grids": {run["key"]: run.pop("grids") for run in runs},
    }
    return (
        templates(resource)
        .get_template("page.html")
        .render(
            runs=runs,
            title=", ".join(run["name"] for run in runs),
            data=as_json(body),
            served=served,
            style="" if served else resource("page.css"),
            script="" if served else resource("page.js"),
            plotly="" if served else plotly_js(),
        )
    )


def plotly_js() -> str:
    """plotly.js, minified, as the package plotly ships it."""
    try:
        found = resources.files("plotly") / "package_data" / "plotly.min.js"
        return found.read_text(encoding="utf-8")
    except (ModuleNotFoundError, OSError):
        raise UserError("the report's charts need plotly: pip install plotly") from None


def resource(name: str) -> str:
    """A part of the page: a template, its style sheet or its script."""
    return (resources.files("agentmerge.report") / "page" / name).read_text(encoding="utf-8")


def as_json(value: Any) -> str:
    """JSON that is safe inside a script element, and holds no markup for plotly but ours.

    Plotly draws tags in any text, links too: names of tasks, models and searches are others'.
    """
    text = json.dumps(_plain(value), separators=(",", ":"), allow_nan=False, default=str)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _MARKUP.sub("&lt;", value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def live_charts(found: Content, key: str) -> dict[str, Any]:
    """``charts_of``, and the heat map of the best recipe, or the answer's."""
    charts = charts_of(found, key)
    for best in list(found.grids.values())[:1]:
        charts[f"{key}-grid"] = {"grid": _grid(best)}
    return charts


def charts_of(found: Content, key: str) -> dict[str, Any]:
    """Every chart of a search, by the id of its place in the page; none before a score."""
    if not found.points:
        return {}
    charts = {
        f"{key}-progress": figures.progress(found),
        f"{key}-distribution": figures.distribution(found),
        f"{key}-tasks": figures.per_task(found),
    }
    if found.depths:
        charts[f"{key}-depths"] = figures.depths(found)
    if found.summary.get("front"):
        charts[f"{key}-front"] = figures.front(found)
    if comparisons(found):
        charts |= {
            f"{key}-changes": figures.item_changes(found),
            f"{key}-matrix": figures.item_matrix(found),
        }
    return charts


def _section(found: Content, key: str) -> dict[str, Any]:
    """What the template shows of one search."""
    row, summary = found.row, found.summary
    card = row.card
    judged = judge_sentences(summary.get("judges", {}))
    best_parent = max(
        (
            score
            for c in found.contenders
            for score in [c.sealed if card.sealed else c.search]
            if c.kind == PARENT and score is not None
        ),
        default=None,
    )
    return {
        "key": key,
        "name": row.name,
        "status": summary["status"],
        "stop_reason": row.stop_reason,
        "algorithm": row.algorithm,
        "seed": row.seed,
        "verdict": card.verdict,
        "notes": [shortened(note) for note in (*card.warnings, *card.notes, *judged)],
        "answer": None if found.answer is None else found.answer.score,
        "sealed": card.answer.sealed_score,
        "best_parent": best_parent,
        "evaluations": summary["evaluations"],
        "generations": summary["generations"],
        "seconds": found.points[-1].cost_s if found.points else 0.0,
        "agents": summary["agents"],
        "contenders": found.contenders,
        "tasks": found.tasks,
        "depths": found.depths,
        "front": summary.get("front", ()),
        "comparisons": comparisons(found),
        "asked": found.asked,
        "charted": bool(found.points),
        "choices": _choices(found),
        "grids": {name: _grid(value) for name, value in found.grids.items()},
        "operators": found.operators,
        "advice": _advice(found),
        "advice_rules": bool(found.advice) and all(not said["model"] for said in _advice(found)),
        "lineage": _tree(found),
        "failed": found.failed,
        "recipe": found.recipe.rstrip(),
        "config": row.config.rstrip(),
        "engine": row.facts.get("engine", {}),
        "identities": row.facts.get("identities", {}),
        "command": _command(found),
    }


def _choices(found: Content) -> list[tuple[str, str]]:
    """(place, label) of every candidate whose recipe the page has, the answer first."""
    by_place = {place(p.candidate): p.candidate.score for p in found.points}
    answer = None if found.answer is None else place(found.answer)
    labels = []
    for at, name in found.names.items():
        what = "answer" if at == answer else name
        labels.append((at, f"{what}, score {by_place.get(at) or 0.0:.4f}"))
    return labels


def _grid(value: Grid) -> dict[str, Any]:
    """Rows as the heat map reads them, top to bottom."""
    return {
        "x": list(value.columns),
        "y": [" · ".join(part for part in row if part) for row in value.rows],
        "z": [list(cells) for cells in value.rows.values()],
    }


def _advice(found: Content) -> list[dict[str, Any]]:
    order = {"critic": 0, "controller": 1, "proposer": 2}
    said = [
        {
            "generation": word["generation"],
            "role": word["role"],
            "words": shortened(own_words(word)),
            "model": word["guidance"].get("source") == "model",
            "expected": Guidance.from_json(word["guidance"]).expected_score,
            "failure": word.get("failure") or "",
        }
        for word in found.advice
    ]
    return sorted(said, key=lambda word: (word["generation"], order.get(word["role"], 3)))


def _tree(found: Content) -> list[dict[str, Any]]:
    """The family of searches as an indented list; empty where it has no branches."""
    depth: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for name, generation, parent in found.lineage:
        depth[name] = depth[parent] + 1 if parent else 0
        rows.append({"name": name, "generation": generation, "parent": parent})
    ordered: list[dict[str, Any]] = []

    def walk(parent: str) -> None:
        for row in rows:
            if row["parent"] == parent:
                ordered.append(row | {"depth": depth[row["name"]]})
                walk(row["name"])

    walk("")
    return ordered if len(ordered) > 1 else []


def _command(found: Content) -> str:
    name = shlex.quote(found.row.name)
    if found.row.parent_run is not None:
        parent = next(parent for run, _, parent in found.lineage if run == found.row.name)
        at = found.row.parent_generation
        return f"agentmerge branch {shlex.quote(parent)} --at {at} --as {name}-again"
    return f"agentmerge run config.yml --name {name}-again"


def _score(value: float | None) -> str:
    return "–" if value is None else figure(value, digits=4)


def _breakable(name: str) -> Any:
    """A task's name that may break after its underscores."""
    from markupsafe import Markup, escape

    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def _signed(value: float) -> str:
    return figure(value, "+", 4)
