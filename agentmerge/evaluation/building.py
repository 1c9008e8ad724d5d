"""Puts a TaskSet together: loads, renders, names, splits and checks every objective's tasks."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from typing import Any

from agentmerge.config import FIRST, ScorerCommand, TaskConfig, TasksConfig
from agentmerge.contracts.worker import ItemRef, WorkerSpec
from agentmerge.errors import TaskError
from agentmerge.evaluation import metrics
from agentmerge.evaluation.aggregation import WITH_STATICS
from agentmerge.evaluation.definitions import without_code
from agentmerge.evaluation.judged import judged_task
from agentmerge.evaluation.loading import LoadedTasks, load_tasks, quiet
from agentmerge.evaluation.playing import JudgedTask
from agentmerge.evaluation.protocol import protocol, protocol_hash, tokenizer_identity
from agentmerge.evaluation.rendering import (
    DATED,
    Asked,
    Render,
    chat_renderer,
    documents,
    item_key,
    render,
)
from agentmerge.evaluation.scorers import code_of, judge
from agentmerge.evaluation.served import served_task
from agentmerge.evaluation.splitting import choose_documents, split, stand_in
from agentmerge.evaluation.tasks import Objective, ScoredTask, TaskSet
from agentmerge.evaluation.tokenizers import context_length, tokenizer_of
from agentmerge.evaluation.whole import OfWhole
from agentmerge.parents.chat_templates import shown


@dataclass(frozen=True)
class _Setting:
    """What all tasks of a config share."""

    config: TasksConfig
    tokenizer: str
    template: str | None
    chat: Render | None
    context: int | None
    day: date | None = None

    @property
    def asking(self) -> dict[str, Any]:
        """What a served model's answers depend on besides its weights."""
        day = {} if self.day is None else {"day": self.day.isoformat()}
        told = {"template": self.template, "tokenizer": self.tokenizer, "context": self.context}
        return told | day


def build(
    config: TasksConfig,
    tokenizer: Any,
    template_source: str,
    context: int | None,
    check_built_ins: bool,
    run_code: bool,
) -> TaskSet:
    """See ``tasks.build_tasks``."""
    theirs = tuple(entry for entry in config.tasks if not (entry.judge or entry.served))
    own = config.model_copy(update={"tasks": theirs})
    loaded = load_tasks(own, check_built_ins=check_built_ins, run_code=run_code) if theirs else []
    left = iter(loaded)
    if config.gen_kwargs:
        for found in loaded:
            for task in found.tasks:
                if task.OUTPUT_TYPE == "generate_until":
                    task.set_config("generation_kwargs", dict(config.gen_kwargs), update=True)
    notes: list[str] = []
    setting = _setting(config, tokenizer, template_source, context, loaded, notes)
    tasks: list[ScoredTask] = []
    objectives = []
    asked, records, served = {}, {}, {}
    aggregations: dict[str, Any] = {}
    judged: dict[str, JudgedTask] = {}
    with quiet():
        for entry in config.tasks:
            if isinstance(entry.scorer, ScorerCommand) and not run_code:
                words = shlex.join(entry.scorer.command)
                notes.append(f"task {entry.name!r} is judged by a program that run starts: {words}")
            if entry.judge is not None or entry.served:
                if entry.served:
                    scored, served[entry.name], record, note = served_task(
                        entry, config, setting.asking, setting.chat
                    )
                else:
                    scored, judged[entry.name], record, note = judged_task(
                        entry,
                        config,
                        tokenizer=setting.tokenizer,
                        template=setting.template,
                        chat=setting.chat,
                        context=setting.context,
                        day=setting.day,
                    )
                tasks.append(scored)
                records[entry.name] = record
                objectives.append(
                    Objective(entry.name, entry.weight, scored.higher_is_better, (entry.name,))
                )
                notes += [note] if note else []
                continue
            found = next(left)
            if code := found.code or ("" if run_code else code_of(entry, config.task_search_path)):
                notes.append(
                    f"task {entry.name!r} is not built, since it names code ({code}); "
                    "check --run-code builds it"
                )
                continue
            for task in found.tasks if entry.scorer else ():
                judge(task, entry, config.task_search_path)
            metric, filter_name = metrics.parse_metric(entry.metric, entry.name)
            leaves, by_size = _leaves(entry, found, metric, filter_name, notes)
            built = []
            for leaf in leaves:
                scored, request, record, note = _scored(leaf, entry, metric, filter_name, setting)
                built.append(scored)
                asked[scored.name], records[scored.name] = request, record
                aggregations |= _combining(scored, metrics.aggregation(leaf, metric))
                notes += [note] if note else []
            higher = {task.higher_is_better for task in built}
            if len(higher) > 1:
                raise TaskError(
                    f"the tasks of group {entry.name!r} do not agree whether a higher "
                    f"{metric} is better; name its tasks one by one"
                )
            names = tuple(task.name for task in built)
            objectives.append(Objective(entry.name, entry.weight, higher.pop(), names, by_size))
            tasks += built
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            raise TaskError(f"two tasks are called {name!r}; rename one of them")
    tasks, more = stand_in(tasks)
    notes += more
    return TaskSet(
        tuple(tasks), tuple(objectives), tuple(notes), aggregations, asked, records, judged, served
    )


