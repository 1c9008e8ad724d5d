"""What each program is given: a family, a seed's tasks, and a command line an arm.

All search the same items; what they hand out is scored on others that none of them has seen. It
knows the programs' inputs; it starts nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import SEARCH_LIMIT, demo_config, write_tasks

HERE = Path(__file__).parent
Program = Literal["agentmerge", "mergekit-evolve", "mergenetic"]

#: Documents a task: those that searches may use (and agentmerge seals some of), those for scoring.
SEARCHED, UNSEEN = 800, 1000
BATCH_SIZE = 200


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run a program. flags: of its command line. order: of ``drive_mergenetic``."""

    program: Program
    note: str
    flags: tuple[str, ...] = ()
    population: int = 0
    dtype: str = "bfloat16"


ARMS: Mapping[str, Arm] = {
    "agentmerge": Arm("agentmerge", "its defaults (`auto`)"),
    "mergekit-evolve": Arm("mergekit-evolve", "its defaults: mean 1/models, `--sigma0` 1/6"),
    "mergenetic": Arm("mergenetic", "its README: `GA(pop_size=32)`, bfloat16", population=32),
    "agentmerge-cma": Arm("agentmerge", "`--search cma_es`", ("--search", "cma_es")),
    "mergekit-evolve-wide": Arm("mergekit-evolve", "`--sigma0 0.3`", ("--sigma0", "0.3")),
    "mergenetic-small": Arm(
        "mergenetic", "`GA(pop_size=10)`, float32", population=10, dtype="float32"
    ),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One seed's inputs. config: one file that agentmerge and mergekit-evolve both read."""

    folder: Path
    seed: int

    @property
    def config(self) -> Path:
        return self.folder / "config.yml"

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    @property
    def unseen(self) -> Path:
        return self.folder / "unseen"


def prepare(family: TinyFamily, setting: Setting) -> None:
    """Write tasks (for searches, and for scoring), config, and the family for mergenetic."""
    whole = setting.folder / "whole"
    write_tasks(whole, family.skills, n_items=SEARCHED + UNSEEN, seed=setting.seed)
    _part(whole, setting.tasks, slice(None, SEARCHED))
    _part(whole, setting.unseen, slice(SEARCHED, None))
    shutil.rmtree(whole)
    older_tokenizer((family.base, *family.experts), setting.folder / "family")
    setting.config.write_text(
        yaml.safe_dump(demo_config(family, setting.tasks), sort_keys=False), encoding="utf-8"
    )


def _part(whole: Path, folder: Path, documents: slice) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in whole.glob("*.yaml"):
        items = folder / f"{path.stem}.jsonl"
        lines = (whole / items.name).read_text(encoding="utf-8").splitlines(keepends=True)
        items.write_text("".join(lines[documents]), encoding="utf-8")
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        task["dataset_kwargs"]["data_files"]["test"] = str(items.absolute())
        (folder / path.name).write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def older_tokenizer(models: Sequence[Path], folder: Path) -> None:
    """Copies whose tokenizer's class has its name of transformers 4, which mergenetic needs."""
    for model in models:
        shutil.copytree(model, folder / model.name, dirs_exist_ok=True)
        path = folder / model.name / "tokenizer_config.json"
        body = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        path.write_text(json.dumps(body, indent=1))


def command(arm: Arm, setting: Setting, out: Path, budget: int, python: Path) -> list[str]:
    """What is started. agentmerge is given mergekit-evolve's command line after its own name."""
    if arm.program == "mergenetic":
        path = out / "order.json"
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(order(arm, setting, out, budget), indent=1))
        return [str(python), str(HERE / "drive_mergenetic.py"), str(path)]
    shared = [str(setting.config), "--storage-path", str(out), "--strategy", "pool"]
    shared += ["--num-gpus", "1", "--no-merge-cuda", "--batch-size", str(BATCH_SIZE)]
    shared += ["--task-search-path", str(setting.tasks), "--random-seed", str(setting.seed)]
    shared += ["--max-fevals", str(budget), *arm.flags]
    if arm.program == "mergekit-evolve":
        return [str(python), str(HERE / "drive_mergekit.py"), *shared]
    runs = ["--runs-dir", str(out / "runs"), "--name", "search"]
    return [sys.executable, "-m", "agentmerge", "run", *shared, *runs]


def order(arm: Arm, setting: Setting, out: Path, budget: int) -> dict[str, Any]:
    """``drive_mergenetic``'s input, as many whole generations as the budget has, at least one."""
    config = yaml.safe_load(setting.config.read_text())
    genome, family = config["genome"], setting.folder / "family"
    return {
        "base": str(family / Path(genome["base_model"]).name),
        "experts": [str(family / Path(model).name) for model in genome["models"]],
        "tasks_dir": str(setting.tasks),
        "tasks": config["tasks"],
        "limit": SEARCH_LIMIT,
        "batch_size": BATCH_SIZE,
        "dtype": arm.dtype,
        "population": arm.population,
        "generations": max(1, round(budget / arm.population)),
        "seed": setting.seed,
        "out": str(out),
    }


def handed_out(arm: Arm, out: Path) -> Path:
    """The model folder that a search ends with."""
    return out / ("models/merged" if arm.program == "mergenetic" else "final_model")
