"""What a page has done, over real HTTP: searches stopped, begun, answered, and who may not."""

from __future__ import annotations

import json
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from agentmerge.cli import options
from agentmerge.cli.app import run_app
from agentmerge.errors import AgentmergeError, UserError
from agentmerge.ledger.folder import LEDGER
from agentmerge.session import driving
from agentmerge.session.opening import RESUMABLE
from agentmerge.ui.actions import Actions
from agentmerge.ui.app import application
from tests.report.conftest import CONFIG, search_family
from tests.ui.test_served import began, served

#: A search of some seconds.
SLOW = CONFIG.replace("num_layers: 4,", "num_layers: 4, delay_s: 0.1,").replace("40}", "30}")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is."""
    monkeypatch.setattr("agentmerge.ui.actions.START_S", 120.0)


def posted(address: str, path: str, token: str = "", **more: str) -> Callable[..., tuple[int, Any]]:
    """Asks for an action: (status, what was answered)."""

    def ask(**given: Any) -> tuple[int, Any]:
        body = json.dumps({key.replace("_", "-"): value for key, value in given.items()}).encode()
        headers = {"x-agentmerge-token": token, "content-type": "application/json"} | more
        request = urllib.request.Request(address + path, body, headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    return ask


def board(address: str, name: str) -> Any:
    with urllib.request.urlopen(f"{address}/api/run/{name}/board", timeout=60) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_a_search_is_stopped_goes_on_and_outlives_the_page(tmp_path: Path) -> None:
    runs, config = tmp_path / "runs", tmp_path / "config.yml"
    config.write_text(SLOW)
    search = began(runs, config, "a")
    with served(runs, "--allow-actions") as (told, server):
        address, _, token = told.partition("/#token=")
        ask = lambda action, **given: posted(address, f"/api/run/a/{action}", token)(**given)  # noqa: E731

        code, found = ask("resume")
        assert (code, "runs already" in found["error"]) == (400, True)
        code, found = ask("stop")
        assert (code, found["command"]) == (200, f"agentmerge stop a --runs-dir {runs}")
        assert search.wait(30) == 130
        offers = {offer["action"]: offer for offer in board(address, "a")["actions"]["offers"]}
        assert offers.keys() == {"resume", "branch"}
        assert {"name": "max-evaluations", "now": 30} in offers["resume"]["options"]

        code, found = ask("resume", max_evaluations=3)
        assert (code, "cannot become 3" in found["error"]) == (400, True), found
        code, found = ask("resume", max_evaluations=36)
        assert code == 200, found
        assert found["command"].endswith(f"--runs-dir {runs} --max-evaluations 36")
        assert ask("resume")[0] == 400

        server.kill()
        server.wait()
    until = time.monotonic() + 60
    with driving.Ledger(runs / LEDGER) as ledger:
        while (row := ledger.run("a")).status != "done":
            assert time.monotonic() < until
            time.sleep(0.1)
    assert row.stop_reason == "budget"
    assert "36 of 36 evaluations" in (runs / "a" / "console.log").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    return folder


def allowed(runs: Path) -> tuple[Actions, TestClient]:
    actions = Actions(runs, options.limits(), True)
    client = TestClient(application(runs, actions=actions), headers={"host": "testserver"})
    return actions, client


def test_who_may_not_act(runs: Path) -> None:
    actions, client = allowed(runs)
    path, right = "/api/run/first/stop", {"x-agentmerge-token": actions.token}
    wrong: list[dict[str, Any]] = [
        {},
        {"headers": {"x-agentmerge-token": actions.token[:-1]}},
        {"headers": {"x-agentmerge-token": "ü".encode()}},
        {"headers": {"authorization": actions.token}},
        {"params": {"token": actions.token}},
        {"headers": {"cookie": f"token={actions.token}"}},
        {"headers": right | {"origin": "http://elsewhere.example"}},
        {"headers": right | {"origin": "null"}},
    ]
    for given in wrong:
        assert client.post(path, json={}, **given).status_code == 403, given
    answer = client.post(path, json={}, headers=right | {"origin": "http://testserver"})
    assert (answer.status_code, answer.json()["error"].count("does not run")) == (400, 1)
    assert actions.token not in client.get("/api/run/first/board").text + client.get("/").text
    # Without --allow-actions nothing listens, whatever is sent.
    closed = TestClient(application(runs, actions=Actions(runs, options.limits())))
    assert closed.post(path, json={}, headers=right).status_code == 404
    assert not Actions(runs, {}).has("")


def test_what_cannot_be_asked_is_one_sentence(runs: Path) -> None:
    actions, client = allowed(runs)
    ask = lambda action, body: client.post(  # noqa: E731
        f"/api/run/{action}", content=body, headers={"x-agentmerge-token": actions.token}
    )
    for body in ("", "[]", "{", '"x"', "\xff", "[" * 9000, '{"at": "' + "1" * 20_000 + '"}'):
        assert ask("first/resume", body).status_code == 400, body[:40]
    for action, given in [
        ("resume", {"runs-dir": "/"}), ("resume", {"at": 1}), ("resume", {"graph": "x.py:build"}),
        ("resume", {"max-evaluations": "--worker-host"}), ("resume", {"max-evaluations": -3}),
        ("resume", {"max-evaluations": {"a": 1}}), ("resume", {"max-evaluations": "١"}),
        ("resume", {"answer": "maybe"}), ("branch", {}), ("branch", {"at": "1;ls"}),
        ("branch", {"at": 1, "as": "../x"}), ("branch", {"at": 1, "as": "-q"}), ("stop", {"at": 1}),
    ]:  # fmt: skip
        answer = ask(f"first/{action}", json.dumps(given))
        assert answer.status_code == 400, (action, given)
        assert len(answer.json()["error"].splitlines()) == 1
    assert ask("first/delete", "{}").status_code == 404
    assert ask("nobody/stop", "{}").status_code == 404
    assert not list(runs.glob("*/console.log")), "nothing was started"


def test_options_are_the_command_lines(runs: Path) -> None:
    assert set(options.limits().values()) == set(RESUMABLE)
    actions = Actions(runs, options.limits(), True)
    given = {"at": 1, "as": "x", "seed": 4, "max-cost": "1.5"}
    arguments = actions._arguments("first", "branch", actions._read("branch", given))
    assert arguments[-8:] == ["--at", "1", "--as", "x", "--seed", "4", "--max-cost", "1.5"]
    here = Actions(Path("runs"), {})
    assert here._arguments("a", "stop", {}) == ["stop", "a"], "as it is typed where runs are"


def test_options_are_used_as_they_were_read(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actions, begun = Actions(runs, {}, allowed=True), []
    monkeypatch.setattr(
        actions, "_awaited", lambda name, arguments: begun.append((name, arguments))
    )
    for given in ({"at": 0}, {"at": " 03 "}, {"at": 3, "as": " foo "}):
        actions.act("first", "branch", given)
    assert [name for name, _ in begun] == ["first-b0", "first-b3", "foo"]
    assert begun[1][1][-2:] == ["--at", "3"]
    assert begun[2][1][-1] == "foo"


def test_a_branch_begins_and_a_refused_one_leaves_nothing(runs: Path) -> None:
    actions = Actions(runs, options.limits(), True)
    said = actions.act("first", "branch", {"at": 1, "as": "third", "max-evaluations": 45})
    assert "--at 1 --as third" in said["command"]
    actions._started["third"].process.wait(120)
    with driving.Ledger(runs / LEDGER) as ledger:
        row = ledger.run("third")
        assert (row.status, row.parent_generation) == ("done", 1)
    with pytest.raises(AgentmergeError, match="has no finished generation 99"):
        actions.act("first", "branch", {"at": 99, "as": "fourth"})
    assert not (runs / "fourth").exists()


WAITS = """\
genome: {models: [north, south], base_model: base, merge_method: linear, layer_granularity: 4,
         layers: 2}
