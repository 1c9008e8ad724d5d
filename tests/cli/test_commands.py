"""The command line as a user types it: results on stdout, words on stderr, honest exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from agentmerge.cli.app import app, run_app
from tests.session.conftest import config_text

SMALL = {"budget": {"max_evaluations": 14}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(config_text(**SMALL))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_app([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out, captured.err


@pytest.fixture
def done(config_file: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert call(capsys, "run", config_file, "--name", "a", "--runs-dir", runs)[0] == 0
    return runs


def test_run_shows_progress_and_a_closing_table(
    config_file: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "run", config_file, "--runs-dir", runs)
    assert code == 0
    assert "generation   0" in err
    assert "14 of 14 evaluations" in err
    for words in ("parent north", "best cheap merge", "this search's answer", "sealed"):
        assert words in out
    assert (runs / "run-1" / "best.yml").is_file()


def test_quiet_and_json(config_file: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "run", config_file, "--runs-dir", runs, "-q", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["status"] == "done"


def test_show_holds_what_the_project_promises(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(call(capsys, "show", "a", "--runs-dir", done, "--json")[1])
    assert found["evaluations"] == {"total": 14, "reused": 0, "failed": 0}
    assert set(found["best"]) >= {"score", "tasks", "recipe_hash", "generation", "operator"}
    chosen = found["final"]["answer"]
    assert found["answer"]["recipe_hash"] == chosen["recipe_hash"], "which best need not be"
    listed = json.loads(call(capsys, "list", "--runs-dir", done, "--json")[1])
    assert listed[0]["answer"] == found["answer"]
    assert "best seen" in call(capsys, "list", "--runs-dir", done)[1]
    assert ", answer " in call(capsys, "tree", "--runs-dir", done)[1]
    assert {row["operator"] for row in found["parents"]} == {"parent", "uniform"}
    costs = {"calls", "failures", "tokens_in", "tokens_out", "cost_usd", "unpriced"}
    assert set(found["agents"]) == costs | {"forecasts"}
    assert found["agents"]["cost_usd"] is None
    assert (found["name"], found["status"], found["seed"]) == ("a", "done", 7)
    assert found["search"] == "cma_es"
    assert found["parent"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["show", "a"],
        ["best", "a"],
        ["gc", "--dry-run"],
        ["doctor"],
        ["resume", "a"],
        ["branch", "a", "--at", "0", "--as", "b", "--search", "random"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_has_json(
    done: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, *arguments, "--runs-dir", done, "--json")
    assert code == 0
    assert json.loads(out) is not None


def every_command() -> dict[str, Any]:
    """ "ledger prune" -> the command, of all that there are."""
    found: dict[str, Any] = {}
    waiting = [("", typer.main.get_command(app))]
    for name, command in waiting:
        groups = getattr(command, "commands", {})
        waiting += [(f"{name} {word}".strip(), each) for word, each in groups.items()]
        if not groups:
            found[name] = command
    return found


def test_what_prints_a_result_prints_it_as_json() -> None:
    speaks_a_protocol = {"mcp", "ui"}
    lacking = {
        name
        for name, command in every_command().items()
        if not any("--json" in getattr(parameter, "opts", ()) for parameter in command.params)
    }
    assert lacking == speaks_a_protocol


def test_the_list_of_commands_cuts_no_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in ([], ["ledger"], ["prompts"], ["tasks"]):
        _, out, _ = call(capsys, *group, "--help")
        assert "..." not in out.split("Commands:")[1]


def test_a_program_reads_nothing_but_events_on_stderr(
    config_file: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runs-dir", runs, "--json", "--merge-cuda"]  # an option with a notice
    code, out, err = call(capsys, "run", config_file, *options)
    assert code == 0
    events = [json.loads(line) for line in err.splitlines()]
    assert {"start", "candidate", "generation", "finish", "done", "note"} <= {
        event["event"] for event in events
    }
    assert json.loads(out)["status"] == "done"


def test_evaluate_and_explain_the_best(
    config_file: Path, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "best.yml"
    recipe.write_text(call(capsys, "best", "a", "--runs-dir", done)[1])
    shown = json.loads(call(capsys, "show", "a", "--runs-dir", done, "--json")[1])
    scored = json.loads(
        call(capsys, "evaluate", recipe, "--config", config_file, "--runs-dir", done, "--json")[1]
    )
    assert scored["score"] == shown["final"]["answer"]["score"]
    assert scored["reused"] is True
    code, out, _ = call(capsys, "explain", recipe)
    assert code == 0
    assert "layer 3" in out
    assert "weight" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yml"], "no config at nowhere.yml"),
        (["run", "{config}", "--search", "cma"], "cma"),
        (["run", "{config}", "--worker", "hff"], "hff"),
        (["run", "{config}", "--seed", "-1"], "search.seed"),
        (["run", "{config}", "--name", "a/b"], "may hold letters"),
        (["run", "{config}", "--name", "a"], "agentmerge resume a"),
        (["run", "{config}", "--max-evaluations", "0"], "budget.max_evaluations"),
        (["run", "{config}", "--sigma-low", "0.5"], "sigma_low 0.5 is above"),
        (["run", "{config}", "--init", "nowhere.yml"], "no recipe at"),
        (["run", "{config}", "--llm", "openai:x"], "OPENAI_API_KEY"),
        (["run", "{config}", "--prompts", "nowhere"], "nowhere"),
        (["run", "{config}", "--graph", "nowhere"], "no graph at"),
        (["run", "{config}", "--strategy", "llm"], "--search"),
        (["run", "{config}", "--api-key", "sk-canary"], "OPENAI_API_KEY"),
        (["run", "{config}", "--load-in-8bit"], "quantised"),
        (["run", "{config}", "--load-in-4bit"], "quantised"),
        (["show", "b"], "there are: a"),
        (["branch", "a", "--at", "77"], "no finished generation 77"),
        (["export", "a", "--to", "x", "--with", "magic"], "agentmerge or mergekit"),
        (["export", "a", "--to", "x"], "no model to export"),
        (["resume", "b"], "no run called 'b'"),
        (["resume", "a", "--max-evaluations", "13"], "is 14 and cannot become 13"),
        (["report", "a", "--to", "."], "it is a directory"),
        (["run", "{config}", "--llm", "nobody:x"], "cannot use 'nobody:x' as a model: Unsupported"),
        (["best", "a", "--bogus"], "No such option"),
    ],
)
def test_a_mistake_is_one_red_sentence_and_code_two(
    done: Path,
    config_file: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    filled = [argument.replace("{config}", str(config_file)) for argument in arguments]
    known = "--bogus" not in filled
    code, _, err = call(capsys, *filled, *(["--runs-dir", done] if known else []))
    assert code == 2
    assert message in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert not any(line == "error: " for line in err.splitlines())
    assert "sk-canary" not in err
    names = {
        row["name"] for row in json.loads(call(capsys, "list", "--runs-dir", done, "--json")[1])
    }
    assert names == {"a"}, "a mistake must not leave a run behind"


def test_a_failed_run_is_code_one(
    config_file: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = config_text(worker={"options": {"base": "base", "die_at": 1}}, **SMALL)
    config_file.write_text(text)
    runs.mkdir()
    (runs / "agentmerge.sqlite").write_bytes(b"not a database" * 300)
    code, _, err = call(capsys, "run", config_file, "--runs-dir", runs)
    assert code == 1
    assert "cannot be opened" in err
    assert "move it away" in err


def test_a_browser_that_is_not_there_is_said(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    code, out, err = call(capsys, "report", "a", "--open", "--runs-dir", done)
    assert (code, out.strip()) == (0, str(done / "a" / "report.html"))
    assert "open the file yourself" in err


def test_nothing_there_yet(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "list", "--runs-dir", runs)
    assert code == 2
    assert "no runs in" in err


def test_benchmarks_are_refused_unless_insisted(
    config_file: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(config_text(**SMALL).replace("name: one", "name: gsm8k"))
    code, _, err = call(capsys, "run", config_file, "--runs-dir", runs)
    assert code == 2
    assert "'gsm8k' is a public benchmark" in err
    insisting = "--i-understand-the-depths-of-the-evils-i-am-unleashing"
    assert call(capsys, "run", config_file, "--runs-dir", runs, insisting)[0] == 0


NOTED = (
    *("--merge-cuda", "--no-merge-cuda", "--reshard", "--no-reshard"),
    "--allow-crimes",
)
OLD = [
    ["--strategy", "pool"],
    ["-s", "buffered"],
    ["--strategy", "serial"],
    ["--no-vllm"],
    ["--in-memory"],
    ["--num-gpus", "4"],
    ["--merge-cuda"],
    ["--no-merge-cuda"],
    ["--trust-remote-code"],
    ["--no-trust-remote-code"],
    ["--allow-crimes"],
    ["--no-allow-crimes"],
    ["--random-seed", "3"],
    ["--batch-size", "8"],
    ["--task-search-path", ".", "--task-search-path", "tasks"],
    ["--max-generation", "1"],
    ["--sigma-low", "0.04", "--sigma-high", "0.3"],
    ["--max-retries", "2"],
    ["--no-wandb"],
    ["--save-final-model"],
    ["--no-save-final-model"],
    ["--reshard"],
    ["--no-reshard"],
    ["--force-population-size", "3"],
    ["--max-fevals", "12"],
    ["--sigma0", "0.2"],
    ["--timeout", "600"],
    ["--no-load-in-8bit", "--no-load-in-4bit"],
    ["--no-i-understand-the-depths-of-the-evils-i-am-unleashing"],
]


@pytest.mark.parametrize("options", OLD, ids=lambda options: options[0])
def test_every_option_of_the_old_programs_is_accepted(
    config_file: Path,
    runs: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentmerge.cli.legacy.find_spec", lambda name: None)  # no cluster here
    code, out, err = call(capsys, "run", config_file, "--runs-dir", runs, "--json", *options)
    assert code == 0, err
    found = json.loads(out)
    text = (runs / found["name"] / "config.yml").read_text()
    expected = {
        "--random-seed": "seed: 3",
        "--max-generation": "max_generations: 1",
        "--max-retries": "max_retries: 2",
        "--force-population-size": "population: 3",
        "--max-fevals": "max_evaluations: 12",
        "--sigma0": "sigma0: 0.2",
        "--timeout": "timeout_s: 600",
        "--num-gpus": "count: 4",
        "-s": "count: 2",
        "--batch-size": "batch_size: 8",
    }
    assert expected.get(options[0], "genome:") in text
    if options[0].removeprefix("--no-") != options[0]:
        assert f"note: --{options[0].removeprefix('--no-')}" not in err
    if options[0] in NOTED:
        assert f"note: {options[0]}" in err


def test_storage_path_holds_the_best_config(
    config_file: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "storage"
    arguments = ["--storage-path", storage, "--no-save-final-model", "--runs-dir", runs]
    code, _, err = call(capsys, "run", config_file, *arguments)
    assert code == 0
    assert "no --llm-model" in err
    best = (storage / "best_config.yaml").read_text()
    assert best == (runs / "run-1" / "best.yml").read_text()
