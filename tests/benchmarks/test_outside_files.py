"""Broken model folders and configs, drawn: ``python -m benchmarks.outside files`` in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
from benchmarks.outside.files import main
tally = main({draws}, 11, search={search})
print(tally.table(), *tally.notes, sep="\\n")
raise SystemExit(bool(tally.bad))
"""


def test_no_draw_ends_unforeseen_or_beyond_bounds(tmp_path: Path) -> None:
    """In a process of its own, which is forked for each draw: one of every kind."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(draws=11, search=False)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "refused by check" in done.stdout
