"""lm-eval's metrics of whole answers, and others that are no number an item: as it has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_equals_lm_eval import scored, simple

from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.errors import TaskError
from agentmerge.evaluation import whole
from agentmerge.evaluation.leads import lead, least_leads
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.ledger.packing import pack, unpack

OWN = """
def answers(doc, results):
    return {"overlap": (doc["gold"], results[0]), "longest": len(results[0])}

def overlap(pairs):
    return sum(len(set(gold) & set(said)) for gold, said in pairs) / sum(
        len(set(gold + said)) for gold, said in pairs)
"""
CORPUS = ("bleu", "chrf", "chrf++", "ter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, parent: Path) -> Path:
    """Tasks whose metrics are corpus metrics, a Brier score, a task's own, and a group of two."""
    root = tmp_path_factory.mktemp("whole")
    asked = tiny.prompts(30, 1)
    kwargs = {"until": ["\n"], "do_sample": False, "max_gen_toks": 8}
    said = [text or "ab" for text in tiny.greedy(parent, asked, 8)]
    gold = [" ".join(text) if i % 3 else f"{text} {i}" for i, text in enumerate(said)]
    spread = [{"q": q, "gold": [g, g[::-1]]} for q, g in zip(asked, gold, strict=True)]
    one = [
        {"q": q, "gold": text if i % 2 else f"{text[::-1]} a"}
        for i, (q, text) in enumerate(zip(asked, said, strict=True))
    ]
    for name, docs in (("one", one), ("two", one), ("three", one), ("several", spread)):
        tiny.write_task(
            root, name, docs, "generate_until", doc_to_target="gold", generation_kwargs=kwargs,
            metric_list=tiny.metric_list(*CORPUS),
        )  # fmt: skip
    choices = [
        {"q": q, "choices": [g, g + "a", "dig"], "gold": i % 3, "golds": [i % 3, (i + 1) % 3]}
        for i, (q, g) in enumerate(zip(asked, said, strict=True))
    ]
    for name, target, metrics in (
        ("brier", "gold", ("acc", "brier_score")),
        ("brier_b", "gold", ("acc", "brier_score")),
        ("golds", "golds", ("acc", "acc_norm")),
    ):
        tiny.write_task(
            root, name, choices if name != "brier_b" else choices[:7], "multiple_choice",
            doc_to_choice="choices", doc_to_target=target, metric_list=tiny.metric_list(*metrics),
        )  # fmt: skip
    (root / "own.py").write_text(OWN)
    path = tiny.write_task(
        root, "own", one, "generate_until", doc_to_target="gold", generation_kwargs=kwargs,
        process_results="!own.answers",
        metric_list=[{"metric": "overlap", "aggregation": "!own.overlap", "higher_is_better": True},
                     {"metric": "longest", "aggregation": "mean", "higher_is_better": False}],
    )  # fmt: skip
    path.write_text(path.read_text().replace("'!own.", "'!function own."))
    path.write_text(path.read_text().replace("'!function own.answers'", "!function own.answers")
                    .replace("'!function own.overlap'", "!function own.overlap"))  # fmt: skip
    (root / "group.yaml").write_text(
        "group: briers\ntask: [brier, brier_b]\n"
        "aggregate_metric_list:\n- {metric: brier_score, weight_by_size: true}\n"
    )
    return root


NAMES = ("one=bleu", "two=chrf++", "three=ter", "own=overlap", "golds=acc_norm")


def built(parent: Path, folder: Path, *names: str) -> tuple[TaskSet, dict[ItemRef, ItemResult]]:
    config = tiny.tasks_config(folder, *(f"{name},none" for name in names))
    return scored(tiny.spec({"a": parent}, config))


def test_they_equal_lm_evals_and_come_back_from_the_ledger(parent: Path, folder: Path) -> None:
    config = tiny.tasks_config(folder, *(f"{name},none" for name in NAMES))
    spec = tiny.spec({"a": parent}, config)
    taskset, results = scored(spec)
    theirs = simple(spec)["results"]
    kept = dict(zip(results, unpack(pack(list(results.values()))), strict=True))
    assert [result.whole for result in kept.values()] == [r.whole for r in results.values()]
    for task in taskset.tasks:
        found = taskset.aggregate(task, [kept[ref] for ref in task.items])
        assert math.isclose(found, theirs[task.name][f"{task.metric},none"], rel_tol=1e-9)
        assert len({results[ref].value for ref in task.items}) > 1, task.name
        means = taskset.is_mean(next(o for o in taskset.objectives if o.name == task.name))
        assert means is (task.name == "golds")


