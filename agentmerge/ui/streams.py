"""Server-sent events: what is new since the last look, at most one message a look."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.responses import StreamingResponse

from agentmerge.evaluation.statistics import figure
from agentmerge.ui.guard import json_text, sentence
from agentmerge.ui.live import Live, Snapshot

#: Looks without news after which a stream says that it is there, so that the dead are noticed.
QUIET_LOOKS = 15

#: A message, or "" for no news; and whether there is more to read at once.
News = Callable[[], tuple[str, bool]]


def streamed(news: News, every_s: float) -> StreamingResponse:
    """Asks for news until whoever listens hangs up; a fault is told, and asked again after."""

    async def messages() -> AsyncIterator[str]:
        sent, quiet = "", 0
        while True:
            try:
                message, more = await run_sync(news)
            except Exception as error:
                message, more = event("trouble", {"sentence": sentence(error)}), False
            quiet += 1
            if message and message != sent:
                sent, quiet = message, 0
                yield message
            elif quiet % QUIET_LOOKS == 0:
                yield ": still here\n\n"
            await anyio.sleep(0.0 if more else every_s)

    return StreamingResponse(messages(), media_type="text/event-stream")


def event(kind: str, found: Any) -> str:
    return f"event: {kind}\ndata: {json_text(found)}\n\n"


def search_news(live: Live, name: str, drawn: Callable[[Snapshot], str]) -> News:
    """Where a search stands, with its part of the page. The stream leaves out what it has sent."""

    def news() -> tuple[str, bool]:
        board = live.look(name)
        return event("board", {"board": board, "html": drawn(board)}), not board["read"]

    return news


def list_news(live: Live) -> News:
    """The searches that stand otherwise than they did, and the names of all, newest first."""
    sent: dict[str, Any] = {}
    names: list[str] | None = None

    def news() -> tuple[str, bool]:
        nonlocal names
        before, names = names, None  # after a fault a page is told again, and takes its word back
        found = live.briefs()
        more = not all(brief and brief["read"] for brief in found.values())
        changed = [brief for name, brief in found.items() if brief and sent.get(name) != brief]
        names = list(found)
        sent.update({brief["name"]: brief for brief in changed})
        if names == before and not changed:
            return "", more
        told = [{"name": brief["name"], "cells": _cells(brief)} for brief in changed]
        return event("searches", {"names": names, "changed": told}), more

    return news


def _cells(brief: Snapshot) -> dict[str, str]:
    """What the row of a search says."""
    found = {key: brief[key] for key in ("phase", "search", "sparkline") if key in brief}
    if "limit" in brief:
        found["evaluations"] = f"{brief['evaluations']:g} of {brief['limit']:g}"
        for key in ("best", "best_parent"):
            found[key] = "–" if brief[key] is None else figure(brief[key], digits=4)
    return found
