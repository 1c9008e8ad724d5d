"""The options of the commands, each written once, and the config keys that they set.

A command that takes settings has one parameter ``given`` and is wrapped in ``settings(...)``: typer
then shows the named options, and the command gets those that were used, under their config keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from agentmerge import plugins
from agentmerge.errors import AgentmergeError


def searches(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of searches, for the shell to complete; none where there is nothing to read."""
    from agentmerge.ledger import Ledger
    from agentmerge.ledger.folder import LEDGER

    path = Path(ctx.params.get("runs_dir") or "runs") / LEDGER
    try:
        with Ledger(path, read_only=True) as ledger:
            return [row.name for row in ledger.runs() if row.name.startswith(incomplete)]
    except AgentmergeError:
        return []


def _plugins(group: str) -> Callable[[str], list[str]]:
    """Names of a group's plugins, for the shell to complete."""

    def names(incomplete: str) -> list[str]:
        return [name for name in plugins.known(group) if name.startswith(incomplete)]

    return names


Search = Annotated[str, typer.Argument(help="A search's name.", autocompletion=searches)]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Where searches and results live.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Ui = Annotated[
    bool, typer.Option("--ui", help="Serve the live page on this machine until the search ends.")
]
AllowBench = Annotated[
    bool,
    typer.Option(
        "--allow-benchmark-tasks/--no-allow-benchmark-tasks",
        "--i-understand-the-depths-of-the-evils-i-am-unleashing"
        "/--no-i-understand-the-depths-of-the-evils-i-am-unleashing",
        help="Allow public benchmarks as objectives.",
    ),
]
RunCode = Annotated[
    bool,
    typer.Option(
        "--run-code",
        help="Also run the code that the config names (graph files, tasks' and models' own).",
    ),
]
Wandb = Annotated[bool, typer.Option("--wandb/--no-wandb", help="The same as --tracker wandb.")]
Trackers = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        help="Log to wandb, mlflow or a plugin; repeatable.",
        autocompletion=_plugins("agentmerge.trackers"),
    ),
]
WandbProject = Annotated[str | None, typer.Option("--wandb-project")]
WandbEntity = Annotated[str | None, typer.Option("--wandb-entity")]

#: Option -> the config key that it sets, its type, its help, and whose names it completes.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "search": ("search.algorithm", str, "How to search: auto, unless a strategy is named "
               "(docs/search.md).", "agentmerge.strategies"),
    "worker": ("worker.kind", str, "hf, vllm, disk or fake.", "agentmerge.workers"),
    "workers": ("worker.count", str, "How many, or auto: as many as there are devices."),
    "worker_host": ("worker.host", str, "Where workers live: here, process, ray or a plugin's.",
                    "agentmerge.hosts"),
    "llm": ("agents.llm", str, '"none" or provider:model.'),
    "base_url": ("agents.base_url", str, "A server for --llm's model."),
    "api_key_env": ("agents.api_key_env", str, "The variable whose key a server may have (none: it "
                    "needs no key)."),
    "prompts": ("agents.prompts", Path, "Folder of prompts to override."),
    "graph": ("search.graph", str, "Graph name or path.py:build."),
    "seed": ("search.seed", int, "All randomness derives from it."),
    "max_generations": ("search.max_generations", int),
    "max_evaluations": ("budget.max_evaluations", int, "Distinct merges to score, seeds included."),
    "timeout": ("budget.timeout_s", float, "Seconds of wall clock."),
    "worker_timeout": ("worker.timeout_s", float, "Seconds that one candidate may take."),
    "max_items": ("budget.max_items", int, "Items to ask, agents' tries and sealed ones too."),
    "max_tokens": ("budget.max_tokens", int, "Tokens of all models."),
    "max_cost": ("budget.max_cost_usd", float, "US dollars for the models."),
    "probes": ("agents.probes", int, "Tool calls of critic and proposer, a generation."),
    "shadow": ("search.shadow", float, "Share of the budget for an arm that hears no model."),
    "structure": ("search.structure", str, "Other search spaces: fixed (none), advised (a model's) "
                  "or free (finer ones)."),
    "layers": ("genome.layers", int, "Search over layers too, with at most so many more than the "
               "models have (docs/search.md)."),
    "approve": ("search.approve", bool, "Ask before another search space."),
    "population": ("search.population", int, "Candidates a generation."),
    "sigma_low": ("search.sigma_low", float),
    "sigma_high": ("search.sigma_high", float),
    "init": ("search.init", list[Path], "A recipe to start from; repeatable."),
    "task_search_path": ("task_search_path", list[Path], "Folder of lm-eval task files; "
                         "repeatable."),
    "batch_size": ("worker.batch_size", int),
    "limit": ("limit", int, "Search items a task."),
    "trust_remote_code": ("worker.trust_remote_code", bool),
}  # fmt: skip


def _shown(name: str, kind: Any, text: str | None = None, group: str | None = None) -> Any:
    """What typer shows of an option that may be left out."""
    flag = name.replace("_", "-")
    names = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    completed = _plugins(group) if group else None
    return Annotated[kind | None, typer.Option(names, help=text, autocompletion=completed)]


#: What ``resume`` may raise, what ``branch`` may change, and what a new search may say.
LIMITS = (
    "max_generations", "max_evaluations", "max_items", "timeout", "worker_timeout", "max_tokens",
    "max_cost",
)  # fmt: skip
BRANCH = (
    "search", "worker", "workers", "worker_host", "llm", "base_url", "api_key_env", "prompts",
    "graph", "probes", "seed",
    *LIMITS,
    "population", "shadow", "structure", "layers", "approve", "sigma_low", "sigma_high",
    "task_search_path", "batch_size", "limit", "trust_remote_code",
)  # fmt: skip
RUN = (*BRANCH, "init")


def limits() -> dict[str, str]:
    """Options of limits, as they are typed after ``--``, and the config keys that they set."""
    return {name.replace("_", "-"): _SETTINGS[name][0] for name in LIMITS}


def settings(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Replaces a command's parameter ``given`` by these options, each of a config key."""
    options = {name: _shown(name, *_SETTINGS[name][1:]) for name in names}
    return lambda command: expanded(command, "given", options, overrides)


def expanded(
    command: Callable[..., int],
    parameter: str,
    options: Mapping[str, Any],
    collect: Callable[[dict[str, Any]], Any],
) -> Callable[..., int]:
    """The command with many options in place of one parameter, which is made of them.

    options: name -> annotation for typer; each is None where it is not used.
    """
    hints = get_type_hints(command, include_extras=True)

    @wraps(command)
    def called(**values: Any) -> int:
        used = {name: values.pop(name) for name in options}
        return command(**{parameter: collect(used)}, **values)

    shown: list[inspect.Parameter] = []
    for name, own in inspect.signature(command).parameters.items():
        if name == parameter:
            shown += [
                own.replace(name=option, default=None, annotation=annotation)
                for option, annotation in options.items()
            ]
        else:
            shown.append(own.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))
    called.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in shown} | {"return": int}
    return called


def overrides(used: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given, under the config keys they set; paths are absolute."""
    found: dict[str, Any] = {}
    for name, value in used.items():
        if value is None:
            continue
        if isinstance(value, list):
            value = [str(Path(item).absolute()) for item in value]
        elif isinstance(value, Path):
            value = str(value.absolute())
        found[_SETTINGS[name][0]] = value
    return found
