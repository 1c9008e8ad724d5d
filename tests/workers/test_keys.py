"""What can change an answer is in its key: one thing after another is edited, and the ledger asked.

Configs name tiny random models in folders of their own, so that a test may edit their files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

import agentmerge.workers.conditions as conditions_module
from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import ItemResult
from agentmerge.errors import AgentmergeError, ParentError, RunFailed, UserError
from agentmerge.ledger import Ledger, ResultKey
from agentmerge.preflight.plan import Prepared
from agentmerge.preflight.prepare import prepare
from agentmerge.search.scoring import Scoring
from agentmerge.session import driving
from agentmerge.workers.conditions import conditions_hash
from agentmerge.workers.disk import DiskWorker
from agentmerge.workers.pool import Pool
from agentmerge.workers.vllm.worker import VllmWorker

CODE = """\
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
from keys_helper import BONUS


def judge(doc, results):
    import keys_late
    return {"acc": float(results[0].strip() == doc["gold"]) + BONUS + keys_late.NOTHING}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with a chat template; tasks of generated answers, a perplexity, and with code."""
    root = tmp_path_factory.mktemp("keys")
    base = tiny.write_model(root / "base", seed=3)
    for name, seed in (("b", 4), ("c", 5)):
        tiny.write_model(root / name, seed=seed, near=base, template=tiny.TEMPLATE)
    tasks = tiny.write_tasks(root / "tasks", root / "b", count=16)
    (tasks / "keys_helper.py").write_text("BONUS = 0.0\n")
    (tasks / "keys_late.py").write_text("NOTHING = 0.0\n")
    (tasks / "judge.py").write_text(CODE)
    path = tasks / "tiny_answer.yaml"
    body = yaml.safe_load(path.read_text()) | {"task": "tiny_judged"}
    del body["metric_list"]
    text = yaml.safe_dump(body | {"metric_list": [{"metric": "acc"}]}, sort_keys=False)
    (tasks / "tiny_judged.yaml").write_text(text + "process_results: !function judge.judge\n")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of the family and its tasks, to be edited."""
    for name in ("base", "b", "c"):
        shutil.copytree(made / name, tmp_path / name)
    shutil.copytree(made / "tasks", tmp_path / "tasks", copy_function=shutil.copyfile)
    for name in ("keys_helper", "keys_late"):
        sys.modules.pop(name, None)  # another test's
    return tmp_path


def config_of(place: Path, **worker: Any) -> SearchConfig:
    body = {
        "genome": {
            "models": [str(place / "b"), str(place / "c")],
            "base_model": str(place / "base"),
            "merge_method": "task_arithmetic",
        },
        "tasks": [
            {"name": "tiny_answer", "metric": "exact_match,none"},
            {"name": "tiny_judged", "metric": "acc,none"},
            {"name": "tiny_cloze", "metric": "perplexity,none", "weight": 0.01},
        ],
        "limit": 8,
        "apply_chat_template": True,
        "task_search_path": [str(place / "tasks")],
        "search": {"seed": 1, "algorithm": "random", "population": 2, "sealed_share": 0},
        "budget": {"max_evaluations": 4},
        "worker": {"batch_size": 8, "device": "cpu", **worker},
    }
    return SearchConfig.from_text(yaml.safe_dump(body))


@dataclasses.dataclass
class _Known:
    """The pool of a search that asks nobody."""

    info: Any


def recipe_hash(prepared: Prepared) -> str:
    return prepared.space.uniform()[0].hash(prepared.identities)


def known_tasks(ledger: Ledger, config: SearchConfig) -> set[str]:
    """The tasks of which the ledger has the uniform merge's results."""
    try:
        prepared = prepare(config)
    except AgentmergeError:
        return set()  # a search that cannot begin reuses nothing
    scoring = Scoring(ledger, prepared.taskset, _Known(prepared.engine))  # type: ignore[arg-type]
    return {ref.task for ref in scoring.known(recipe_hash(prepared))}


def filled(path: Path, config: SearchConfig) -> Ledger:
    """A ledger that knows the uniform merge's results."""
    prepared = prepare(config)
    ledger = Ledger(path)
    for task in prepared.taskset.tasks:
        key = ResultKey(recipe_hash(prepared), prepared.engine, task.protocol_hash)
        ledger.save_results(key, task.name, task.items, [ItemResult(1.0)] * len(task.items), "f")
    return ledger


def edit_json(file: Path, **changes: Any) -> None:
    body = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(body | changes))


