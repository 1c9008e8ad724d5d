"""Preflight: every fault at once, and the plan, from configs, headers and task definitions alone.

Reads no weights. ``prepare`` resolves what a search needs before its worker starts; ``check``
also says what it would cost. Knows no search state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge import plugins
from agentmerge.config import FIRST, ROLES, SearchConfig
from agentmerge.contracts.worker import EngineInfo, WorkerSpec
from agentmerge.errors import (
    AgentmergeError,
    ConfigError,
    ParentError,
    RecipeRejected,
    UserError,
)
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.splitting import unsealed
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.ledger import Ledger
from agentmerge.recipe import Recipe
from agentmerge.recipe.cancelling import cancelling_notes
from agentmerge.space.grouped import SearchSpace
from agentmerge.system.bounded import read_text
from agentmerge.system.redaction import redacted, revealed
from agentmerge.system.temporary import temporary_folder
from agentmerge.system.waits import waiting_for
from agentmerge.workers.options import given, option_faults
from agentmerge.workers.pool import crowd_of, devices_for, worker_class

if TYPE_CHECKING:  # both are read only where models are
    from agentmerge.merging.placement import MemoryPlan
    from agentmerge.parents.layout import Layout

#: Benchmarks that are not objectives unless the user insists (LLM-Evo-Merge's and upstream's list).
BENCHMARK_PREFIXES = (
    "mmlu", "hendrycks", "agieval", "gsm8k", "hellaswag", "winogrande", "arc_", "ai2_arc",
    "truthfulqa", "bigbench", "piqa", "openbookqa", "leaderboard",
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A config on real models: what a search needs before a worker starts.

    identities: model name -> content fingerprint. check: raises RecipeRejected for a recipe that
    these models cannot make. engine, conditions: what answers depend on besides weights and
    questions, as the worker describes it. memory: None where no model is read. made_bytes: on disk,
    of the parents that are no plain checkpoints as they are. notes: what to know of the parents.
    warnings: what in the config or a warm start is most likely a mistake; it goes with the results.
    searched: keys of items that would be sealed, had an earlier search not seen them.
    """

    config: SearchConfig
    spec: WorkerSpec
    space: SearchSpace
    taskset: TaskSet
    identities: Mapping[str, str]
    check: Callable[[Recipe], object] = field(repr=False)
    engine: EngineInfo
    conditions: Mapping[str, Any] = field(default_factory=dict)
    memory: MemoryPlan | None = None
    made_bytes: int = 0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()

    @property
    def paths(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in self.spec.parents}

    def without(self, searched: Collection[str]) -> Prepared:
        """The same, none of these items (by key) sealed: an earlier search saw them."""
        sealed = {ref.key for ref in self.taskset.refs("sealed")}
        found = sealed.intersection(searched)
        taskset = unsealed(self.taskset, found)
        return replace(self, taskset=taskset, searched=(*self.searched, *sorted(found)))

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
            "notes": redacted([*self.notes, *self.taskset.notes]),
            "searched": list(self.searched),
            "objectives": [
                {
                    "name": o.name,
                    "signed_weight": o.signed_weight,
                    "higher_is_better": o.higher_is_better,
                    "leaves": list(o.leaves),
                    "by_size": o.by_size,
                    "mean": self.taskset.is_mean(o),
                    "rebuild": [self.taskset.task(n).rebuild for n in o.leaves],
                    "item_sign": [self.taskset.item_sign(self.taskset.task(n)) for n in o.leaves],
                }
                for o in self.taskset.objectives
            ],
            "engine": asdict(self.engine),
            "conditions": redacted(dict(self.conditions), shapes=False),
        }


@dataclass(frozen=True)
class Plan:
    """What a search would do, for people and for ``check --json``.

    live_model: the parent whose config and tokenizer every merge has; "" on the fake worker.
    chat_template: whose template asks; "" where none does.
    """

    dimensions: int
    freedoms: int
    algorithm: str
    population: int
    max_evaluations: int
    items: int
    sealed_items: int
    live_model: str
    chat_template: str
    memory: MemoryPlan | None
    made_bytes: int
    seconds_per_candidate: float | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": self.memory and self.memory.to_dict()}


