"""How alike the experts of a pool are, as a picture: a square for each pair, from a survey."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from agentmerge.errors import UserError
from agentmerge.recipe.names import short_name
from agentmerge.report.picture import photograph
from agentmerge.system.temporary import write_at_once

if TYPE_CHECKING:  # it needs torch, and who reads results has none
    from agentmerge.merging.experts import ExpertFacts, ExpertSurvey

CELL, LETTER, MARGIN = 34, 7, 16
#: Colours of a cosine of -1, 0 and 1; none where there is no cosine.
_ENDS = ((179, 38, 30), (247, 248, 250), (11, 92, 173))
_NONE = "#d9dee5"


def heat_map(found: ExpertSurvey) -> tuple[str, int, int]:
    """(SVG, width, height) of the cosines of task vectors; damaged experts are marked."""
    names = [_shown(one) for one in found.experts]
    left = MARGIN + LETTER * max(map(len, names)) + 8
    size = CELL * len(names)
    width, height = max(left + size + MARGIN, 420), size + 3 * MARGIN + 40
    origin = short_name(found.base) if found.base else "the experts' mean"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 8}">Cosines of what each adds to {escape(origin)}</text>',
    ]
    top = 2 * MARGIN + 8
    for row, name in enumerate(names):
        y = top + row * CELL
        parts.append(f'<text x="{left - 8}" y="{y + 21}" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(found.cosines[row]):
            x = left + column * CELL
            shown = "" if value is None else f"{value:.2f}".replace("0.", ".")
            ink = "#ffffff" if value is not None and abs(value) > 0.6 else "#1f2933"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{_colour(value)}"/><text x="{x + CELL // 2}" y="{y + 21}" font-size="11" '
                f'fill="{ink}" text-anchor="middle">{shown}</text>'
            )
    return "\n".join([*parts, "</svg>", ""]), width, height


def _shown(expert: ExpertFacts) -> str:
    mark = ", damaged" if expert.damage else ", no family" if expert.misfit else ""
    return "".join(c for c in short_name(expert.model) if c.isprintable())[:48] + mark


def refuse_other_pictures(to: Path) -> None:
    """Raises UserError where a file's name ends like no picture that is drawn here."""
    if to.suffix.lower() not in (".svg", ".png"):
        raise UserError(f"--picture {to} is neither .svg nor .png; name such a file")


def draw_heat_map(found: ExpertSurvey, to: Path) -> Path:
    """Write it as .svg, or as .png by a browser of this machine.

    Raises:
        UserError: another ending, no browser, or the file cannot be written.
    """
    refuse_other_pictures(to)
    svg, width, height = heat_map(found)
    if to.suffix.lower() == ".png":
        page = f'<!doctype html><meta charset="utf-8"><body style="margin:0">{svg}'
        return photograph(page, to, "--picture", width, height)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_at_once(to, svg)
    except OSError as error:
        raise UserError(f"--picture {to} cannot be written: {error.strerror}") from None
    return to


def _colour(value: float | None) -> str:
    if value is None:
        return _NONE
    end, share = _ENDS[2 if value > 0 else 0], min(abs(value), 1.0)
    mixed = (round(m + share * (e - m)) for m, e in zip(_ENDS[1], end, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)
