"""Puts trackers between a search and the screen, and keeps their failures away from both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agentmerge.errors import UserError

Emit = Callable[[dict[str, Any]], None]


@contextmanager
def tracked(
    emit: Emit, config: Any, wandb: bool, project: str | None, entity: str | None, name: str | None
) -> Iterator[Emit]:
    """``emit``, and a W&B run too where it was asked for.

    Raises:
        UserError: the tracker's package is missing (before the search begins).
    """
    if not wandb:
        yield emit
        return
    from agentmerge import plugins

    try:
        tracker = plugins.load("agentmerge.trackers", "wandb")(
            config, name=name, project=project, entity=entity
        )
    except UserError:
        raise
    except Exception as error:
        print(f"note: W&B did not start ({error}); the search goes on", file=sys.stderr)
        yield emit
        return
    broken: list[Exception] = []

    def tell(event: dict[str, Any]) -> None:
        emit(event)
        if not broken:
            _try(lambda: tracker.tell(event), broken)

    try:
        yield tell
    finally:
        _try(tracker.close, broken)


def _try(call: Callable[[], None], broken: list[Exception]) -> None:
    try:
        call()
    except Exception as error:
        broken.append(error)
        print(f"note: W&B failed ({error}); the search goes on without it", file=sys.stderr)