def prepare(
    config: SearchConfig,
    *,
    allow_benchmarks: bool = False,
    also: Sequence[str] = (),
    fresh: bool = False,
    tasks: bool = True,
    weights: bool = True,
    run_code: bool = True,
    known_faults: Sequence[str] = (),
) -> Prepared:
    """Resolve models, tasks, strategy and worker.

    also: models beside the genome's that recipes may name. fresh: a search begins, so its warm
    starts are looked at too. tasks: leave them out where nothing is scored. weights: False for a
    look at the plan alone: no weight is read, no parent made, nothing can be run. run_code: False,
    beside weights=False, runs no code that the config names; what is not looked at is a note.
    known_faults: what the caller found wrong already, told with the rest.

    Raises:
        ConfigError: every fault found, one sentence each.
    """
    faults = [*known_faults, *([] if allow_benchmarks else benchmark_faults(config))]
    faults += _tokenizer_faults(config) + _plugin_faults(config)
    faults += init_faults(config) if fresh else []
    misread, readable = option_faults(config.worker, config.genome.parents)
    faults += misread
    spoiled: dict[str, Any] = {**readable}
    if devices := _device_faults(config):
        faults += devices
        spoiled["device"] = "cpu"
    if spoiled:  # goes, for the rest of the faults
        config = config.model_copy(update={"worker": config.worker.model_copy(update=spoiled)})
    with waiting_for("a look at models and tasks"):
        if config.worker.kind == "fake":
            prepared = _prepare_fake(config, fresh, faults)
        else:
            prepared = _prepare_real(config, also, tasks, weights, run_code, fresh, faults)
    warm = init_notes(config, prepared.space.num_layers) if fresh else []
    named = [] if run_code else _graph_notes(config)
    return replace(prepared, warnings=(*config.warnings, *warm), notes=(*prepared.notes, *named))


def _graph_notes(config: SearchConfig) -> list[str]:
    graph = config.search.graph
    if not graph.partition(":")[0].endswith(".py") and "/" not in graph:
        return []
    return [f"search.graph {graph!r} is code, and was not run; check --run-code runs it"]


def _own_code(parents: Sequence[Any]) -> list[str]:
    """Models whose config or tokenizer is made by Python of their own."""
    from agentmerge.parents.headers import read_json

    names = []
    for parent in parents:
        for file in ("config.json", "tokenizer_config.json"):
            with suppress(ParentError):  # a fault, said as such
                if "auto_map" in read_json(parent.model / file):
                    names.append(parent.name)
    return list(dict.fromkeys(names))


def all_faults(error: ConfigError, look: Callable[[SearchConfig], object]) -> list[str]:
    """The faults of a config's text, and those that ``look`` finds in what can be read of it."""
    faults = list(error.faults)
    if error.readable is not None:
        try:
            look(error.readable)
        except ConfigError as more:
            faults += [fault for fault in more.faults if fault not in faults]
    return faults


def named_faults(config: SearchConfig) -> list[str]:
    """Names of workers, strategies and models' providers that nobody knows; imports nothing heavy,
    so that they are told at once."""
    from agentmerge.agents.providers import refuse_unnamed_key, split_spec

    faults = []
    for group, name in _named_plugins(config):
        try:
            plugins.named(group, name)
        except UserError as error:
            faults.append(str(error))
    for role in ROLES:
        settings = config.agents.settings_for(role)
        if settings.model not in (None, "none"):
            try:
                split_spec(str(settings.model), settings.base_url)
                if settings.base_url and settings.api_key_env is None:
                    server = revealed(settings.base_url, "base_url")
                    refuse_unnamed_key(str(settings.model), server)
            except UserError as error:
                faults.append(str(error))
    return list(dict.fromkeys(faults))


