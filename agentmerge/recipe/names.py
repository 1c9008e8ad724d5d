"""Names of models, for people and prompts: without the folders of one machine."""

from __future__ import annotations

from collections.abc import Iterable


def short_name(model: str) -> str:
    """The last part of a model's name or path, for people and prompts."""
    return "+".join(part.rstrip("/").rsplit("/", 1)[-1] for part in model.split("+"))


def public_names(models: Iterable[str]) -> dict[str, str]:
    """Names to publish: of a local folder the end of its path that tells it from the others, which
    is mostly its own name; hub ids as they are."""
    names = list(dict.fromkeys(models))
    found: dict[str, str] = {}
    for model in names:
        others = [name for name in names if name != model]
        depth = 1
        while depth < model.count("/") and _end(model, depth) in [_end(o, depth) for o in others]:
            depth += 1
        found[model] = _end(model, depth)
    return found


def _end(model: str, depth: int) -> str:
    """A model's name with its local paths cut to so many parts."""
    return "+".join(
        "/".join(part.rstrip("/").split("/")[-depth:]) if part.startswith(("/", "~", ".")) else part
        for part in model.split("+")
    )
