"""What a metric's aggregation decides: mean or whole, which way is better, what an item says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from agentmerge.evaluation.aggregation import aggregation_of
from agentmerge.evaluation.building import build_tasks
from agentmerge.evaluation.racing import Course


@pytest.mark.parametrize(
    ("task", "mean", "higher", "item_sign"),
    [
        ("tiny_choice=acc,none", True, True, 1.0),
        ("tiny_answer=exact_match,none", True, True, 1.0),
        ("tiny_cloze=acc,none", True, True, 1.0),
        # LAMBADA's: exp of minus the mean log-likelihood, each stored as a plain number
        ("tiny_cloze=perplexity,none", False, False, 1.0),
        ("tiny_text=word_perplexity,none", False, False, 1.0),
        ("tiny_text=byte_perplexity,none", False, False, 1.0),
        ("tiny_text=bits_per_byte,none", False, False, 1.0),
        ("tiny_binary=f1,none", False, True, None),
        ("tiny_binary=mcc,none", False, True, None),
    ],
)
def test_the_aggregation_says_what_a_metric_is(
    tasks_dir: Path, task: str, mean: bool, higher: bool, item_sign: float | None
) -> None:
    config = tiny.tasks_config(tasks_dir, task)
    taskset = build_tasks(config, tiny.tokenizer(), template_source="a", check_built_ins=False)
    (objective,), (scored,) = taskset.objectives, taskset.tasks
    assert taskset.is_mean(objective) is mean
    assert (objective.higher_is_better, scored.higher_is_better) == (higher, higher)
    assert taskset.item_sign(scored) == item_sign
    assert Course(taskset).raceable is mean


def test_a_task_that_does_not_say_which_way_is_better_has_its_aggregations(tmp_path: Path) -> None:
    docs = [{"q": f"{a}=", "gold": a} for a in tiny.LETTERS]
    (tmp_path / "own.py").write_text(
        "def nll(doc, results):\n    return {'nll': results[0][0], 'share': results[0][1]}\n"
        "def worst(values):\n    return min(values)\n"
    )
    body = {"process_results": "!own.nll", "doc_to_target": "gold"}
    listed = [
        {"metric": "nll", "aggregation": "perplexity"},
        {"metric": "share", "aggregation": "mean"},
    ]
    path = tiny.write_task(tmp_path, "own", docs, "loglikelihood", metric_list=listed, **body)
    text = path.read_text().replace("'!own.nll'", "!function own.nll")
    path.write_text(text)
    for metric, higher in (("nll", False), ("share", True)):
        config = tiny.tasks_config(tmp_path, f"own={metric},none")
        taskset = build_tasks(config, tiny.tokenizer(), template_source="a", check_built_ins=False)
        assert taskset.objectives[0].higher_is_better is higher
    path.write_text(text.replace("aggregation: perplexity", "aggregation: !function own.worst"))
    config = tiny.tasks_config(tmp_path, "own=nll,none")
    taskset = build_tasks(config, tiny.tokenizer(), template_source="a", check_built_ins=False)
    assert not taskset.is_mean(taskset.objectives[0]), "the worst item is no mean"


def test_what_needs_whole_answers_has_a_direction_all_the_same() -> None:
    from lm_eval.api import metrics

    found = {
        name: (known.rebuild, known.mean, known.higher_is_better)
        for name in ("bleu", "chrf", "chrfpp", "ter", "brier_score")
        for known in [aggregation_of(getattr(metrics, name))]
    }
    assert found == {
        "bleu": ("whole", False, True),
        "chrf": ("whole", False, True),
        "chrfpp": ("whole", False, True),
        "ter": ("whole", False, False),
        "brier_score": ("one_hot", False, False),
    }


def test_only_what_is_called_a_mean_is_one() -> None:
    from lm_eval.api import metrics

    for function in (None, metrics.mean, np.mean):
        assert aggregation_of(function).mean
    for other in (metrics.median, metrics.nanmean, np.median, max, partial(np.mean)):
        assert not aggregation_of(other).mean