def _prepare_real(
    config: SearchConfig,
    also: Sequence[str],
    tasks: bool,
    weights: bool,
    run_code: bool,
    fresh: bool,
    faults: list[str],
) -> Prepared:
    from agentmerge.merging.plan import plan, read_layout
    from agentmerge.parents.headers import content_fingerprint, stamps_of
    from agentmerge.parents.plain import known_identities, make_plain

    notes: list[str] = []
    with temporary_folder("agentmerge-check") as scratch:
        found, survey, layout, foreign = _parents(config, also, faults, run_code, tasks)
        if foreign:
            tasks = False
            notes.append(
                f"{', '.join(map(repr, foreign))}: its tokenizer and the tasks are not looked at, "
                "since worker.trust_remote_code runs the model's own code; check --run-code does"
            )
        space = None
        if layout is not None:
            faults += _filter_faults(config, layout)
            try:
                space = SearchSpace(
                    config.genome,
                    layout.num_layers,
                    config.worker.dtype or layout.dtype,
                    merge_seed=config.search.seed,
                )
                faults += _depth_faults(config, space) if fresh else []
            except ConfigError as error:
                faults += error.faults
        taskset, spec, memory = TaskSet((), ()), None, None
        dtype = config.worker.dtype or (layout.dtype if layout else "float32")
        if found:
            paths = {parent.name: parent.model for parent in found}
            for index, parent in enumerate(found):
                if parent.name in survey.made_bytes:
                    paths[parent.name] = scratch / str(index)
                    paths[parent.name].mkdir()
                    survey.write_side_files(parent, paths[parent.name])
            spec = _spec(config, paths, dtype)
            if tasks:
                taskset = _tasks(spec, faults, run_code)
                if differing := _differing_templates(config, spec, taskset):
                    names = f"{', '.join(map(repr, differing))} have different chat templates"
                    if config.tasks.chat_template == FIRST:
                        notes.append(
                            f"{names}, and {spec.template_model!r} is the first; {_CHOOSE}"
                        )
                    else:
                        faults.append(
                            f"chat_template is missing: {names}, and the tasks are asked through "
                            f"one; {_CHOOSE}"
                        )
                if fresh or weights:  # else nothing will run: the model's class is not needed
                    notes += _preflight(spec, layout, faults)
            if layout is not None:
                memory = _memory(config, spec, layout)
                faults += [memory.reason] if tasks and memory.chosen is None else []
        if faults or layout is None or space is None or spec is None:
            raise ConfigError(faults)
        if not weights:
            conditions: dict[str, Any] = {}
            if foreign:
                parts = (spec.kind, "", spec.device, spec.dtype, str(spec.batch_size))
                engine = EngineInfo(*parts)
            else:
                engine, conditions = _engine_of(spec)  # before its scratch folders go
    if not weights:
        identities = known_identities(found)
    else:  # nothing speaks against it
        base = _base_among(config, {parent.name for parent in found})
        paths = make_plain(
            found,
            base,
            config.genome.tokenizer_source,
            trust_remote_code=config.worker.trust_remote_code,
        )
        spec = _spec(config, paths, dtype)
        layout = read_layout(paths, _base_among(config, paths))
        # Before the contents are looked at: a change after this line is noticed by the workers.
        spec = replace(spec, stamps=tuple(s for path in paths.values() for s in stamps_of(path)))
        identities = {name: content_fingerprint(path) for name, path in paths.items()}
        if faults := _twin_faults(identities):
            raise ConfigError(faults)
        engine, conditions = _engine_of(spec)
    return Prepared(
        config,
        replace(spec, placement=memory.chosen or "auto") if memory else spec,
        space,
        taskset,
        identities,
        lambda recipe: plan(recipe, layout),
        engine,
        conditions,
        memory=memory,
        made_bytes=sum(survey.made_bytes.values()),
        notes=(*survey.notes, *notes),
    )


def _engine_of(spec: WorkerSpec) -> tuple[EngineInfo, dict[str, Any]]:
    """What the spec's worker is, and the conditions that it answers under, where it has any."""
    kind = worker_class(spec)
    known = getattr(kind, "conditions", None)
    return kind.describe(spec), known(spec) if known else {}


