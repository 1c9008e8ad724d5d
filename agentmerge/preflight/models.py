"""The first stages of a look: where a config's models are, what they are, and what they share.

Reads configs, headers and tokenizers, and no weights; knows no tasks and no space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentmerge.config import FIRST, SearchConfig
from agentmerge.errors import ConfigError, ParentError, UserError
from agentmerge.evaluation.tokenizers import asked_templates
from agentmerge.evaluation.trials import faults_of, trials_of
from agentmerge.parents.headers import read_json
from agentmerge.preflight.faults import Look
from agentmerge.preflight.spec import base_among, template_model
from agentmerge.system.waits import waiting_for

if TYPE_CHECKING:  # read only where models are
    from agentmerge.parents.layout import Layout
    from agentmerge.parents.plain import Survey
    from agentmerge.parents.sources import Parent


@dataclass(frozen=True, slots=True)
class Models:
    """The parents that were found, and what they are.

    foreign: those whose own code makes their tokenizer, and was not to run. askable: nothing speaks
    against asking through a tokenizer of theirs.
    """

    found: Sequence[Parent]
    survey: Survey
    foreign: Sequence[str]
    askable: bool


def family_layout(config: SearchConfig) -> Layout:
    """What every merge of a config's models is made of, from headers alone.

    Raises:
        ConfigError: every reason why they cannot be merged.
    """
    look = Look(config)
    layout = layout_of(look, surveyed(look, located(look)))
    if look.faults or layout is None:
        raise ConfigError(look.faults)
    return layout


def located(look: Look) -> list[Parent]:
    """The parents that are on this machine, or can be fetched."""
    from agentmerge.parents.sources import find_parent

    worker, found = look.config.worker, []
    for name in dict.fromkeys((*look.config.genome.parents, *look.also)):
        with look.faults.of(ParentError):
            parent = find_parent(
                name,
                trust_remote_code=worker.trust_remote_code,
                allow_pickle=worker.allow_pickle,
            )
            found.append(parent)
    return found


def surveyed(look: Look, found: Sequence[Parent]) -> Models:
    """What they are; tokenizers that take too much, or whose code is not to run, are left alone."""
    from agentmerge.parents.plain import Survey, survey

    config, source = look.config, look.config.genome.tokenizer_source
    heavy = _heavy(config, found) if look.tasks or source else []
    look.faults.extend(heavy)
    trusted = config.worker.trust_remote_code
    foreign = _own_code(found) if trusted and not look.run_code else []
    if heavy and source:  # all rows would be put in its order
        return Models(found, Survey({}), foreign, askable=False)
    seen = survey(
        found,
        config.genome.base_model,
        None if foreign else source,
        trust_remote_code=trusted and not foreign,
    )
    look.faults.extend(seen.faults)
    return Models(found, seen, foreign, askable=not (foreign or heavy))


def _heavy(config: SearchConfig, found: Sequence[Parent]) -> list[str]:
    """What of the tokenizer and the template that will ask takes too much time or memory."""
    paths = {parent.name: parent.model for parent in found}
    if not paths:
        return []
    asks, asked = template_model(config, paths), config.tasks.chat_template
    templates: Mapping[str, str | None] = {}
    if config.tasks.apply_chat_template:
        with suppress(UserError):  # none: said as such by who asks through it
            templates = asked_templates(asks if asked in (None, FIRST) else str(asked), paths)
    aligned = config.genome.tokenizer_source is not None
    folders = {repr(name): paths[name] for name in (paths if aligned else [asks])}
    with waiting_for("a trial of chat templates and tokenizers"):
        return faults_of(trials_of(templates, folders))


def _own_code(found: Sequence[Parent]) -> list[str]:
    """Models whose config or tokenizer is made by Python of their own."""
    names = []
    for parent in found:
        for file in ("config.json", "tokenizer_config.json"):
            with suppress(ParentError):  # a fault, said as such
                if "auto_map" in read_json(parent.model / file):
                    names.append(parent.name)
    return list(dict.fromkeys(names))


def layout_of(look: Look, models: Models) -> Layout | None:
    """What every merge of them is made of; None where they cannot be merged with each other."""
    from agentmerge.parents.layout import read_layout

    checkpoints = models.survey.checkpoints
    with look.faults.of(ParentError):
        if checkpoints:
            return read_layout(checkpoints, base_among(look.config, checkpoints))
    return None
