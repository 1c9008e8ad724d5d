"""What the live pages say, asked in this process; a real server is ``test_served.py``."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import ItemResult
from agentmerge.ledger import Ledger, ResultKey
from agentmerge.ledger.archive import remove_runs
from agentmerge.ledger.folder import LEDGER
from agentmerge.report import html
from agentmerge.report.board import Follower
from agentmerge.report.content import content
from agentmerge.report.summary import trace
from agentmerge.session import driving
from agentmerge.ui import live
from agentmerge.ui.app import application
from agentmerge.ui.live import Live
from agentmerge.ui.streams import list_news
from tests.report.conftest import CONFIG, search_family

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
PAGES = (
    "/", "/lineage", "/compare", "/compare?name=first&name=second", "/run/first",
    "/run/first/candidates", "/run/first/candidates?sort=score&way=down&state=scored&limit=5",
    "/run/first/candidate/0.0", "/run/first/candidate/2.1", "/run/second",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """The same searches, to be spoiled."""
    return shutil.copytree(runs, tmp_path / "runs")


def asked(folder: Path, **more: Any) -> TestClient:
    return TestClient(application(folder, **more))


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run_app([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class _Elements(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("path", PAGES)
def test_every_page_has_a_twin_and_runs_no_script_of_its_own(runs: Path, path: str) -> None:
    client = asked(runs)
    page = client.get(path)
    assert page.status_code == 200, page.text
    twin = client.get(f"/api{path}")
    assert twin.status_code == 200
    assert twin.headers["content-type"].startswith("application/json")
    elements = _Elements(page.text).found
    assert any(a.get("href") == f"/api{path}" for _, a in elements)
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "script":
            mine = str(attributes.get("src", "")).startswith("/parts/")
            assert mine or attributes.get("type") == "application/json"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy


def test_links_of_pages_lead_somewhere(runs: Path) -> None:
    client, todo, seen = asked(runs), ["/"], set[str]()
    while todo and len(seen) < 80:
        path = todo.pop(0)
        seen.add(path)
        answer = client.get(path)
        assert answer.status_code == 200, path
        if not answer.headers["content-type"].startswith("text/html"):
            continue
        base = path.partition("?")[0]
        for tag, attributes in _Elements(answer.text).found:
            for link in (attributes.get("href"), attributes.get("src")):
                if not link or link.startswith(("#", "data:")):
                    continue
                assert link.startswith(("/", "?")), (tag, link)
                target = link if link.startswith("/") else base + link
                if target not in seen and target not in todo and "plotly" not in target:
                    todo.append(target)
    assert {"/run/first", "/run/first/report", "/run/first/candidates", "/lineage"} <= seen


def test_twins_say_what_the_command_line_says(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, where = asked(runs), ("--runs-dir", runs)
    assert client.get("/api/").json()["searches"] == cli(capsys, "list", *where)[::-1]
    assert client.get("/api/run/first").json() == cli(capsys, "show", "first", *where)
    assert client.get("/api/lineage").json()["nodes"] == cli(capsys, "tree", *where)
    found = client.get("/api/compare?name=first&name=second").json()
    for key, value in cli(capsys, "compare", "first", "second", *where).items():
        assert found[key] == value
    board = client.get("/api/run/first/board").json()
    shown = cli(capsys, "show", "first", *where)
    while not board["read"]:
        board = client.get("/api/run/first/board").json()
    assert board["evaluations"] == shown["evaluations"]["total"]
    assert board["best"]["score"] == shown["best"]["score"]
    assert board["failed"] == shown["evaluations"]["failed"] > 0
    assert board["words"]["controller"].startswith("step size"), "its own, not the critic's again"
    assert any(": " in line and line.startswith("candidate") for line in board["events"])


def test_charts_are_the_reports_and_made_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(ledger: Ledger, row: Any, **more: Any) -> Any:
        made.append(row.name)
        return content(ledger, row, **more)

    monkeypatch.setattr("agentmerge.ui.app.content", counted)
    client = asked(runs)
    found = [client.get("/api/run/first/report").json() for _ in range(3)]
    assert made == ["first"]
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        told = html.live_charts(content(ledger, ledger.run("first")), "run0")
    assert told["run0-grid"]["grid"]["z"]
    assert found == [json.loads(html.as_json(told))] * 3
    both = client.get("/api/compare/overview?name=first&name=second").json()["overview"]
    assert [line["name"] for line in both["data"]] == ["first", "second"]
    assert client.get("/api/compare/overview?name=nobody").status_code == 404


def test_ten_searches_are_read_once_however_many_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SearchConfig.from_text(CONFIG.replace("max_evaluations: 40", "max_evaluations: 8"))
    for n in range(10):
        driving.run(config, name=f"s{n}", runs_dir=tmp_path)
    reads: list[str] = []
    news = Follower.news

    def counted(follower: Follower) -> Any:
        reads.append(follower.row.name)
        return news(follower)

    monkeypatch.setattr(Follower, "news", counted)
    monkeypatch.setattr(live, "run_status", lambda ledger, row: "running")  # all ten at once
    monkeypatch.setattr(live, "LOOK_S", 60.0)
    following = Live(tmp_path, every_s=3600.0)
    pages = [list_news(following) for _ in range(5)]
    first = [page() for page in pages]
    assert len({message for message, _ in first}) == 1
    assert sorted(reads) == [f"s{n}" for n in range(10)]
    body = json.loads(first[0][0].partition("data: ")[2])
    assert body["names"] == [f"s{n}" for n in range(9, -1, -1)]
    assert {row["cells"]["evaluations"] for row in body["changed"]} == {"8 of 8"}
    assert [page() for page in pages] == [("", False)] * 5, "nothing is new"
    assert len(reads) == 10


def test_candidates_are_sorted_filtered_and_paged(runs: Path) -> None:
    client = asked(runs)
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        every = ledger.candidates(ledger.run("first").id)

    def told(query: str) -> Any:
        return client.get(f"/api/run/first/candidates?limit=500&{query}").json()

    places = [[c["generation"], c["slot"]] for c in told("")["candidates"]]
    assert places == [[c.generation, c.slot] for c in every]
    scores = [c["score"] for c in told("sort=score&way=down&state=scored")["candidates"]]
    assert scores == sorted((c.score for c in every if c.state == "scored"), reverse=True)
    failed = told("state=failed")
    assert failed["total"] == sum(c.state == "failed" for c in every) > 0
    assert all(c["failure"] for c in failed["candidates"])
    parents = told("operator=parent")["candidates"]
    assert {c["label"] for c in parents} == {"base", "north", "south", "east"}
    found = [c["label"] for c in told("containing=SOUTH")["candidates"]]
    assert "south" in found
    assert all("south" in label for label in found)
    pages = [
        client.get(f"/api/run/first/candidates?limit=7&offset={at}&sort=score").json()
        for at in range(0, len(every), 7)
    ]
    together = [(c["generation"], c["slot"]) for page in pages for c in page["candidates"]]
    assert sorted(together) == [(c.generation, c.slot) for c in every]
    for wrong in ("sort=evil", "state=gone", "limit=-1", "offset=x", "offset=1e9"):
        answer = client.get(f"/run/first/candidates?{wrong}")
        assert answer.status_code == 400
        assert wrong.partition("=")[2] in answer.text


def test_one_candidate_in_full(runs: Path) -> None:
    client = asked(runs)
    with Ledger(runs / LEDGER, read_only=True) as ledger:
        row = ledger.run("first")
        assert row.result is not None
        answer = ledger.candidate(row.id, *row.result["answer"]["candidate"])
        other = next(c for c in ledger.candidates(row.id) if c.score and c.score < answer.score)
        recipe = ledger.recipe(other.recipe_hash, row.id)
    at = f"/run/first/candidate/{other.generation}.{other.slot}?limit=500"
    found = client.get(f"/api{at}").json()
    assert found["recipe"] == recipe.rstrip()
    assert recipe.splitlines()[0] in client.get(at).text
    assert found["changes"]["rows"], "its values are not the answer's"
    gained = sum(task["gained"] for task in found["against_best"]["tasks"])
    lost = sum(task["lost"] for task in found["against_best"]["tasks"])
    changes = [item["change"] for item in found["items"]["rows"]]
    assert (changes.count("gained"), changes.count("lost")) == (gained, lost)
    assert lost > 0
    assert found["against_best"]["difference"]["mean"] < 0
    mean = [item["value"] for item in found["items"]["rows"] if item["task"] == "one"]
    assert sum(mean) / len(mean) == pytest.approx(found["candidate"]["tasks"]["one"])
    mine = f"/run/first/candidate/{answer.generation}.{answer.slot}"
    assert "It is the best of this search." in client.get(mine).text
    assert found["explained"]["rows"][0] == ["where", "tensors", "source", "values"]


def test_items_are_shown_with_what_was_answered_and_why_it_is_worth_that(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those whose words were kept; one that no judge gave a verdict on breaks no page."""
    with Ledger(copied / LEDGER) as ledger:
        row = ledger.run("first")
        failed, missing = ledger.item_keys(row.id, "search")["one"][:2]
    results = Ledger.results

    def told(ledger: Ledger, key: ResultKey) -> dict[str, ItemResult]:
        found = results(ledger, key)
        if failed in found and key.recipe_hash == mine:
            why = (HOSTILE, "", "two short")
            found[failed] = replace(found[failed], answers=("a", "b", "c"), reasons=why)
            found[missing] = replace(found[missing], value=math.nan, missing=True)
        return found

    client = asked(copied)
    at = "/run/first/candidate/2.1"
    mine = client.get(f"/api{at}").json()["candidate"]["recipe_hash"]
    monkeypatch.setattr(Ledger, "results", told)
    found = client.get(f"/api{at}?limit=500").json()
    rows = {item["item"]: item for item in found["items"]["rows"]}
    assert rows[failed]["said"] == ["a", "b", "c"]
    assert rows[failed]["why"] == [HOSTILE, "", "two short"]
    assert (rows[missing]["value"], rows[missing]["why"]) == (None, ["no verdict"])
    (one,) = [task for task in found["against_best"]["tasks"] if task["task"] == "one"]
    count = sum(item["task"] == "one" for item in rows.values())
    assert one["items"] == count - 1, "who has no verdict has gained and lost nothing"
    page = client.get(f"{at}?limit=500").text
    assert "a / b / c" in page
    assert "/ two short</em>" in page
    assert "<script>alert" not in page


