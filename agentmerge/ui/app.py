"""The application: the pages, a JSON twin of each under ``/api``, the report and the streams."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, urlencode

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from agentmerge.contracts.operators import PARENT
from agentmerge.errors import LedgerError, NotFound
from agentmerge.ledger import Ledger, RunRow
from agentmerge.report import html
from agentmerge.report.compare import compare, lineage
from agentmerge.report.content import Content, content
from agentmerge.report.figures import overview
from agentmerge.report.summary import run_status
from agentmerge.ui import views
from agentmerge.ui.actions import Actions
from agentmerge.ui.guard import Guard, body_of, code_of, json_answer, refusal, sentence
from agentmerge.ui.live import Live, Snapshot
from agentmerge.ui.streams import list_news, search_news, streamed

#: Charts that are kept, so that pages that are open at once have them made once.
MAX_CHARTS = 16
#: Where scripts and styles are, and whose: the report's own, and this room's.
PARTS = "/parts/"
#: No candidate is so far.
_LAST = 2**62
_KINDS = {"js": "text/javascript", "css": "text/css"}

View = Callable[[Ledger, Request], Mapping[str, Any]]
Answer = Callable[[Request], Response]


def application(
    runs_dir: Path,
    *,
    hosts: Sequence[str] = (),
    every_s: float = 1.0,
    actions: Actions | None = None,
) -> Starlette:
    """The ASGI application over a runs directory.

    hosts: names that it answers under; none: any. every_s: seconds between looks at a search.
    actions: what its pages may have done; they may do nothing where none are allowed.
    """
    pages = _Pages(Live(runs_dir, every_s, actions))
    acting = [Route("/api/run/{name}/{action}", pages.act, methods=["POST"])]
    candidate = "/run/{name}/candidate/{generation:int}.{slot:int}"
    return Starlette(
        routes=[
            *pages.pair("/", "searches.html", _searches),
            *pages.pair("/lineage", "lineage.html", lambda ledger, _: {"nodes": lineage(ledger)}),
            *pages.pair("/compare", "compare.html", _compared),
            *pages.pair("/run/{name}", "search.html", _search),
            *pages.pair("/run/{name}/candidates", "candidates.html", _candidates),
            *pages.pair(candidate, "candidate.html", _candidate),
            Route("/run/{name}/report", pages.guarded(pages.report)),
            Route("/api/run/{name}/report", pages.guarded(pages.charts)),
            Route("/api/run/{name}/board", pages.guarded(pages.board)),
            Route("/api/compare/overview", pages.guarded(pages.overview)),
            Route("/live", pages.live_list),
            Route("/run/{name}/live", pages.live_search),
            Route(PARTS + "{name}", pages.guarded(_part)),
            *(acting if pages.live.actions.allowed else ()),
        ],
        middleware=[Middleware(Guard, hosts=tuple(hosts))],
        exception_handlers={HTTPException: pages.not_there},
    )


def _run(ledger: Ledger, request: Request) -> RunRow:
    return ledger.run(request.path_params["name"])


def _searches(ledger: Ledger, request: Request) -> Mapping[str, Any]:
    return views.searches(ledger, request.query_params)


def _search(ledger: Ledger, request: Request) -> Mapping[str, Any]:
    return views.search(ledger, _run(ledger, request))


def _candidates(ledger: Ledger, request: Request) -> Mapping[str, Any]:
    return views.candidates(ledger, _run(ledger, request), request.query_params)


def _candidate(ledger: Ledger, request: Request) -> Mapping[str, Any]:
    row, at = _run(ledger, request), request.path_params
    generation, slot = min(at["generation"], _LAST), min(at["slot"], _LAST)
    return views.candidate(ledger, row, generation, slot, request.query_params)


def _compared(ledger: Ledger, request: Request) -> Mapping[str, Any]:
    """As ``agentmerge compare --json`` has it; nothing before two searches are chosen."""
    chosen = _chosen(request)
    names = [row.name for row in ledger.runs()[::-1]]
    found: Mapping[str, Any] = {"searches": [], "differences": []}
    if len(chosen) > 1:
        found = compare(ledger, chosen)
    return {**found, "names": names, "chosen": chosen}


def _chosen(request: Request) -> list[str]:
    names = request.query_params.getlist("name")
    return list(dict.fromkeys(name for name in names if name))[:2]


class _Pages:
    """What is read and drawn of one runs directory."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.templates = html.templates(_resource)
        self.templates.globals |= {
            "run_at": _run_at, "candidate_at": _candidate_at, "asking": _asking, "PARENT": PARENT,
        }  # fmt: skip
        self._charts: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._drawing = Lock()

    def pair(self, path: str, template: str, view: View) -> list[Route]:
        """A page, and its twin: the same facts as JSON."""

        def read(request: Request) -> Mapping[str, Any]:
            with self.live.ledger() as ledger:
                return view(ledger, request)

        def page(request: Request) -> Response:
            return self._page(template, request, found=read(request))

        def twin(request: Request) -> Response:
            return json_answer(read(request))

        return [Route(path, self.guarded(page)), Route(f"/api{path}", self.guarded(twin))]

    def guarded(self, answer: Answer) -> Answer:
        """The answer; where there is a fault, a sentence."""

        def guarded(request: Request) -> Response:
            try:
                return answer(request)
            except Exception as error:
                again = isinstance(error, NotFound | LedgerError)
                return self._fault(request, sentence(error), code_of(error), again)

        return guarded

    def not_there(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = "there is no such page" if error.status_code == 404 else error.detail
        return self._fault(request, text, error.status_code)

    def _fault(self, request: Request, text: str, code: int, again: bool = False) -> Response:
        """again: a page looks whether it is there by now."""
        if request.url.path.startswith("/api/"):
            return json_answer({"error": text}, code)
        return self._page("fault.html", request, code, sentence=text, again=again)

    def _page(self, template: str, request: Request, code: int = 200, **facts: Any) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        twin = f"/api{request.url.path}{query}"
        facts |= {"twin": twin, "runs_dir": str(self.live.runs_dir), "parts": PARTS}
        facts["acting"] = self.live.actions.allowed
        return HTMLResponse(self.templates.get_template(template).render(facts), code)

    def board(self, request: Request) -> Response:
        return json_answer(self.live.look(request.path_params["name"]))

    def report(self, request: Request) -> Response:
        """What ``agentmerge report`` writes, made now."""
        with self.live.ledger() as ledger:
            found = content(ledger, _run(ledger, request))
        return HTMLResponse(html.page([found], served=PARTS))

    def charts(self, request: Request) -> Response:
        """The report's charts of a search."""
        with self.live.ledger() as ledger:
            rows = [_run(ledger, request)]
            return self._charted(ledger, rows, lambda found: html.live_charts(found[0], "run0"))

    def overview(self, request: Request) -> Response:
        """The report's chart of two searches."""
        with self.live.ledger() as ledger:
            rows = [ledger.run(name) for name in _chosen(request)]
            return self._charted(ledger, rows, lambda found: {"overview": overview(found)})

    def _charted(
        self, ledger: Ledger, rows: Sequence[RunRow], draw: Callable[[list[Content]], Any]
    ) -> Response:
        """Charts, made anew where something was scored since."""
        with self._drawing:
            key = tuple((r.id, run_status(ledger, r), ledger.tally(r.id)) for r in rows)
            text = self._charts.pop(key, None)
            if text is None:
                text = html.as_json(draw([content(ledger, row, recipes=1) for row in rows]))
            self._charts[key] = text
            while len(self._charts) > MAX_CHARTS:
                self._charts.popitem(last=False)
        return Response(text, media_type="application/json")

    async def act(self, request: Request) -> Response:
        """Have something done; whoever asks has the token, and no page of another site does."""
        actions = self.live.actions
        if refused := refusal(request, actions.has):
            return json_answer({"error": refused}, 403)
        try:
            given, path = await body_of(request), request.path_params
            return json_answer(await run_sync(actions.act, path["name"], path["action"], given))
        except Exception as error:
            return json_answer({"error": sentence(error)}, code_of(error))

    async def live_search(self, request: Request) -> Response:
        news = search_news(self.live, request.path_params["name"], self._drawn)
        return streamed(news, self.live.every_s)

    async def live_list(self, request: Request) -> Response:
        return streamed(list_news(self.live), self.live.every_s)

    def _drawn(self, board: Snapshot) -> str:
        return self.templates.get_template("board.html").render(board=board)


def _part(request: Request) -> Response:
    name = request.path_params["name"]
    if name == "plotly.js":
        return Response(html.plotly_js(), media_type=_KINDS["js"])
    if name in ("page.js", "page.css"):
        return Response(html.resource(name), media_type=_KINDS[name.rpartition(".")[2]])
    if name in ("ui.js", "ui.css"):
        return Response(_resource(name), media_type=_KINDS[name.rpartition(".")[2]])
    raise NotFound(f"there is no part {name[:40]!r}")


def _resource(name: str) -> str:
    return (resources.files("agentmerge.ui") / "page" / name).read_text(encoding="utf-8")


def _run_at(name: str, rest: str = "") -> str:
    return f"/run/{quote(name, safe='')}{rest}"


def _candidate_at(name: str, generation: int, slot: int) -> str:
    return _run_at(name, f"/candidate/{generation}.{slot}")


def _asking(query: Mapping[str, Any], **changes: Any) -> str:
    """The same page asked otherwise: its query with these changes, without what is empty."""
    return "?" + urlencode({key: value for key, value in {**query, **changes}.items() if value})
