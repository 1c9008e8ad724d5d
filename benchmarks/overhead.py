"""What a generation costs besides its evaluations, at a search's beginning and at its end.

    python -m benchmarks.overhead --generations 300 random cma_es

Searches on the fake worker, which answers at once. Printed are milliseconds of processor time a
generation, over its first and its last tenth, and how many times as much the last take; and rows
read from the results database a candidate, over the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import yaml

from agentmerge.config import SearchConfig
from agentmerge.ledger.store import Store
from agentmerge.session import driving
from benchmarks.fake import fake_config


@dataclass
class Meter:
    """Processor time and rows read, by generation. candidates: in a generation."""

    rows: int = 0
    marks: list[tuple[float, int]] = field(default_factory=list)

    def tell(self, event: dict[str, Any]) -> None:
        if event["event"] == "generation":
            self.marks.append((time.process_time(), self.rows))

    def between(self, first: int, last: int) -> tuple[float, float]:
        """(seconds, rows) a generation."""
        (start, read), (end, later) = self.marks[first], self.marks[last]
        return (end - start) / (last - first), (later - read) / (last - first)


def measured(algorithm: str, generations: int, population: int) -> Meter:
    """A search of so many generations, metered."""
    meter, plain = Meter(), Store._rows

    def counted(store: Store, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        found = plain(store, sql, *values)
        meter.rows += len(found)
        return found

    body = fake_config(8) | {
        "search": {"algorithm": algorithm, "seed": 7, "population": population},
        "budget": {"max_evaluations": 12 + generations * population},
    }
    with tempfile.TemporaryDirectory() as folder, patch.object(Store, "_rows", counted):
        config = SearchConfig.from_text(yaml.safe_dump(body))
        driving.run(config, name="a", runs_dir=folder, emit=meter.tell)
    return meter


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("algorithms", nargs="+")
    parser.add_argument("--generations", type=int, default=300)
    parser.add_argument("--population", type=int, default=5)
    given = parser.parse_args()
    for algorithm in given.algorithms:
        meter = measured(algorithm, given.generations, given.population)
        last = len(meter.marks) - 1
        tenth = max(1, last // 10)
        (first_s, first_rows), (end_s, end_rows) = (
            meter.between(*ends) for ends in ((0, tenth), (last - tenth, last))
        )
        print(
            f"{algorithm}: {1000 * first_s:.1f} ms a generation at first, {1000 * end_s:.1f} ms at "
            f"generation {last} ({end_s / first_s:.1f} times); rows a candidate "
            f"{first_rows / given.population:.1f}, then {end_rows / given.population:.1f}"
        )


if __name__ == "__main__":
    main()