def test_items_are_shown_with_what_they_say(copied: Path) -> None:
    with Ledger(copied / LEDGER) as ledger:
        row = ledger.run("first")
        key = ledger.item_keys(row.id, "search")["one"][0]
        ledger.save_texts(row.id, "one", {key: (HOSTILE, "four")})
        ledger.save_texts(row.id, "one", {key: ("other", "five")})
    client = asked(copied)
    rows = client.get("/api/run/first/candidate/2.1?limit=500").json()["items"]["rows"]
    found = {item["item"]: (item["asks"], item["right"]) for item in rows if item["task"] == "one"}
    assert found.pop(key) == (HOSTILE, "four"), "the first word stands"
    assert set(found.values()) == {("", "")}, "a search before this was kept"
    page = client.get("/run/first/candidate/2.1?limit=500").text
    assert "<strong>four</strong>" in page
    assert "alert(1)" in page
    assert "<script>alert" not in page
    with Ledger(copied / LEDGER) as ledger:
        remove_runs(ledger, [row.id])
        assert ledger.texts(row.id) == {}


@pytest.fixture
def hostile(copied: Path) -> Path:
    """Whatever others named or said is markup."""
    with sqlite3.connect(copied / LEDGER) as db:
        for table, column in (
            ("candidates", "label"), ("candidates", "failure"), ("candidates", "operator"),
            ("runs", "stop_reason"), ("runs", "algorithm"),
        ):  # fmt: skip
            db.execute(f"UPDATE {table} SET {column} = {column} || ?", (HOSTILE,))
        db.execute("UPDATE candidates SET tasks = replace(tasks, 'one', ?)", (HOSTILE[:34],))
        for run, config in db.execute("SELECT id, config FROM runs").fetchall():
            config = config.replace("name: one", f"name: {HOSTILE[:34]}")
            config = config.replace("north", HOSTILE[34:60])
            db.execute("UPDATE runs SET config = ? WHERE id = ?", (config, run))
        for run, generation, role, body in db.execute("SELECT * FROM advice").fetchall():
            said = json.loads(body)
            said["guidance"]["critique"] = said["guidance"]["thought"] = HOSTILE
            db.execute(
                "UPDATE advice SET body = ? WHERE run_id = ? AND generation = ? AND role = ?",
                (json.dumps(said), run, generation, role),
            )
        db.execute("UPDATE runs SET name = ? WHERE name = 'second'", (f"x{HOSTILE}",))
    return copied