def _setting(
    config: TasksConfig,
    tokenizer: Any,
    source: str,
    context: int | None,
    loaded: Sequence[LoadedTasks],
    notes: list[str],
) -> _Setting:
    identity = tokenizer_identity(tokenizer)
    talks = any(
        task.OUTPUT_TYPE != "loglikelihood_rolling" for found in loaded for task in found.tasks
    ) or any(entry.judge or entry.served for entry in config.tasks)
    if not (config.apply_chat_template and talks):
        return _Setting(config, identity, None, None, context)
    if not getattr(tokenizer, "chat_template", None):
        # On by default, as in mergekit-evolve; but that default must not keep base models out.
        if "apply_chat_template" in config.model_fields_set:
            raise TaskError(
                f"apply_chat_template is on, and {source!r} has no chat template; "
                "set apply_chat_template: false, or add a parent that has one"
            )
        notes.append(f"no chat template is applied: {source!r} has none")
        return _Setting(config, identity, None, None, context)
    template = tokenizer.get_chat_template()
    asked = shown(source if config.chat_template in (None, FIRST) else str(config.chat_template))
    notes.append(f"questions are asked through the chat template {asked}")
    dated = DATED in template
    if dated:
        notes.append(
            f"the chat template prints the date, which is {config.chat_date} throughout "
            "(worker.lm_eval_args.chat_date)"
        )
    day = config.chat_date if dated else None
    return _Setting(config, identity, template, chat_renderer(tokenizer, day), context, day)


def _leaves(
    entry: TaskConfig, found: LoadedTasks, metric: str, filter_name: str, notes: list[str]
) -> tuple[list[Any], bool]:
    """(leaf tasks that carry the metric, whether a group weights them by size)."""
    if found.group is None:
        return list(found.tasks), False
    if not found.group.has_aggregation:
        names = ", ".join(task.task_name for task in found.tasks)
        raise TaskError(
            f"group {entry.name!r} has no aggregate of its own; name its tasks instead: {names}, "
            "or give it an aggregate_metric_list"
        )
    rules = [rule for rule in found.group.aggregate_metric_list if rule.metric == metric]
    rules = [rule for rule in rules if not rule.filter_list or filter_name in rule.filter_list]
    if not rules:
        legal = ", ".join(
            f"{rule.metric},{name}"
            for rule in found.group.aggregate_metric_list
            for name in rule.filter_list or ["<filter>"]
        )
        raise TaskError(
            f"metric {entry.metric!r} does not exist in group {entry.name!r}; it has: {legal}"
        )
    having = [
        task
        for task in found.tasks
        if metric in task.aggregation() and filter_name in {f.name for f in task._filters}
    ]
    if not having:
        raise TaskError(f"no task of group {entry.name!r} has the metric {entry.metric!r}")
    if len(having) < len(found.tasks):
        left = ", ".join(t.task_name for t in found.tasks if t not in having)
        notes.append(f"group {entry.name!r}: {left} left out, without {entry.metric}")
    return having, bool(rules[0].weight_by_size)


