"""What came with a model and never ends, or takes all memory, is refused before it is used."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import tiny
import yaml

from agentmerge.check import prepare
from agentmerge.config import SearchConfig
from agentmerge.errors import ConfigError
from agentmerge.evaluation import trials
from agentmerge.evaluation.trials import faults_of, trials_of

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}"
    "{% endgeneration %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ tools | tojson }}{{ strftime_now('%Y') }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}"
)
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMB = "{{ messages[0].content * 10**10 }}"


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "CPU_S", 1)


def test_a_template_is_tried_as_it_is_used() -> None:
    began = time.monotonic()
    assert faults_of(trials_of({"'a'": CHATML, "'b'": CHATML, "'c'": None}, {})) == []
    assert (
        faults_of(trials_of({"'a'": "{{ nonsense", "'b'": "{{ messages.nothing.here }}"}, {})) == []
    )
    assert time.monotonic() - began < 20
    assert faults_of([]) == []


@pytest.mark.parametrize(
    ("template", "said"),
    [(LOOP, "is not done with one short chat after 1 s"), (BOMB, "takes more than 4 GB")],
    ids=["loop", "bomb"],
)
def test_a_template_that_takes_too_much(template: str, said: str) -> None:
    (fault,) = faults_of(trials_of({"'good'": CHATML, "'bad'": template}, {}))
    assert f"the chat template of 'bad' {said}" in fault
    assert "genome.chat_template" in fault


def test_a_tokenizer_that_takes_too_long(tmp_path: Path, parents: dict[str, Path]) -> None:
    folders = {"'good'": parents["b"]}
    assert faults_of(trials_of({}, folders)) == []
    body = json.loads((parents["b"] / "tokenizer.json").read_text())
    body["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(1|1|11)+$x"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    (fault,) = faults_of(trials_of({}, folders | {"'bad'": tmp_path}))
    assert f"replace {tmp_path / 'tokenizer.json'}, or leave the model out" in fault
    assert "the tokenizer of 'bad'" in fault


def config(parents: dict[str, Path], tasks_dir: Path, **genome: object) -> SearchConfig:
    body = {
        "genome": {
            "models": [str(parents["b"]), str(parents["c"])],
            "base_model": str(parents["base"]),
            "merge_method": "task_arithmetic",
        }
        | genome,
        "tasks": [{"name": "tiny_choice", "metric": tiny.METRICS["tiny_choice"]}],
        "task_search_path": [str(tasks_dir)],
        "limit": 20,
        "apply_chat_template": True,
        "worker": {"kind": "hf", "device": "cpu"},
    }
    return SearchConfig.from_text(yaml.safe_dump(body))


def with_file(parents: dict[str, Path], folder: Path) -> dict[str, Path]:
    """The family, with an expert whose files may be replaced."""
    mine = folder / "b"
    mine.mkdir()
    for file in parents["b"].iterdir():
        (mine / file.name).symlink_to(file)
    return parents | {"b": mine}


@pytest.mark.parametrize("look", [{"weights": False, "run_code": False}, {}], ids=["check", "run"])
def test_nothing_hangs_on_a_template(parents, tasks_dir, tmp_path, look) -> None:
    family = with_file(parents, tmp_path)
    (family["b"] / "chat_template.jinja").write_text(LOOP)
    with pytest.raises(ConfigError, match=r"chat template of .* is not done with one short chat"):
        prepare(config(family, tasks_dir), **look)
    prepare(config(family, tasks_dir, chat_template="chatml"), **look)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "x.jinja"])
def test_nothing_hangs_on_a_pipe(parents, tasks_dir, tmp_path, name) -> None:
    family = with_file(parents, tmp_path)
    (family["b"] / name).unlink(missing_ok=True)
    os.mkfifo(family["b"] / name)
    with pytest.raises(ConfigError, match=rf"{name} .*is a pipe"):
        prepare(config(family, tasks_dir))