tasks: [{name: one, metric: "acc,none"}]
limit: 20
search: {algorithm: random, seed: 3, population: 6, approve: true}
worker: {kind: fake, options: {num_layers: 4, base: base}}
budget: {max_evaluations: 56}
"""


def test_a_move_that_waits_is_answered(tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(WAITS)
    runs = tmp_path / "runs"
    assert run_app(["run", str(config), "--runs-dir", str(runs), "--name", "w", "-q"]) == 0
    actions, client = allowed(runs)
    found = client.get("/api/run/w/board").json()
    assert (found["status"], "another search space" in found["stop_reason"]) == ("waiting", True)
    commands = [(o["action"], o["given"].get("answer")) for o in found["actions"]["offers"]]
    assert commands[:2] == [("resume", "yes"), ("resume", "no")]
    said = actions.act("w", "resume", {"answer": "no"})
    assert said["command"].endswith("--answer no")
    assert actions._started["w"].process.wait(120) == 0
    with driving.Ledger(runs / LEDGER) as ledger:
        assert ledger.run("w").status == "done"
    with pytest.raises(UserError, match="asks nothing"):
        actions.act("w", "resume", {"answer": "yes"})


def test_what_ends_later_is_told_on_the_page(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose models or tasks take long to be refused."""
    monkeypatch.setattr("agentmerge.ui.actions.START_S", 0.0)
    with sqlite3.connect(runs / LEDGER) as db:
        db.execute(
            "UPDATE runs SET config = replace(config, 'north', 'nobody') WHERE name='second'"
        )
    db.close()
    actions, client = allowed(runs)
    assert "looks at its models" in actions.act("second", "resume", {})["said"]
    actions._started["second"].process.wait(120)
    fault = client.get("/api/run/second/board").json()["actions"]["fault"]
    assert fault
    assert "\n" not in fault
