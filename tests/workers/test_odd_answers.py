"""A task's own code that raises at one candidate's answer: that candidate fails, nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from agentmerge.config import SearchConfig
from agentmerge.errors import AnswerRefused, CandidateFailed, ConfigError, TaskError
from agentmerge.evaluation import metrics
from agentmerge.ledger import Ledger
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.workers.hf import HfWorker

#: What each stage of a task's own code does with an answer that it does not know.
CODE = """\
def known(doc, answer):
    if answer not in doc["known"]:
        raise LookupError("never heard of it")
    return answer


def judge(doc, results):
    return {"acc": float(known(doc, results[0]) == doc["known"][0])}


def trusting(doc, results):
    return {"acc": float(results[0] == doc["known"][0])}


def nothing(doc, results):
    return {"acc": float(not results[0]) if results[0] in ["", *doc["known"]] else None}


def strict(resps, docs):
    for answers, doc in zip(resps, docs):
        for answer in answers:
            known(doc, answer)
    return [answers for answers in resps]


def total(values):
    if min(values) < 0:
        raise ValueError("below zero")
    return sum(values) / len(values)
"""


def write(place: Path, parents: dict[str, Path], body: str, known: int = 3) -> Path:
    """A task whose documents list what the first ``known`` parents say, in generated answers."""
    asked = tiny.prompts(12, 1)
    said = [answers(path, asked) for path in list(parents.values())[:known]]
    docs = [{"q": q, "known": list(answers)} for q, *answers in zip(asked, *said, strict=True)]
    kwargs = {"until": ["\n"], "do_sample": False, "max_gen_toks": 4}
    path = tiny.write_task(
        place, "tiny_odd", docs, "generate_until", doc_to_target="{{known[0]}}",
        generation_kwargs=kwargs,
    )  # fmt: skip
    path.write_text(path.read_text() + body)
    (place / "odd.py").write_text(CODE)
    return place


def answers(path: Path, asked: list[str]) -> list[str]:
    """As lm-eval reads them: up to the end of text or of the line, without special tokens."""
    said = [text.split("</s>")[0] for text in tiny.raw(path, asked, 4)]
    for token in tiny.TOKENS[:4]:
        said = [text.replace(token, "") for text in said]
    return [text.split("\n")[0] for text in said]


STAGES = {
    "process_results": "metric_list: [{metric: acc}]\nprocess_results: !function odd.judge\n",
    "process_results of": "metric_list: [{metric: acc}]\nprocess_results: !function odd.nothing\n",
    "the filter": (
        "metric_list: [{metric: acc}]\nprocess_results: !function odd.trusting\n"
        "filter_list: [{name: none, filter: [{function: custom, filter_fn: !function odd.strict}, "
        "{function: take_first}]}]\n"
    ),
}


def config_of(parents: dict[str, Path], tasks: Path, task: str, metric: str) -> SearchConfig:
    body = {
        "genome": {
            "models": [str(parents["b"]), str(parents["c"])],
            "base_model": str(parents["base"]),
            "merge_method": "task_arithmetic",
        },
        "tasks": [
            {"name": task, "metric": metric},
            {"name": "tiny_cloze", "metric": "perplexity,none", "weight": 0.01},
        ],
        "limit": 12,
        "apply_chat_template": False,
        "task_search_path": [str(tasks)],
        "search": {"seed": 1, "algorithm": "random", "population": 4, "sealed_share": 0.25},
        "budget": {"max_evaluations": 14},
        "worker": {"batch_size": 12, "device": "cpu"},
    }
    return SearchConfig.from_text(yaml.safe_dump(body))


def with_cloze(place: Path, tasks_dir: Path) -> Path:
    for name in ("tiny_cloze.yaml", "tiny_cloze.jsonl"):
        shutil.copy(tasks_dir / name, place / name)
    return place


@pytest.mark.parametrize("stage", STAGES)
def test_the_candidate_fails_and_the_search_ends_with_an_answer(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path, stage: str
) -> None:
    place = with_cloze(write(tmp_path / "tasks", parents, STAGES[stage]), tasks_dir)
    config = config_of(parents, place, "tiny_odd", "acc,none")
    row = driving.run(config, name="odd", runs_dir=tmp_path)
    assert row.status == "done"
    assert row.result is not None
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    failures = [c.failure for c in found if c.state == "failed"]
    assert failures
    assert len(failures) < len(found)
    assert stage in failures[0]
    assert "'tiny_odd'" in failures[0]
    assert "document" in failures[0]
    assert "the answer ['" in failures[0].replace("[['", "['")


def test_a_worker_names_the_answer_and_goes_on(parents: dict[str, Path], tmp_path: Path) -> None:
    place = write(tmp_path, parents, STAGES["the filter"], known=1)
    tasks = tiny.tasks_config(place, "tiny_odd=acc,none")
    worker = HfWorker(tiny.spec(parents, tasks))
    refs = worker.tasks(tiny.spec(parents, tasks)).refs()
    worker.load(Recipe.of_model("c", 2).canonical(2))
    with pytest.raises(AnswerRefused, match=r"the filter of task 'tiny_odd' raised LookupError"):
        worker.score(refs)
    worker.load(Recipe.of_model("base", 2).canonical(2))
    assert {result.value for result in worker.score(refs)} == {1.0}
    worker.close()


def test_of_a_parent_it_is_the_tasks_fault(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    body = STAGES["process_results"]
    place = with_cloze(write(tmp_path / "tasks", parents, body, known=1), tasks_dir)
    config = config_of(parents, place, "tiny_odd", "acc,none")
    with pytest.raises(TaskError, match=r"process_results of .*parent '\w+': mend the task"):
        driving.run(config, name="odd", runs_dir=tmp_path)
    for _ in range(2):  # both experts say what the task does not know
        try:
            row = driving.resume("odd", runs_dir=tmp_path)
        except TaskError:
            continue
    assert row.status == "done"


def test_an_aggregation_that_raises_is_the_candidates_failure(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    body = (
        "metric_list: [{metric: acc, aggregation: !function odd.total, higher_is_better: true}]\n"
        "process_results: !function odd.trusting\n"
    )
    place = write(tmp_path, parents, body)
    spec = tiny.spec(parents, tiny.tasks_config(place, "tiny_odd=acc,none"))
    taskset = HfWorker.tasks(spec)
    task = taskset.task("tiny_odd")
    from agentmerge.contracts.worker import ItemResult

    rows = [ItemResult(1.0)] * len(task.items)
    assert taskset.aggregate(task, rows) == 1.0
    with pytest.raises(CandidateFailed, match=r"aggregation of acc of task 'tiny_odd' raised"):
        taskset.aggregate(task, [*rows[1:], ItemResult(-1.0)])


def test_f1_with_three_classes_is_found_before_a_search(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    docs = [{"q": q, "gold": i % 2} for i, q in enumerate(tiny.prompts(12, 3))]
    place = with_cloze(tmp_path / "tasks", tasks_dir) if (tmp_path / "tasks").mkdir() else tmp_path
    for name, classes in (("tiny_three", ["b", "t", "c"]), ("tiny_two", ["b", "t"])):
        tiny.write_task(
            place / "tasks", name, docs, "multiple_choice", doc_to_choice=classes,
            doc_to_target="gold", metric_list=tiny.metric_list("acc", "f1", "mcc"),
        )  # fmt: skip
    with_cloze(place / "tasks", tasks_dir)
    config = config_of(parents, place / "tasks", "tiny_three", "f1,none")
    with pytest.raises(ConfigError, match=r"'f1' of task 'tiny_three'.*3 classes.*acc or mcc"):
        prepare(config, weights=False)
    for task, metric in (("tiny_three", "mcc,none"), ("tiny_two", "f1,none")):
        prepare(config_of(parents, place / "tasks", task, metric), weights=False)


@pytest.mark.parametrize(
    ("lls", "gold", "expected"),
    [
        ((-1.0, -2.0, -3.0), (1,), (-2.0, 1.5 - 1.0)),
        ((-1.0, -2.0, -3.0), (0,), (-1.0, None)),
        ((-1.0, -2.0, -3.0), (0, 2), (None, 1.0 - 1.5)),
    ],
)
def test_an_empty_choice_is_never_the_best(
    lls: tuple[float, ...], gold: tuple[int, ...], expected: tuple[Any, Any]
) -> None:
    """Choices of 0, 2 and 2 letters: by length the first one has no score, and lm-eval picks
    another."""
    found = metrics.choice_margin(lls, gold, (0.0, 2.0, 2.0))
    assert found[0] == expected[0]
    assert found[1] == (None if expected[1] is None else pytest.approx(expected[1]))