def _memory(config: SearchConfig, spec: WorkerSpec, layout: Layout) -> MemoryPlan:
    """Where the parents are kept, decided once for all workers: each alone would see what the
    others have not taken yet."""
    from agentmerge.merging.placement import (
        Demand,
        bytes_per_token,
        gradient_bytes_per_token,
        plan_memory,
    )
    from agentmerge.parents.headers import read_config, text_config

    demand = getattr(worker_class(spec), "demand", None)
    text = text_config(read_config(Path(dict(spec.parents)[spec.template_model])))
    has_gradient = hasattr(worker_class(spec), "gradient")
    return plan_memory(
        layout,
        dtype=spec.dtype,
        device=spec.device,
        method=spec.method,
        workers=config.worker.count,
        apart=config.worker.timeout_s is not None,
        devices=len(set(devices_for(spec, config.worker.count))),
        demand=demand(spec, layout) if demand else Demand(),
        asked=config.worker.placement,
        memory_gb=config.worker.memory_gb,
        token_bytes=bytes_per_token(text, spec.dtype),
        gradient_token_bytes=gradient_bytes_per_token(text, spec.dtype) if has_gradient else 0,
    )


def _differing_templates(config: SearchConfig, spec: WorkerSpec, taskset: TaskSet) -> list[str]:
    """Experts that were taught to talk in different ways, one of each, where tasks are asked
    through a template and nobody said in which: a merge would be judged by whichever is first."""
    from agentmerge.parents.headers import chat_template

    sources = ("base", *config.genome.parents)
    chosen = config.tasks.chat_template not in (None, FIRST)
    if chosen or config.genome.tokenizer_source in sources:
        return []
    if not any(record.get("template") for record in taskset.protocols.values()):
        return []
    first: dict[str, str] = {}
    for name, path in spec.parents:
        text = chat_template(Path(path)) if name in config.genome.experts else None
        if text is not None:
            first.setdefault(text.strip(), name)
    return list(first.values()) if len(first) > 1 else []


_CHOOSE = (
    "set genome.chat_template to one of these models, to a template that mergekit has (chatml), to "
    "a file, to first, or to auto for the one that most have; or apply_chat_template: false"
)


def _preflight(spec: WorkerSpec, layout: Layout | None, faults: list[str]) -> list[str]:
    """What a kind of worker has to say before it is built, where it has: its faults are added."""
    try:
        look = getattr(worker_class(spec), "preflight", None)
    except UserError:
        return []  # said already
    found, notes = look(spec, layout) if look else ([], [])
    faults += found
    return list(notes)


def _tasks(spec: WorkerSpec, faults: list[str], run_code: bool) -> TaskSet:
    """Every task built; where that fails, each is tried alone, so that all faults are found."""
    try:
        return tasks_for(spec, run_code=run_code)
    except AgentmergeError as error:
        found = str(error).splitlines()
    for task in spec.tasks.tasks if len(spec.tasks.tasks) > 1 else ():
        alone = replace(spec, tasks=spec.tasks.model_copy(update={"tasks": (task,)}))
        try:
            tasks_for(alone, run_code=run_code)
        except AgentmergeError as error:
            found += str(error).splitlines()
    faults += dict.fromkeys(found)
    return TaskSet((), ())


def anchored_name(name: str) -> str:
    """A model or file that is here as an absolute path; any other name as it stands."""
    path = Path(name).expanduser()
    if "+" in name and not path.exists():  # a model and its adapter
        return "+".join(map(anchored_name, name.split("+")))
    return str(path.absolute()) if path.exists() and not path.is_absolute() else name


def warm_start(path: str | Path) -> Recipe:
    """A recipe to begin with, its models named as an anchored config names them.

    Raises:
        RecipeError: it cannot be read.
    """
    return Recipe.parse(Path(path)).renamed(anchored_name)


