"""``demo``, ``doctor`` and ``gc``: trying agentmerge, and keeping it well."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agentmerge.cli import options
from agentmerge.cli.terminal import show_result


def gc(
    runs_dir: options.RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: options.Json = False,
) -> int:
    """Free the disk of what no search needs.

    Old checkpoints (each search keeps its latest), what killed processes left half made, and
    parents that were made in the cache and are not in use. Results and branches stay.
    """
    from agentmerge.errors import NotFound
    from agentmerge.session.gc import discard_leftovers, discard_made_parents, prune_checkpoints

    # What was left anywhere goes, whatever is at fault with this runs directory.
    left = discard_leftovers(dry_run=dry_run)
    parents = discard_made_parents(dry_run=dry_run)
    try:
        report = prune_checkpoints(runs_dir, dry_run=dry_run)
    except NotFound:
        if not (left["removed"] or left["put_back"] or parents["made"]):
            raise
        report = {"checkpoints": 0, "freed_bytes": 0, "busy": [], "dry_run": dry_run}
    report |= {"parents": parents, "leftovers": left}
    verb = "would free" if dry_run else "freed"
    text = f"{verb} {report['freed_bytes'] / 1e6:.2f} MB in {report['checkpoints']} checkpoints"
    text += f", {parents['freed_bytes'] / 1e6:.2f} MB in {parents['made']} parents made here"
    text += f", {left['freed_bytes'] / 1e6:.2f} MB that killed processes left"
    text += "".join(f"\n  {path}" for path in left["removed"])
    text += "".join(f"\n  put back, moved by a killed export: {path}" for path in left["put_back"])
    text += "".join(f"\n  left alone, it may be in use: {path}" for path in left["elsewhere"])
    if report["busy"]:
        text += f"\n  running, left alone: {', '.join(report['busy'])} (the file keeps its size)"
    show_result(report, as_json, text)
    return 0


@options.settings("max_evaluations", "seed", "worker")
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where to put the demo.")] = Path(
        "runs/demo"
    ),
    *,
    given: dict[str, Any],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> int:
    """Make a family of small real models here and find its best merge."""
    from agentmerge.cli.demo import run_demo

    return run_demo(
        directory,
        given.get("budget.max_evaluations", 100),
        given.get("search.seed", 0),
        given.get("worker.kind", "hf"),
        as_json,
        quiet,
    )


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A genome config, to forecast its memory too.")
    ] = None,
    runs_dir: options.RunsDir = Path("runs"),
    selftest: Annotated[
        bool,
        typer.Option("--selftest", help="Try what each device computes, in about half a minute."),
    ] = False,
    as_json: options.Json = False,
) -> int:
    """Check this machine. Versions, devices, memory, disk, keys, and what to do."""
    from agentmerge.cli.forecast import memory_text
    from agentmerge.session.doctor import diagnose, forecast, forecast_finding, selftest_findings

    found = diagnose(runs_dir)
    found += selftest_findings() if selftest else []
    memory, nodes = (None, []) if config is None else forecast(config)
    found += nodes
    if memory is not None:
        found.append(forecast_finding(memory))
    lines = [f"{'ok ' if f['ok'] else 'NOT'} {f['what']}: {f['detail']}" for f in found]
    lines += [f"    {f['remedy']}" for f in found if not f["ok"] and f["remedy"]]
    lines += [] if memory is None else ["", memory_text(memory)]
    show_result(found, as_json, "\n".join(lines))
    return 0 if all(f["ok"] for f in found) else 1
