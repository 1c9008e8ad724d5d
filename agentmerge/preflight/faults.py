"""How faults are collected and told at once; and those that a config alone shows.

Knows names and files of a config; reads no model and no task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.config import ROLES, SearchConfig
from agentmerge.errors import AgentmergeError, ConfigError, UserError
from agentmerge.methods import METHODS
from agentmerge.recipe.names import short_name
from agentmerge.system.redaction import revealed

#: Benchmarks that are not objectives unless the user insists (LLM-Evo-Merge's and upstream's list).
BENCHMARK_PREFIXES = (
    "mmlu", "hendrycks", "agieval", "gsm8k", "hellaswag", "winogrande", "arc_", "ai2_arc",
    "truthfulqa", "bigbench", "piqa", "openbookqa", "leaderboard",
)  # fmt: skip

#: What the class of a host has (``contracts.worker.Host``).
_HOST = ("apart", "start", "close")


class Faults(list[str]):
    """Sentences in the order in which they were found."""

    @contextmanager
    def of(self, kind: type[AgentmergeError]) -> Iterator[None]:
        """Within: an error of this kind ends the block, and its sentences that nobody has said yet
        are faults."""
        try:
            yield
        except kind as error:
            self += [fault for fault in str(error).splitlines() if fault not in self]

    def tell(self) -> None:
        """
        Raises:
            ConfigError: all of them, where there are any.
        """
        if self:
            raise ConfigError(self)


@dataclass(frozen=True, slots=True)
class Look:
    """What is looked at, how far (see ``prepare.prepare``), and what was found wrong so far.

    kind: the worker's class; None where it cannot be had.
    """

    config: SearchConfig
    kind: Any = None
    faults: Faults = field(default_factory=Faults)
    also: Sequence[str] = ()
    fresh: bool = False
    tasks: bool = False
    weights: bool = False
    run_code: bool = True


def all_faults(error: ConfigError, look: Callable[[SearchConfig], object]) -> list[str]:
    """The faults of a config's text, and those that ``look`` finds in what can be read of it."""
    faults = Faults(error.faults)
    if error.readable is not None:
        with faults.of(ConfigError):
            look(error.readable)
    return faults


def named_faults(config: SearchConfig) -> list[str]:
    """Names of workers, strategies and models' providers that nobody knows; imports nothing heavy,
    so that they are told at once."""
    from agentmerge.agents.providers import refuse_unnamed_key, split_spec

    faults = Faults()
    for group, name in _named_plugins(config):
        with faults.of(UserError):
            plugins.named(group, name)
    for role in ROLES:
        settings = config.agents.settings_for(role)
        if settings.model not in (None, "none"):
            with faults.of(UserError):
                split_spec(str(settings.model), settings.base_url)
                if settings.base_url and settings.api_key_env is None:
                    server = revealed(settings.base_url, "base_url")
                    refuse_unnamed_key(str(settings.model), server)
    return faults


def benchmark_faults(config: SearchConfig) -> list[str]:
    """Published benchmarks among the objectives: a merge tuned on them proves nothing."""
    named = [
        task.name
        for task in config.tasks.tasks
        if task.name.startswith(BENCHMARK_PREFIXES) and not task.name.endswith("_train")
    ]
    return [
        f"tasks: {name!r} is a public benchmark, and a merge tuned on it proves nothing; use a "
        "training split (a name ending in _train), or pass --allow-benchmark-tasks"
        for name in named
    ]


def tokenizer_faults(config: SearchConfig) -> list[str]:
    source = config.genome.tokenizer_source
    known = config.genome.parents
    if source in (None, "union", "base", *known) or Path(str(source)).expanduser().is_dir():
        return []
    return [
        f"genome.tokenizer_source {source!r} is not possible; use union, base, the directory of a "
        f"tokenizer, or one of the models: {', '.join(known)}"
    ]


def _named_plugins(config: SearchConfig) -> tuple[tuple[str, str], ...]:
    return (
        ("agentmerge.strategies", config.algorithm),
        ("agentmerge.workers", config.worker.kind),
        *([("agentmerge.hosts", config.worker.host)] if config.worker.host else []),
        *([("agentmerge.spaces", config.genome.space)] if config.genome.space else []),
        *[
            ("agentmerge.scorers", task.scorer)
            for task in config.tasks.tasks
            if isinstance(task.scorer, str) and not task.scorer_file
        ],
    )


def method_faults(config: SearchConfig) -> list[str]:
    """The config's own merge methods whose code cannot be run, or is not what it declares."""
    faults = Faults()
    for name, own in (config.worker.methods or {}).items():
        from agentmerge.merging.foreign import kernel_of

        with faults.of(UserError):
            kernel_of(METHODS[METHODS.declare(name, own.plain)[0]])
    return faults