def test_what_others_named_is_text(hostile: Path) -> None:
    client = asked(hostile)
    listed = client.get("/").text
    assert "&lt;img" in listed
    links = [str(a.get("href")) for _, a in _Elements(listed).found]
    odd = next(link for link in links if link.startswith("/run/x"))
    for path in (*PAGES[:-1], "/run/first/report", odd):
        answer = client.get(path)
        for tag, attributes in _Elements(answer.text).found:
            assert tag != "img"
            assert not [name for name in attributes if name.startswith("on")]
            assert tag != "script" or attributes, "a script came with a name"
    found = Live(hostile).look("first")
    text = json.dumps(found)
    assert "onerror" in text, "the board has the words"
    drawn = client.get("/run/first/report").text
    assert "<img" not in drawn


def test_a_locked_database_is_a_sentence(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PATIENCE_S", 0.1)
    client = asked(copied)
    assert client.get("/run/first").status_code == 200
    with sqlite3.connect(copied / LEDGER, isolation_level=None) as db:
        db.execute("PRAGMA journal_mode=DELETE")
        db.execute("BEGIN EXCLUSIVE")
        for path in ("/", "/run/first", "/api/run/first", "/run/first/candidates"):
            answer = client.get(path)
            assert answer.status_code == 503
            assert "locked" in answer.text
            assert "Traceback" not in answer.text
        db.execute("ROLLBACK")
    db.close()
    assert client.get("/run/first").status_code == 200


def test_what_is_gone_is_a_sentence_and_a_new_one_is_seen(copied: Path) -> None:
    client = asked(copied, every_s=0.0)
    assert client.get("/api/run/first/board").json()["status"] == "done"
    (copied / LEDGER).rename(copied / "away")
    for path in ("/", "/run/first", "/run/first/candidate/0.0", "/api/run/first/board"):
        answer = client.get(path)
        assert answer.status_code == 404
        assert "no runs in" in answer.text
    driving.run(SearchConfig.from_text(CONFIG), name="first", runs_dir=copied)
    with Ledger(copied / LEDGER, read_only=True) as ledger:
        new = ledger.run("first")
    assert client.get("/api/run/first").json()["id"] == new.id
    for path in (
        "/run/first/candidate/99999999999999999999.0",
        "/run/nobody",
        "/api/run/nobody/board",
        "/run/first/candidate/99.0",
    ):
        assert client.get(path).status_code == 404
    assert client.get("/run/nobody").text.count("there are: first") == 1
    assert client.get("/nowhere").status_code == 404


def test_a_fault_of_ours_is_a_sentence_too(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise KeyError("odd")

    monkeypatch.setattr("agentmerge.ui.views.search", broken)
    for path in ("/run/first", "/api/run/first"):
        answer = asked(runs).get(path)
        assert answer.status_code == 500
        assert "unexpected KeyError" in answer.text
        assert "Traceback" not in answer.text


def test_only_this_machines_names_are_answered(runs: Path) -> None:
    client = asked(runs, hosts=("localhost", "127.0.0.1", "::1"))
    for host in ("localhost", "localhost:8787", "127.0.0.1:1", "[::1]:8787"):
        assert client.get("/api/", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "", "[", "127.0.0.1.nip.io:8787"):
        answer = client.get("/api/", headers={"host": host})
        assert answer.status_code == 403
        assert "first" not in answer.text


def test_nothing_is_written_and_no_method_but_reading(runs: Path) -> None:
    client = asked(runs)

    def stored() -> Any:
        with Ledger(runs / LEDGER, read_only=True) as ledger:
            return [trace(ledger, row) for row in ledger.runs()]

    before, files = stored(), sorted(runs.rglob("*"))
    for path in (*PAGES, "/run/first/report", "/api/run/first/report", "/api/run/first/board"):
        assert client.get(path).status_code == 200
        assert client.post(path).status_code == 405
        assert client.delete(path).status_code == 405
    assert stored() == before
    assert sorted(runs.rglob("*")) == files


def test_the_parts_are_our_own(runs: Path) -> None:
    client = asked(runs)
    for name in ("ui.js", "ui.css", "page.js", "page.css", "plotly.js"):
        assert client.get(f"/parts/{name}").status_code == 200
    for name in ("page.html", "..%2fapp.py", "%2e%2e%2fapp.py", "app.py"):
        assert client.get(f"/parts/{name}").status_code == 404


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A search with 5,000 candidates more than it made."""
    folder = tmp_path / "runs"
    row = driving.run(SearchConfig.from_text(CONFIG), name="many", runs_dir=folder)
    with sqlite3.connect(folder / LEDGER) as db:
        columns = [c[1] for c in db.execute("PRAGMA table_info(candidates)")]
        last, *_ = db.execute(
            "SELECT max(generation) FROM candidates WHERE run_id = ?", (row.id,)
        ).fetchone()
        own = "SELECT * FROM candidates WHERE run_id = ? AND state = 'scored' LIMIT 1"
        body = dict(zip(columns, db.execute(own, (row.id,)).fetchone(), strict=True))
        db.executemany(
            f"INSERT INTO candidates VALUES ({', '.join('?' * len(columns))})",
            [
                tuple((body | {"generation": last + 1 + n // 100, "slot": n % 100}).values())
                for n in range(5000)
            ],
        )
    db.close()
    return folder


def test_a_page_does_not_grow_with_the_search(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = asked(many, every_s=0.0)
    sizes = [
        len(client.get(path).content)
        for path in ("/run/many", "/run/many/candidates", "/run/many/candidates?limit=100000")
    ]
    assert sizes[0] < 10_000
    assert sizes[1] < 30_000
    assert sizes[2] < 250_000
    assert client.get("/api/run/many/candidates").json()["total"] > 5000
    # A long past is read a part at a time: nobody waits for all of it.
    monkeypatch.setattr(live, "LOOK_S", 0.0)
    first = client.get("/api/run/many/board").json()
    assert not first["read"]
    assert "read" in first["phase"]
    monkeypatch.setattr(live, "LOOK_S", 60.0)
    last = client.get("/api/run/many/board").json()
    assert last["read"]
    assert last["evaluations"] >= 5000
    assert len(last["trail"]) <= live.MAX_TRAIL
    assert len(client.get("/api/run/many/board").content) < 40_000


def test_a_search_without_a_score_has_its_pages(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    text = CONFIG.replace("max_weight>0.99", "max_weight>-9")
    driving.run(SearchConfig.from_text(text), name="none", runs_dir=folder)
    client = asked(folder)
    for path in ("/", "/lineage", "/run/none", "/run/none/candidates", "/run/none/candidate/0.0",
                 "/run/none/report", "/run/none/board"):  # fmt: skip
        if path != "/run/none/board":
            assert client.get(path).status_code == 200, client.get(path).text
        assert client.get(f"/api{path}").status_code == 200
    assert client.get("/api/run/none/report").json() == {}
    assert client.get("/api/run/none/board").json()["best"] is None


def test_searches_that_nobody_looks_at_are_forgotten(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "MAX_FOLLOWED", 1)
    following = Live(runs, every_s=0.0)
    for name in ("first", "second", "first"):
        assert following.look(name)["status"] == "done"
        assert len(following._followed) == 1
    assert re.fullmatch("[▁▂▃▄▅▆▇█]+", following.look("first")["sparkline"])


def test_a_refused_candidate_has_its_page(copied: Path) -> None:
    with sqlite3.connect(copied / LEDGER) as db:
        db.execute("INSERT INTO recipes VALUES ('refused-2-1', '')")
        db.execute(
            "UPDATE candidates SET recipe_hash = 'refused-2-1', state = 'failed', score = NULL, "
            "failure = 'refused' WHERE generation = 2 AND slot = 1"
        )
    db.close()
    answer = asked(copied).get("/run/first/candidate/2.1")
    assert answer.status_code == 200, answer.text
    assert "refused" in answer.text


def test_a_list_is_told_that_a_fault_is_over(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_S", 60.0)
    following = Live(runs, every_s=3600.0)
    news = list_news(following)
    assert news()[0]
    assert news()[0] == ""
    with monkeypatch.context() as patch:
        patch.setattr(following, "briefs", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            news()
    assert news()[0].startswith("event: searches")
    assert news()[0] == ""
