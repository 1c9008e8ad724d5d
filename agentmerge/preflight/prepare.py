"""Preflight: from a config to what a search needs, in stages, with every fault told at once.

The parents are located and surveyed; their layout gives the space; then come the tasks, the memory
plan and, where it is wanted, the parents themselves. Until that last stage only configs, headers
and task definitions are read. A stage whose ground is missing leaves its own out, and those after
it look at what can still be looked at. Knows no search state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.config import FIRST, SearchConfig
from agentmerge.contracts.worker import EngineInfo, Sources, WorkerSpec
from agentmerge.errors import AgentmergeError, ConfigError, UserError
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.parents.cards import licences_of
from agentmerge.parents.headers import chat_template, content_fingerprint, stamps_of
from agentmerge.preflight.anchoring import depth_faults, init_faults, init_notes
from agentmerge.preflight.faults import (
    Faults,
    Look,
    benchmark_faults,
    device_faults,
    host_faults,
    method_faults,
    method_notes,
    plugin_faults,
    pool_faults,
    tokenizer_faults,
    window_faults,
    window_notes,
)
from agentmerge.preflight.graphs import is_own
from agentmerge.preflight.layers import layers_plan, outputs_of_models, outputs_of_names
from agentmerge.preflight.models import Models, layout_of, located, surveyed
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.spec import (
    base_among,
    buffered,
    counted,
    engine_of,
    known_class,
    memory_of,
    spec_of,
    windowed,
)
from agentmerge.recipe import Recipe
from agentmerge.space.grouped import SearchSpace
from agentmerge.system.temporary import temporary_folder
from agentmerge.system.waits import waiting_for
from agentmerge.workers.kinds import refuse_stack
from agentmerge.workers.options import option_faults

if TYPE_CHECKING:  # read only where models are
    from agentmerge.merging.placement import MemoryPlan
    from agentmerge.parents.layout import Layout

_CHOOSE = (
    "set genome.chat_template to one of these models, to a template that mergekit has (chatml), to "
    "a file, to first, or to auto for the one that most have; or apply_chat_template: false"
)


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
    faults = Faults([*known_faults, *([] if allow_benchmarks else benchmark_faults(config))])
    faults += tokenizer_faults(config) + plugin_faults(config)
    faults += window_faults(config) + pool_faults(config)
    notes = window_notes(config)
    faults += init_faults(config) if fresh else []
    if fresh and config.genome.layers and config.genome.tokenizer_source:
        faults.append(
            "genome.layers is not possible with genome.tokenizer_source "
            f"{config.genome.tokenizer_source!r}: a stack of layers names no base, and mergekit "
            "would align its models to whichever comes first; remove one"
        )
    misread, readable = option_faults(config.worker, config.genome.parents)
    faults += misread
    spoiled: dict[str, Any] = {**readable}
    if devices := device_faults(config):
        faults += devices
        spoiled["device"] = "cpu"
    if hosts := host_faults(config):
        faults += [fault for fault in hosts if fault not in faults]
        spoiled["host"] = None
    if spoiled:  # goes, for the rest of the faults
        config = config.model_copy(update={"worker": config.worker.model_copy(update=spoiled)})
    with faults.of(UserError):
        config = counted(config)
    kind = known_class(config)
    faults += method_faults(config) if run_code else []
    look = Look(config, kind, faults, also, fresh, tasks, weights, run_code)
    with waiting_for("a look at models and tasks"):
        prepared = (_of_models if getattr(kind, "reads_models", True) else _of_names)(look)
    if prepared.taskset.tasks and config.search.counted and not prepared.taskset.generating:
        named = ", ".join(repr(task.name) for task in config.tasks.tasks)
        raise ConfigError(
            [
                f"search: tokens are asked for, and no task generates any ({named}): answers of a "
                "task have a length where its output_type is generate_until; leave tokens out of "
                "search.objectives and search.constraints"
            ]
        )
    warm = init_notes(config, prepared.space.num_layers) if fresh else []
    notes += method_notes(config) if not run_code else []
    if is_own(config.search.graph) and not run_code:
        graph = config.search.graph
        notes.append(f"search.graph {graph!r} is code, and was not run; check --run-code runs it")
    return replace(
        prepared,
        config=windowed(prepared.config),
        warnings=(*config.warnings, *warm),
        notes=(*prepared.notes, *notes),
    )


def _of_names(look: Look) -> Prepared:
    """For a worker that reads no model: parents are names, and it says itself how deep they are."""
    config, kind = look.config, look.kind
    names = config.genome.parents
    config, said = buffered(config, lambda twice: "")
    look = replace(look, config=config)
    spec = spec_of(config, {name: Path(name) for name in names}, "float32", device="cpu")
    outputs = outputs_of_names(look)
    space = _space(look, kind.num_layers(spec), spec.dtype, outputs=outputs)
    taskset = TaskSet((), ())
    with look.faults.of(AgentmergeError):
        taskset = kind.tasks(spec)
    if look.faults or space is None:
        raise ConfigError(look.faults)
    return Prepared(
        config,
        spec,
        space,
        taskset,
        {name: f"{spec.kind}:{name}" for name in names},
        lambda recipe: recipe.effective("model.layers.0.weight", 0),
        *engine_of(spec),
        notes=tuple(said),
        layers=layers_plan(space),
    )


def _of_models(look: Look) -> Prepared:
    """For a worker that merges models."""
    from agentmerge.merging.plan import plan
    from agentmerge.parents.plain import known_identities

    config = look.config
    space, spec, taskset, memory = None, None, TaskSet((), ()), None

    def checked(layout: Layout) -> Callable[[Recipe], None]:
        def check(recipe: Recipe) -> None:
            layers = config.genome.layers
            extra = layers.most if layers else None
            refuse_stack(recipe, layout.num_layers, config.worker.kind, look.kind, extra)
            plan(recipe, layout)

        return check

    with temporary_folder("agentmerge-check") as scratch:
        models = surveyed(look, located(look))
        notes = [*models.survey.notes]
        layout = layout_of(look, models)
        dtype = config.worker.dtype or (layout.dtype if layout else "float32")
        if layout is not None:
            look.faults.extend(_filter_faults(config, layout))
            outputs = outputs_of_models(look, models, layout)
            space = _space(look, layout.num_layers, dtype, checked(layout), outputs)
        if models.found:
            folders = _side_files(models, scratch)
            config, said = buffered(
                config, lambda twice: _unbuffered(look, twice, layout, folders, models)
            )
            notes += said
            look = replace(look, config=config)
            spec = spec_of(config, folders, dtype)
            taskset, said = _tasks(look, models, spec)
            notes += said + _worker_notes(look, spec, layout)
            memory = _memory(look, spec, layout, models)
        if look.faults or layout is None or space is None or spec is None:
            raise ConfigError(look.faults)
        if look.weights:  # nothing speaks against it
            spec, layout, identities = _make(look, models, spec)
        else:
            identities = known_identities(models.found)
        conditions: dict[str, Any] = {}
        if models.foreign:
            parts = (spec.kind, "", spec.device, spec.dtype, str(spec.batch_size))
            engine = EngineInfo(*parts)
        else:
            engine, conditions = engine_of(spec)
    return Prepared(
        config,
        replace(spec, placement=memory.chosen or "auto") if memory else spec,
        space,
        taskset,
        identities,
        checked(layout),
        engine,
        conditions,
        memory=memory,
        made_bytes=sum(models.survey.made_bytes.values()),
        notes=tuple(notes),
        parameters=None
        if layout is None
        else (layout.parameters, layout.layer_parameters // layout.num_layers),
        layers=layers_plan(space, layout),
        licences=licences_of(models.found),
    )


def _filter_faults(config: SearchConfig, layout: Layout) -> list[str]:
    names = [tensor.name for tensor in layout.tensors]
    return [
        f"genome.filters: {text!r} is in the name of no tensor of these models, so it would do "
        f"nothing; names look like {names[len(names) // 2]!r}"
        for text in config.genome.filters
        if not any(text in name for name in names)
    ]


def _space(
    look: Look,
    num_layers: int,
    dtype: str,
    check: Callable[[Recipe], None] = lambda recipe: None,
    outputs: tuple[str, str] | None = None,
) -> SearchSpace | None:
    """The space on models of this depth; a search's warm starts have to be merges of them too."""
    config = look.config
    with look.faults.of(UserError):
        space = SearchSpace(
            config.genome,
            num_layers,
            dtype,
            config.search.seed,
            outputs,
            pool=config.genome.experts if config.genome.pool else (),
        )
        if not space.axes:
            raise ConfigError(
                f"genome.space {config.genome.space!r} has no axis here; take another"
            )
        look.faults.extend(depth_faults(config, num_layers, check) if look.fresh else [])
        return space
    return None


