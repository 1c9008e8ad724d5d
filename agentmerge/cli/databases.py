"""``ledger stats | prune | export``: the results database as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The results database as a whole."
)


@app.command()
def stats(runs_dir: options.RunsDir = Path("runs"), as_json: options.Json = False) -> int:
    """Show how large it is, and what of it no search needs."""
    from agentmerge.ledger.archive import stats as measured
    from agentmerge.ledger.folder import opened

    with opened(runs_dir) as ledger:
        found = measured(ledger)
    each = found["bytes_per_item"]
    unused = found["unused"]
    lines = [
        f"{found['path']}: {found['bytes'] / 1e6:.1f} MB",
        f"{found['searches']} searches, {found['candidates']} candidates, "
        f"{found['recipes']} recipes, {found['model_calls']} model calls",
        f"{found['item_results']} item results in {found['blocks']} blocks"
        + ("" if each is None else f", {each:.2f} bytes an item"),
        f"unused: {unused['item_results']} item results, {unused['bytes'] / 1e6:.1f} MB "
        "(agentmerge ledger prune removes them)",
    ]
    show_result(found, as_json, "\n".join(lines))
    return 0


@app.command()
def prune(
    forget: Annotated[
        list[str] | None, typer.Option("--forget", help="Forget this search too; repeatable.")
    ] = None,
    runs_dir: options.RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: options.Json = False,
) -> int:
    """Remove what no search has, forget searches. Folders of runs stay."""
    from agentmerge.session.gc import prune_results

    found = prune_results(runs_dir, forget or [], dry_run=dry_run)
    verb = "would remove" if dry_run else "removed"
    text = (
        f"{verb} {found['item_results']} item results in {found['blocks']} blocks, "
        f"{found['freed_bytes'] / 1e6:.1f} MB"
    )
    if found["forgotten"]:
        text += f"; {'would forget' if dry_run else 'forgot'} {', '.join(found['forgotten'])}"
    if found["busy"]:
        later = "will keep" if dry_run else "keeps"
        text += (
            f"; {', '.join(found['busy'])} runs now, so the file {later} its size: what is removed "
            "is filled again, and a later prune makes the file smaller"
        )
    show_result(found, as_json, text)
    return 0


@app.command()
def export(
    to: Annotated[Path, typer.Option("--to", help="Folder for the Parquet files.")],
    runs_dir: options.RunsDir = Path("runs"),
    as_json: options.Json = False,
) -> int:
    """Write searches, candidates and every item result as Parquet."""
    from agentmerge.ledger.archive import export_parquet
    from agentmerge.ledger.folder import opened

    with opened(runs_dir) as ledger:
        counts = export_parquet(ledger, to)
    rows = [f"{to / name}.parquet: {count} rows" for name, count in counts.items()]
    show_result({"folder": str(to), "rows": counts}, as_json, "\n".join(rows))
    return 0
