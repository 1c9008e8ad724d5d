"""No secret of the user's is in a file, on a screen or in a tracker after a search that used it.

Searches run in processes of their own, against a real HTTP server that repeats what it was sent;
then every byte of every file and all that was printed is looked through.
"""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.agents.roles import models_for
from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import demo_config, write_tasks
from agentmerge.errors import RunFailed, UserError
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.system import redaction
from agentmerge.system.redaction import hidden, redact, revealed
from agentmerge.testing.scripted import Fault, ScriptedServer, ToolCalls
from agentmerge.workers.fake import FakeWorker
from tests.session.conftest import command, config, config_text

#: One of each kind; none has a shape that gives it away.
KEY = "canary-key-94b1f0"
PASSWORD = "canary-pass-31d7"
TOKEN = "canary-token-77ae"
MINE = "canary-mine-5c20e1"
PROXY = "canary-proxy-0b6f"
SECRETS = (KEY, PASSWORD, TOKEN, MINE, PROXY)
WORKER = '''
import sys
from agentmerge.errors import CandidateFailed
from agentmerge.workers.hf import HfWorker

class Leaky(HfWorker):
    """Logs in with its token, and tells everybody."""

    options = ("base", "threads", "token", "headers")

    def __init__(self, spec, taskset=None):
        super().__init__(spec, taskset)
        self.options_ = spec.options
        self.loads = 0

    def load(self, recipe):
        token, other = self.options_["token"], self.options_["headers"]["Authorization"]
        assert token == "canary-" + "token-77ae", "the worker needs the value itself"
        assert other == "Bearer canary-" + "mine-5c20e1"
        self.loads += 1
        print("logged in with", token, file=sys.stderr)
        if self.loads % 5 == 4:
            raise CandidateFailed(f"403 for {token} ({other})")
        return super().load(recipe)
'''


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has learnt of secrets is learnt anew, as in a process of its own."""
    monkeypatch.setattr(redaction, "_named", {})
    monkeypatch.setattr(redaction, "_values", set())


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    """The environment in which the worker ``leaky`` is installed."""
    folder = tmp_path / "plugin"
    (folder / "leaky-1.0.dist-info").mkdir(parents=True)
    (folder / "leaky.py").write_text(WORKER)
    (folder / "leaky-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: leaky\nVersion: 1.0\n"
    )
    (folder / "leaky-1.0.dist-info" / "entry_points.txt").write_text(
        "[agentmerge.workers]\nleaky = leaky:Leaky\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def everything_in(folder: Path, *but: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file below, as it is and unpacked as far as it can be."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path in but:
            continue
        raw = path.read_bytes()
        yield path, raw
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            yield path, json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
        elif path.suffix == ".sqlite":
            with closing(sqlite3.connect(path)) as conn:
                for (table,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
                    for row in conn.execute(f"SELECT * FROM {table}").fetchall():
                        for cell in row:
                            yield path, _unpacked(cell)


def _unpacked(cell: Any) -> bytes:
    if not isinstance(cell, bytes):
        return str(cell).encode()
    try:
        return cell + zlib.decompress(cell)
    except zlib.error:
        return cell


def nowhere(found: Iterator[tuple[Path, bytes]], secrets: tuple[str, ...] = SECRETS) -> int:
    """No secret in any form; returns how much was looked through."""
    forms = {s.encode() for s in secrets}
    forms |= {base64.b64encode(f"me:{s}".encode()) for s in secrets}
    size = 0
    for path, content in found:
        size += len(content)
        for form in forms:
            at = content.find(form)
            assert at < 0, (path, content[max(0, at - 200) : at + 60])
    return size


def cli(*arguments: str | Path, **environment: str) -> tuple[int, str]:
    """(exit code, all that was printed)."""
    process = command(*arguments, **environment)
    out, err = process.communicate(timeout=400)
    return process.returncode, out + err


class Echo:
    """Replies that repeat what came in: the key in words, in escapes, in errors, in a header, in
    the arguments of tools."""

    def __init__(self) -> None:
        self.server = ScriptedServer(self)
        self.asked = 0

    def __call__(self, body: dict) -> Any:
        sent = self.server.requests[-1].headers["authorization"]
        self.asked += 1
        said = {"thought": f"you sent {sent}", "sigma": 0.1, "summary": sent, "findings": [sent]}
        escaped = "".join(f"\\u{ord(c):04x}" for c in sent)
        turn = self.asked % 6
        if turn == 1 and "tools" in body:
            return ToolCalls((("compare", {"a": sent, "b": sent}), ("list_candidates", sent)))
        if turn == 2:
            return json.dumps(said).replace(sent, escaped)
        if turn == 3:
            return Fault("429", retry_after_s=f"0 {sent}")
        if turn == 4:
            return Fault("401")
        if turn == 5:
            return f"no JSON for {sent}"
        return said


def test_a_server_that_repeats_the_key_gets_it_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    echo, runs = Echo(), tmp_path / "runs"
    monkeypatch.setenv("MY_SERVERS", KEY)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{PROXY}@proxy.invalid:3128")
    with echo.server as server:
        agents = {
            "llm": "openai:m", "base_url": server.base_url, "api_key_env": "MY_SERVERS",
            "probes": 2, "max_retries": 1,
        }  # fmt: skip
        path = tmp_path / "config.yml"
        path.write_text(config_text(agents=agents, search={"algorithm": "llm_evo"}))
        where = ["--runs-dir", str(runs)]
        assert run_app(["run", str(path), "--name", "a", *where]) == 0
        assert {r.headers["authorization"] for r in server.requests} == {f"Bearer {KEY}"}
        more = ["branch", "a", "--at", "1", "--as", "b", "--max-evaluations", "40"]
        assert run_app([*more, *where]) == 0
    assert echo.asked > 6
    said = capsys.readouterr().err
    assert "[redacted]" in said
    shown = looked_at(runs, tmp_path / "out", monkeypatch, capsys)
    assert "[redacted]" in (tmp_path / "out" / "report.html").read_text()
    with Ledger(runs / driving.LEDGER) as ledger:
        words = ledger.advice(ledger.run("a").id)
        calls = ledger.records("SELECT reply, tool_calls FROM model_calls")
    assert any("[redacted]" in json.dumps(word) for word in words)
    assert any("[redacted]" in call["tool_calls"] for call in calls), "it asked for tools"
    assert nowhere(everything_in(tmp_path)) > 100_000
    nowhere(iter([(Path("screen"), (said + shown).encode())]))


def looked_at(
    runs: Path, out: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """All that is said of the searches afterwards, and the files that are made of them, where
    nobody knows the secrets any more."""
    patch.setattr(redaction, "_named", {})
    patch.setattr(redaction, "_values", set())
    for name in ("MY_SERVERS", "MINE", "HTTPS_PROXY"):
        patch.delenv(name, raising=False)
    capsys.readouterr()
    for line in (
        ["report", "a", "--runs-dir", runs, "--to", out / "report.html"],
        ["ledger", "export", "--runs-dir", runs, "--to", out / "parquet"],
        ["show", "a", "--runs-dir", runs],
        ["show", "a", "--runs-dir", runs, "--json"],
        ["best", "a", "--runs-dir", runs],
        ["doctor", "--runs-dir", runs],
        ["prompts", "try", "critic", "--run", "a", "--runs-dir", runs],
    ):
        code = run_app([str(word) for word in line])
        assert code == 0 or line[0] == "doctor", capsys.readouterr().err
    said = capsys.readouterr()
    return said.out + said.err


@pytest.fixture
def real(tmp_path: Path, family: TinyFamily) -> dict[str, Any]:
    """A config over real models, whose worker needs secrets; a perplexity beside an accuracy."""
    tasks = write_tasks(tmp_path / "tasks", family.skills, n_items=12)
    worker = {
        "kind": "leaky",
        "options": {"token": TOKEN, "headers": {"Authorization": "Bearer ${MINE}"}, "threads": 1},
    }
    return demo_config(family, tasks) | {
        "limit": 8, "task_search_path": [str(tasks)], "worker": worker,
        "search": {"algorithm": "llm_evo", "seed": 1, "population": 3},
        "budget": {"max_evaluations": 14},
    }  # fmt: skip


@pytest.mark.parametrize(("tracker", "workers"), [("wandb", 1), ("mlflow", 2)])
def test_secrets_of_a_config_are_used_and_kept_nowhere(
    tmp_path: Path,
    plugin: dict[str, str],
    real: dict[str, Any],
    tracker: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(tracker)
    echo, runs, store = Echo(), tmp_path / "runs", tmp_path / "tracked"
    store.mkdir()
    environment = plugin | {
        "MINE": MINE, "WANDB_MODE": "offline", "WANDB_DIR": str(store), "WANDB_API_KEY": KEY * 3,
        "WANDB_DATA_DIR": str(store), "WANDB_CACHE_DIR": str(store),
        "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": (store / "ml").as_uri(),
    }  # fmt: skip
    path = tmp_path / "config.yml"
    with echo.server as server:
        address = server.base_url.replace("://", f"://me:{PASSWORD}@")
        agents = {"llm": "openai:m", "base_url": address, "api_key_env": "none", "max_retries": 0}
        real["worker"]["count"] = workers
        path.write_text(yaml.safe_dump(real | {"agents": agents}))
        typed = ["--base-url", address] if workers == 1 else []
        code, said = cli(
            "run", path, "--name", "a", "--runs-dir", runs, "--tracker", tracker, *typed,
            **environment,
        )  # fmt: skip
        assert code == 0, said
        basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        assert {r.headers["authorization"] for r in server.requests} == {f"Basic {basic}"}
    assert "logged in with [redacted]" in said
    assert "stands in its place, and `resume` and `branch` need it" in said
    merged = tmp_path / "merged"
    code, exported = cli(
        "export", "a", "--to", merged, "--runs-dir", runs,
        **environment | {"AGENTMERGE_SECRET_TOKEN": TOKEN},
    )  # fmt: skip
    assert code == 0, exported
    said += exported
    assert {"README.md", "config.json", "mergekit_config.yml"} <= {f.name for f in merged.iterdir()}
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    shown = looked_at(runs, tmp_path / "out", monkeypatch, capsys)
    failures = [c.failure for c in candidates(runs)]
    assert any(f == "403 for [redacted] ([redacted])" for f in failures), failures
    assert nowhere(everything_in(tmp_path, path, tmp_path / "plugin" / "leaky.py")) > 100_000
    nowhere(iter([(Path("screen"), (said + shown).encode())]))
    kept = yaml.safe_load((runs / "a" / "config.yml").read_text())
    assert kept["worker"]["options"]["token"] == "${AGENTMERGE_SECRET_TOKEN}"
    assert kept["worker"]["options"]["headers"] == {"Authorization": "Bearer ${MINE}"}
    assert "//${AGENTMERGE_SECRET_BASE_URL}@127.0.0.1" in kept["agents"]["base_url"]


def candidates(runs: Path) -> list[Any]:
    with Ledger(runs / driving.LEDGER, read_only=True) as ledger:
        return ledger.candidates(ledger.run("a").id)


def test_a_resume_is_given_its_secrets_again(
    tmp_path: Path, plugin: dict[str, str], real: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    runs, path = tmp_path / "runs", tmp_path / "config.yml"
    monkeypatch.syspath_prepend(tmp_path / "plugin")
    path.write_text(yaml.safe_dump(real | {"budget": {"max_evaluations": 8}}))

    def line(*words: str, **environment: str) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(redaction, "_named", {})
            patch.setattr(redaction, "_values", set())
            for name, value in environment.items():
                patch.setenv(name, value)
            return run_app([*words, "--runs-dir", str(runs)]), capsys.readouterr().err

    code, said = line("run", str(path), "--name", "a")
    assert code == 2
    assert "worker.options.headers.Authorization refers to ${MINE}" in said
    assert "export MINE=..." in said
    code, said = line("run", str(path), "--name", "a", MINE=MINE)
    assert code == 0, said
    more = ["resume", "a", "--max-evaluations", "12"]
    code, said = line(*more, MINE=MINE)
    assert code == 2, said
    assert "${AGENTMERGE_SECRET_TOKEN}" in said
    assert "which no file keeps; export AGENTMERGE_SECRET_TOKEN=..." in said
    code, said = line(*more, MINE=MINE, AGENTMERGE_SECRET_TOKEN=TOKEN)
    assert code == 0, said
    assert len(candidates(runs)) > 9
    # What a variable holds is looked for there, without a new name.
    code, said = line("run", str(path), "--name", "b", MINE=MINE, LOGIN_TOKEN=TOKEN)
    assert code == 0, said
    assert "${LOGIN_TOKEN}" in (runs / "b" / "config.yml").read_text()
    nowhere(everything_in(tmp_path, path, tmp_path / "plugin" / "leaky.py"))


def test_a_ledger_of_before_goes_on_and_is_shown_without(tmp_path: Path) -> None:
    body = {"worker": {"options": {"token": TOKEN}}, "budget": {"max_evaluations": 8}}
    driving.run(config(budget={"max_evaluations": 8}), name="a", runs_dir=tmp_path)
    with closing(sqlite3.connect(tmp_path / driving.LEDGER)) as conn:
        (text,) = conn.execute("SELECT config FROM runs").fetchone()
        old = yaml.safe_load(text)
        old["worker"]["options"] |= body["worker"]["options"]
        conn.execute("UPDATE runs SET config = ?", (yaml.safe_dump(old),))
        conn.commit()
    (tmp_path / "a" / "config.yml").write_text("")
    assert run_app(["report", "a", "--runs-dir", str(tmp_path)]) == 0
    out = str(tmp_path / "parquet")
    assert run_app(["ledger", "export", "--runs-dir", str(tmp_path), "--to", out]) == 0
    nowhere(everything_in(tmp_path, tmp_path / driving.LEDGER))
    made = []
    init = FakeWorker.__init__

    def spying(self: Any, spec: Any, taskset: Any = None) -> None:
        made.append(spec.options["token"])
        init(self, spec, taskset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeWorker, "__init__", spying)
        row = driving.resume("a", runs_dir=tmp_path, overrides={"budget.max_evaluations": 14})
    assert made == [TOKEN], "the search itself had it"
    assert "${AGENTMERGE_SECRET_TOKEN}" in row.config
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        stored = ledger.records("SELECT config FROM runs")[0]["config"]
    assert TOKEN not in stored


def test_an_error_that_ends_a_search_is_kept_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """LangGraph keeps a node's error in its checkpoints; one nobody expected goes to a file."""
    path = tmp_path / "config.yml"
    path.write_text(config_text(worker={"options": {"token": TOKEN}}))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken(*_: Any) -> None:
        raise RunFailed(f"no login with {TOKEN} at http://me:{PASSWORD}@host")

    monkeypatch.setattr(FakeWorker, "load", broken)
    run = ["run", str(path), "--runs-dir", str(tmp_path)]
    assert run_app(run) == 1
    monkeypatch.setattr("agentmerge.search.search.Search.scoring", property(lambda _: {}[TOKEN]))
    assert run_app(run) == 1
    said = capsys.readouterr()
    assert "details in" in said.err
    assert list(tmp_path.glob("agentmerge-crash-*"))
    nowhere(everything_in(tmp_path, path))
    nowhere(iter([(Path("screen"), (said.out + said.err).encode())]))


