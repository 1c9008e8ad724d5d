"""The same models under other names: one merge, and each search speaks of it by its own names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import demo_config, write_tasks
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger
from agentmerge.recipe import Recipe
from agentmerge.report.summary import best_recipe
from agentmerge.session import driving, export
from agentmerge.session.gc import prune_results
from tests.session.conftest import command, config_text
from tests.session.conftest import config as fake_config


@pytest.fixture
def moved(tmp_path: Path, family: TinyFamily) -> TinyFamily:
    """A copy of the family elsewhere."""
    shutil.copytree(family.base.parent, tmp_path / "family")
    places = [tmp_path / "family" / expert.name for expert in family.experts]
    return TinyFamily(
        tmp_path / "family" / family.base.name, tuple(places), family.skills, family.seed
    )


def config_of(family: TinyFamily, tasks: Path, **more: Any) -> SearchConfig:
    body = demo_config(family, tasks) | {"limit": 10, "task_search_path": [str(tasks)]}
    body |= {"search": {"algorithm": "random", "seed": 1}, "budget": {"max_evaluations": 10}}
    return SearchConfig.from_text(yaml.safe_dump(body | more))


def test_a_search_over_moved_models_keeps_its_own_names(
    tmp_path: Path, family: TinyFamily, moved: TinyFamily
) -> None:
    tasks, runs = write_tasks(tmp_path / "tasks", family.skills, n_items=40), tmp_path / "runs"
    driving.run(config_of(family, tasks), name="here", runs_dir=runs)
    first = driving.run(config_of(moved, tasks), name="there", runs_dir=runs)
    #: Asks what nobody has asked, so that its merges are really made.
    fewer = config_of(moved, tasks, limit=12)
    second = driving.run(fewer, name="anew", runs_dir=runs)
    branched = driving.branch("there", at=0, name="branched", runs_dir=runs)
    own = {str(path) for path in (moved.base, *moved.experts)}
    with Ledger(runs / driving.LEDGER) as ledger:
        assert all(c.reused for c in ledger.candidates(first.id) if c.state == "scored")
        for row in (first, second, branched):
            assert [c.failure for c in ledger.candidates(row.id) if c.failure] == []
            assert set(Recipe.parse(best_recipe(ledger, row)["recipe"]).models) <= own
            written = Recipe.parse(runs / row.name / "best.yml")
            assert set(written.models) <= own
        before = best_recipe(ledger, ledger.run("here"))["recipe"]
        assert str(family.base.parent) in before
    prune_results(runs, ["here"], dry_run=False)
    shutil.rmtree(runs / "here")
    exported = export.export_run("there", tmp_path / "merged", runs_dir=runs)
    assert exported["equal"] is True


def test_searches_without_a_name_may_begin_together(tmp_path: Path) -> None:
    """Three processes; each number is given once."""
    path = tmp_path / "config.yml"
    path.write_text(config_text(budget={"max_evaluations": 5}))
    line = ("run", path, "--runs-dir", tmp_path / "runs", "-q")
    together = [command(*line) for _ in range(3)]
    said = [process.communicate() for process in together]
    assert [process.returncode for process in together] == [0] * 3, said
    with Ledger(tmp_path / "runs" / driving.LEDGER) as ledger:
        assert sorted(row.name for row in ledger.runs()) == [f"run-{n}" for n in range(1, 4)]


@pytest.mark.parametrize(
    "name", ["agentmerge.sqlite-journal", "Checkpoints.sqlite", "agentmerge.saved-1.sqlite"]
)
def test_a_name_of_the_databases_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="that of a database"):
        driving.run(fake_config(), name=name, runs_dir=tmp_path)
    assert not list(tmp_path.glob("*/"))
