"""The chat templates that mergekit knows by name, from its own files; and what a setting means.

A ``chat_template`` of a recipe or a config is a template's text, or one of these names. What else a
config may say there (a model, a file) is for whoever has those. Imports nothing heavy.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from agentmerge.errors import UserError

#: mergekit's word for the template that most models have.
MOST = "auto"
#: Settings of a recipe that leave the choice open.
UNSAID = (None, "", MOST)


@cache
def template_names() -> tuple[str, ...]:
    """Every name, sorted."""
    return tuple(sorted(file.stem for file in _folder().glob("*.jinja")))


def template_text(asked: str) -> str | None:
    """The template that a name or a text stands for; None where it is neither.

    By mergekit's rule a short single line without a brace is a name.
    """
    if "{" in asked:
        return asked
    return _folder().joinpath(f"{asked}.jinja").read_text() if asked in template_names() else None


def recipe_template(asked: str | None) -> str | None:
    """The template that a recipe's ``chat_template`` gives, None where it leaves the parent's own.

    Raises:
        UserError: a name that mergekit does not have.
    """
    if asked in UNSAID:
        return None
    text = template_text(str(asked))
    if text is None:
        raise UserError(
            f"chat_template {asked!r} is no template that mergekit has; use one of "
            f"{', '.join(template_names())}, write the template's text, or leave it out to keep "
            "the parent's own"
        )
    return text


def shown(asked: str) -> str:
    """A setting as a note names it."""
    return "that the config spells out" if "{" in asked else repr(asked)


def _folder() -> Path:
    """Where mergekit has them: beside its code, which is not imported for that."""
    spec = find_spec("mergekit")
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise UserError("mergekit is not installed; `pip install agentmerge` brings it")
    return Path(next(iter(places))) / "_data" / "chat_templates"
