"""The old programs' command lines: each option mapped, noticed or refused, and no key kept."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.cli import legacy
from agentmerge.cli.app import run_app
from agentmerge.cli.legacy import Legacy, map_options
from agentmerge.errors import UserError
from agentmerge.testing.scripted import ScriptedServer

#: SEED.md's list: every option of LLM-Evo-Merge and mergekit-evolve; flags have a --no- form.
FLAGS = (
    "vllm", "in-memory", "merge-cuda", "trust-remote-code", "allow-crimes", "wandb",
    "i-understand-the-depths-of-the-evils-i-am-unleashing", "save-final-model", "reshard",
    "load-in-8bit", "load-in-4bit",
)  # fmt: skip
VALUES = (
    "storage-path", "strategy", "num-gpus", "random-seed", "batch-size", "task-search-path",
    "max-generation", "sigma-low", "sigma-high", "max-retries", "api-key", "llm-model",
    "wandb-project", "wandb-entity", "force-population-size", "max-fevals", "sigma0", "timeout",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A command takes the signals over; a test gives them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def config_file(tmp_path: Path, fake_config: str) -> Path:
    path = tmp_path / "config.yml"
    path.write_text(fake_config.replace("max_evaluations: 19", "max_evaluations: 12"))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_app([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out, captured.err


def saved_config(runs: Path, name: str = "a") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((runs / name / "config.yml").read_text())
    return found


def test_help_lists_every_old_option(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "run", "--help")
    assert code == 0
    words = set("".join(c if c.isalnum() or c == "-" else " " for c in out).split())
    missing = [f"--{name}" for name in (*FLAGS, *VALUES) if f"--{name}" not in words]
    missing += [f"--no-{name}" for name in FLAGS if f"--no-{name}" not in words]
    # A narrow terminal wraps the longest one; it is accepted below.
    assert [name for name in missing if "unleashing" not in name] == []


def test_a_whole_old_command_line_works(
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(legacy, "find_spec", lambda name: None)
    runs, storage = tmp_path / "runs", tmp_path / "out" / "deep"
    code, out, err = call(
        capsys, "run", config_file, "--name", "a", "--runs-dir", runs, "--json",
        "--storage-path", storage, "-s", "serial", "--no-vllm", "--in-memory", "--num-gpus", 2,
        "--merge-cuda", "--trust-remote-code", "--allow-crimes", "--random-seed", 11,
        "--batch-size", 3, "--task-search-path", tmp_path, "--task-search-path", tmp_path / "x",
        "--max-generation", 7, "--sigma-low", 0.04, "--sigma-high", 0.3, "--max-retries", 1,
        "--i-understand-the-depths-of-the-evils-i-am-unleashing", "--no-save-final-model",
        "--reshard", "--force-population-size", 4, "--max-fevals", 13, "--sigma0", 0.25,
        "--timeout", 300, "--no-wandb", "--no-load-in-8bit", "--no-load-in-4bit",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["evaluations"]["total"] == 13
    kept = saved_config(runs)
    assert kept["search"] | {"seed": 11, "max_generations": 7, "population": 4} == kept["search"]
    assert kept["search"] | {"sigma_low": 0.04, "sigma_high": 0.3, "sigma0": 0.25} == kept["search"]
    assert kept["budget"] == {"max_evaluations": 13, "timeout_s": 300.0}
    assert (kept["worker"]["batch_size"], kept["worker"]["trust_remote_code"]) == (3, True)
    assert kept["agents"]["max_retries"] == 1
    assert kept["task_search_path"] == [str(tmp_path), str(tmp_path / "x")]
    events = [json.loads(line) for line in err.splitlines()]
    notices = [event["text"] for event in events if event["event"] == "note"]
    assert all(notice.startswith("note: ") for notice in notices)
    assert kept["worker"]["count"] == 2
    for name in ("--strategy serial", "--merge-cuda", "--reshard", "--allow-crimes"):
        assert sum(name in line for line in notices) == 1, name
    assert (storage / "best_config.yaml").read_text() == (runs / "a" / "best.yml").read_text()
    assert not (storage / "final_model").exists()


def test_our_option_wins_over_the_old_one_of_the_same_meaning(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    both = ["--random-seed", 1, "--seed", 2, "--max-fevals", 11, "--max-evaluations", 10]
    assert call(capsys, "run", config_file, "--name", "a", "--runs-dir", runs, *both)[0] == 0
    kept = saved_config(runs)
    assert (kept["search"]["seed"], kept["budget"]["max_evaluations"]) == (2, 10)


@pytest.mark.parametrize(
    ("given", "override"),
    [
        ({"random_seed": 3}, {"search.seed": 3}),
        ({"random_seed": 0}, {"search.seed": 0}),
        ({"max_generation": 10}, {"search.max_generations": 10}),
        ({"max_fevals": 100}, {"budget.max_evaluations": 100}),
        ({"max_retries": 0}, {"agents.max_retries": 0}),
        ({"sigma0": 0.5}, {"search.sigma0": 0.5}),
        ({"force_population_size": 9}, {"search.population": 9}),
        ({"llm_model": "gpt-4o"}, {"agents.llm": "openai:gpt-4o"}),
        ({"llm_model": "anthropic:claude"}, {"agents.llm": "anthropic:claude"}),
        ({"llm_model": "none"}, {"agents.llm": "none"}),
        ({"in_memory": False}, {"worker.kind": "disk"}),
        ({"in_memory": True}, {}),
        ({"vllm": True}, {"worker.kind": "vllm"}),
        ({"vllm": True, "in_memory": True}, {"worker.kind": "vllm"}),
        (
            {"vllm": True, "in_memory": False},
            {"worker.kind": "disk", "worker.options": {"evaluate_with": "vllm"}},
        ),
        ({"num_gpus": 8}, {"worker.count": 8}),
        ({"num_gpus": 1}, {"worker.count": 1}),
        ({"strategy": "buffered"}, {"worker.buffered": True}),
        ({"strategy": "serial"}, {"worker.host": "ray_serial"}),
        ({"load_in_8bit": False, "load_in_4bit": False}, {}),
        ({}, {}),
    ],
)
def test_what_has_a_meaning_is_mapped(
    given: dict[str, Any], override: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy, "find_spec", lambda name: name == "ray")
    mapped = map_options(Legacy(**given))
    assert mapped.overrides == override
    assert mapped.notices == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strategy": "serial"}, "--strategy serial"),
        ({"merge_cuda": True}, "--merge-cuda"),
        ({"reshard": True}, "--reshard"),
        ({"allow_crimes": True}, "--allow-crimes"),
        ({"storage_path": Path("x")}, "no --llm-model"),
    ],
)
def test_what_has_none_is_said_in_one_line(
    given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(legacy, "find_spec", lambda name: None)
    mapped = map_options(Legacy(**given))
    assert mapped.overrides == {}
    assert len(mapped.notices) == 1
    assert words in mapped.notices[0]
    assert "\n" not in mapped.notices[0]


@pytest.mark.parametrize("given", [{"strategy": "pool"}, {"vllm": False}, {"allow_crimes": False}])
def test_what_is_so_already_needs_no_word(given: dict[str, Any]) -> None:
    mapped = map_options(Legacy(**given))
    assert (mapped.overrides, mapped.notices) == ({}, [])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"api_key": "sk-canary"}, "OPENAI_API_KEY"),
        ({"api_key": ""}, "OPENAI_API_KEY"),
        ({"load_in_8bit": True}, "--load-in-8bit scores a quantised copy"),
        ({"load_in_4bit": True}, "--load-in-4bit scores a quantised copy"),
        ({"strategy": "cma_es"}, "--search"),
    ],
)
def test_what_must_not_be_honoured_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        map_options(Legacy(**given))
    assert words in str(caught.value)
    assert "sk-canary" not in str(caught.value)


@pytest.mark.parametrize("form", [["--api-key", "sk-canary-1"], ["--api-key=sk-canary-1"]])
def test_a_key_on_the_command_line_is_refused_and_written_nowhere(
    config_file: Path, tmp_path: Path, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    code, out, err = call(capsys, "run", config_file, "--runs-dir", runs, *form)
    assert code == 2
    assert err.count("\n") == 1
    assert "sk-canary-1" not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"sk-canary-1" not in path.read_bytes(), path
    assert not runs.exists()


def test_a_key_in_the_environment_reaches_the_server_and_no_file(
    config_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LLM-Evo-Merge's way, --llm-model NAME, with base URL and key where OpenAI's client looks."""
    runs = tmp_path / "runs"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-2")
    with ScriptedServer(lambda body: {"summary": "fine", "thought": "", "sigma": 0.1}) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        arguments = ["--llm-model", "gpt-4o", "--max-retries", 0, "--name", "a"]
        code, out, err = call(capsys, "run", config_file, "--runs-dir", runs, *arguments)
        assert code == 0, err
        assert {r.body["model"] for r in server.requests} == {"gpt-4o"}
        assert {r.headers["authorization"] for r in server.requests} == {"Bearer sk-canary-2"}
    assert saved_config(runs)["agents"]["llm"] == "openai:gpt-4o"
    shown = json.loads(call(capsys, "show", "a", "--runs-dir", runs, "--json")[1])
    assert shown["agents"]["calls"] > 0
    doctor = call(capsys, "doctor", "--runs-dir", runs)[1]
    assert "OPENAI_API_KEY: set" in doctor
    assert "sk-canary-2" not in out + err + doctor
    for path in runs.rglob("*"):
        assert not path.is_file() or b"sk-canary-2" not in path.read_bytes(), path


