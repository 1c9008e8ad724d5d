"""What only looks at models and tasks does not import what would run or search them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import demo_search
from agentmerge.evaluation.catalogue import search_tasks

RUNS_MODELS = {
    "agentmerge.evaluation.hf_lm",
    "lm_eval.models.huggingface",
    "langgraph",
    "langchain",
}


def loaded_by(folder: Path, *commands: list[str]) -> tuple[list[int], set[str]]:
    """Exit codes of commands in one new process, and every module that they imported."""
    script = (
        "import json, sys\nfrom agentmerge.cli.app import run_app\n"
        f"codes = [run_app(command) for command in {list(commands)!r}]\n"
        "print('\\n' + json.dumps([codes, list(sys.modules)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    return codes, set(modules)


def test_looking_at_models_imports_nothing_that_runs_them(
    family: TinyFamily, tmp_path: Path
) -> None:
    config = demo_search(family, tmp_path, max_evaluations=4, seed=0, worker="hf")
    models = [str(expert) for expert in family.experts]
    task = ["--task", "agentmerge_demo_sort", "--task-search-path", "tasks"]
    codes, modules = loaded_by(
        tmp_path,
        ["check", config.name],
        ["init", *models, "--base", str(family.base), *task, "--to", "first.yml"],
    )
    assert codes == [0, 0]
    assert not RUNS_MODELS & modules


def test_tasks_are_found_without_torch_and_transformers(family: TinyFamily, tmp_path: Path) -> None:
    demo_search(family, tmp_path, max_evaluations=4, seed=0, worker="hf")
    codes, modules = loaded_by(
        tmp_path, ["tasks", "search", "demo", "--task-search-path", "tasks", "--json"]
    )
    assert codes == [0]
    assert not (RUNS_MODELS | {"torch", "transformers"}) & modules


def test_a_word_that_stands_in_an_included_file_finds_the_task(tmp_path: Path) -> None:
    """Only files that may have the word are parsed."""
    (tmp_path / "below").mkdir()
    (tmp_path / "_common").write_text("dataset_path: Some/Quokkas\noutput_type: generate_until\n")
    (tmp_path / "below" / "one.yaml").write_text("include: '../_common'\ntask: plain_one\n")
    (tmp_path / "below" / "two.yaml").write_text("include:\n  - ../_common\ntask: plain_two\n")
    (tmp_path / "round.yaml").write_text("include: round.yaml\ntask: quokka_round\n")
    (tmp_path / "other.yaml").write_text("task: plain_other\ndataset_path: some/other\n")
    found = [entry.name for entry in search_tasks("quokka", [str(tmp_path)])]
    assert found == ["plain_one", "plain_two"]


def test_looking_at_searches_does_not_import_what_drives_them(
    fake_config: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yml").write_text(fake_config)
    arguments = ["--name", "a", "--max-evaluations", "8", "-q"]
    codes, modules = loaded_by(tmp_path, ["run", "config.yml", *arguments])
    assert codes == [0]
    assert not {"torch", "transformers", "lm_eval"} & modules, "where no model is read"
    reading = ([verb, "a"] for verb in ("show", "best", "report"))
    codes, modules = loaded_by(tmp_path, ["list"], ["tree"], *reading)
    assert codes == [0] * 5
    assert not (RUNS_MODELS | {"torch", "langchain_core"}) & modules
