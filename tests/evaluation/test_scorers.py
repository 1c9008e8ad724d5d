"""A scorer of a plugin judges what a real model generates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

from agentmerge import plugins
from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import AnswerRefused, TaskError
from agentmerge.evaluation.building import tasks_for
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker

SHARE = """
def letters(document, answers):
    return sum(a == b for a, b in zip(document["gold"], answers[0])) / 4

class Spent:
    higher_is_better = False

    def __call__(self, document, answers):
        return len(answers[0])

spent = Spent()

def stumbles(document, answers):
    raise LookupError("no such answer")
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a package with scorers."""
    file = tmp_path / "judges_of_tests.py"
    file.write_text(SHARE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("letters", "spent", "stumbles"):
        points = plugins._BUILT_IN["agentmerge.scorers"]
        monkeypatch.setitem(points, name, f"judges_of_tests:{name}")
    sys.modules.pop("judges_of_tests", None)
    return file


def spec_of(parent: Path, tasks_dir: Path, *tasks: dict[str, str]) -> WorkerSpec:
    config = TasksConfig(
        tasks=tasks, task_search_path=(str(tasks_dir),), limit=12, sealed_share=0.0,
        apply_chat_template=False,
    )  # fmt: skip
    return WorkerSpec("hf", (("a", str(parent)),), "a", config, "float32", 8)


def test_answers_are_worth_what_the_scorer_says(parent: Path, tasks_dir: Path) -> None:
    spec = spec_of(parent, tasks_dir, {"name": "tiny_answer", "scorer": "letters"})
    taskset = tasks_for(spec)
    (task,) = taskset.tasks
    assert (task.metric, task.higher_is_better, task.margin_kind) == ("letters", True, "token")
    asked = taskset.asked["tiny_answer"].requests
    docs = [asked[ref.index][0].doc for ref in task.items]
    said = tiny.greedy(parent, [doc["q"] for doc in docs], 4)
    expected = [
        sum(a == b for a, b in zip(doc["gold"], text, strict=False)) / 4
        for doc, text in zip(docs, said, strict=True)
    ]
    worker = HfWorker(spec, taskset)
    worker.load(Recipe.of_model("a", 2, "float32").canonical(2))
    results = worker.score(task.items)
    worker.close()
    assert [result.value for result in results] == expected
    assert 0 < sum(expected) < len(expected)
    score = taskset.score(dict(zip(task.items, results, strict=True)))
    assert score.value == pytest.approx(sum(expected) / len(expected))


def test_less_can_be_better(parent: Path, tasks_dir: Path) -> None:
    spec = spec_of(parent, tasks_dir, {"name": "tiny_answer", "scorer": "spent"})
    taskset = tasks_for(spec)
    assert not taskset.tasks[0].higher_is_better
    assert taskset.objectives[0].signed_weight == -1.0
    assert taskset.is_mean(taskset.objectives[0])


def test_what_it_raises_is_the_candidates_failure(parent: Path, tasks_dir: Path) -> None:
    spec = spec_of(
        parent, tasks_dir, {"name": "tiny_answer", "scorer": "stumbles", "metric": "stumbles,none"}
    )
    taskset = tasks_for(spec)
    worker = HfWorker(spec, taskset)
    worker.load(Recipe.of_model("a", 2, "float32").canonical(2))
    with pytest.raises(AnswerRefused, match="no such answer"):
        worker.score(taskset.tasks[0].items)
    worker.close()


def test_another_scorer_or_other_code_is_another_protocol(
    parent: Path, tasks_dir: Path, installed: Path
) -> None:
    def protocol(**scorer: str) -> str:
        sys.modules.pop("judges_of_tests", None)
        spec = spec_of(parent, tasks_dir, {"name": "tiny_answer"} | scorer)
        return tasks_for(spec).tasks[0].protocol_hash

    plain = protocol(metric="exact_match,none")
    first = protocol(scorer="letters")
    assert len({plain, first, protocol(scorer="spent")}) == 3
    assert protocol(scorer="letters") == first
    installed.write_text(SHARE.replace("/ 4", "/ 5"))
    assert protocol(scorer="letters") != first


def test_only_what_is_generated_can_be_judged(parent: Path, tasks_dir: Path) -> None:
    spec = spec_of(parent, tasks_dir, {"name": "tiny_choice", "scorer": "letters"})
    with pytest.raises(TaskError, match="judges what models generate, and task 'tiny_choice'"):
        tasks_for(spec)


def test_a_config_without_a_scorer_is_stored_as_ever() -> None:
    plain = TasksConfig(tasks=({"name": "one"},))
    assert plain.model_dump()["tasks"] == ({"name": "one", "weight": 1.0, "metric": "acc,none"},)
    judged = TasksConfig(tasks=({"name": "one", "scorer": "letters"},))
    assert TasksConfig(**judged.model_dump()) == judged
