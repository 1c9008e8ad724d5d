"""Preflight: every fault at once, and the plan, from configs, headers and task definitions alone.

Reads no weights. ``prepare`` resolves what a search needs before its worker starts; ``check``
also says what it would cost. Knows no search state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.config import SearchConfig
from agentmerge.errors import AgentmergeError, ConfigError, ParentError, UserError
from agentmerge.evaluation.tasks import TaskSet, tasks_for
from agentmerge.genome import SearchSpace
from agentmerge.ledger import Ledger
from agentmerge.recipe import Recipe
from agentmerge.workers.base import WorkerSpec
from agentmerge.workers.pool import worker_class

#: Benchmarks that are not objectives unless the user insists (LLM-Evo-Merge's and upstream's list).
BENCHMARK_PREFIXES = (
    "mmlu", "hendrycks", "agieval", "gsm8k", "hellaswag", "winogrande", "arc_", "ai2_arc",
    "truthfulqa", "bigbench", "piqa", "openbookqa", "leaderboard",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A config on real models: what a search needs before a worker starts.

    identities: model name -> content fingerprint. check: raises RecipeRejected for a recipe that
    these models cannot make. ``parent_bytes``: all parents resident.
    """

    config: SearchConfig
    spec: WorkerSpec
    space: SearchSpace
    taskset: TaskSet
    identities: Mapping[str, str]
    check: Callable[[Recipe], object] = field(repr=False)
    parent_bytes: int = 0
    model_bytes: int = 0

    @property
    def paths(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self.spec.parents}

    def facts(self) -> dict[str, Any]:
        """What decides answers besides the config; compared on resume."""
        return {
            "identities": dict(self.identities),
            "protocols": {task.name: task.protocol_hash for task in self.taskset.tasks},
            "items": {
                task.name: {
                    "search": len(task.search),
                    "sealed": len(task.sealed),
                    "search_hash": _items_hash(task.part("search")),
                    "sealed_hash": _items_hash(task.part("sealed")),
                }
                for task in self.taskset.tasks
            },
            "num_layers": self.space.num_layers,
            "dtype": self.space.dtype,
            "notes": list(self.taskset.notes),
            "engine": asdict(worker_class(self.spec).describe(self.spec)),
        }


@dataclass(frozen=True)
class Plan:
    """What a search would do, for people and for ``check --json``."""

    dimensions: int
    freedoms: int
    algorithm: str
    population: int
    max_evaluations: int
    items: int
    sealed_items: int
    memory_bytes: int
    seconds_per_candidate: float | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def prepare(
    config: SearchConfig, *, allow_benchmarks: bool = False, also: Sequence[str] = ()
) -> Prepared:
    """Resolve models, tasks, strategy and worker.

    also: models beside the genome's that recipes may name.

    Raises:
        ConfigError: every fault found, one sentence each.
    """
    faults = [] if allow_benchmarks else benchmark_faults(config)
    faults += _tokenizer_faults(config) + init_faults(config)
    for group, name in (
        ("agentmerge.strategies", config.algorithm),
        ("agentmerge.workers", config.worker.kind),
    ):
        try:
            plugins.load(group, name)
        except UserError as error:
            faults.append(str(error))
    if config.worker.kind == "fake":
        return _prepare_fake(config, faults)
    paths, layout = _parents(config, also, faults)
    space = None
    if layout is not None:
        try:
            space = SearchSpace(
                config.genome,
                layout.num_layers,
                config.worker.dtype or layout.dtype,
                merge_seed=config.search.seed,
            )
        except ConfigError as error:
            faults += error.faults
    taskset, spec = None, None
    if paths:
        spec = _spec(config, paths, config.worker.dtype or (layout.dtype if layout else "float32"))
        try:
            taskset = tasks_for(spec)
        except AgentmergeError as error:
            faults += str(error).splitlines()
    if faults or layout is None or space is None or taskset is None or spec is None:
        raise ConfigError(faults)
    from agentmerge.merging.headers import content_fingerprint
    from agentmerge.merging.plan import plan

    size = layout_bytes(layout, space.dtype)
    return Prepared(
        config,
        spec,
        space,
        taskset,
        {name: content_fingerprint(path) for name, path in paths.items()},
        lambda recipe: plan(recipe, layout),
        parent_bytes=layout_bytes(layout, layout.dtype) * len(paths),
        model_bytes=size,
    )


def anchored(config: SearchConfig) -> SearchConfig:
    """The config with local folders and files absolute, so that it means the same from anywhere.

    mergekit, too, takes a relative ``a/b`` for a hub id; hub ids stay as they are.
    """

    def absolute(name: str) -> str:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() and not path.is_absolute() else name

    genome = config.genome
    base, source = genome.base_model, genome.tokenizer_source
    return config.model_copy(
        update={
            "genome": genome.model_copy(
                update={
                    "models": tuple(absolute(model) for model in genome.models),
                    "base_model": base and absolute(base),
                    "tokenizer_source": source
                    if source in (None, "union", "base")
                    else absolute(source),
                }
            ),
            "tasks": config.tasks.model_copy(
                update={"task_search_path": tuple(map(absolute, config.tasks.task_search_path))}
            ),
            "search": config.search.model_copy(
                update={"init": tuple(map(absolute, config.search.init))}
            ),
        }
    )