def agents_of(text: str, **overrides: str) -> SearchConfig:
    return SearchConfig.from_text(config_text(agents=yaml.safe_load(text)), "c", overrides)


def key_sent(settings: SearchConfig) -> list[str]:
    keys = {
        chat.openai_api_key.get_secret_value()
        for _, model in models_for(settings, {})
        for chat in [model.chat]
    }
    return sorted(keys)


class TestWhoseKey:
    """A config that brings its own server says which key that may have."""

    @pytest.fixture(autouse=True)
    def keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("MY_SERVERS", MINE)
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    @pytest.mark.parametrize(
        "host", ["evil.example", "192.168.1.9", "localhost.evil.example", "127.0.0.1.evil.example",
                 "me:pw@evil.example", "[2001:db8::1]"],
    )  # fmt: skip
    def test_another_machine_gets_none_that_is_not_named(self, host: str) -> None:
        text = f"{{llm: 'openai:m', base_url: 'https://{host}/v1'}}"
        with pytest.raises(UserError, match=r"add `api_key_env: OPENAI_API_KEY` beside base_url"):
            key_sent(agents_of(text))
        role = f"critic: {{model: 'openai:m', base_url: 'https://{host}/v1'}}"
        typed = {"agents.base_url": "https://mine.example/v1", "agents.api_key_env": "default"}
        with pytest.raises(UserError, match="does not say which key"):
            key_sent(agents_of(f"{{llm: 'openai:m', {role}}}", **typed))

    @pytest.mark.parametrize(
        "host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "a.localhost"]
    )
    def test_a_server_of_this_machine_gets_a_placeholder(self, host: str) -> None:
        text = f"{{llm: 'openai:m', base_url: 'http://{host}:8000/v1'}}"
        assert key_sent(agents_of(text)) == ["none"]

    @pytest.mark.parametrize(
        ("named", "key"), [("OPENAI_API_KEY", KEY), ("MY_SERVERS", MINE), ("none", "none"),
                           ("default", KEY)],
    )  # fmt: skip
    def test_a_key_that_is_named_is_sent_and_said(self, named: str, key: str) -> None:
        text = f"{{llm: 'openai:m', base_url: 'https://h.example/v1', api_key_env: {named}}}"
        settings = agents_of(text)
        assert key_sent(settings) == [key]
        again = SearchConfig.from_text(settings.to_yaml())
        assert again.agents == settings.agents
        told = [n for n in settings.notices if n.endswith(f"{named} holds is sent to h.example")]
        assert len(told) == named.isupper()

    def test_a_variable_that_is_not_set_is_told(self) -> None:
        text = "{llm: 'openai:m', base_url: 'https://h.example/v1', api_key_env: NO_SUCH_KEY}"
        with pytest.raises(UserError, match=r"NO_SUCH_KEY is not set, and agents.api_key_env"):
            key_sent(agents_of(text))

    def test_a_key_in_the_place_of_its_name_is_not_shown(self) -> None:
        text = "{llm: 'openai:m', base_url: 'https://h.example/v1', api_key_env: sk-9-1}"
        with pytest.raises(UserError, match="write the name and not the key") as refused:
            agents_of(text)
        assert "sk-9-1" not in str(refused.value)

    def test_a_server_that_the_user_types_may_have_the_key(self, monkeypatch) -> None:
        typed = {"agents.base_url": "https://mine.example/v1"}
        settings = agents_of("{llm: 'openai:m', base_url: 'https://other.example/v1'}", **typed)
        assert key_sent(settings) == [KEY]
        resumed = SearchConfig.from_text(settings.to_yaml())
        assert key_sent(resumed) == [KEY], "and has it again on resume"
        monkeypatch.delenv("OPENAI_API_KEY")
        assert key_sent(resumed) == ["none"], "a server of one's own may need none"

    def test_the_environments_own_server_may_have_the_key(self, monkeypatch) -> None:
        monkeypatch.setenv("OPENAI_BASE_URL", "https://mine.example/v1")
        assert key_sent(agents_of("{llm: 'openai:m'}")) == [KEY]

    def test_a_named_key_is_for_one_server(self) -> None:
        text = """{llm: 'openai:m', base_url: 'https://h.example/v1', api_key_env: MY_SERVERS,
            critic: {model: 'openai:n', base_url: 'http://localhost:1/v1'},
            proposer: 'openai:o'}"""
        assert key_sent(agents_of(text)) == [MINE, "none"]

    def test_a_search_of_before_is_resumed_once_a_key_is_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        driving.run(config(budget={"max_evaluations": 8}), name="a", runs_dir=tmp_path)
        with closing(sqlite3.connect(tmp_path / driving.LEDGER)) as conn:
            (text,) = conn.execute("SELECT config FROM runs").fetchone()
            old = yaml.safe_load(text)
            old["agents"] |= {"llm": "openai:m", "base_url": "http://nowhere.invalid/v1"}
            old["agents"] |= {"max_retries": 0, "timeout_s": 1.0}
            conn.execute("UPDATE runs SET config = ?", (yaml.safe_dump(old),))
            conn.commit()
        resume = ["resume", "a", "--runs-dir", str(tmp_path), "--max-evaluations", "12"]
        assert run_app(resume) == 2
        assert "(or --api-key-env OPENAI_API_KEY)" in capsys.readouterr().err
        assert run_app(["show", "a", "--runs-dir", str(tmp_path)]) == 0
        assert run_app([*resume, "--api-key-env", "MY_SERVERS"]) == 0
        with Ledger(tmp_path / driving.LEDGER) as ledger:
            assert "api_key_env: MY_SERVERS" in ledger.run("a").config


