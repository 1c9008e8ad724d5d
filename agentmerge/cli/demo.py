"""``agentmerge demo``: a real family made on this machine, searched, and what that gained."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

SKILLS = ("shift", "sort")
#: Three sealed items a search item: enough to tell 2 points apart.
SEALED_SHARE = 0.75
INTRO = """\
Two small models were trained from one base: one learned to shift letters, one to sort them.
The search looks for the merge of the two that does both."""

#: From docs/search.md; the benchmark asks the two exact-match tasks alone.
BENCHMARK = """
The same family in the benchmark (exact match only, sealed items, median over seeds): best uniform
merge 0.569, CMA-ES after 100 candidates 0.719, this search 0.824 after 46 (docs/search.md)."""


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


def run_demo(
    directory: Path, max_evaluations: int, seed: int, worker: str, as_json: bool, quiet: bool
) -> int:
    """Make the family (or take it from the cache), search it, and print the closing table."""
    from agentmerge import session
    from agentmerge.cli.live import progress
    from agentmerge.cli.render import card_text
    from agentmerge.cli.terminal import show_result, signals, speaker
    from agentmerge.config import SearchConfig
    from agentmerge.demo.family import cached_family
    from agentmerge.demo.tasks import demo_config, write_tasks
    from agentmerge.report.summary import run_summary

    say = speaker(quiet, as_json)
    say(INTRO)
    family = cached_family(SKILLS, 0, on_progress=say)
    directory = directory.absolute()
    tasks = write_tasks(directory / "tasks", SKILLS)
    body: dict[str, Any] = demo_config(family, tasks)
    body["task_search_path"] = [str(tasks)]
    body["budget"] = {"max_evaluations": max_evaluations}
    body["search"] = {"seed": seed, "sealed_share": SEALED_SHARE}
    body["worker"] = {"kind": worker, "batch_size": 200, "options": {"threads": 1}}
    config_path = directory / "config.yml"
    config_path.write_text(yaml.safe_dump(body, sort_keys=False))
    config = SearchConfig.from_file(config_path)
    drain = session.Drain()
    signals(drain, say)
    with progress(config, quiet=quiet, as_json=as_json) as listener:
        row = session.run(config, runs_dir=directory, emit=listener, drain=drain)
    with session.opened(directory) as ledger:
        summary = run_summary(ledger, row)
    if row.result is None:
        say(f"saved; go on with: agentmerge resume {row.name} --runs-dir {directory}")
        show_result(summary, as_json, "stopped before the search was done")
        return 0
    show_result(summary, as_json, "\n" + card_text(row.result))
    say(BENCHMARK)
    here = f"--runs-dir {_short(directory)}"
    program = _program()
    say(
        f"\nNext:  {program} show {row.name} {here}\n"
        f"       {program} best {row.name} {here}\n"
        f"       {program} export {row.name} --to merged {here}\n"
        f"The config was {_short(config_path)}"
    )
    return 0
