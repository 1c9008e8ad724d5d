"""A tracker: is told every event of a search, and closed at its end."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from agentmerge.contracts import SearchConfig


class CsvTracker:
    """Writes NAME.csv into the folder that --wandb-project names, or the working directory."""

    def __init__(
        self, config: SearchConfig, *, name: str | None, project: str | None, entity: str | None
    ) -> None:
        folder = Path(project or ".")
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{name or 'search'}.csv").open("w", newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(["generation", "slot", "operator", "score"])

    def tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "candidate":
            self._rows.writerow(
                [event["generation"], event["slot"], event["operator"], event["score"]]
            )

    def keep(self, kind: str, path: Path) -> None:
        """At the end: the best recipe ("recipe") and the HTML report ("report"), as files."""
        self._rows.writerow([kind, path, "", ""])

    def close(self) -> None:
        self._file.close()