def method_notes(config: SearchConfig) -> list[str]:
    """What is said where their code is not run."""
    return [
        f"merge method {name!r} is code of {own.code}, and was not run; check --run-code runs it"
        for name, own in (config.worker.methods or {}).items()
    ]


def host_faults(config: SearchConfig) -> list[str]:
    """A host that is none; one whose workers share the search's memory has one, and no way to end
    it."""
    worker, faults = config.worker, Faults()
    if worker.host is not None:
        with faults.of(UserError):
            host = plugins.load("agentmerge.hosts", worker.host)
            if lacking := [name for name in _HOST if not hasattr(host, name)]:
                point = plugins.named("agentmerge.hosts", worker.host)
                return [
                    f"worker.host {worker.host!r} ({point.value}) has no {', '.join(lacking)}: a "
                    f"host is a class with {', '.join(_HOST)}; mend it, or name another"
                ]
            faults += getattr(host, "faults", lambda settings: [])(worker)
            if not host.apart:
                for key, value in (("count", worker.count), ("timeout_s", worker.timeout_s)):
                    if value not in (None, 1, "auto"):  # auto is one there
                        faults.append(
                            f"worker.{key} {value} is not possible with worker.host "
                            f"{worker.host!r}, where one worker lives that nothing can end; "
                            "use process"
                        )
    return faults


def pool_faults(config: SearchConfig) -> list[str]:
    """What speaks against choosing among the models."""
    genome = config.genome
    if genome.pool is None:
        return []
    found, most = [], genome.pool.most
    if len(genome.experts) <= most:
        found.append(
            f"genome.pool.most is {most}, and there are {len(genome.experts)} experts: nothing is "
            "to be chosen, so leave genome.pool out"
        )
    alone = len(genome.parents)
    if config.budget.max_evaluations <= alone:
        found.append(
            f"budget.max_evaluations {config.budget.max_evaluations} pays for no merge: of a pool, "
            f"each of the {alone} models is asked by itself first"
        )
    short = [short_name(model) for model in genome.experts]
    bad = {n for n in short if short.count(n) > 1 or ", " in n or " -> " in n or n != n.strip()}
    if bad:
        found.append(
            "of a pool, each expert needs a last name of its own, without ', ' or ' -> ', by which "
            f"it is chosen: {', '.join(map(repr, sorted(bad)))}; rename or link the folders"
        )
    if config.search.shadow:
        found.append("search.shadow is not possible with genome.pool; remove one of them")
    return found


def window_faults(config: SearchConfig) -> list[str]:
    """Of agents, what cannot be beside a window in which workers never wait."""
    agents = config.agents
    window = config.search.lag and not waits_for_all(config)
    asked = {"probes": agents.probes, "ahead": agents.ahead} if window else {}
    return [
        f"agents.{name} {value} is not possible with search.lag {config.search.lag}: workers have "
        "candidates of the window while models think; leave one of them out"
        for name, value in asked.items()
        if value
    ]


def window_notes(config: SearchConfig) -> list[str]:
    """Where there is no window although one is asked for."""
    why = waits_for_all(config)
    if not config.search.lag or not why:
        return []
    return [f"search.lag {config.search.lag} opens no window: {why}; it is as if it were left out"]


def waits_for_all(config: SearchConfig) -> str:
    """Why a search knows whole generations only, or ""."""
    with suppress(UserError):
        strategy = plugins.load("agentmerge.strategies", config.algorithm)
        if getattr(strategy, "needs_all", False):
            return f"{config.algorithm} learns from whole generations"
    return "search.shadow compares whole generations" if config.search.shadow else ""


def device_faults(config: SearchConfig) -> list[str]:
    device = config.worker.device
    if device is None or device == "cpu":
        return []
    import torch

    from agentmerge.merging.memory import cuda_devices

    try:
        wanted = torch.device(device)
    except RuntimeError:
        return [f"worker.device {device!r} is not a device; use cpu or cuda"]
    if wanted.index is not None and _places(config):
        return [
            f"worker.device {device!r} is not possible with worker.host {config.worker.host!r}, "
            "which gives each worker devices of its own; use cuda"
        ]
    there = cuda_devices()
    if wanted.type == "cuda" and (wanted.index or 0) >= there:
        other = f"one of the {there} that are (cuda:0, ...)" if there else "cpu"
        return [f"worker.device {device!r} is not on this machine; use {other}"]
    return []


def _places(config: SearchConfig) -> bool:
    """Whether the config's host shares out devices itself."""
    with suppress(UserError):
        host = config.worker.host
        return host is not None and getattr(plugins.load("agentmerge.hosts", host), "places", False)
    return False


def plugin_faults(config: SearchConfig) -> list[str]:
    """Workers and strategies that nobody knows, or that cannot be imported."""
    faults = Faults()
    for group, name in _named_plugins(config):
        with faults.of(UserError):
            plugins.load(group, name)
    return faults
