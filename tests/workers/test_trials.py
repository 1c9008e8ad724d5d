"""What came with a model and never ends, or takes all memory, is refused before it is used."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path

import pytest
import tiny
import yaml

from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import ConfigError, TaskError
from agentmerge.evaluation import trials
from agentmerge.evaluation.tokenizers import tokenizer_of
from agentmerge.evaluation.trials import faults_of, trials_of
from agentmerge.parents.headers import chat_template
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker

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


def test_a_template_is_told_what_transformers_tells_it() -> None:
    slow = f"{{% if documents is defined %}}{LOOP}{{% endif %}}"
    (fault,) = faults_of(trials_of({"'a'": slow}, {}))
    assert "is not done with one short chat" in fault


PLACES = {
    "named": {"tokenizer_config.json": {"chat_template": {"default": "A", "tool_use": "B"}}},
    "listed twice": {
        "tokenizer_config.json": {
            "chat_template": [
                {"name": "default", "template": "B"},
                {"name": "default", "template": "A"},
            ]
        }
    },
    "a processor's too": {
        "chat_template.json": {"chat_template": "B"},
        "tokenizer_config.json": {"chat_template": "A"},
    },
    "a file of its own": {
        "chat_template.jinja": "A",
        "additional_chat_templates/default.jinja": "A",
        "tokenizer_config.json": {"chat_template": "B"},
    },
    "among more": {
        "additional_chat_templates/default.jinja": "A",
        "additional_chat_templates/tool_use.jinja": "B",
        "tokenizer_config.json": {"chat_template": "B"},
    },
    "none by default": {"tokenizer_config.json": {"chat_template": {"tool_use": "B"}}},
    "no default file": {
        "additional_chat_templates/tool_use.jinja": "B",
        "tokenizer_config.json": {"chat_template": "B"},
    },
}


@pytest.mark.parametrize("place", PLACES)
def test_the_template_that_is_tried_is_the_one_that_asks(
    place: str, parents: dict[str, Path], tmp_path: Path
) -> None:
    """Wherever a model keeps it: else a harmless one in another place would be tried."""
    family = with_file(parents, tmp_path)
    for name, content in PLACES[place].items():
        file = family["b"] / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(content, dict):
            old = json.loads((parents["b"] / name).read_text()) if file.exists() else {}
            file.unlink(missing_ok=True)
            content = json.dumps(old | content)
        file.write_text(content)
    named = tuple((name, str(path)) for name, path in family.items())
    spec = WorkerSpec("hf", named, "b", config(parents, tmp_path).tasks, "float32", 8)
    used = tokenizer_of(spec).chat_template
    assert used == chat_template(family["b"])
    assert used == (None if place.startswith("no") else "A")


def normalizing(parents: dict[str, Path], folder: Path, **parts: object) -> dict[str, Path]:
    body = json.loads((parents["b"] / "tokenizer.json").read_text()) | parts
    family = with_file(parents, folder)
    (family["b"] / "tokenizer.json").unlink()
    (family["b"] / "tokenizer.json").write_text(json.dumps(body))
    return family


def test_a_tokenizer_that_makes_a_flood_of_tokens(tmp_path, parents, tasks_dir) -> None:
    """Each text would have a million: every item's would be made before any is asked."""
    flood = {"type": "Replace", "pattern": {"Regex": "."}, "content": "yes no " * 40}
    family = normalizing(parents, tmp_path, normalizer=flood)
    with pytest.raises(ConfigError, match="makes more than 20 tokens of each character"):
        prepare(config(family, tasks_dir))


def test_a_tokenizer_of_other_files_is_tried_too(tmp_path, monkeypatch) -> None:
    """Without a tokenizer.json, transformers makes the same patterns of what is there."""
    spm = pytest.importorskip("sentencepiece")
    model = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    (tmp_path / "text").write_text("\n".join(f"hello world abc {n}" for n in range(300)))
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=50,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    monkeypatch.setattr(trials, "CPU_S", 10)
    for name, table in (("good", b""), ("bad", b"\x04\x00\x00\x00\xff\xff\xff\xffa")):
        model.ParseFromString((tmp_path / "m.model").read_bytes())
        model.normalizer_spec.precompiled_charsmap = table or (
            model.normalizer_spec.precompiled_charsmap
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(model.SerializeToString())
        settings = {"tokenizer_class": "T5Tokenizer"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / name / "config.json").write_text('{"model_type": "t5"}')
    assert faults_of(trials_of({}, {"'good'": tmp_path / "good"})) == []
    (fault,) = faults_of(trials_of({}, {"'bad'": tmp_path / "bad"}))
    assert "ends the process that uses it" in fault


def test_a_token_that_the_model_has_no_row_for_is_a_fault(tmp_path, parents, tasks_dir) -> None:
    """On a GPU the embedding's index error takes the device with it."""
    model = json.loads((parents["b"] / "tokenizer.json").read_text())["model"]
    high = model | {"vocab": {word: n + 5000 * (n > 6) for word, n in model["vocab"].items()}}
    family = normalizing(parents, tmp_path, model=high)
    prepared = prepare(config(family, tasks_dir, chat_template="chatml"))
    recipe = Recipe.of_model(str(family["b"]), prepared.space.num_layers, "float32")
    with closing(HfWorker(prepared.spec, prepared.taskset)) as worker:
        worker.load(recipe)
        with pytest.raises(TaskError, match=r"makes token 50\d\d of .* rows for tokens"):
            worker.score(prepared.taskset.refs())
