"""What no search needs is removed: old checkpoints, leftovers, made parents, forgotten searches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentmerge.errors import LeaseHeld, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.archive import prune
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER, existing_runs, opened
from agentmerge.ledger.journal import journal_mode
from agentmerge.ledger.lease import Lease
from agentmerge.session.checkpoints import open_saver, readable
from agentmerge.system.temporary import cache_dir, discard_unfinished


def prune_checkpoints(runs_dir: Path | str, *, dry_run: bool) -> dict[str, Any]:
    """Keep each idle search's latest checkpoint, and none of searches that are forgotten:
    {checkpoints, freed_bytes, busy, dry_run}.

    Branching reads the ledger, so pruning cannot break it. Searches that run now are left alone,
    and the file keeps its size meanwhile.

    Raises:
        NotFound: nothing has run there.
    """
    runs_dir = existing_runs(runs_dir)
    path = runs_dir / CHECKPOINTS
    with readable(path, "NAME"), open_saver(path) as saver:
        threads = saver.searches()  # before the rows: a search has its row before its checkpoints
        with opened(runs_dir) as ledger:
            rows = ledger.runs()
        busy = [row.name for row in rows if Lease.holder(path, row.id) is not None]
        idle = [row.id for row in rows if row.name not in busy]
        known = {row.id for row in rows}
        orphans = [
            thread
            for thread in threads
            if thread not in known and Lease.holder(path, thread) is None
        ]
        old, orphaned = saver.prunable(idle), saver.prunable(orphans, strategy="delete")
        count = old.checkpoints + orphaned.checkpoints
        freed = old.payload_bytes + orphaned.payload_bytes
        if not dry_run and count:
            before = saver.size_bytes()
            saver.prune(orphans, strategy="delete", shrink=False)
            saver.prune(idle, shrink=not busy)
            freed = before - saver.size_bytes()
    return {
        "checkpoints": count,
        "freed_bytes": freed,
        "busy": busy,
        "dry_run": dry_run,
    }


def discard_made_parents(*, dry_run: bool) -> dict[str, Any]:
    """Remove the checkpoints that were made of parents and that no process uses: {made,
    freed_bytes, dry_run}. They are made again when they are needed."""
    from agentmerge.parents.made import discard_made

    made, freed = discard_made(dry_run=dry_run)
    return {"made": made, "freed_bytes": freed, "dry_run": dry_run}


def discard_leftovers(*, dry_run: bool) -> dict[str, Any]:
    """Remove what processes that were killed left half made, wherever it is, and put back what they
    had moved away: {removed, put_back, elsewhere, freed_bytes, dry_run}, paths each.

    elsewhere: left alone, since another host's process may be at work there.
    """
    shared = journal_mode(cache_dir() / "any") != "WAL"
    return asdict(discard_unfinished(dry_run=dry_run, shared=shared)) | {"dry_run": dry_run}


def prune_results(runs_dir: Path | str, names: Sequence[str], *, dry_run: bool) -> dict[str, Any]:
    """Forget searches by name, and all results that no search has: see ``ledger.archive.prune``.

    Their folders (config, best recipe, log) stay. While a search runs there ("busy") files keep
    their size, since it would wait for them to be rewritten, and give up.

    Raises:
        NotFound: no such search.
        UserError: one of them runs now.
    """
    runs_dir = existing_runs(runs_dir)
    path = runs_dir / CHECKPOINTS
    with Ledger(runs_dir / LEDGER) as ledger, readable(path, "NAME"), ExitStack() as stack:
        rows = [ledger.run(name) for name in dict.fromkeys(names)]
        for row in rows if path.is_file() else ():
            running = f"search {row.name!r} runs now; stop it before it is forgotten"
            if dry_run and Lease.holder(path, row.id) is not None:
                raise UserError(running)
            if not dry_run:
                try:
                    stack.enter_context(Lease.acquire(path, row.id, name=row.name))
                except LeaseHeld as error:
                    raise UserError(running) from error
        busy = [
            row.name
            for row in ledger.runs()
            if row not in rows and Lease.holder(path, row.id) is not None
        ]
        if rows and not dry_run and path.is_file():
            # Before the rows: a search that is still there can do without its checkpoints.
            with open_saver(path) as saver:
                for row in rows:
                    saver.delete_thread(row.id)
        found = prune(ledger, [row.id for row in rows], dry_run=dry_run, shrink=not busy)
    return found | {"forgotten": [row.name for row in rows], "busy": busy}
