"""What became of each draw, and the table that says so. Knows no mutation and no search."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

#: How a draw ends where something came through.
BAD = ("unexpected", "not mended", "over bounds")


@dataclass
class Tally:
    """counts: what was broken -> how it ended -> draws. notes: what each bad draw needs to be
    drawn again, with what was seen."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, ending: str, note: str = "") -> None:
        self.counts.setdefault(kind, Counter())[ending] += 1
        if ending in BAD:
            self.notes.append(f"{kind}: {ending}: {note}")

    def merge(self, other: Tally) -> None:
        for kind, ended in other.counts.items():
            self.counts.setdefault(kind, Counter()).update(ended)
        self.notes += other.notes

    @property
    def bad(self) -> int:
        return sum(ended[ending] for ended in self.counts.values() for ending in BAD)

    def table(self) -> str:
        """Markdown: a row a kind, a column an ending, the bad ones last."""
        seen = {ending for ended in self.counts.values() for ending in ended}
        columns = [*sorted(seen - {*BAD}), *BAD]
        rows = [["broken", "draws", *columns]]
        for kind, ended in [*sorted(self.counts.items()), ("all", self._all())]:
            rows.append([kind, str(ended.total()), *(str(ended[column]) for column in columns)])
        rows.insert(1, ["---"] * len(rows[0]))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _all(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())
