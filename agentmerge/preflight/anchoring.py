"""What a config names by its place: models and files, the same from anywhere, and warm starts.

Knows names and recipes; reads no model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from agentmerge.config import ScorerCommand, SearchConfig, TaskConfig
from agentmerge.errors import RecipeRejected, UserError
from agentmerge.parents.chat_templates import UNSAID
from agentmerge.recipe import Recipe
from agentmerge.recipe.cancelling import cancelling_notes
from agentmerge.recipe.copying import stacked_layers
from agentmerge.system.commands import cut_word, file_in


def anchored_name(name: str) -> str:
    """A model or file that is here as an absolute path; any other name as it stands."""
    path = Path(name).expanduser()
    if "+" in name and not path.exists():  # a model and its adapter
        return "+".join(map(anchored_name, name.split("+")))
    return str(path.absolute()) if path.exists() and not path.is_absolute() else name


def anchored(config: SearchConfig) -> SearchConfig:
    """The config with local folders and files absolute, so that it means the same from anywhere.

    mergekit, too, takes a relative ``a/b`` for a hub id; hub ids stay as they are.
    """

    def template(asked: str | None) -> str | None:
        return asked if asked is None or "{" in asked else anchored_name(asked)

    def code(named: str) -> str:
        file, colon, name = named.partition(":")
        return anchored_name(file) + colon + name if file.endswith(".py") else named

    def inserted(name: str) -> str:
        return anchored_name(name) if name in config.genome.parents else name

    def argument(word: str) -> str:
        before, file = cut_word(word)
        return f"{before}{file.absolute()}" if file else word

    def scored(task: TaskConfig) -> TaskConfig:
        """A program's files alone: a folder's name may be a word (``python -m package``)."""
        if task.judge is not None:
            files = {k: getattr(task.judge, k) for k in ("conversations", "prompt", "against")}
            found = {key: file and anchored_name(file) for key, file in files.items()}
            return task.model_copy(update={"judge": task.judge.model_copy(update=found)})
        if not isinstance(task.scorer, ScorerCommand):
            return task
        program, *words = task.scorer.command
        file = file_in(program) if os.sep in program else None
        command = (str(file.absolute()) if file else program, *map(argument, words))
        own = task.scorer.model_copy(update={"command": command})
        return task.model_copy(update={"scorer": own})

    genome = config.genome
    base, source = genome.base_model, genome.tokenizer_source
    return config.model_copy(
        update={
            "genome": genome.model_copy(
                update={
                    "models": tuple(anchored_name(model) for model in genome.models),
                    "base_model": base and anchored_name(base),
                    "layers": genome.layers
                    and genome.layers.model_copy(
                        update={"insert": tuple(map(inserted, genome.layers.insert))}
                    ),
                    "chat_template": template(genome.chat_template),
                    "tokenizer_source": source
                    if source in (None, "union", "base")
                    else anchored_name(source),
                }
            ),
            "tasks": config.tasks.model_copy(
                update={
                    "tasks": tuple(map(scored, config.tasks.tasks)),
                    "task_search_path": tuple(map(anchored_name, config.tasks.task_search_path)),
                    "chat_template": template(config.tasks.chat_template),
                }
            ),
            "worker": config.worker.model_copy(
                update={
                    "lm_eval_args": config.worker.lm_eval_args.model_copy(
                        update={"chat_template": template(config.worker.lm_eval_args.chat_template)}
                    ),
                    "methods": config.worker.methods
                    and {
                        name: own.model_copy(update={"code": code(own.code)})
                        for name, own in config.worker.methods.items()
                    },
                }
            ),
            "search": config.search.model_copy(
                update={
                    "init": tuple(map(anchored_name, config.search.init)),
                    "graph": code(config.search.graph),
                }
            ),
            "agents": config.agents.model_copy(
                update={"prompts": config.agents.prompts and anchored_name(config.agents.prompts)}
            ),
        }
    )


def warm_start(path: str | Path) -> Recipe:
    """A recipe to begin with, its models named as an anchored config names them.

    Raises:
        RecipeError: it cannot be read.
    """
    return Recipe.parse(Path(path)).renamed(anchored_name)


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
        if template not in (*UNSAID, config.tasks.chat_template):
            faults.append(
                f"--init {path}: its chat_template {str(template)[:40]!r} is not the search's; set "
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


def depth_faults(
    config: SearchConfig, num_layers: int, check: Callable[[Recipe], None]
) -> Iterator[str]:
    """Warm starts that models of this depth cannot make; and stacks of layers that ``check``, which
    raises RecipeRejected, refuses."""
    for path in config.search.init:
        try:
            recipe = warm_start(path).canonical(num_layers)
            if (
                stacked_layers(recipe, num_layers) is not None
            ):  # others are candidates, and may fail as such
                check(recipe)
        except RecipeRejected as error:
            yield f"--init {path}: {error}"
        except UserError:
            continue  # said already