def test_a_final_model_that_cannot_be_made_is_said_before_the_search(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old default exports, and the fake worker has no model: said with the way out."""
    runs = tmp_path / "runs"
    arguments = ["--runs-dir", runs, "--storage-path", tmp_path / "storage", "-q"]
    code, _, err = call(capsys, "run", config_file, *arguments)
    assert code == 2
    assert "--no-save-final-model" in err
    assert not (runs / "run-1").exists()


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("mmlu_anatomy", True),
        ("hendrycks_math", True),
        ("agieval_en", True),
        ("gsm8k", True),
        ("hellaswag", True),
        ("winogrande", True),
        ("arc_easy", True),
        ("ai2_arc", True),
        ("truthfulqa_mc2", True),
        ("bigbench_x", True),
        ("piqa", True),
        ("openbookqa", True),
        ("leaderboard_ifeval", True),
        ("gsm8k_train", False),
        ("my_gsm8k", False),
        ("architecture", False),
    ],
)
def test_benchmarks_are_no_objectives(
    config_file: Path, name: str, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config_file.write_text(config_file.read_text().replace("name: two", f"name: {name}"))
    runs = ["--runs-dir", config_file.parent / "runs"]
    code, _, err = call(capsys, "check", config_file, *runs)
    assert code == (2 if refused else 0)
    assert (f"{name!r} is a public benchmark" in err) is refused
    flag = "--i-understand-the-depths-of-the-evils-i-am-unleashing"
    assert call(capsys, "check", config_file, *runs, flag)[0] == 0
    assert call(capsys, "check", config_file, *runs, "--allow-benchmark-tasks")[0] == 0


def test_a_folder_where_a_recipe_should_go_is_said_before_the_search(
    tmp_path: Path, fake_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yml").write_text(fake_config)
    (tmp_path / "out" / "best_config.yaml").mkdir(parents=True)
    where = ["--storage-path", str(tmp_path / "out"), "--no-save-final-model"]
    assert run_app(["run", str(tmp_path / "c.yml"), "--runs-dir", str(tmp_path / "r"), *where]) == 2
    assert "is a folder; name another --storage-path" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