def test_what_lm_eval_makes_no_metric_of_is_refused(parent: Path, folder: Path) -> None:
    """It makes one number of several references, of which its own aggregation makes nothing."""
    with pytest.raises(TaskError, match="metric 'bleu' of task 'several' is made of"):
        built(parent, folder, "several=bleu")


def test_a_brier_score_is_a_mean_and_a_group_weighs_by_size(parent: Path, folder: Path) -> None:
    config = tiny.tasks_config(folder, "briers=brier_score,none")
    spec = tiny.spec({"a": parent}, config)
    taskset, results = scored(spec)
    theirs = simple(spec)
    (objective,) = taskset.objectives
    assert (objective.higher_is_better, taskset.is_mean(objective)) == (False, True)
    assert [taskset.item_sign(task) for task in taskset.tasks] == [-1.0, -1.0]
    score = taskset.score(results)
    whole_group = theirs["groups"]["briers"]["brier_score,none"]
    assert math.isclose(dict(score.tasks)["briers"], whole_group, rel_tol=1e-6)
    assert score.value == -dict(score.tasks)["briers"]


@pytest.mark.parametrize("name", ["one", "several", "uneven"])
@pytest.mark.parametrize("metric", CORPUS)
def test_sums_of_parts_are_what_the_aggregation_says(
    parent: Path, folder: Path, name: str, metric: str
) -> None:
    """Of any subset, references unequal in number included."""
    from lm_eval.api import metrics as theirs

    rng = np.random.default_rng(0)
    words = ["ab", "cd e", "f, g.", "", "h"]
    references = {"one": 1, "several": 2, "uneven": 0}[name]
    pairs = []
    for _ in range(12):
        count = references or int(rng.integers(1, 4))
        golds = [" ".join(rng.choice(words, 4)) for _ in range(count)]
        pairs.append([golds[0] if name == "one" else golds, " ".join(rng.choice(words, 4))])
    function = getattr(theirs, metric.replace("++", "pp"))
    made = whole.OfWhole(function)
    for size in (1, 5, 12):
        texts = [whole.kept(pair) for pair in pairs[:size]]
        assert made(texts) == function(pairs[:size])


def test_a_lead_is_resampled_from_what_the_items_gave(parent: Path, folder: Path) -> None:
    taskset, mine = built(parent, folder, "one=ter")
    (task,) = taskset.tasks
    assert task.higher_is_better is False
    refs = list(mine)

    def worse(share: int) -> dict[ItemRef, ItemResult]:
        found = dict(mine)
        for ref in refs[::share]:
            gold = whole.read(mine[ref].whole)[0]
            gave = whole.kept([gold, "x y z"])
            value = taskset.aggregations["one"].alone(gave)
            found[ref] = ItemResult(value, whole=gave)
        return found

    ahead = lead(taskset, mine, worse(2), seed=0)
    assert ahead is not None
    expected = taskset.score(mine).value - taskset.score(worse(2)).value
    assert ahead.mean == pytest.approx(expected)
    assert 0 < ahead.low < ahead.mean < ahead.high
    none = lead(taskset, mine, mine, seed=0)
    assert none is None or none.low <= 0 <= none.high
    least = least_leads(taskset, [mine, worse(3)], worse(2), seed=0)
    assert least is not None
    assert least[0] > least[1]


def test_what_cannot_be_kept_is_refused() -> None:
    for value in (object(), {1, 2}, ["x" * 2_000_000]):
        with pytest.raises(ValueError, match=r"cannot be kept|more than"):
            whole.kept(value)
    for value in (("a", ["b"]), ["a", "b"], {"a": 1.5}, (1, np.array([0.5, 0.25]))):
        again = whole.read(whole.kept(value))
        assert type(again) is type(value)
        assert str(again[1] if isinstance(again, tuple) else again)


def test_older_blocks_are_read_and_plain_ones_are_what_they_were() -> None:
    plain = [ItemResult(1.0, -0.5, 0.25), ItemResult(0.0)]
    assert unpack(pack(plain)) == plain
    told: list[Any] = [ItemResult(0.5, tokens=3), ItemResult(0.5, whole='{"": ["a\\ud800", "ü"]}')]
    assert [(r.whole, r.tokens) for r in unpack(pack(told))] == [(r.whole, r.tokens) for r in told]
