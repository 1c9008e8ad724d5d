"""What came of a search: read from its log or ledger, and from what it handed out.

One harness scores every model that was handed out: ours, on items that no search has seen.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rivals.orders import BATCH_SIZE, Arm, Setting


def found(arm: Arm, out: Path, log: str) -> dict[str, Any]:
    """{evaluations, search}: how many merges were scored, and the best score it saw."""
    if arm.program == "agentmerge":
        return _from_ledger(out / "runs")
    if arm.program == "mergenetic":
        scores = [float(score) for score in re.findall(r"^scored ([0-9.]+)$", log, re.M)]
        return {"evaluations": len(scores), "search": max(scores)}
    counts = re.findall(r"^Received (\d+) genotypes$", log, re.M)
    best = re.findall(r"^Best cost: (-?[0-9.]+)$", log, re.M)
    return {"evaluations": sum(map(int, counts)), "search": -float(best[-1])}


def _from_ledger(runs: Path) -> dict[str, Any]:
    from agentmerge.ledger.folder import opened
    from agentmerge.report.summary import run_summary

    with opened(runs) as ledger:
        row = ledger.run("search")
        summary = run_summary(ledger, row)
    assert row.result is not None
    return {
        "evaluations": summary["evaluations"]["total"],
        "search": row.result["answer"]["score"],
    }


def ended_by(log: str) -> str:
    """The error in the log of a program that failed: the last line that says one."""
    said = re.findall(r"^(?:\S+ )*?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", log, re.M)
    lines = said or log.strip().splitlines() or ["no word"]
    return str(lines[-1])


def unseen_score(model: Path, setting: Setting, folder: Path) -> dict[str, Any]:
    """{score, tasks, items}: of a model folder, in its own dtype, on items that nobody saw."""
    from agentmerge.config import SearchConfig
    from agentmerge.recipe import Recipe
    from agentmerge.session import driving

    config = yaml.safe_load(setting.config.read_text())
    base = config["genome"]["base_model"]
    body: dict[str, Any] = {
        "genome": {"models": [str(model), base], "merge_method": "linear"},
        "tasks": config["tasks"],
        "task_search_path": [str(setting.unseen)],
        "num_fewshot": config["num_fewshot"],
        "apply_chat_template": config["apply_chat_template"],
        "search": {"sealed_share": 0},
        "worker": {"kind": "hf", "batch_size": BATCH_SIZE, "options": {"threads": 1}},
    }
    dtype = stored_dtype(model)
    body["worker"]["dtype"] = dtype
    alone = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1.0}}],
        "dtype": dtype,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, written in (("config.yml", body), ("recipe.yml", alone)):
        (folder / name).write_text(yaml.safe_dump(written, sort_keys=False))
    settings = SearchConfig.from_file(folder / "config.yml")
    scored = driving.evaluate(
        Recipe.parse(folder / "recipe.yml"), settings, runs_dir=folder / "runs"
    )
    return {"score": scored["score"], "tasks": dict(scored["tasks"]), "items": scored["items"]}


def stored_dtype(model: Path) -> str:
    """Of a folder's tensors, from the head of its first safetensors file."""
    with min(model.glob("*.safetensors")).open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    kinds = {entry["dtype"] for name, entry in head.items() if name != "__metadata__"}
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    (kind,) = kinds
    return names[kind]