def _scored(
    task: Any, entry: TaskConfig, metric: str, filter_name: str, setting: _Setting
) -> tuple[ScoredTask, Asked, dict[str, Any], str | None]:
    config, name = setting.config, str(task.task_name)
    rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
    chosen = choose_documents(len(documents(task)), config, name)
    if not chosen.search:
        raise TaskError(f"task {name!r} has no documents")
    chat = None if rolling else setting.chat
    script = entry.scorer if isinstance(entry.scorer, ScorerCommand) else None
    chats: dict[str, Any] = {}
    if script and chat:
        chat = _remembering(chat, chats)
    requests = render(task, [*chosen.search, *chosen.beyond], chat, config.fewshot_as_multiturn)
    if task.OUTPUT_TYPE == "generate_until" and setting.context is not None:
        _refuse_no_room(name, requests[chosen.search[0]], setting.context)
    rebuild = metrics.check_metric(task, metric, filter_name, requests[chosen.search[0]])
    refs = {n: ItemRef(name, n, item_key(task, asked)) for n, asked in requests.items()}
    items, search, sealed, note = split(
        [refs[n] for n in chosen.search], [refs[n] for n in chosen.beyond], config
    )
    statics = () if rebuild not in WITH_STATICS else tuple(
        metrics.static_part(task, metric, filter_name, rebuild, requests[ref.index])
        for ref in items
    )  # fmt: skip
    if rebuild == "class":
        metrics.check_classes(task, metric, statics, max(len(asked) for asked in requests.values()))
    kind = metrics.margin_kind(task, config.companion and script is None)
    record = protocol(
        task,
        metric,
        filter_name,
        template=None if rolling else setting.template,
        as_multiturn=config.fewshot_as_multiturn,
        tokenizer=setting.tokenizer,
        context=setting.context,
        companion=kind == "token",
        day=None if rolling else setting.day,
    )
    scored = ScoredTask(
        name=name,
        weight=entry.weight,
        metric=metric,
        filter=filter_name,
        higher_is_better=metrics.higher_is_better(task, metric),
        output_type=str(task.OUTPUT_TYPE),
        margin_kind=kind,
        protocol_hash=protocol_hash(record),
        items=items,
        search=search,
        sealed=sealed,
        rebuild=rebuild,
        statics=statics,
        objective=entry.name,
    )
    kept = {ref.index: requests[ref.index] for ref in items}
    asked = Asked(task, metric, filter_name, kept, kind == "token", chat is not None, script, chats)
    return scored, asked, record, note


def _combining(task: ScoredTask, function: Any) -> dict[str, Any]:
    """How its stored values become the metric; nothing where that is their mean."""
    if task.rebuild == "one_hot":
        return {}
    return {task.name: OfWhole(function) if task.rebuild == "whole" else function}


def _remembering(chat: Render, chats: dict[str, Any]) -> Render:
    """The same, and what each text was made of is kept."""

    def render_chat(history: Any, *args: Any, **more: Any) -> str:
        text = chat(history, *args, **more)
        chats[text] = [dict(message) for message in history]
        return text

    return render_chat


def _refuse_no_room(name: str, instances: Sequence[Any], context: int) -> None:
    """An answer that alone fills the context, which else the first evaluation would find."""
    from agentmerge.evaluation.tokens import answer_length, refuse_no_room

    try:
        refuse_no_room(answer_length(instances[0].args[1]), context)
    except TaskError as error:
        raise TaskError(f"task {name!r}: {error}") from None


def build_tasks(
    config: TasksConfig,
    tokenizer: Any,
    *,
    template_source: str,
    context: int | None = None,
    check_built_ins: bool = True,
    run_code: bool = True,
) -> TaskSet:
    """Load, render and split every task of a config. Reads data, no model.

    tokenizer: of the parent that asks; its chat template is used where the config wants one.
    template_source: that parent's name, for messages.
    context: tokens the models can read, part of the protocol; None: unknown.
    check_built_ins: look for lm-eval's own tasks of the same name (0.7 s); a second process that
        builds what a first one has checked may leave it out.
    run_code: False runs no code of a task's author; a task that names some is a note instead.

    Raises:
        TaskError: a task, metric or filter that does not exist or cannot be scored.
    """
    with nullcontext() if run_code else without_code():
        return build(config, tokenizer, template_source, context, check_built_ins, run_code)


def tasks_for(spec: WorkerSpec, *, check_built_ins: bool = True, run_code: bool = True) -> TaskSet:
    """``build_tasks`` as a worker of this spec asks them: its template parent's tokenizer,
    template and context length. Session and workers use this, so their keys agree."""
    tokenizer = tokenizer_of(spec)
    return build_tasks(
        spec.tasks,
        tokenizer,
        template_source=spec.template_model,
        context=context_length(spec, tokenizer),
        check_built_ins=check_built_ins,
        run_code=run_code,
    )