def anchored(config: SearchConfig) -> SearchConfig:
    """The config with local folders and files absolute, so that it means the same from anywhere.

    mergekit, too, takes a relative ``a/b`` for a hub id; hub ids stay as they are.
    """

    def template(asked: str | None) -> str | None:
        return asked if asked is None or "{" in asked else anchored_name(asked)

    genome = config.genome
    graph_file, colon, function = config.search.graph.partition(":")
    base, source = genome.base_model, genome.tokenizer_source
    return config.model_copy(
        update={
            "genome": genome.model_copy(
                update={
                    "models": tuple(anchored_name(model) for model in genome.models),
                    "base_model": base and anchored_name(base),
                    "chat_template": template(genome.chat_template),
                    "tokenizer_source": source
                    if source in (None, "union", "base")
                    else anchored_name(source),
                }
            ),
            "tasks": config.tasks.model_copy(
                update={
                    "task_search_path": tuple(map(anchored_name, config.tasks.task_search_path)),
                    "chat_template": template(config.tasks.chat_template),
                }
            ),
            "worker": config.worker.model_copy(
                update={
                    "lm_eval_args": config.worker.lm_eval_args.model_copy(
                        update={"chat_template": template(config.worker.lm_eval_args.chat_template)}
                    )
                }
            ),
            "search": config.search.model_copy(
                update={
                    "init": tuple(map(anchored_name, config.search.init)),
                    "graph": anchored_name(graph_file) + colon + function
                    if graph_file.endswith(".py")
                    else config.search.graph,
                }
            ),
            "agents": config.agents.model_copy(
                update={"prompts": config.agents.prompts and anchored_name(config.agents.prompts)}
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
        population=config.generation_size(strategy.population(prepared.space.dimensions)),
        max_evaluations=config.budget.max_evaluations,
        items=len(tasks.refs("search")),
        sealed_items=len(tasks.refs("sealed")),
        live_model=prepared.spec.template_model if prepared.conditions else "",
        chat_template=_template_source(prepared),
        memory=prepared.memory,
        made_bytes=prepared.made_bytes,
        seconds_per_candidate=(
            None if ledger is None else ledger.seconds_per_candidate(settings_hash)
        ),
        warnings=prepared.warnings,
        notes=(*config.notices, *prepared.notes, *tasks.notes),
    )


def _template_source(prepared: Prepared) -> str:
    from agentmerge.parents.chat_templates import shown

    asked = any(record.get("template") for record in prepared.taskset.protocols.values())
    source = prepared.config.tasks.chat_template
    if source in (None, FIRST):
        source = prepared.spec.template_model
    return shown(str(source)) if asked else ""


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
    )


def _plugin_faults(config: SearchConfig) -> list[str]:
    faults = []
    for group, name in _named_plugins(config):
        try:
            plugins.load(group, name)
        except UserError as error:
            faults.append(str(error))
    return faults


def _device_faults(config: SearchConfig) -> list[str]:
    device = config.worker.device
    if device is None or device == "cpu":
        return []
    import torch

    from agentmerge.merging.memory import cuda_devices

    try:
        wanted = torch.device(device)
    except RuntimeError:
        return [f"worker.device {device!r} is not a device; use cpu or cuda"]
    there = cuda_devices()
    if wanted.type == "cuda" and (wanted.index or 0) >= there:
        other = f"one of the {there} that are (cuda:0, ...)" if there else "cpu"
        return [f"worker.device {device!r} is not on this machine; use {other}"]
    return []


def _twin_faults(identities: Mapping[str, str]) -> list[str]:
    """One model under two names: weights between them would do nothing."""
    first: dict[str, str] = {}
    faults = []
    for name, identity in identities.items():
        other = first.setdefault(identity, name)
        if other != name:
            faults.append(f"{other!r} and {name!r} are the same model; name each model once")
    return faults


def _filter_faults(config: SearchConfig, layout: Any) -> list[str]:
    names = [tensor.name for tensor in layout.tensors]
    return [
        f"genome.filters: {text!r} is in the name of no tensor of these models, so it would do "
        f"nothing; names look like {names[len(names) // 2]!r}"
        for text in config.genome.filters
        if not any(text in name for name in names)
    ]


def init_faults(config: SearchConfig) -> list[str]:
    """Warm-start recipes that cannot be read, that name other models, or another chat template."""
    known = set(config.genome.parents)
    faults = []
    for path in config.search.init:
        try:
            recipe = warm_start(path)
        except UserError as error:
            faults.append(f"--init {path}: {error}")
            continue
        template = recipe.chat_template
        if template is not None and template not in ("", "auto", config.tasks.chat_template):
            faults.append(
                f"--init {path}: its chat_template {template[:40]!r} is not the search's; set "
                "genome.chat_template to it, or take it out of the recipe"
            )
        strangers = sorted(set(recipe.models) - known)
        if strangers:
            faults.append(
                f"--init {path}: names {strangers}, which the genome does not; a warm start may "
                f"only use {sorted(known)}"
            )
    return faults


def init_notes(config: SearchConfig, num_layers: int | None = None) -> list[str]:
    """What in the warm starts does nothing, and where the depth is known, what nearly cancels."""
    notes = []
    for path in config.search.init:
        with suppress(UserError, RecipeRejected):  # a fault, or a failed candidate, said as such
            recipe = warm_start(path)
            notes += [f"--init {path}: {note}" for note in recipe.notes]
            if num_layers is not None:
                found = cancelling_notes(recipe.canonical(num_layers))
                notes += [f"--init {path}: {note}" for note in found]
    return notes


def _depth_faults(config: SearchConfig, space: SearchSpace) -> Iterator[str]:
    """Warm starts that these models cannot make."""
    for path in config.search.init:
        try:
            warm_start(path).canonical(space.num_layers)
        except RecipeRejected as error:
            yield f"--init {path}: {error}"
        except UserError:
            continue  # said already


def _parents(
    config: SearchConfig,
    also: Sequence[str],
    faults: list[str],
    run_code: bool = True,
    tasks: bool = False,
) -> tuple[list[Any], Any, Any, list[str]]:
    """The parents that were found, what they are, their layout where they can be merged, and those
    whose own code may run and was not to.

    tasks: they will be asked something, so what asks is tried out.

    Raises:
        ConfigError: that takes too much time or memory, so nothing may use it.
    """
    from agentmerge.parents.layout import read_layout
    from agentmerge.parents.plain import survey
    from agentmerge.parents.sources import find_parent

    names = list(config.genome.parents)
    names += [name for name in also if name not in names]
    found = []
    for name in names:
        try:
            found.append(
                find_parent(
                    name,
                    trust_remote_code=config.worker.trust_remote_code,
                    allow_pickle=config.worker.allow_pickle,
                )
            )
        except ParentError as error:
            faults.append(str(error))
    if (tasks or config.genome.tokenizer_source) and (
        heavy := _heavy(config, {parent.name: parent.model for parent in found})
    ):
        raise ConfigError([*faults, *heavy])
    trusted = config.worker.trust_remote_code
    foreign = _own_code(found) if trusted and not run_code else []
    seen = survey(
        found,
        config.genome.base_model,
        None if foreign else config.genome.tokenizer_source,
        trust_remote_code=trusted and not foreign,
    )
    faults += seen.faults
    layout = None
    try:
        if seen.checkpoints:
            layout = read_layout(seen.checkpoints, _base_among(config, seen.checkpoints))
    except ParentError as error:
        faults += [fault for fault in str(error).splitlines() if fault not in faults]
    return found, seen, layout, foreign


def _heavy(config: SearchConfig, paths: Mapping[str, Path]) -> list[str]:
    """What of the tokenizer and the template that will ask takes too much time or memory."""
    from agentmerge.evaluation.trials import faults_of, trials_of
    from agentmerge.parents.chat_templates import template_text
    from agentmerge.parents.headers import chat_template

    if not paths:
        return []
    asks, asked = _template_model(config, paths), config.tasks.chat_template
    templates: dict[str, str | None] = {}
    if not config.tasks.apply_chat_template:
        pass
    elif asked in (None, FIRST):
        templates = {repr(asks): chat_template(paths[asks])}
    elif asked == "auto" or asked in paths:
        names = paths if asked == "auto" else [asked]
        templates = {repr(name): chat_template(paths[name]) for name in names}
    else:
        text = template_text(asked)
        with suppress(UserError):  # neither a text nor a file: said as such
            text = text or read_text(asked, UserError)
        templates = {"the config": text}
    aligned = config.genome.tokenizer_source is not None
    folders = {repr(name): paths[name] for name in (paths if aligned else [asks])}
    with waiting_for("a trial of chat templates and tokenizers"):
        return faults_of(trials_of(templates, folders))


def _base_among(config: SearchConfig, names: Collection[str]) -> str | None:
    base = config.genome.base_model
    return base if base in names else None


def _spec(
    config: SearchConfig, paths: Mapping[str, Path], dtype: str, device: str | None = None
) -> WorkerSpec:
    spec = WorkerSpec(
        kind=config.worker.kind,
        parents=tuple((name, str(path)) for name, path in paths.items()),
        template_model=_template_model(config, paths),
        tasks=config.tasks,
        dtype=dtype,
        batch_size=config.worker.batch_size,
        device=device or config.worker.device or _device(),
        matmul_precision=_matmul_precision(),
        trust_remote_code=config.worker.trust_remote_code,
        options={"base": config.genome.base_model} | _engine(config) | given(config.worker.options),
        method=config.genome.merge_method,
    )
    return replace(spec, crowd=crowd_of(spec, config.worker.count))


def _engine(config: SearchConfig) -> dict[str, Any]:
    worker = config.worker
    given = {"engine_args": worker.engine_args} if worker.engine_args else {}
    return given | {"canary_every": worker.canary_every} if worker.kind == "vllm" else given


def _template_model(config: SearchConfig, paths: Mapping[str, Path]) -> str:
    """Whose tokenizer asks: ``tokenizer_source`` where it names a parent, else the first expert
    that has a chat template, else the base, else the first expert."""
    from agentmerge.parents.headers import chat_template

    source = config.genome.tokenizer_source
    if source == "base":
        source = config.genome.base_model
    if source in paths:
        return str(source)
    names = list(config.genome.parents)
    if config.tasks.apply_chat_template:
        for name in names:
            if name in paths and chat_template(paths[name]):
                return name
    return next(name for name in names if name in paths)


def _matmul_precision() -> str:
    """torch's, where this process has torch: else nobody can have set it."""
    torch: Any = sys.modules.get("torch")
    return torch.get_float32_matmul_precision() if torch else "highest"


def _device() -> str:
    from agentmerge.merging.memory import cuda_devices

    return "cuda" if cuda_devices() else "cpu"


def _prepare_fake(config: SearchConfig, fresh: bool, faults: list[str]) -> Prepared:
    """A search on FakeWorker: no model is read, so the depth is an option of the worker."""
    from agentmerge.workers.fake import FakeWorker

    names = list(config.genome.parents)
    depth = config.worker.options.get("num_layers") or 4
    spec = _spec(config, {name: Path(name) for name in names}, "float32", device="cpu")
    try:
        space = SearchSpace(config.genome, depth, "float32", config.search.seed)
        faults += _depth_faults(config, space) if fresh else []
    except ConfigError as error:
        faults += error.faults
    taskset = TaskSet((), ())
    try:
        taskset = FakeWorker.tasks(spec)
    except AgentmergeError as error:
        faults += str(error).splitlines()
    if faults:
        raise ConfigError(faults)
    return Prepared(
        config,
        spec,
        space,
        taskset,
        {name: f"fake:{name}" for name in names},
        lambda recipe: recipe.effective("model.layers.0.weight", 0),
        FakeWorker.describe(spec),
    )


def _items_hash(items: Any) -> str:
    from hashlib import sha256

    return sha256("".join(item.key for item in items).encode()).hexdigest()[:16]


def family_layout(config: SearchConfig) -> Layout:
    """What every merge of a config's models is made of, from headers alone.

    Raises:
        ConfigError: every reason why they cannot be merged.
    """
    faults: list[str] = []
    layout = _parents(config, (), faults)[2]
    if faults or layout is None:
        raise ConfigError(faults)
    found: Layout = layout
    return found
