"""The benchmarks that others rely on run, and find nothing lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def bench(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_nothing_is_lost_repeated_or_diverges() -> None:
    assert "lost 0, repeated 0, diverged 0" in bench("kill", "--kills", "5")


@pytest.mark.slow
def test_the_ledger_stays_small() -> None:
    said = bench("ledger", "--candidates", "400", "--items", "1000", "--searches", "2")
    each = float(said.split(" bytes an item result")[0].rpartition(" ")[2])
    assert each < 7
