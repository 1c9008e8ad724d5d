"""``check`` reads a config, models and tasks from elsewhere, and runs none of their code."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentmerge.cli.app import run_app
from tests.evaluation import tiny

#: What each piece of code does when it is run: a file appears.
CANARY = "from pathlib import Path\nPath({place!r}, {name!r}).write_text('ran')\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.write_family(root)
    return root


@pytest.fixture
def place(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path / "models")
    docs = [{"q": f"s:{'ab' * n}=", "gold": "ab"} for n in range(1, 9)]
    for name, metric in (
        ("plain", "acc"),
        ("coded", "acc"),
        ("rude", "acc"),
        ("odd", "perplexity"),
    ):
        tiny.write_task(
            tmp_path / "tasks", name, docs, "loglikelihood", doc_to_target="gold",
            metric_list=tiny.metric_list(metric),
        )  # fmt: skip
    return tmp_path


def canary(place: Path, file: str, rest: str = "") -> None:
    (place / file).write_text(CANARY.format(place=str(place), name=f"canary-{file[-9:-3]}") + rest)


def canaries(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("canary-*"))


def write(place: Path, *tasks: str, **sections: Any) -> None:
    body = {
        "genome": {
            "models": ["models/b", "models/c"],
            "base_model": "models/base",
            "merge_method": "task_arithmetic",
        },
        "tasks": [
            {"name": name, "metric": "perplexity,none" if name == "odd" else "acc,none"}
            for name in tasks
        ],
        "task_search_path": ["tasks"],
        "apply_chat_template": False,
        "search": {"algorithm": "random", "sealed_share": 0},
        "worker": {"options": {"threads": 1}},
        "budget": {"max_evaluations": 5},
    } | sections
    (place / "c.yml").write_text(yaml.safe_dump(body))


def check(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    code = run_app(["check", "c.yml", "--json", *options])
    out, err = capsys.readouterr()
    assert out, err
    return code, json.loads(out)


def test_code_of_tasks_and_graph_is_named_and_not_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary(place, "tasks/coding.py", "def docs(data):\n    return data\n")
    coded = (place / "tasks" / "coded.yaml").read_text() + "process_docs: !function coding.docs\n"
    (place / "tasks" / "shared").write_text(coded)
    (place / "tasks" / "coded.yaml").write_text("include: shared\ntask: coded\n")
    canary(place, "graphs.py", "def build():\n    from graphs.search import build as b\n")
    write(place, "plain", "odd", "coded", search={"graph": "graphs.py:build"})
    code, found = check(capsys)
    assert code == 0, found
    assert canaries(place) == []
    assert found["plan"]["items"] == 8 + 8, "what names no code is built as ever"
    told = "\n".join(found["plan"]["notes"])
    assert "task 'coded' is not built" in told
    assert "!function coding.docs" in told
    assert "graphs.py:build' is code" in told

    code, found = check(capsys, "--run-code")
    assert canaries(place) == ["canary-coding", "canary-graphs"]
    assert code == 0, found
    assert found["plan"]["items"] == 8 + 8 + 8


def test_a_metric_of_another_library_is_code(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "metric").mkdir()
    canary(place, "metric/metric.py")
    file = place / "tasks" / "coded.yaml"
    file.write_text(file.read_text().replace("metric: acc", f"metric: {place}/metric"))
    write(place, "plain", "coded")
    code, found = check(capsys)
    assert code == 0, found
    assert canaries(place) == []
    assert any("metric" in note and "'coded'" in note for note in found["plan"]["notes"])


def test_a_template_of_a_task_does_not_reach_python(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "tasks" / "rude.yaml"
    rude = (
        "{{ cycler.__init__.__globals__.os.system('touch "
        + str(place / "canary-template")
        + "') }}"
    )
    body = yaml.safe_load(file.read_text()) | {"doc_to_text": rude}
    file.write_text(yaml.safe_dump(body))
    write(place, "plain", "rude")
    code, found = check(capsys)
    assert canaries(place) == []
    assert code == 2
    assert any("rude" in fault for fault in found["faults"])


def test_a_models_own_code_waits_for_the_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(place / "modules"))
    for model in (place / "models").iterdir():
        canary(place, f"models/{model.name}/own_code.py")
        for name, key in (
            ("config.json", {"AutoConfig": "own_code.C"}),
            ("tokenizer_config.json", {"AutoTokenizer": ["own_code.T", None]}),
        ):
            file = model / name
            file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": key}))
    write(place, "plain", worker={"trust_remote_code": True})
    code, found = check(capsys)
    assert code == 0, found
    assert canaries(place) == []
    assert any("--run-code" in note for note in found["plan"]["notes"])


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "circle", "bomb", "documents"])
def test_a_task_that_would_be_read_for_ever_is_refused(
    place: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = place / "tasks" / "zz.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.write_text("task: zz\ninclude: /dev/zero\n")
    elif kind == "huge":
        file.write_text("task: zz\n# " + "x" * (1 << 20))
    elif kind == "circle":
        file.write_text("task: zz\ninclude: zz.yaml\n")
    elif kind == "bomb":
        levels = (
            f"m{i}: &m{i} {{<<: [{'*m' + str(i - 1) + ', '}*m{i - 1}]}}" for i in range(1, 40)
        )
        file.write_text("\n".join(["task: zz", "m0: &m0 {a: 1}", *levels]))
    else:
        os.mkfifo(place / "docs.jsonl")
        text = (place / "tasks" / "plain.yaml").read_text()
        file.write_text(text.replace("plain.jsonl", "../docs.jsonl").replace("plain", "zz"))
    # What lm-eval passes over as well is refused where it is asked for.
    write(place, "plain", *(["zz"] if kind in ("documents", "circle") else []))
    code, found = check(capsys)
    assert code == 2
    assert any(
        ("docs.jsonl" if kind == "documents" else "zz") in f or "/dev/zero" in f
        for f in found["faults"]
    )


def teardown_module() -> None:
    for name in [name for name in sys.modules if name.startswith("agentmerge_graph_graphs")]:
        del sys.modules[name]
