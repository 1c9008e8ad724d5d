"""A runs directory: what its databases are called, and its ledger for reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agentmerge.errors import NotFound
from agentmerge.ledger import Ledger

LEDGER = "agentmerge.sqlite"
CHECKPOINTS = "checkpoints.sqlite"


def existing_runs(runs_dir: Path | str) -> Path:
    """The runs directory.

    Raises:
        NotFound: nothing has run there.
    """
    path = Path(runs_dir)
    if not (path / LEDGER).is_file():
        raise NotFound(f"no runs in {path}; `agentmerge run CONFIG` or --runs-dir DIR")
    return path


@contextmanager
def opened(runs_dir: Path | str, busy_timeout_s: float = 30.0) -> Iterator[Ledger]:
    """The ledger of a runs directory, for reading."""
    with Ledger(existing_runs(runs_dir) / LEDGER, busy_timeout_s, read_only=True) as ledger:
        yield ledger
