"""A program of the user's judges what a real model generates: lines in, lines out, faults."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from agentmerge.config import SearchConfig, TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import AnswerRefused, ConfigError, TaskError, UserError
from agentmerge.evaluation.building import tasks_for
from agentmerge.evaluation.scripts import read_verdicts
from agentmerge.preflight.anchoring import anchored
from agentmerge.recipe import Recipe
from agentmerge.session.clients import client_changes, client_config
from agentmerge.workers.hf import HfWorker

#: Letters of the answer that are in the document's gold one; keeps what it was told beside itself.
SCRIPT = """
import json, sys, pathlib
lines = [json.loads(line) for line in sys.stdin]
pathlib.Path(__file__).with_name("told.json").write_text(json.dumps(lines))
for told in reversed(lines):
    right = sum(a == b for a, b in zip(told["document"]["gold"], told["answers"][0]))
    print(json.dumps({"id": told["id"], "score": right, "margin": right - 2.5, "details": "x"}))
"""
WHOSE = "the scorer of task 't'"


def spec_of(parent: Path, tasks_dir: Path, script: str, **more: Any) -> WorkerSpec:
    file = tasks_dir / "judge.py"
    file.write_text(script)
    scorer = {"command": [sys.executable, str(file)], "range": [0, 4], **more}
    config = TasksConfig(
        tasks=({"name": "tiny_answer", "scorer": scorer},), task_search_path=(str(tasks_dir),),
        limit=12, sealed_share=0.0,
    )  # fmt: skip
    return WorkerSpec("hf", (("a", str(parent)),), "a", config, "float32", 8)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory, parent: Path) -> Path:
    return tiny.write_model(
        tmp_path_factory.mktemp("talker") / "a", seed=3, near=parent, template=tiny.TEMPLATE
    )


@pytest.fixture(scope="module")
def worker(talker: Path, tasks_dir: Path) -> Any:
    """One whose program is there to be replaced."""
    spec = spec_of(talker, tasks_dir, SCRIPT, timeout_s=20)
    made = HfWorker(spec, tasks_for(spec))
    made.load(Recipe.of_model("a", 2, "float32").canonical(2))
    yield made, tasks_for(spec).tasks[0], tasks_dir / "judge.py"
    made.close()


def test_answers_are_worth_what_the_program_says(worker: Any) -> None:
    made, task, file = worker
    results = made.score(task.items)
    told = json.loads((file.parent / "told.json").read_text())
    assert [entry["id"] for entry in told] == [ref.index for ref in task.items]
    for entry, result in zip(told, results, strict=True):
        pairs = zip(entry["document"]["gold"], entry["answers"][0], strict=False)
        right = sum(a == b for a, b in pairs)
        assert (result.value, result.margin, result.log_likelihood) == (right, right - 2.5, None)
        assert (list(result.answers), result.reasons) == (entry["answers"], ("x",))
        assert entry["messages"] == [{"role": "user", "content": entry["document"]["q"]}]
        assert entry["prompt"] == f"<s>[u]{entry['document']['q']}#[a]"
    assert len({result.value for result in results}) > 1
    assert (task.metric, task.margin_kind, task.higher_is_better) == ("command", None, True)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import sys; sys.exit('no dictionary')", "exit code 1; it wrote: no dictionary"),
        ('print(\'{"id": 0, "score": 9}\')', "line 1 of .* has score 9, outside the range from 0"),
        ("print('\\n{}')", "line 2 of .* has no id"),
    ],
)
def test_a_program_that_fails_is_the_candidates_failure(
    worker: Any, script: str, words: str
) -> None:
    made, task, file = worker
    file.write_text(script)
    with pytest.raises(AnswerRefused, match=words):
        made.score(task.items)
    file.write_text(SCRIPT)
    assert len(made.score(task.items[:3])) == 3, "the worker stays usable"


def test_a_late_program_is_ended(parent: Path, tasks_dir: Path) -> None:
    from agentmerge.config import ScorerCommand
    from agentmerge.evaluation.scripts import verdicts

    code = 'import time; print(\'{"id": 1, "score": 1}\', flush=True); time.sleep(600)'
    scorer = ScorerCommand(command=(sys.executable, "-S", "-c", code), timeout_s=1)
    with pytest.raises(AnswerRefused, match="not done after 1 s, with 1 lines printed"):
        verdicts(scorer, "t", {1: {}, 2: {}})


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("no", "is not JSON: no"),
        ("[" * 100_000, r"is not JSON: \[\["),
        ("[1]", "is no JSON object"),
        ('{"id": 1}', "has no score"),
        ('{"id": "1", "score": 1}', "has id '1', which is no whole number"),
        ('{"id": true, "score": 1}', "has id 'True', which is no whole number"),
        ('{"id": 3, "score": 1}', "has id 3, which was not asked"),
        ('{"id": 2, "score": 1}', "is a second one for id 2"),
        ('{"id": 1, "score": "1"}', "has score '1', which is no number"),
        ('{"id": 1, "score": true}', "has score 'True', which is no number"),
        ('{"id": 1, "score": NaN}', "has score nan, which is not finite"),
        ('{"id": 1, "score": 1' + "0" * 400 + "}", "has score 10+, which is not finite"),
        ('{"id": 1, "score": -0.1}', "has score -0.1, outside the range from 0 to 1"),
        ('{"id": 1, "score": 1, "margin": Infinity}', "has margin inf, which is not finite"),
        ('{"id": 1, "score": 1, "Margin": 1}', "has a key 'Margin'; id, score, margin and details"),
    ],
)
def test_a_wrong_line_is_named(line: str, fault: str) -> None:
    with pytest.raises(AnswerRefused, match=f"^line 2 of {WHOSE} {fault}"):
        read_verdicts(['{"id": 2, "score": 1}', line], [1, 2], (0.0, 1.0), WHOSE)


def test_no_secret_of_its_client_is_kept() -> None:
    key = "sk-proj-" + "a1B2" * 30
    for said in (f"401 Incorrect API key provided: {key}", {"error": [f"{'x' * 455}: {key}"]}):
        line = json.dumps({"id": 1, "score": 0, "details": said})
        why = read_verdicts([line], [1], (0.0, 1.0), WHOSE)[1].details
        assert "a1B2" not in why
        assert "redacted" in why


def test_a_missing_line_is_named() -> None:
    with pytest.raises(AnswerRefused, match="gave no line for id 1, and so for 2 of 3 items"):
        read_verdicts(['{"id": 2, "score": 1}', ""], [1, 2, 3], (0.0, 1.0), WHOSE)


def test_program_and_range_are_part_of_the_protocol(parent: Path, tasks_dir: Path) -> None:
    def protocol(script: str = SCRIPT, **more: Any) -> str:
        spec = spec_of(parent, tasks_dir, script, **more)
        return tasks_for(spec, check_built_ins=False).tasks[0].protocol_hash

    first = protocol()
    assert protocol(timeout_s=7) == first
    assert len({first, protocol(SCRIPT + "#"), protocol(range=[0, 5])}) == 3
    spec = spec_of(parent, tasks_dir, SCRIPT, higher_is_better=False)
    lower = tasks_for(spec, check_built_ins=False)
    assert lower.objectives[0].signed_weight == -1.0


def test_a_function_of_a_file_judges_where_its_folder_was_named(
    parent: Path, tasks_dir: Path, tmp_path: Path
) -> None:
    code = "import words_beside\ndef share(document, answers):\n    return words_beside.share\n"
    (tasks_dir / "words_beside.py").write_text("share = 0.5\n")

    def taskset(scorer: str, run_code: bool = True) -> Any:
        config = TasksConfig(
            tasks=({"name": "tiny_answer", "scorer": scorer},), limit=3, sealed_share=0.0,
            task_search_path=(str(tasks_dir),), apply_chat_template=False,
        )  # fmt: skip
        spec = WorkerSpec("hf", (("a", str(parent)),), "a", config, "float32", 8)
        return tasks_for(spec, check_built_ins=False, run_code=run_code)

    for folder in (tasks_dir, tmp_path):
        (folder / "mine.py").write_text(code)
    found = taskset("mine.py:share")
    assert found.tasks[0].metric == "share"
    document = found.asked["tiny_answer"].requests[0][0].doc
    assert found.asked["tiny_answer"].task.process_results(document, ["a"]) == {"share": 0.5}
    (tasks_dir / "words_beside.py").write_text("share = 0.25\n")
    assert taskset("mine.py:share").tasks[0].protocol_hash != found.tasks[0].protocol_hash
    assert not taskset("mine.py:share", run_code=False).tasks
    assert f"share in {tasks_dir / 'mine.py'}" in taskset("mine.py:share", False).notes[-1]
    for elsewhere in (str(tmp_path / "mine.py"), "../mine.py"):
        for run_code in (True, False):
            with pytest.raises(TaskError, match="is in none of the folders of task_search_path"):
                taskset(f"{elsewhere}:share", run_code)
    with pytest.raises(TaskError, match="has no function 'other'"):
        taskset("mine.py:other")


CONFIG = {
    "genome": {"models": ["a", "b"], "merge_method": "linear"},
    "tasks": [{"name": "t", "scorer": {"command": ["python", "s.py", "pkg"]}}],
}


def config_of(scorer: Any) -> SearchConfig:
    return SearchConfig.from_text(json.dumps(CONFIG | {"tasks": [{"name": "t", "scorer": scorer}]}))


def test_files_of_a_command_are_the_same_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("s.py", "python"):
        (tmp_path / file).write_text("")
    (tmp_path / "pkg").mkdir()
    config = config_of({"command": ["python", "s.py", "pkg"]})
    assert anchored(config).tasks.tasks[0].scorer.command == (
        "python", str(tmp_path / "s.py"), "pkg",
    )  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path / "pkg"))
    (tmp_path / "pkg" / "judge").write_text("")
    words = ["~/judge", "-c", "x" * 300, "--rubric=s.py", "~nobody-of-that-name/x"]
    assert anchored(config_of({"command": words})).tasks.tasks[0].scorer.command == (
        str(tmp_path / "pkg" / "judge"), *words[1:3], f"--rubric={tmp_path / 's.py'}", words[4],
    )  # fmt: skip
    again = SearchConfig.from_text(config.to_yaml())
    assert again.tasks == config.tasks
    assert config.tasks.tasks[0].metric == "command,none"


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ({"command": []}, "command is empty"),
        ({"range": [0, 1]}, r"tasks\.0\.scorer\.command is missing"),
        ({"command": ["x"], "range": [1, 1]}, r"range \[1.0, 1.0\] must go from a lower"),
        ({"command": ["x"], "scale": 3}, r"tasks\.0\.scorer\.scale is not a known key"),
        ({"command": ["x", "--key=sk-" + "a1" * 12]}, "command has a secret in it"),
    ],
)
def test_faults_of_a_command_are_said_in_one_sentence(scorer: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as found:
        config_of(scorer)
    assert len(found.value.faults) == 1
    assert "a1a1" not in str(found.value)


def test_a_servers_client_names_no_code() -> None:
    for scorer in ("s.py:f", {"command": ["python"]}):
        asked = json.dumps(CONFIG | {"tasks": [{"name": "t", "scorer": scorer}]})
        with pytest.raises(UserError, match="is code, and the server's own"):
            client_config(asked)
        own = config_of(scorer)
        assert client_changes({"search.seed": 1}, own) == {"search.seed": 1}
        with pytest.raises(UserError, match="is code, and the server's own"):
            client_changes({"tasks": json.loads(asked)["tasks"]}, config_of("letters"))