@pytest.mark.parametrize(
    ("key", "text"),
    [("pad_token", "<pad>"), ("max_length", "4096"), ("attn_implementation", "eager"),
     ("model", "/models/sk-llama-3-8b-instruct"), ("tokens", "all of them and many more"),
     ("image_token", "<|vision_start|>")],
)  # fmt: skip
def test_what_is_no_secret_stays_in_a_config(key: str, text: str) -> None:
    assert hidden({key: text}) == {key: text}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"hf_token": "short1"}, {"hf_token": "${AGENTMERGE_SECRET_HF_TOKEN}"}),
        ({"url": "https://a:b@h/x"}, {"url": "https://${AGENTMERGE_SECRET_URL}@h/x"}),
        (
            {"url": "https://h/x?a=1&api_key=secret99&b=2"},
            {"url": "https://h/x?a=1&api_key=${AGENTMERGE_SECRET_URL}&b=2"},
        ),
        ({"args": ["-H", "Bearer abc123"]}, {"args": ["-H", "Bearer ${AGENTMERGE_SECRET_ARGS}"]}),
        ({"a": {"password": "x y"}}, {"a": {"password": "${AGENTMERGE_SECRET_PASSWORD}"}}),
        ({"n": "hf_" + "A1b2" * 8}, {"n": "${AGENTMERGE_SECRET_N}"}),
    ],
)
def test_a_secret_of_a_config_has_a_name_and_is_read_back(options: dict, shown: dict) -> None:
    assert hidden(options) == shown
    assert hidden(shown) == shown
    assert revealed(shown, "options") == options


def test_two_secrets_under_one_key_have_two_names() -> None:
    one, two = {"token": "first-one"}, {"token": "second-one"}
    assert [hidden(one), hidden(two), hidden(one)] == [
        {"token": "${AGENTMERGE_SECRET_TOKEN}"},
        {"token": "${AGENTMERGE_SECRET_TOKEN_2}"},
        {"token": "${AGENTMERGE_SECRET_TOKEN}"},
    ]
    assert revealed(hidden(two), "x") == two


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("TOKENIZERS_PARALLELISM is disabled", True),
        ("see /home/me/tokens.txt in the home", True),
        ("models/sk-llama and a risk-based task-sketch", True),
        ("HTTP 401: Authorization: Token abcdef12", False),
        ('{"api_key": "abcdef12"}', False),
        ("GET https://h/x?X-Amz-Signature=abcdef12&y=1", False),
        ("postgres://me:abcdef12@db/x", False),
        ("hf_abcdef12ABCDEF34xyz", False),
        ("sk-proj-abcdef12-0123456789", False),
    ],
)
def test_shapes(text: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/tokens.txt")
    assert ("[redacted]" not in redact(text)) == kept
    assert kept or "abcdef12" not in redact(text)