def _side_files(models: Models, scratch: Path) -> dict[str, Path]:
    """Where each parent's config and tokenizer are: of one that has to be made, in ``scratch``."""
    paths = {parent.name: parent.model for parent in models.found}
    for index, parent in enumerate(models.found):
        if parent.name in models.survey.made_bytes:
            paths[parent.name] = scratch / str(index)
            paths[parent.name].mkdir()
            models.survey.write_side_files(parent, paths[parent.name])
    return paths


def _tasks(look: Look, models: Models, spec: WorkerSpec) -> tuple[TaskSet, list[str]]:
    """(what is asked, what to know of it); nothing where it cannot be asked."""
    if models.foreign:
        return TaskSet((), ()), [
            f"{', '.join(map(repr, models.foreign))}: its tokenizer and the tasks are not looked "
            "at, since worker.trust_remote_code runs the model's own code; check --run-code does"
        ]
    if not (look.tasks and models.askable):
        return TaskSet((), ()), []
    taskset = _built(look, spec)
    differing = _differing_templates(look.config, spec, taskset)
    if not differing:
        return taskset, []
    names = f"{', '.join(map(repr, differing))} have different chat templates"
    if look.config.tasks.chat_template == FIRST:
        return taskset, [f"{names}, and {spec.template_model!r} is the first; {_CHOOSE}"]
    look.faults.append(
        f"chat_template is missing: {names}, and the tasks are asked through one; {_CHOOSE}"
    )
    return taskset, []


