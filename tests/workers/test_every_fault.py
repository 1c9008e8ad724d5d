"""No stage of a look at models and tasks hides what a later one can still find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from agentmerge import plugins
from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import ConfigError, ParentError, UserError
from agentmerge.evaluation import trials
from agentmerge.preflight.prepare import prepare
from agentmerge.session import driving, export
from agentmerge.workers.fake import FakeWorker
from agentmerge.workers.hf import HfWorker

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def config(parents: dict[str, Path], tasks_dir: Path, **others: Any) -> SearchConfig:
    genome = {
        "models": [str(parents["b"]), str(parents["c"])],
        "base_model": str(parents["base"]),
        "merge_method": "task_arithmetic",
        "filters": ["nowhere"],
    }
    body = {
        "genome": genome | others.pop("genome", {}),
        "tasks": [{"name": "tiny_choice", "metric": tiny.METRICS["tiny_choice"]}],
        "task_search_path": [str(tasks_dir)],
        "limit": 20,
        "apply_chat_template": True,
        "worker": {"kind": "hf", "device": "cpu"},
    }
    return SearchConfig.from_text(yaml.safe_dump(body | others))


def faults_of(settings: SearchConfig, **how: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare(settings, **how)
    return caught.value.faults


def in_order(faults: list[str], *words: str) -> bool:
    """Each of these is said by one fault, in this order, and nothing else is."""
    return len(faults) == len(words) and all(w in f for w, f in zip(words, faults, strict=True))


@pytest.mark.parametrize("how", [{"weights": False, "run_code": False}, {}], ids=["check", "run"])
def test_a_worker_that_nobody_knows_hides_no_fault_of_models_or_tasks(
    how: dict[str, Any], parents: dict[str, Path], tasks_dir: Path
) -> None:
    tasks = [{"name": "no_such_task", "metric": "acc"}]
    found = faults_of(config(parents, tasks_dir, worker={"kind": "hff"}, tasks=tasks), **how)
    assert in_order(found, "'hff' is not one of the workers", "genome.filters", "no_such_task")


def test_a_template_that_never_ends_hides_no_fault_of_what_asks_nothing(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "CPU_S", 1)
    (tmp_path / "loop.jinja").write_text(LOOP)
    asked = {"chat_template": str(tmp_path / "loop.jinja"), "layer_granularity": 3}
    worker = {"kind": "hf", "device": "cpu", "options": {"attn_implementation": "none"}}
    settings = config(parents, tasks_dir, genome=asked, worker=worker)
    found = faults_of(settings, fresh=True, weights=False)
    assert in_order(
        found, "is not done with one short chat", "filters", "layer_granularity 3", "'none'"
    ), found


def test_a_worker_that_cannot_look_at_broken_models_hides_none_of_their_faults(
    parents: dict[str, Path], tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's look reads the config of a model that the survey could not read."""

    def look(spec: WorkerSpec, layout: object) -> Any:
        raise ParentError("it has no config that can be read")

    monkeypatch.setattr(HfWorker, "preflight", staticmethod(look))
    tasks = [{"name": "no_such_task", "metric": "acc"}]
    found = faults_of(config(parents, tasks_dir, tasks=tasks))
    assert in_order(found, "filters", "no_such_task", "it has no config that can be read"), found


class Deep(FakeWorker):
    """A plugin's worker that reads no models, and has its own depth."""

    @staticmethod
    def num_layers(spec: WorkerSpec) -> int:
        return 6


def test_a_worker_says_itself_that_it_reads_no_models(
    fake_config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plugins._BUILT_IN["agentmerge.workers"], "deep", f"{__name__}:Deep")
    settings = SearchConfig.from_text(fake_config, "deep", {"worker.kind": "deep"})
    prepared = prepare(settings)
    assert prepared.space.num_layers == 6
    assert prepared.memory is None
    assert dict(prepared.identities) == {n: f"deep:{n}" for n in ("base", "north", "south")}
    run = driving.run(settings, runs_dir=tmp_path / "runs")
    assert run.status == "done"
    with pytest.raises(UserError, match="searched on the deep worker: it has no model to export"):
        export.export_run(run.name, tmp_path / "model", runs_dir=tmp_path / "runs")


def test_only_a_worker_with_a_canary_is_told_how_often_it_is_asked(
    parents: dict[str, Path], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(parents, tasks_dir, genome={"filters": [], "chat_template": "chatml"})
    assert "canary_every" not in prepare(settings, weights=False).spec.options
    monkeypatch.setattr(HfWorker, "has_canary", True, raising=False)
    spec = prepare(settings, weights=False).spec
    assert spec.options["canary_every"] == settings.worker.canary_every
