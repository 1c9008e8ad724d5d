"""What a killed process leaves half made is found by gc, and what a living one uses is not."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import agentmerge
from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.errors import WorkerLost
from agentmerge.parents.headers import MADE
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.session.checkpoints import open_saver
from agentmerge.session.gc import discard_leftovers, discard_made_parents, prune_checkpoints
from agentmerge.system.temporary import (
    Unfinished,
    crash_file,
    replacing,
    temporary_folder,
    write_at_once,
)
from agentmerge.workers.pool import Pool

PACKAGE = Path(agentmerge.__file__).parent

#: Makes a thing of each kind under the folder argv[1], says where they are, and waits.
MAKES = {
    "export": """
from agentmerge.parents.writing import directory_at_once
with directory_at_once(home / "deep" / "merged") as made:
    (made / "model.safetensors").write_bytes(bytes(1000))
    wait(made)
""",
    "replay": """
from agentmerge.system.temporary import temporary_folder
with temporary_folder("agentmerge-replay") as made:
    (made / "agentmerge.sqlite").write_bytes(bytes(1000))
    wait(made)
""",
    "parent": """
from agentmerge.parents import made as making
def make(made):
    (made / "model.safetensors").write_bytes(bytes(1000))
    wait(made)
making.made("renamed", ["a"], make)
""",
    "draft": """
from agentmerge.system.temporary import replacing
(home / "report.html").write_text("the old one")
with replacing(home / "report.html") as made:
    made.write_bytes(bytes(1000))
    wait(made)
""",
    "demo family": """
import agentmerge.demo.family as family
def make(made, **_):
    made.mkdir()
    (made / "model.safetensors").write_bytes(bytes(1000))
    wait(made.parent)
family.make_family = make
family.cached_family(("shift", "sort"), 5)
""",
}
HEAD = """
import sys, time
from pathlib import Path
home = Path(sys.argv[1])
def wait(path):
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temp"))


def removed(dry_run: bool = False) -> list[str]:
    return list(discard_leftovers(dry_run=dry_run)["removed"])