def _built(look: Look, spec: WorkerSpec) -> TaskSet:
    """Every task built; where that fails, each is tried alone, so that all faults are found."""
    faults = Faults()
    with faults.of(AgentmergeError):
        return tasks_for(spec, run_code=look.run_code)
    for task in spec.tasks.tasks if len(spec.tasks.tasks) > 1 else ():
        alone = replace(spec, tasks=spec.tasks.model_copy(update={"tasks": (task,)}))
        with faults.of(AgentmergeError):
            tasks_for(alone, run_code=look.run_code)
    look.faults.extend(faults)
    return TaskSet((), ())


def _differing_templates(config: SearchConfig, spec: WorkerSpec, taskset: TaskSet) -> list[str]:
    """Experts that were taught to talk in different ways, one of each, where tasks are asked
    through a template and nobody said in which: a merge would be judged by whichever is first."""
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


def _worker_notes(look: Look, spec: WorkerSpec, layout: Layout | None) -> list[str]:
    """What the kind of worker has to say before it is built, where it has; its faults are added."""
    ask = getattr(look.kind, "preflight", None)
    # Where nothing will run, the model's class is not needed.
    if ask is None or not (look.fresh or look.weights):
        return []
    with look.faults.of(UserError):
        faults, notes = ask(spec, layout)
        look.faults.extend(faults)
        return list(notes)
    return []


def _memory(
    look: Look, spec: WorkerSpec, layout: Layout | None, models: Models
) -> MemoryPlan | None:
    """Where the parents are kept; None where that cannot be said."""
    if look.kind is None or layout is None:
        return None
    memory = memory_of(look.config, spec, layout, models.survey.low_rank)
    look.faults.extend([memory.reason] if look.tasks and memory.chosen is None else [])
    return memory


def _unbuffered(
    look: Look,
    twice: SearchConfig,
    layout: Layout | None,
    folders: dict[str, Path],
    models: Models,
) -> str:
    """Why two models do not fit on a device; "" where they do, kept as one alone is."""
    if layout is None or look.kind is None:
        return "that cannot be foreseen"
    dtype = look.config.worker.dtype or layout.dtype
    plans = [
        memory_of(c, spec_of(c, folders, dtype), layout, models.survey.low_rank)
        for c in (look.config, twice)
    ]
    if plans[1].chosen is None:
        return plans[1].reason
    return (
        "" if plans[0].chosen == plans[1].chosen else "the parents would have to be kept elsewhere"
    )


def _make(
    look: Look, models: Models, spec: WorkerSpec
) -> tuple[WorkerSpec, Layout, dict[str, str]]:
    """The parents as plain checkpoints: the spec of a worker on them, their layout, and the
    fingerprint of each.

    Raises:
        ConfigError: a model has two names: weights between them would do nothing.
    """
    from agentmerge.parents.layout import read_layout
    from agentmerge.parents.plain import make_plain

    config = look.config
    paths = make_plain(
        models.found,
        base_among(config, {parent.name for parent in models.found}),
        config.genome.tokenizer_source,
        trust_remote_code=config.worker.trust_remote_code,
    )
    layout = read_layout(paths, base_among(config, paths))
    # Before the contents are looked at: a change after this line is noticed by the workers.
    stamps = tuple(stamp for path in paths.values() for stamp in stamps_of(path))
    identities = {name: content_fingerprint(path) for name, path in paths.items()}
    sources = Sources(
        tuple(identities.items()),
        config.worker.paths,
        config.genome.tokenizer_source,
        config.worker.allow_pickle,
    )
    spec = replace(spec_of(config, paths, spec.dtype), stamps=stamps, sources=sources)
    first: dict[str, str] = {}
    for name, identity in identities.items():
        if (other := first.setdefault(identity, name)) != name:
            look.faults.append(f"{other!r} and {name!r} are the same model; name each model once")
    look.faults.tell()
    return spec, layout, identities
