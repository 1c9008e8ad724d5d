"""The benchmark's fast evaluator gives what the product's worker gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import demo_config, skill_task, write_skill_tasks, write_tasks
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.space import seeds
from agentmerge.testing.tiny import NO_HEADROOM, TINY, TinyProblem
from agentmerge.workers.hf import HfWorker

ITEMS = 60


def demo_search(family: TinyFamily, folder: Path, items: int, **genome: Any) -> Prepared:
    """A search of the demo's family on its own two skills."""
    tasks = write_tasks(folder, family.skills, n_items=600)
    write_skill_tasks(folder, family.skills, n_items=600)
    body = demo_config(family, tasks)
    body["tasks"] = [
        {"name": skill_task(skill), "weight": 0.5, "metric": "exact_match,none"}
        for skill in family.skills
    ]
    body |= {"limit": items, "task_search_path": [str(tasks)]}
    body["genome"] |= genome
    return prepare(SearchConfig.from_text(yaml.safe_dump(body)))


def test_it_scores_as_the_worker_does(family: TinyFamily, tmp_path: Path) -> None:
    prepared = demo_search(family, tmp_path, ITEMS)
    worker = HfWorker(prepared.spec, prepared.taskset)
    problem = TinyProblem(TINY["tiny-so-8"], 0)
    rng = np.random.default_rng(0)
    for point in (seeds.scale_points(problem.space)[3][2], tuple(rng.uniform(0.4, 0.7, 8))):
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
def test_where_nothing_can_be_gained_a_cheap_rival_is_best(family: TinyFamily, name: str) -> None:
    """Beyond noise: what is asserted holds of any family, whatever the machine trained."""
    problem = TinyProblem(TINY[name], 0)
    rivals = {label: problem.sealed(point) for _, label, point in problem.first_points()}
    named = rivals["first" if "useless" in name else "uniform"]
    least, most = (0.6, 0.97) if TINY[name].damaged else (0.9, 1.0)
    assert least <= named.sum() <= most
    rng = np.random.default_rng(0)
    points = rng.random((20, problem.space.dimensions))
    for other in [*rivals.values(), *(problem.sealed(tuple(point)) for point in points)]:
        gap = (other - named) * len(other)
        assert gap.mean() <= 3 * gap.std() / np.sqrt(len(gap)) + 0.01
