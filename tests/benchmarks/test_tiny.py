"""The benchmark's fast evaluator gives what the product's worker gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from agentmerge.check import prepare
from agentmerge.config import SearchConfig
from agentmerge.demo.family import Family
from agentmerge.demo.tasks import demo_config, skill_task, write_skill_tasks, write_tasks
from agentmerge.workers.hf import HfWorker
from benchmarks.tiny import NO_HEADROOM, TINY, TinyProblem

ITEMS = 60


def test_it_scores_as_the_worker_does(family: Family, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path, family.skills, n_items=600)
    write_skill_tasks(tmp_path, family.skills, n_items=600)
    body = demo_config(family, tasks)
    body["tasks"] = [
        {"name": skill_task(skill), "weight": 0.5, "metric": "exact_match,none"}
        for skill in family.skills
    ]
    body |= {"limit": ITEMS, "task_search_path": [str(tasks)]}
    prepared = prepare(SearchConfig.from_text(yaml.safe_dump(body)))
    worker = HfWorker(prepared.spec, prepared.taskset)
    problem = TinyProblem(TINY["tiny-so-8"], 0)
    rng = np.random.default_rng(0)
    for point in (problem.space.scale_points()[3][2], tuple(rng.uniform(0.4, 0.7, 8))):
        assert point is not None
        worker.load(prepared.space.recipe(point))
        asked = worker.score(prepared.taskset.refs("search"))
        evidence = problem.evaluate(point).evidence
        assert evidence is not None
        for task in range(2):
            mine = np.flatnonzero(evidence.items.task == task)[:ITEMS]
            theirs = asked[task * ITEMS : (task + 1) * ITEMS]
            assert [r.value for r in theirs] == evidence.values[mine].tolist()
            margins = [r.margin for r in theirs]
            np.testing.assert_allclose(margins, evidence.signals[mine], atol=1e-3)


@pytest.mark.parametrize("name", NO_HEADROOM)
def test_where_nothing_can_be_gained_a_cheap_rival_is_best(family: Family, name: str) -> None:
    problem = TinyProblem(TINY[name], 0)
    rivals = {
        label: problem.sealed(point).sum() for _, label, point in problem.first_points() if point
    }
    best = "first" if "useless" in name else "uniform"
    assert rivals[best] == max(rivals.values()) > 0.9
    rng = np.random.default_rng(0)
    for point in rng.random((20, problem.space.dimensions)):
        assert problem.sealed(tuple(point)).sum() <= rivals[best]