def edit_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def swap_letters(file: Path) -> None:
    body = json.loads(file.read_text())
    vocab = body["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(body))


ALL = {"tiny_answer", "tiny_judged", "tiny_cloze"}
EDITS: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "nothing": (lambda p: None, ALL),
    "who wrote a config": (
        lambda p: edit_json(p / "b/config.json", transformers_version="1", _name_or_path="x"), ALL,
    ),
    "penalties, which are never used": (
        lambda p: edit_json(
            p / "b/generation_config.json", repetition_penalty=2.0, no_repeat_ngram_size=1
        ),
        ALL,
    ),
    "the end of text": (lambda p: edit_json(p / "b/generation_config.json", eos_token_id=9), set()),
    "a setting of the live model": (
        lambda p: edit_json(p / "b/config.json", rms_norm_eps=0.5), set(),
    ),
    "the tokenizer's table": (lambda p: swap_letters(p / "b/tokenizer.json"), set()),
    "a flag of the tokenizer": (
        lambda p: edit_json(p / "b/tokenizer_config.json", clean_up_tokenization_spaces=True),
        set(),
    ),
    "the chat template": (
        lambda p: (p / "b/chat_template.jinja").write_text(tiny.TEMPLATE + "!"), set(),
    ),
    "the task's code": (
        lambda p: edit_text(p / "tasks/judge.py", "+ BONUS", "+ 2 * BONUS"), ALL - {"tiny_judged"},
    ),
    "its helper module": (
        lambda p: (p / "tasks/keys_helper.py").write_text("BONUS = 1.0\n"), ALL - {"tiny_judged"},
    ),
    "a module imported late": (
        lambda p: (p / "tasks/keys_late.py").write_text("NOTHING = 1.0\n"), ALL - {"tiny_judged"},
    ),
    "the decoding": (
        lambda p: edit_text(p / "tasks/tiny_answer.yaml", "max_gen_toks: 4", "max_gen_toks: 3"),
        ALL - {"tiny_answer"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_the_ledger_answers_only_while_all_is_the_same(place: Path, what: str) -> None:
    change, still_known = EDITS[what]
    with filled(place / "a.sqlite", config_of(place)) as ledger:
        change(place)
        if what == "the chat template":  # of both, or the search wants to be told which
            shutil.copy(place / "b/chat_template.jinja", place / "c/chat_template.jinja")
        assert known_tasks(ledger, config_of(place)) == still_known


@pytest.mark.parametrize(
    "worker",
    [{"dtype": "bfloat16"}, {"batch_size": 4}, {"options": {"attn_implementation": "eager"}}],
    ids=lambda worker: next(iter(worker)),
)
def test_other_settings_of_the_worker_are_another_key(place: Path, worker: dict[str, Any]) -> None:
    with filled(place / "a.sqlite", config_of(place)) as ledger:
        assert known_tasks(ledger, config_of(place)) == ALL
        assert known_tasks(ledger, config_of(place, **worker)) == set()


def test_the_process_is_part_of_the_key(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of our own code, torch's precision, and variables that choose other kernels."""
    config = config_of(place)
    with filled(place / "a.sqlite", config) as ledger:
        for name in ("MERGING", "SCORING"):
            with monkeypatch.context() as patch:
                patch.setattr(conditions_module, name, 99)
                assert known_tasks(ledger, config) == set(), name
        with monkeypatch.context() as patch:
            patch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
            assert known_tasks(ledger, config) == set()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            assert known_tasks(ledger, config) == set()
        finally:
            torch.set_float32_matmul_precision(before)
        assert known_tasks(ledger, config) == ALL


def _edited(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, Mapping):
        return {k: v if isinstance(v, str) else _edited(v) for k, v in value.items()}
    return "gelu" if value == "silu" else f"{value}-other"


def test_every_setting_that_a_config_has_is_part_of_the_key(place: Path) -> None:
    """Whatever it is: which of them an architecture reads, only its code knows."""
    spec = tiny.spec({"b": place / "b"}, tiny.tasks_config(place / "tasks", "tiny_answer"))
    before = conditions_hash(spec)
    file = place / "b/config.json"
    body = json.loads(file.read_text())
    edits = {key: _edited(value) for key, value in body.items()} | {"logit_scale": 2.0}
    impossible = set()
    for key in edits.keys() - {"dtype", "transformers_version"}:
        file.write_text(json.dumps(body | {key: edits[key]}))
        try:
            assert conditions_hash(spec) != before, key
        except ParentError:  # no such model: nothing is reused
            impossible.add(key)
    assert not impossible & {"rope_parameters", "rms_norm_eps", "attention_bias", "hidden_act"}
    file.write_text(json.dumps(body))
    assert conditions_hash(spec) == before


def test_vllms_variables_count_for_vllm_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions_module, "_before_vllm", [])
    hf = tiny.spec({"b": place / "b"}, tiny.tasks_config(place / "tasks", "tiny_answer"))
    disk = dataclasses.replace(hf, options=hf.options | {"evaluate_with": "vllm"})
    by_vllm = partial(conditions_hash, hf, vllm=True)
    before = conditions_hash(hf), by_vllm()
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert (conditions_hash(hf), by_vllm()) == before
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert conditions_hash(hf) == before[0]
    assert by_vllm() != before[1]
    assert VllmWorker.describe(hf).conditions == DiskWorker.describe(disk).conditions == by_vllm()
    assert DiskWorker.describe(hf).conditions == before[0]
    assert VllmWorker.conditions(hf) == DiskWorker.conditions(disk) != DiskWorker.conditions(hf)


def test_a_models_own_code_is_part_of_the_key(place: Path) -> None:
    folder = place / "b"
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})
    (folder / "own.py").write_text("import more\n")
    spec = tiny.spec({"b": folder}, tiny.tasks_config(place / "tasks", "tiny_answer"))
    trusted = dataclasses.replace(spec, trust_remote_code=True)
    before = conditions_hash(spec), conditions_hash(trusted)
    (folder / "more.py").write_text("ANSWER = 42\n")
    assert conditions_hash(spec) == before[0]
    assert conditions_hash(trusted) != before[1]


# --- searches ------------------------------------------------------------------------------------


def scores(runs_dir: Path, name: str) -> tuple[list[float | None], int]:
    """(score of every candidate, how many of them were not paid for)."""
    with Ledger(runs_dir / driving.LEDGER) as ledger:
        found = ledger.candidates(ledger.run(name).id)
    return [c.score for c in found], sum(c.reused for c in found)


def test_a_search_reuses_nothing_of_another_model(place: Path) -> None:
    """A penalty of one parent counts for no merge; a setting that does is another search's."""
    config, runs = config_of(place), place / "runs"
    driving.run(config, name="one", runs_dir=runs)
    edit_json(place / "b/generation_config.json", no_repeat_ngram_size=1, repetition_penalty=1.8)
    driving.run(config, name="two", runs_dir=runs)
    driving.run(config, name="afresh", runs_dir=place / "other")
    one, paid_before = scores(runs, "one")
    assert paid_before == 0
    assert scores(runs, "two") == (one, 4)
    assert scores(place / "other", "afresh") == (one, 0)
    for name in ("base", "b", "c"):
        edit_json(place / name / "config.json", rms_norm_eps=0.5)
    driving.run(config, name="three", runs_dir=runs)
    three, reused = scores(runs, "three")
    assert reused == 0
    assert three != one
    with pytest.raises(UserError, match=r"live model's config changed: rms_norm_eps from 1e-06 to"):
        driving.resume("one", runs_dir=runs, overrides={"budget.max_evaluations": 6})


def test_a_recipe_with_other_weights_is_refused(place: Path) -> None:
    """Results of two merges are never put together under one key."""
    config, runs = config_of(place), place / "runs"
    driving.run(config, name="one", runs_dir=runs)
    with Ledger(runs / driving.LEDGER) as ledger, ledger._writing() as conn:
        conn.execute("UPDATE results SET fingerprint = 'another'")
    raised = config.model_copy(update={"tasks": config.tasks.model_copy(update={"limit": 10})})
    with pytest.raises(RunFailed, match=r"other weights \(fingerprint .*another.*--runs-dir"):
        driving.run(raised, name="two", runs_dir=runs)


def test_old_results_stay_and_are_not_reused_and_that_is_said_once(place: Path) -> None:
    config, runs = config_of(place), place / "runs"
    driving.run(config, name="old", runs_dir=runs)
    with Ledger(runs / driving.LEDGER) as ledger, ledger._writing() as conn:
        conn.execute("UPDATE engines SET hash = 'h', info = json_remove(info, '$.conditions')")
        conn.execute("UPDATE runs SET facts = json_remove(facts, '$.engine.conditions')")
        conn.execute("UPDATE runs SET facts = json_remove(facts, '$.conditions')")
        conn.execute("DELETE FROM told")
    said: list[str] = []

    def emit(event: dict[str, Any]) -> None:
        said.extend([event["text"]] if event["event"] == "note" else [])

    with pytest.raises(UserError, match="has become part of the key of results"):
        driving.resume("old", runs_dir=runs, overrides={"budget.max_evaluations": 6})
    driving.run(config, name="new", runs_dir=runs, emit=emit)
    assert scores(runs, "new") == (scores(runs, "old")[0], 0)
    driving.run(config, name="newer", runs_dir=runs, emit=emit)
    assert len(said) == 1
    assert "keyed them by weights and tasks only" in said[0]
    branch = driving.branch("old", at=0, name="branch", runs_dir=runs, emit=emit)
    assert branch.status == "done"


@pytest.mark.parametrize("kind", ["hf", "disk"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_parent_replaced_before_it_is_loaded_is_noticed(
    place: Path, kind: str, file: str
) -> None:
    """By another file of the same size and time, as a copy that keeps times leaves one."""
    prepared = prepare(config_of(place, kind=kind))
    old = (place / "c" / file).stat()
    fresh = place / "fresh"
    body = bytearray((place / "c" / file).read_bytes())
    at = body.index(b'"transformers_version": "') + 25 if file == "config.json" else -2
    body[at] ^= 1
    fresh.write_bytes(body)
    os.utime(fresh, ns=(old.st_atime_ns, old.st_mtime_ns))
    os.replace(fresh, place / "c" / file)
    recipe = prepared.space.uniform()[0]
    with Pool(prepared.spec) as pool, pytest.raises(RunFailed, match=rf"{file} was changed after"):
        pool.evaluate(recipe, prepared.taskset.refs())
    if file == "model.safetensors":
        assert prepare(config_of(place)).identities != prepared.identities
