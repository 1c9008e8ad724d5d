"""``agentmerge demo``: a real family made on this machine, searched, and what that gained."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from agentmerge.contracts.card import Card, Compared

SKILLS = ("shift", "sort")
INTRO = """\
Two small models were trained from one base: one learned to shift letters, one to sort them.
The search looks for the merge of the two that does both."""


def _short(path: Path) -> Path:
    """The path as it is reached from here."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _program() -> str:
    """What to type: the bare name where the shell finds it, else what this was started by."""
    if shutil.which("agentmerge"):
        return "agentmerge"
    started = Path(sys.argv[0]).absolute()
    return "python -m agentmerge" if started.name == "__main__.py" else str(_short(started))


def measured_here(card: Card, used: int, allowed: int) -> str:
    """What this run measured, and of what: other families have other figures."""

    def score(row: Compared | None) -> float | None:
        return getattr(row, "sealed_score" if card.sealed else "score", None)

    parents = [value for row in card.parents if (value := score(row)) is not None]
    steps = [("the best parent", max(parents, default=None))]
    steps.append(("the best cheap merge", score(card.best_rival)))
    steps.append((f"this search after {used} of {allowed} evaluations", score(card.answer)))
    figures = ", ".join(f"{what} {value:.3f}" for what, value in steps if value is not None)
    where = "sealed" if card.sealed else "search"
    return (
        f"Measured here, on {where} items: {figures}.\n"
        "The models were trained on this machine; on another processor they come out otherwise, "
        "and so do\nthe figures (python -m benchmarks.demo counts over many families)."
    )


def run_demo(
    directory: Path, max_evaluations: int, seed: int, worker: str, as_json: bool, quiet: bool
) -> int:
    """Make the family (or take it from the cache), search it, and print the closing table."""
    from agentmerge.cli.render import card_text
    from agentmerge.cli.searching import followed
    from agentmerge.cli.terminal import show_result, speaker
    from agentmerge.config import SearchConfig
    from agentmerge.demo.family import cached_family
    from agentmerge.demo.tasks import demo_search
    from agentmerge.ledger.folder import opened
    from agentmerge.report.summary import run_summary
    from agentmerge.session import driving

    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)  # before a family is trained for it
    say = speaker(quiet, as_json)
    say(INTRO)
    family = cached_family(SKILLS, 0, on_progress=say)
    config_path = demo_search(
        family, directory, max_evaluations=max_evaluations, seed=seed, worker=worker
    )
    config = SearchConfig.from_file(config_path)

    def start(emit: Any, drain: Any) -> Any:
        return driving.run(config, runs_dir=directory, emit=emit, drain=drain)

    row, caught = followed(start, config, directory, as_json, quiet)
    with opened(directory) as ledger:
        summary = run_summary(ledger, row)
    if row.result is None:
        say(f"saved; go on with: agentmerge resume {row.name} --runs-dir {directory}")
        show_result(summary, as_json, "stopped before the search was done")
        return 128 + caught[0] if caught else 0
    show_result(summary, as_json, "\n" + card_text(row.card))
    say("\n" + measured_here(row.card, summary["evaluations"]["total"], max_evaluations))
    here = f"--runs-dir {_short(directory)}"
    program = _program()
    say(
        f"\nNext:  {program} show {row.name} {here}\n"
        f"       {program} best {row.name} {here}\n"
        f"       {program} export {row.name} --to merged {here}\n"
        f"The config was {_short(config_path)}"
    )
    return 0
