"""What ``doctor`` looks at: this machine, its packages, a runs directory. Touches no results."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.errors import AgentmergeError, UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import CHECKPOINTS, LEDGER
from agentmerge.session.checkpoints import open_saver, readable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentmerge.config import SearchConfig
    from agentmerge.merging.placement import MemoryPlan
    from agentmerge.space.grouped import SearchSpace

#: Distribution -> the least version this code was written against.
NEEDED = {
    "torch": "2.6",
    "transformers": "5",
    "lm-eval": "0.4.13",
    "mergekit": "0.1.5",
    "langgraph": "1.2",
    "langgraph-checkpoint-sqlite": "3.1",
    "langchain": "1.5",
    "langchain-openai": "1.7",
    "sqlite-utils": "4",
    "cma": "4",
    "typer": "0.16",
}
_MORE_FOR_THE_END = "raise that limit, or seal fewer conversations (search.sealed_share)"
KEYS = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "GOOGLE_API_KEY", "WANDB_API_KEY")


def diagnose(runs_dir: Path | str) -> list[dict[str, Any]]:
    """Findings as {what, ok, detail, remedy}; a key's value is never read out."""
    from agentmerge.workers.vllm.preflight import findings as vllm_findings

    found = [
        _finding(
            "python",
            sys.version_info >= (3, 11),
            ".".join(map(str, sys.version_info[:3])),
            "install Python 3.11 or newer",
        )
    ]
    for name, least in NEEDED.items():
        found.append(_package(name, least))
    found += [*vllm_findings(), _device(), _memory(), _disk(Path(runs_dir))]
    found += [_database(Path(runs_dir)), _checkpoints(Path(runs_dir))]
    for key in KEYS:
        state = "set" if os.environ.get(key) else "not set (needed only for that service)"
        found.append(_finding(key, True, state))
    return found


def selftest_findings() -> list[dict[str, Any]]:
    """Whether each device here computes what the CPU does, and what is trusted on it."""
    from agentmerge.session.selftest import devices, try_device

    found = []
    for device in devices():
        trials = try_device(device)
        found += [_finding(f"{device}, {t.what}", t.ok, t.detail) for t in trials]
        wrong = [trial.what for trial in trials if not trial.ok]
        good = ", ".join(trial.what for trial in trials if trial.ok) or "nothing"
        remedy = f"search on another device than {device}: {', '.join(wrong)} cannot be trusted"
        found.append(_finding(f"{device}, trusted", not wrong, good, remedy))
    return found


def forecast(config: Path) -> tuple[MemoryPlan | None, list[dict[str, Any]]]:
    """What a config's search needs in each placement (None where its worker reads no models), and
    what is found of its judges' cost and of the nodes on which its workers would live.

    Raises:
        ConfigError: the config or its models are at fault.
    """
    from agentmerge import plugins
    from agentmerge.config import SearchConfig
    from agentmerge.preflight.anchoring import anchored
    from agentmerge.preflight.prepare import prepare

    settings = anchored(SearchConfig.from_file(config))
    prepared = prepare(settings, allow_benchmarks=True, tasks=False, weights=False, run_code=False)
    worker = prepared.config.worker
    host = plugins.load("agentmerge.hosts", worker.host) if worker.host else None
    look = getattr(host, "findings", None)
    found = [*_judges(settings, prepared.space)]
    return prepared.memory, [*found, *(look(worker, prepared.spec.device) if look else ())]


def _judges(config: SearchConfig, space: SearchSpace) -> Iterator[dict[str, Any]]:
    from agentmerge.preflight.judges import judge_forecast
    from agentmerge.search.budget import ending_merges
    from agentmerge.search.judging import judge_faults

    for fault in judge_faults(config):
        yield _finding("judge", False, fault)
    for entry in config.tasks.tasks:
        if entry.judge is not None:
            what = f"judge of {entry.name}"
            try:
                told, enough = judge_forecast(config, entry, ending_merges(config, space))
                yield _finding(what, enough, told, "" if enough else _MORE_FOR_THE_END)
            except UserError as error:
                yield _finding(what, False, str(error))


def forecast_finding(memory: MemoryPlan) -> dict[str, Any]:
    """A forecast as one more finding of ``diagnose``, with all its figures under ``forecast``."""
    chosen = memory.chosen
    detail = f"{memory.name_of(chosen)}: {memory.reason}" if chosen else memory.reason
    return _finding("placement", chosen is not None, detail) | {"forecast": memory.to_dict()}


def _finding(what: str, ok: bool, detail: str, remedy: str = "") -> dict[str, Any]:
    return {"what": what, "ok": ok, "detail": detail, "remedy": remedy}


def _package(name: str, least: str) -> dict[str, Any]:
    remedy = f"pip install '{name}>={least}'"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return _finding(name, False, "not installed", remedy)
    return _finding(name, _numbers(installed) >= _numbers(least), installed, remedy)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _device() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return _finding("device", False, f"torch cannot be imported: {error}", "pip install torch")
    from agentmerge.merging.memory import cuda_devices, device_of

    try:
        there = [device_of(f"cuda:{index}") for index in range(cuda_devices())]
    except UserError as error:
        return _finding("device", False, str(error), "see nvidia-smi; or worker.device: cpu")
    if there:
        said = (f"{device.name}, {device.total_bytes / 1e9:.0f} GB" for device in there)
        return _finding("device", True, "; ".join(said))
    return _finding("device", True, f"CPU, {torch.get_num_threads()} threads")


def _memory() -> dict[str, Any]:
    from agentmerge.merging.memory import host_limit

    limit = host_limit()
    return _finding("memory", True, f"{limit.size_bytes / 1e9:.1f} GB {limit.source}")


def _disk(runs_dir: Path) -> dict[str, Any]:
    place = runs_dir if runs_dir.exists() else Path.cwd()
    free = shutil.disk_usage(place).free / 1e9
    return _finding(
        "disk", free > 2, f"{free:.1f} GB free at {place.absolute()}", "free at least 2 GB"
    )


def _database(runs_dir: Path) -> dict[str, Any]:
    path = runs_dir / LEDGER
    if not path.is_file():
        return _finding("results", True, f"none yet in {runs_dir}")
    try:
        with Ledger(path) as ledger:
            return _finding("results", True, f"{len(ledger.runs())} searches in {path}")
    except AgentmergeError as error:
        return _finding("results", False, str(error), f"move {path} away")


def _checkpoints(runs_dir: Path) -> dict[str, Any]:
    path = runs_dir / CHECKPOINTS
    if not path.is_file():
        return _finding("checkpoints", True, f"none yet in {runs_dir}")
    try:
        with readable(path, "NAME"), open_saver(path) as saver:
            return _finding("checkpoints", True, f"{saver.size_bytes() / 1e6:.1f} MB in {path}")
    except AgentmergeError as error:
        return _finding("checkpoints", False, str(error), f"delete {path}: no result is in it")
