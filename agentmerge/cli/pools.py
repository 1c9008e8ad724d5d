"""How a pool of experts looks on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmerge.cli.render import table
from agentmerge.cli.terminal import plain_line
from agentmerge.recipe.names import short_name

if TYPE_CHECKING:  # it needs torch
    from agentmerge.merging.experts import ExpertSurvey

#: More experts make lines that no terminal is wide enough for.
_MOST_COLUMNS = 12


def survey_text(found: ExpertSurvey) -> str:
    """A row an expert, the cosines of their task vectors, and what speaks against some."""
    names = [plain_line(short_name(one.model)) for one in found.experts]
    rows = [["expert", "length", "closest", "cosine", "same side", "tokenizer", "template",
             "licence", "languages"]]  # fmt: skip
    for i, one in enumerate(found.experts):
        near = [(v, j) for j, v in enumerate(found.cosines[i]) if j != i and v is not None]
        cosine, j = max(near, default=(None, i))
        agreed = found.agreement[i][j]
        rows.append(
            [
                names[i],
                "-" if one.length is None else f"{one.length:.4f}",
                "-" if cosine is None else names[j],
                "-" if cosine is None else f"{cosine:.3f}",
                "-" if cosine is None or agreed is None else f"{agreed:.3f}",
                one.tokenizer,
                one.template,
                one.licence or "not named",
                ", ".join(one.languages) or "-",
            ]
        )
    lines = [table(rows)]
    if 2 < len(names) <= _MOST_COLUMNS:
        head = ["cosine", *(str(i + 1) for i in range(len(names)))]
        cells = [["-" if v is None else f"{v:.2f}" for v in row] for row in found.cosines]
        numbered = [f"{i + 1} {name}" for i, name in enumerate(names)]
        lines += ["", table([head, *([n, *row] for n, row in zip(numbered, cells, strict=True))])]
    lines.append("")
    lines += [
        f"near-duplicates: {short_name(one)} and {short_name(other)} (cosine {value:.4f})"
        for one, other, value in found.duplicates
    ]
    lines += [f"damaged: {n}: {said}" for n, one in zip(names, found.experts, strict=True)
              for said in one.damage]  # fmt: skip
    lines += [f"no family: {n}: {one.misfit}" for n, one in zip(names, found.experts, strict=True)
              if one.misfit]  # fmt: skip
    lines += [f"note: {note}" for note in found.notes]
    lines.append(
        "length: of what an expert adds to "
        + (
            f"{short_name(found.base)}, as a share of its own"
            if found.base
            else "the experts' mean"
        )
        + "; same side: of the numbers that both change, how many they move alike."
    )
    if found.share < 1:
        lines.append(
            f"{found.share:.2%} of the numbers were read; --share 1 reads all, and finds all damage"
        )
    return "\n".join(map(plain_line, "\n".join(lines).split("\n")))
