"""Options of mergekit-evolve and LLM-Evo-Merge: mapped, noticed or refused.

Their command lines work after the program's name. Knows what each option meant there and which of
ours it is; knows nothing of how a search runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from agentmerge.cli.options import expanded
from agentmerge.errors import UserError


@dataclass(frozen=True)
class Legacy:
    """The old programs' options as typer shows them and as given; None where one was not."""

    storage_path: Annotated[
        Path | None, typer.Option(help="Also write best_config.yaml and final_model here.")
    ] = None
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", "-s", help="pool, buffered or serial: where candidates are."),
    ] = None
    vllm: bool | None = None
    in_memory: bool | None = None
    num_gpus: Annotated[int | None, typer.Option(min=1)] = None
    merge_cuda: bool | None = None
    allow_crimes: bool | None = None
    random_seed: int | None = None
    max_generation: int | None = None
    max_fevals: int | None = None
    max_retries: int | None = None
    api_key: Annotated[str | None, typer.Option(help="Refused: use OPENAI_API_KEY.")] = None
    llm_model: str | None = None
    sigma0: float | None = None
    save_final_model: bool | None = None
    reshard: bool | None = None
    force_population_size: int | None = None
    load_in_8bit: bool | None = None
    load_in_4bit: bool | None = None


def old_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replaces a command's parameter ``old`` by the old programs' options."""
    shown = get_type_hints(Legacy, include_extras=True)
    return expanded(command, "old", shown, lambda used: Legacy(**used))


@dataclass
class Mapped:
    """overrides: dotted config keys. notices: one line each for what no longer means anything."""

    overrides: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def map_options(old: Legacy) -> Mapped:
    """Ours for theirs.

    Raises:
        UserError: an option that must not be honoured (a key on the command line, quantised
            evaluation).
    """
    if old.api_key is not None:
        raise UserError(
            "--api-key would leave the key in your shell history and process list; export "
            "OPENAI_API_KEY=... instead (and OPENAI_BASE_URL for another server)"
        )
    for bits, given in ((8, old.load_in_8bit), (4, old.load_in_4bit)):
        if given:
            raise UserError(
                f"--load-in-{bits}bit scores a quantised copy that is not the merge you get; "
                "leave it out, or lower --batch-size if memory is short"
            )
    if old.strategy is not None and old.strategy not in ("pool", "buffered", "serial"):
        raise UserError(
            f"--strategy {old.strategy!r} must be pool, buffered or serial (how evaluations are "
            "scheduled); the search algorithm is --search"
        )
    out = Mapped()
    renamed = {
        "search.seed": old.random_seed,
        "search.max_generations": old.max_generation,
        "budget.max_evaluations": old.max_fevals,
        "agents.max_retries": old.max_retries,
        "search.sigma0": old.sigma0,
        "search.population": old.force_population_size,
        "worker.count": old.num_gpus,
        "worker.buffered": True if old.strategy == "buffered" else None,
        "agents.llm": _llm(old.llm_model),
    }
    out.overrides = {key: value for key, value in renamed.items() if value is not None}
    if old.in_memory is False:
        out.overrides["worker.kind"] = "disk"
        if old.vllm:
            out.overrides["worker.options"] = {"evaluate_with": "vllm"}
    elif old.vllm:
        out.overrides["worker.kind"] = "vllm"
    if old.storage_path is not None and old.llm_model is None:
        out.notices.append(
            "no --llm-model: rules advise the search (LLM-Evo-Merge asked gpt-4o by default)"
        )
    if old.strategy == "serial" and find_spec("ray"):
        out.overrides["worker.host"] = "ray_serial"
    elif old.strategy == "serial":
        out.notices.append(
            "--strategy serial: workers keep their devices without Ray; "
            "pip install 'agentmerge[ray]' for a placement group a candidate"
        )
    if old.merge_cuda is not None:
        switch = "--merge-cuda" if old.merge_cuda else "--no-merge-cuda"
        out.notices.append(f"{switch}: the merge runs where the model is scored")
    if old.reshard is not None:
        switch = "--reshard" if old.reshard else "--no-reshard"
        out.notices.append(f"{switch}: parents stay resident, so nothing is resharded")
    if old.allow_crimes:
        out.notices.append(
            "--allow-crimes: architectures cannot be mixed; the models are checked as ever"
        )
    return out


def _llm(name: str | None) -> str | None:
    if name is None or ":" in name or name == "none":
        return name
    return f"openai:{name}"