def plan_of(prepared: Prepared, ledger: Ledger | None, settings_hash: str) -> Plan:
    """The plan of a prepared search; time only where this ledger has run the same settings."""
    config = prepared.config
    strategy = plugins.load("agentmerge.strategies", config.algorithm)
    tasks = prepared.taskset
    return Plan(
        dimensions=prepared.space.dimensions,
        freedoms=prepared.space.freedoms,
        algorithm=config.algorithm,
        population=config.search.population or strategy.population(prepared.space.dimensions),
        max_evaluations=config.budget.max_evaluations,
        items=len(tasks.refs("search")),
        sealed_items=len(tasks.refs("sealed")),
        memory_bytes=prepared.parent_bytes + 2 * prepared.model_bytes,
        seconds_per_candidate=(
            None if ledger is None else ledger.seconds_per_candidate(settings_hash)
        ),
        warnings=config.warnings,
        notes=tuple(tasks.notes),
    )


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


def _tokenizer_faults(config: SearchConfig) -> list[str]:
    """Parents share one vocabulary here, so a source only says whose tokenizer is kept."""
    source = config.genome.tokenizer_source
    known = [
        *config.genome.models,
        *([config.genome.base_model] if config.genome.base_model else []),
    ]
    if source in (None, "union", "base", *known):
        return []
    return [
        f"genome.tokenizer_source {source!r} is not possible; use union, base, or one of the "
        f"models: {', '.join(known)}"
    ]


def init_faults(config: SearchConfig) -> list[str]:
    """Warm-start recipes that cannot be read, or that name other models."""
    known = {*config.genome.models, config.genome.base_model}
    faults = []
    for path in config.search.init:
        try:
            recipe = Recipe.parse(Path(path))
        except UserError as error:
            faults.append(f"--init {path}: {error}")
            continue
        strangers = sorted(set(recipe.models) - known)
        if strangers:
            faults.append(
                f"--init {path}: names {strangers}, which the genome does not; a warm start may "
                f"only use {sorted(str(k) for k in known if k)}"
            )
    return faults


def layout_bytes(layout: Any, dtype: str) -> int:
    width = {"float32": 4, "float64": 8}.get(dtype, 2)
    total = 0
    for tensor in layout.tensors:
        count = 1
        for side in tensor.shape:
            count *= side
        total += count * width
    return total


def _parents(
    config: SearchConfig, also: Sequence[str], faults: list[str]
) -> tuple[dict[str, Path], Any]:
    from agentmerge.merging.headers import resolve_model
    from agentmerge.merging.layout import read_layout

    names = list(config.genome.models)
    if config.genome.base_model and config.genome.base_model not in names:
        names.append(config.genome.base_model)
    names += [name for name in also if name not in names]
    paths: dict[str, Path] = {}
    for name in names:
        try:
            paths[name] = resolve_model(name, trust_remote_code=config.worker.trust_remote_code)
        except ParentError as error:
            faults.append(str(error))
    if len(paths) < len(names):
        return {}, None
    try:
        return paths, read_layout(paths, config.genome.base_model)
    except ParentError as error:
        faults += str(error).splitlines()
        return paths, None


def _spec(
    config: SearchConfig, paths: Mapping[str, Path], dtype: str, device: str | None = None
) -> WorkerSpec:
    return WorkerSpec(
        kind=config.worker.kind,
        parents=tuple((name, str(path)) for name, path in paths.items()),
        template_model=_template_model(config, paths),
        tasks=config.tasks,
        dtype=dtype,
        batch_size=config.worker.batch_size,
        device=device or config.worker.device or _device(),
        trust_remote_code=config.worker.trust_remote_code,
        options={"base": config.genome.base_model} | config.worker.options,
    )


def _template_model(config: SearchConfig, paths: Mapping[str, Path]) -> str:
    """Whose tokenizer asks: ``tokenizer_source`` where it names a parent, else the first expert
    that has a chat template, else the base, else the first expert."""
    source = config.genome.tokenizer_source
    if source == "base":
        source = config.genome.base_model
    if source in paths:
        return str(source)
    names = list(config.genome.models)
    if config.genome.base_model and config.genome.base_model not in names:
        names.append(config.genome.base_model)
    if config.tasks.apply_chat_template:
        for name in names:
            if has_chat_template(paths[name]):
                return name
    return names[0]


def has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    try:
        settings = json.loads((path / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(settings.get("chat_template"))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _prepare_fake(config: SearchConfig, faults: list[str]) -> Prepared:
    """A search on FakeWorker: no model is read, so the depth is an option of the worker."""
    if faults:
        raise ConfigError(faults)
    from agentmerge.workers.fake import FakeWorker

    names = list(config.genome.models)
    if config.genome.base_model and config.genome.base_model not in names:
        names.append(config.genome.base_model)
    depth = int(config.worker.options.get("num_layers", 4))
    spec = _spec(config, {name: Path(name) for name in names}, "float32", device="cpu")
    return Prepared(
        config,
        spec,
        SearchSpace(config.genome, depth, "float32", config.search.seed),
        FakeWorker.tasks(spec),
        {name: f"fake:{name}" for name in names},
        lambda recipe: recipe.effective("model.layers.0.weight", 0),
    )


def _items_hash(items: Any) -> str:
    from hashlib import sha256

    return sha256("".join(item.key for item in items).encode()).hexdigest()[:16]
