"""``worker.options`` that nobody reads, devices that are not there, names that nobody knows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.errors import ConfigError
from agentmerge.preflight.prepare import prepare

NOWHERE = """\
genome: {models: [./one, ./two], merge_method: linear}
tasks: [no_such_task]
"""


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        prepare(SearchConfig.from_text(NOWHERE + text), fresh=True, weights=False)
    return caught.value.faults


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("hf", "{thread: 2}", "worker.options.thread is not a known option; did you mean"),
        ("hf", "{in_place: false}", "it is one of the vllm worker's; the hf worker knows"),
        ("disk", "{store: /x}", "worker.options.store is not a known option; did you mean"),
    ],
)
def test_an_option_that_the_worker_does_not_know_is_a_fault(
    kind: str, options: str, words: str
) -> None:
    found = faults(f"worker: {{kind: {kind}, options: {options}}}")
    assert any(words in fault for fault in found), found
    assert any("./one" in fault for fault in found), "told with the rest"


@pytest.mark.parametrize("key", ["threads", "max_length"])
@pytest.mark.parametrize("value", [".inf", ".nan", "0", "-1", "many", "[2]", "{}"])
def test_a_count_that_is_none_is_a_fault(key: str, value: str) -> None:
    found = faults(f"worker: {{options: {{{key}: {value}}}}}")
    (own,) = [fault for fault in found if fault.startswith(f"worker.options.{key} must be a")]
    assert ", not " in own
    assert any("./one" in fault for fault in found), "told with the rest"


WRONG = [
    ("hf", "options: {base: nowhere}", "base: 'nowhere' is not one of the models; use "),
    ("hf", "options: {base: [one]}", "base must be text, not ['one']"),
    ("hf", "options: {attn_implementation: 3}", "attn_implementation must be text, not 3"),
    ("hf", "engine_args: {tensor_parallel_size: two}", "must be a whole number, not 'two'"),
    ("disk", "options: {storage: 3}", "storage must be text, not 3"),
    ("disk", "options: {storage: no/where}", "storage: 'no/where' is no folder that can be writ"),
    ("disk", "options: {evaluate_with: x}", "evaluate_with must be 'hf' or 'vllm', not 'x'"),
    ("vllm", "options: {way: other}", "way must be 'reload', not 'other'"),
    ("vllm", "options: {in_place: 'no'}", "in_place must be true or false, not 'no'"),
    ("vllm", "options: {engine_process: 3}", "engine_process must be true or false, not 3"),
    ("vllm", "options: {engine_args: abc}", "engine_args must be a mapping, as in {key: value}"),
    ("vllm", "options: {engine_args: {max_model_len: x}}", "args.max_model_len must be a whole"),
    ("vllm", "engine_args: {gpu_memory_utilization: 2}", "utilization must be at most 1, not 2"),
    ("vllm", "engine_args: {max_num_batched_tokens: []}", "must be a whole number, not []"),
]


@pytest.mark.parametrize(("kind", "section", "words"), WRONG)
def test_a_value_that_the_worker_would_not_understand_is_a_fault(
    kind: str, section: str, words: str
) -> None:
    found = faults(f"worker: {{kind: {kind}, {section}}}")
    key = section.partition(":")[0]
    assert [f for f in found if f.startswith(f"worker.{key}.") and words in f], found
    assert any("./one" in fault for fault in found), "told with the rest"


def test_an_option_without_a_value_is_not_given() -> None:
    found = faults("worker: {options: {threads: null, base: null, attn_implementation: null}}")
    assert not [fault for fault in found if "worker.options" in fault]


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("delay_s: abc", "delay_s must be a number, not 'abc'"),
        ("delay_s: -1", "delay_s must be at least 0, not -1"),
        ("fail_when: 'x>>y'", "fail_when: 'x>>y' is not understood; write e.g. 'max_weight>0.95'"),
        ("fail_when: 'max_weight>1.2.3'", "fail_when: 'max_weight>1.2.3' is not understood"),
        ("die_when: [1]", "die_when: [1] is not understood"),
        ("hang_when: {a: 1}", "hang_when: {'a': 1} is not understood"),
        ("die_hard: maybe", "die_hard must be true or false, not 'maybe'"),
        ("die_at: soon", "die_at must be a whole number, not 'soon'"),
        ("scales: 3", "scales must be a list, as in [a, b], not 3"),
        ("fail_items: [a]", "fail_items.0 must be a whole number, not 'a'"),
        ("groups: {one: x}", "groups.one must be a whole number, not 'x'"),
        ("num_layers: '4'", "num_layers must be a whole number, not '4'"),
        ("no_gradient: some", "no_gradient must be 'failed' or 'lost', not 'some'"),
        ("base: 3", "base must be text, not 3"),
    ],
)
def test_a_fake_workers_wrong_value_is_one_sentence_before_anything_runs(
    command: str,
    option: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fake_config: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = fake_config.replace("kind: fake", f"kind: fake, options: {{{option}}}")
    Path("c.yml").write_text(text)
    assert run_app([command, "c.yml"]) == 2
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    assert f"worker.options.{words}" in told
    assert not Path("runs").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "nonsense"])
def test_a_device_that_is_not_there_is_one_of_the_faults(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = faults(f"worker: {{device: '{device}'}}")
    assert any(fault.startswith(f"worker.device '{device}'") for fault in found), found
    assert any("./one" in fault for fault in found)


def test_a_fault_of_the_worker_brings_none_of_another_kinds(
    tmp_path: Path, fake_config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yml"
    path.write_text(fake_config.replace("{kind: fake}", "{kind: fake, count: 0}"))
    assert run_app(["check", str(path)]) == 2
    [fault] = capsys.readouterr().err.splitlines()
    assert "worker.count must be at least 1, or 'auto', not 0" in fault


def test_check_tells_faults_of_every_kind_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yml").write_text(
        NOWHERE + "search: {sead: 1, graph: none}\nworker: {options: {thread: 1}}\n"
    )
    arguments = ["--init", "nowhere.yml", "--prompts", "no-folder", "--llm", "openai:x"]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert run_app(["check", "c.yml", *arguments]) == 2
    told = capsys.readouterr().err
    for words in (
        "search.sead is not a known key",
        "./one",
        "./two",
        "worker.options.thread",
        "no-folder",
        "OPENAI_API_KEY is not set",
    ):
        assert words in told, told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--worker", "fakes"], "did you mean 'fake'"),
        (["--search", "cma"], "did you mean 'cma_es'"),
        (["--llm", ""], "agents.llm: it is empty"),
        (["--llm", "opneai:gpt"], "did you mean 'openai'"),
        (["--base-url", "not a url"], "is no address of a server"),
    ],
)
def test_a_name_that_nobody_knows_is_told_before_anything_heavy_is_imported(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "c.yml").write_text(NOWHERE)
    script = (
        "import sys\nfrom agentmerge.cli.app import run_app\n"
        f"code = run_app(['run', 'c.yml', *{arguments!r}])\n"
        "heavy = {'torch', 'langgraph', 'langchain', 'lm_eval'} & set(sys.modules)\n"
        "print(sorted(heavy))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--dir", "file/below"],
        ["run", "c.yml", "--worker", "fake", "--runs-dir", "file/below"],
        ["init", "north", "south", "--to", "file/below/c.yml"],
    ],
)
def test_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agentmerge.demo.family.cached_family", None)
    Path("file").write_text("mine")
    Path("c.yml").write_text(NOWHERE.replace("no_such_task", "one").replace("./", ""))
    assert run_app(arguments) in (1, 2)
    told = capsys.readouterr().err
    assert "file" in told
    assert "unexpected" not in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_search_that_was_stopped_says_so_by_its_exit_code(
    tmp_path: Path, number: str, code: int, fake_config: str
) -> None:
    (tmp_path / "c.yml").write_text(fake_config)
    script = (
        "import os, signal, sys\nfrom agentmerge.cli.app import run_app\n"
        "from agentmerge.workers.fake import FakeWorker\nload = FakeWorker.load\n"
        "def stopped(self, recipe):\n"
        f"    if os.environ.pop('STOP', ''):\n        os.kill(os.getpid(), signal.{number})\n"
        "    return load(self, recipe)\nFakeWorker.load = stopped\n"
        "sys.exit(run_app(sys.argv[1:]))"
    )

    def call(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | more,
            check=False,
        )

    stopped = call("run", "c.yml", "--name", "a", STOP="1")
    assert stopped.returncode == code, stopped.stderr
    assert "go on with: agentmerge resume a" in stopped.stderr
    assert call("resume", "a").returncode == 0


def test_methods_say_what_a_search_normalizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["methods"]) == 0
    text = capsys.readouterr().out
    (ties, dare) = (text.partition(f"\n{name}: ")[2] for name in ("ties", "dare_ties"))
    line = next(line for line in dare.splitlines() if "normalize*" in line)
    assert "default false (true in a search)" in line
    assert "in a search)" not in ties.partition("\n\n")[0]


def test_check_imports_no_graph_library(tmp_path: Path, fake_config: str) -> None:
    (tmp_path / "c.yml").write_text(fake_config)
    script = (
        "import sys\nfrom agentmerge.cli.app import run_app\ncode = run_app(['check', 'c.yml'])\n"
        "sys.exit(code or (3 if {'langgraph.graph', 'torch'} & set(sys.modules) else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
    assert done.returncode == 0