@pytest.mark.parametrize("kind", MAKES)
def test_what_a_killed_process_left_is_removed_and_a_living_ones_is_not(
    kind: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HEAD + MAKES[kind], str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        made = Path(process.stdout.readline().strip())
        assert made.exists()
        assert removed() == []  # it lives
        process.kill()
    assert removed(dry_run=True) == [str(made)]
    assert made.exists()
    assert removed() == [str(made)]
    assert not made.exists()
    assert removed() == []
    if kind == "draft":
        assert (tmp_path / "report.html").read_text() == "the old one"


EXPORT = """
import os, signal, sys
from pathlib import Path
from agentmerge.merging import export
from agentmerge.recipe import Recipe
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.config import TasksConfig
from agentmerge.workers.disk import DiskWorker
base, north, south, to, storage = sys.argv[1:]
whole = export.write_weights
def killed(*arguments):
    for written in whole(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)
        yield written
export.write_weights = killed
text = f'''merge_method: task_arithmetic
base_model: {base}
models: [{{model: {north}, parameters: {{weight: 0.5}}}}, {{model: {south}}}]
dtype: float32
'''
recipe = Recipe.parse(text.replace("{model: " + south + "}",
                                   "{model: " + south + ", parameters: {weight: 0.5}}"))
paths = {name: Path(name) for name in (base, north, south)}
if storage:
    parents = tuple((name, name) for name in paths)
    spec = WorkerSpec(kind="disk", parents=parents, template_model=base, dtype="float32",
                      tasks=TasksConfig.model_construct(), batch_size=1,
                      options={"base": base, "storage": storage})
    DiskWorker(spec).load(recipe.canonical(4))
export.export_checkpoint(recipe, paths, Path(to), template_model=base, base=base, overwrite=True)
"""


@pytest.mark.parametrize("storage", ["", "models"])
def test_a_killed_export_leaves_the_old_one_and_gc_takes_the_half(
    family: TinyFamily, tmp_path: Path, storage: str
) -> None:
    """By an export, and by a disk worker that writes its candidate."""
    to, where = tmp_path / "merged", tmp_path / storage
    to.mkdir()
    (to / "old").write_text("model")
    where.mkdir(exist_ok=True)
    models = [str(path) for path in (family.base, *family.experts)]
    ended = subprocess.run(
        [sys.executable, "-c", EXPORT, *models, str(to), storage and str(where)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (to / "old").read_text() == "model"
    before = {path.name for path in where.iterdir()}
    done = discard_leftovers(dry_run=False)
    assert done["freed_bytes"] > 10_000
    gone = before - {path.name for path in where.iterdir()}
    assert len(gone) == 1
    assert done["removed"]
    assert (to / "old").read_text() == "model"


SWAP = """
import os, signal, sys
from pathlib import Path
from agentmerge.system import temporary
home, at = Path(sys.argv[1]), int(sys.argv[2])
renames, calls = os.rename, []
def rename(*paths):
    calls.append(paths)
    if len(calls) > at:
        os.kill(os.getpid(), signal.SIGKILL)
    renames(*paths)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
os.rename = rename
with temporary.temporary_folder(".new", home) as fresh:
    (fresh / "model").write_text("new")
    temporary.swap_in(fresh, home / "model")
"""


@pytest.mark.parametrize(("at", "found"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_kill_between_two_renames_loses_neither_model(
    tmp_path: Path, at: int, found: str
) -> None:
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    (home / "model" / "model").write_text("old")
    subprocess.run([sys.executable, "-c", SWAP, str(home), str(at)], check=False)
    done = discard_leftovers(dry_run=False)
    assert [path.name for path in home.iterdir()] == ["model"], done
    assert (home / "model" / "model").read_text() == found
    assert done["put_back"] == ([str(home / "model")] if at == 1 else [])


def test_nothing_that_others_made_is_removed(tmp_path: Path) -> None:
    """Neither what only looks like ours, nor what an entry names that has not its number."""
    theirs = tmp_path / "temp" / "agentmerge-replay-0123456789ab"
    theirs.mkdir()
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    register = tmp_path / "cache" / "unfinished"
    register.mkdir(parents=True)
    host = os.uname().nodename
    entries: dict[str, Any] = {
        "0123456789aa": {"path": str(thesis), "host": host, "pid": 1},
        "0123456789ac": {"path": "x-0123456789ac", "host": host, "pid": 1},
        "0123456789ad": {"path": 3, "host": host},
        "0123456789ae": [],
    }
    for key, body in entries.items():
        (register / f"{key}.json").write_text(json.dumps(body))
    link = tmp_path / "x-0123456789af"
    link.symlink_to(thesis)
    body = {"path": str(link), "host": host, "pid": 1}
    (register / "0123456789af.json").write_text(json.dumps(body))
    assert removed() == []
    assert thesis.is_dir()
    assert theirs.is_dir()
    assert link.is_symlink()


def test_of_made_parents_only_those_that_say_so_are_removed(tmp_path: Path) -> None:
    parents = tmp_path / "cache" / "parents"
    ours = parents / ("a" * 24)
    for folder in (ours, parents / ("b" * 24), tmp_path / "thesis"):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(100))
    (ours / MADE).write_text("{}")
    (parents / ("c" * 24)).symlink_to(tmp_path / "thesis")
    for dry_run in (True, False):
        assert discard_made_parents(dry_run=dry_run)["made"] == 1
    left = {path.name for path in parents.iterdir() if not path.name.startswith(".")}
    assert left == {"b" * 24, "c" * 24}
    assert (tmp_path / "thesis" / "model.safetensors").exists()


@pytest.mark.parametrize("how", ["everybody's", "no number", "a pipe", "a link"])
def test_a_shared_caches_other_users_have_nothing_removed(tmp_path: Path, how: str) -> None:
    """An entry that somebody else put there, which names a file of ours by its own name."""
    register = tmp_path / "cache" / "unfinished"
    register.mkdir(parents=True)
    number = "thesis" if how == "no number" else "0123456789ab"
    mine = tmp_path / f"my {number}.tex"
    mine.write_text("years")
    body = json.dumps({"path": str(mine), "host": os.uname().nodename, "pid": 1})
    entry = register / f"{number}.json"
    if how == "a pipe":
        os.mkfifo(entry)
    elif how == "a link":
        (tmp_path / "entry").write_text(body)
        entry.symlink_to(tmp_path / "entry")
    else:
        entry.write_text(body)
        entry.chmod(0o666 if how == "everybody's" else 0o600)
    assert removed() == []
    assert mine.read_text() == "years"


def test_what_another_hosts_process_may_use_is_left_and_named(tmp_path: Path) -> None:
    made = Unfinished(tmp_path / "temp", "agentmerge-disk")
    (entry,) = (tmp_path / "cache" / "unfinished").glob("*.json")
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"host": "elsewhere"}))
    made.keep()
    done = discard_leftovers(dry_run=False)
    assert done["elsewhere"] == [f"{made.path} of elsewhere"]
    assert entry.exists()


def test_without_a_cache_things_are_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "file" / "cache"))
    with temporary_folder("agentmerge-replay") as folder:
        assert folder.is_dir()
    assert not folder.exists()
    write_at_once(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert removed() == []


def test_a_draft_that_fails_leaves_the_file_and_nothing_beside(tmp_path: Path) -> None:
    target, link = tmp_path / "a", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with pytest.raises(OSError, match="None"), replacing(target) as draft:  # noqa: PT012
        draft.write_text("half")
        raise OSError(None)
    assert target.read_text() == "old"
    write_at_once(link, "new")  # what it points to is replaced, as by any program that writes
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"a", "link", "cache", "temp"}


