"""What a strategy is told item by item adds up to the score, whatever the metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agentmerge.config import SearchConfig, TasksConfig
from agentmerge.contracts.strategy import Observation
from agentmerge.contracts.worker import ItemRef, ItemResult
from agentmerge.evaluation.tasks import Objective, ScoredTask, TaskSet
from agentmerge.ledger import Ledger
from agentmerge.search.evidence import ItemTable
from agentmerge.session import driving
from agentmerge.workers.fake import fake_tasks


def test_a_search_learns_from_its_items(fake_config: str, tmp_path: Path) -> None:
    config = SearchConfig.from_text(fake_config, overrides={"search.algorithm": "margins"})
    row = driving.run(config, name="a", runs_dir=tmp_path)
    assert row.status == "done"
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(row.id)
    first = max(c.score for c in found if c.score is not None and c.generation == 0)
    later = max(c.score for c in found if c.score is not None)
    assert later > first
    assert {c.operator for c in found if c.generation > 0} == {"margins"}


def test_values_add_up_to_the_score_and_margins_are_the_signals() -> None:
    config = TasksConfig(tasks=[{"name": "one"}, {"name": "two", "weight": -0.5}], limit=30)
    taskset = fake_tasks(config)
    rng = np.random.default_rng(0)
    results = {
        ref: ItemResult(float(margin > 0), -1.0, float(margin))
        for ref in taskset.refs("search")
        for margin in [rng.normal()]
    }
    score = taskset.score(results)
    told = Observation(0, 0, (0.5,), "x", score.value, score.tasks, recipe_hash="h")
    (found,) = ItemTable(taskset, lambda _: results).of([told])
    evidence = found.evidence
    assert evidence is not None
    assert evidence.items.margins.all()
    np.testing.assert_allclose(evidence.values @ evidence.items.weight, score.value)
    margins = [results[ref].margin for ref in taskset.refs("search")]
    np.testing.assert_array_equal(evidence.signals, margins)


def test_a_metric_that_is_no_mean_is_one_item_and_a_lower_one_counts_against() -> None:
    refs = tuple(ItemRef("ppl", i, f"{i:016x}") for i in range(4))
    task = ScoredTask(
        "ppl", 2.0, "word_perplexity", "none", False, "loglikelihood_rolling", None, "p", refs,
        (0, 1, 2, 3), rebuild="weighted", statics=(3.0,) * 4, objective="ppl",
    )  # fmt: skip
    taskset = TaskSet((task,), (Objective("ppl", 2.0, False, ("ppl",)),))
    told = Observation(0, 0, (0.5,), "x", -24.0, (("ppl", 12.0),), recipe_hash="h")
    results = dict.fromkeys(refs, ItemResult(-7.0, -7.0))
    (found,) = ItemTable(taskset, lambda _: results).of([told])
    assert found.evidence is not None
    assert found.evidence.values @ found.evidence.items.weight == -24.0
    assert not found.evidence.items.margins.any()


def test_an_item_without_a_margin_somewhere_counts_with_its_value() -> None:
    taskset = fake_tasks(TasksConfig(tasks=[{"name": "one"}], limit=5))
    refs = taskset.refs("search")
    whole = {ref: ItemResult(1.0, -1.0, 0.5) for ref in refs}
    holed = whole | {refs[2]: ItemResult(0.0, -1.0, None)}
    known = {"a": whole, "b": holed}
    history = [Observation(0, i, (0.5,), "x", 1.0, recipe_hash=h) for i, h in enumerate("ab")]
    found = ItemTable(taskset, known.__getitem__).of(history)
    assert found[0].evidence is not None
    assert found[0].evidence.items.margins.tolist() == [True, True, False, True, True]
    assert found[0].evidence.signals.tolist() == [0.5, 0.5, 1.0, 0.5, 0.5]


def test_items_that_were_not_asked_are_not_numbers() -> None:
    taskset = fake_tasks(TasksConfig(tasks=[{"name": "one"}], limit=4))
    refs = taskset.refs("search")
    known = {ref: ItemResult(1.0, -1.0, 0.5) for ref in refs[:2]}
    whole = {ref: ItemResult(1.0, -1.0, 0.5) for ref in refs}
    history = [
        Observation(0, 0, (0.5,), "x", 1.0, recipe_hash="part"),
        Observation(0, 1, (0.5,), "x", 1.0, recipe_hash="whole"),
    ]
    found = ItemTable(taskset, {"part": known, "whole": whole}.__getitem__).of(history)
    assert found[0].evidence is not None
    assert np.isnan(found[0].evidence.signals).tolist() == [False, False, True, True]
    assert found[0].evidence.items.margins.all()


def test_a_races_loser_has_the_items_of_its_rung_whatever_else_is_known() -> None:
    taskset = fake_tasks(TasksConfig(tasks=[{"name": "one"}, {"name": "two"}], limit=40))
    whole = {ref: ItemResult(1.0, -1.0, 0.5) for ref in taskset.refs("search")}
    history = [
        Observation(0, 0, (0.5,), "x", 1.0, recipe_hash="h"),
        Observation(1, 0, (0.5,), "x", 0.4, recipe_hash="h", rung=0.25),
    ]
    found = ItemTable(taskset, lambda _: whole).of(history)
    asked = np.isfinite(found[1].evidence.signals)
    assert np.isfinite(found[0].evidence.signals).all()
    assert [asked[:40].sum(), asked[40:].sum()] == [10, 10]
