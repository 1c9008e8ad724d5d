"""What adapters take in memory and in a merge, held as adapters and as whole models.

    python -m benchmarks.adapters [--parameters N] [--repeats N] [--experts N ...]

A random Llama checkpoint in bfloat16 and LoRA adapters of rank 8 of all its linear layers. Held is
what the family counts in memory; a merge is every tensor of a plan with new weights, written into
live tensors, by the process's own processor time (one thread), the median of several; equal says
whether both ways gave the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from agentmerge.merging.digests import digest
from agentmerge.merging.family import Family
from agentmerge.parents.plain import make_plain
from agentmerge.parents.sources import find_parent
from agentmerge.recipe import Recipe
from benchmarks.families import LAYERS, Shape, recipe, write_family
from benchmarks.machine import machine

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
RANK = 8


def write_adapter(path: Path, base: Path, shape: Shape, seed: int) -> Path:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in shape.tensors.items():
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, size[1], generator=draw) / 30
            tensors[f"{module}.lora_B.weight"] = torch.randn(size[0], RANK, generator=draw) / 50
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": "all-linear",
    }
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def measured(paths: dict[str, Path], repeats: int) -> tuple[int, dict[str, tuple[float, str]]]:
    """Bytes held; of each method seconds a merge, and the digest of the last."""
    family = Family.open(paths, base="base", placement="device")
    targets = {s.name: torch.empty(s.shape, dtype=torch.bfloat16) for s in family.layout.tensors}
    draw = torch.Generator().manual_seed(0)
    found = {}
    for method in METHODS:
        times = []
        for _ in range(repeats + 1):
            body = recipe(method, list(paths), 1, draw)
            plan = family.plan(Recipe.parse(body).canonical(LAYERS))
            start = time.process_time()
            for item in plan.tensors:
                family.merge_into(item, plan.merge_seed, targets[item.spec.name])
            times.append(time.process_time() - start)
        found[method] = statistics.median(times[1:]), digest(targets.items())
    return family.size_bytes, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parameters", type=int, default=115_600_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 12])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    shape = Shape.near(asked.parameters)
    table = Table("adapters", "held as", "MB held", *(f"{m}, ms" for m in METHODS), "equal")
    with tempfile.TemporaryDirectory() as root:
        os.environ["AGENTMERGE_CACHE"] = f"{root}/cache"
        base = write_family(Path(root), shape, 0, torch.bfloat16)["base"]
        names = [
            f"{base}+{write_adapter(Path(root) / f'adapter-{seed}', base, shape, seed)}"
            for seed in range(max(asked.experts))
        ]
        made = make_plain(map(find_parent, names))
        folders = [made[name] for name in names]
        found = {}
        for way in ("adapters", "whole models"):
            for count in asked.experts:
                paths = {"base": base} | {f"e{i}": path for i, path in enumerate(folders[:count])}
                found[count, way] = measured(paths, asked.repeats)
            for folder in folders:  # without its factors, a checkpoint is a whole model
                shutil.rmtree(folder / "low_rank", ignore_errors=True)
    for (count, way), (held, rows) in sorted(found.items()):
        other = found[count, "whole models"][1]
        equal = all(rows[m][1] == other[m][1] for m in METHODS)
        times = (f"{rows[m][0] * 1e3:.1f}" for m in METHODS)
        table.add_row(str(count), way, f"{held / 1e6:.1f}", *times, "yes" if equal else "NO")
    console = Console(width=120)
    console.print(", ".join(f"{name} {value}" for name, value in machine(1).items()))
    console.print(table)


if __name__ == "__main__":
    main()