def test_a_crash_file_follows_no_link_and_goes_with_gc(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "temp" / f"agentmerge-crash-{os.getpid()}.txt").symlink_to(victim)
    path = crash_file("Traceback")
    assert path.stat().st_mode & 0o777 == 0o600
    assert victim.read_text() == "mine"
    assert removed() == [str(path)]


def test_checkpoints_of_a_forgotten_search_go(
    tmp_path: Path, fake_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a prune that was killed between the two databases left them; others' threads stay."""
    runs = tmp_path / "runs"
    config = SearchConfig.from_text(fake_config)
    rows = [driving.run(config, name=name, runs_dir=runs) for name in ("a", "b")]
    with open_saver(runs / driving.CHECKPOINTS) as saver:
        saver.copy_thread(rows[0].id, "a thread of another graph")
    with sqlite3.connect(runs / driving.LEDGER) as conn:
        conn.execute("DELETE FROM runs WHERE name = 'a'")
    conn.close()
    assert run_app(["gc", "--dry-run", "--json", "--runs-dir", str(runs)]) == 0
    would = json.loads(capsys.readouterr().out)
    found = prune_checkpoints(runs, dry_run=False)
    assert found["checkpoints"] == would["checkpoints"]
    with open_saver(runs / driving.CHECKPOINTS) as saver, saver.cursor() as cur:
        cur.execute("SELECT DISTINCT thread_id FROM checkpoints ORDER BY thread_id")
        threads = {row[0] for row in cur.fetchall()}
    assert threads == {rows[1].id, "a thread of another graph"}


def test_gc_works_without_a_runs_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--runs-dir", str(tmp_path / "none")]
    assert run_app(["gc", *where]) == 2
    path = crash_file("Traceback")
    assert run_app(["gc", *where]) == 0
    assert str(path) in capsys.readouterr().out


def test_every_temporary_file_of_the_package_is_in_the_register() -> None:
    """Made through ``temporary.py``; drafts have no names of their own making."""
    own = re.compile(
        r"mkdtemp|mkstemp|TemporaryDirectory|NamedTemporaryFile|gettempdir|\.tmp\b|uuid4\(\)\.hex\["
    )
    found = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if own.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"system/temporary.py"}


def test_results_are_swapped_in_whole(
    tmp_path: Path, fake_config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full while a result is written leaves the one that was there."""
    runs, out = tmp_path / "runs", tmp_path / "out"
    driving.run(SearchConfig.from_text(fake_config), name="a", runs_dir=runs)
    out.mkdir()
    commands: dict[Path, list[str]] = {
        out / "report.html": ["report", "a", "--to", str(out / "report.html")],
        out / "items.parquet": ["ledger", "export", "--to", str(out)],
    }
    for path, command in commands.items():
        assert run_app([*command, "--runs-dir", str(runs)]) == 0
        before = path.read_bytes()
        with monkeypatch.context() as broken:
            broken.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
            assert run_app([*command, "--runs-dir", str(runs)]) == 2
        assert path.read_bytes() == before
        assert [file.name for file in out.iterdir() if file.name.startswith(".")] == []
    assert yaml.safe_load((runs / "a" / "config.yml").read_text())["budget"]


class _Writes:
    """A worker that dies while it writes a candidate."""

    def __init__(self, spec: Any, taskset: Any) -> None:
        from agentmerge.system.temporary import TemporaryFolder

        self._scratch = TemporaryFolder("agentmerge-disk", spec.options["storage"])
        (self._scratch.path / "model.safetensors").write_bytes(bytes(1000))
        self.info = None

    def load(self, recipe: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_workers_half_candidate_does_not_wait_for_gc(
    tmp_path: Path, fake_config: str
) -> None:
    """The worker that takes its place writes one of its own; another's stay."""
    from dataclasses import replace

    from agentmerge.preflight.prepare import prepare

    storage = tmp_path / "storage"
    storage.mkdir()
    prepared = prepare(SearchConfig.from_text(fake_config))
    recipe, spec = Recipe.of_model("north", prepared.space.num_layers), prepared.spec
    spec = replace(spec, options={"storage": str(storage)})
    living = Unfinished(storage, "agentmerge-disk")
    living.path.mkdir()
    with Pool(spec, count=2, make=_Writes) as pool:
        with pytest.raises(WorkerLost):
            pool.evaluate(recipe, [])
        assert [path.name for path in storage.iterdir()] == [living.path.name]
    living.close()
