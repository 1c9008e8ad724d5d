"""What a gradient costs beside a score: peak memory and time, and against keeping every gradient.

    python -m benchmarks.gradient [--config FILE ...] [--repeats 3] [--json FILE]

Without a config: the demo family, and a random family of 86 million parameters in bfloat16 on the
demo's tasks. Every figure is taken in a process of its own. Seconds are the processor's, which
other programs hardly lengthen; use one thread (OMP_NUM_THREADS=1). Peak is the resident memory that
a pass takes on top of what the worker holds before it (parents, live model, prepared items). "kept"
is the same backward pass with every parameter's gradient kept to its end, and contracted then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARMS = ("score", "gradient", "kept")
METHODS = ("task_arithmetic", "ties")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient", description=__doc__)
    parser.add_argument("--config", action="append", default=[], help="a search's config")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        print(json.dumps(measured(asked.config[0], *asked.arm.split(":"), asked.repeats)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        configs = asked.config or [demo_config(Path(scratch)), wide_config(Path(scratch))]
        for config in configs:
            for method in METHODS:
                rows += [in_a_process(config, method, arm, asked.repeats) for arm in ARMS]
    print(table(rows))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


def in_a_process(config: str, method: str, arm: str, repeats: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gradient", "--config", config]
    command += ["--arm", f"{method}:{arm}", "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{row['family']} {method} {arm}: {row['seconds']:.2f} s", file=sys.stderr)
    return row


def measured(config: str, method: str, arm: str, repeats: int) -> dict[str, Any]:
    from agentmerge.config import SearchConfig
    from agentmerge.preflight.prepare import prepare
    from agentmerge.workers.hf import HfWorker

    text = Path(config).read_text()
    changed = {"genome.merge_method": method, "genome.normalize": method == "ties"}
    prepared = prepare(SearchConfig.from_text(text, config, changed), allow_benchmarks=True)
    worker = HfWorker(prepared.spec, prepared.taskset)
    refs = prepared.taskset.refs()
    recipe, _ = prepared.space.uniform()
    if method == "ties":
        recipe = prepared.space.recipe(
            [0.5 if axis.parameter == "density" else axis.unit(0.5) for axis in prepared.space.axes]
        )
    passes: dict[str, Callable[[], Any]] = {
        "score": lambda: worker.score(refs),
        "gradient": lambda: worker.gradient(recipe, refs),
        "kept": lambda: all_kept(worker, recipe, refs),
    }
    worker.load(recipe)
    worker.score(refs[:1])  # what a first pass sets up once
    peaks, seconds = [], []
    for _ in range(repeats):
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        start = time.process_time()
        passes[arm]()
        seconds.append(time.process_time() - start)
        peaks.append(memory("VmHWM") - before)
    sizes = [p.numel() * p.element_size() / 2**20 for p in worker._live.values()]
    return {
        "family": Path(config).stem,
        "method": method,
        "pass": arm,
        "seconds": statistics.median(seconds),
        "peak_mib": peaks[0],
        "model_mib": sum(sizes),
        "largest_tensor_mib": max(sizes),
        "items": len(refs),
        "batch_size": prepared.spec.batch_size,
    }


def all_kept(worker: Any, recipe: Any, refs: Any) -> Any:
    """The gradient as one would write it first: backward, then contract."""
    from agentmerge.evaluation.losses import item_loss
    from agentmerge.merging.gradient import MergeGradient

    worker.load(recipe)
    for parameter in worker._live.values():
        parameter.requires_grad_(True)
    with worker._guarded():
        for part in item_loss(worker._scorer, worker._lm, refs, "margin").parts(worker._lm):
            part.backward()
        plan, family = worker._family.plan(recipe), worker._family
        slopes = MergeGradient(plan, family, family.statistics)
        for name, parameter in worker._live.items():
            slopes.add(name, parameter.grad)
    for parameter in worker._live.values():
        parameter.grad = None
        parameter.requires_grad_(False)
    return slopes.slopes()


def memory(line: str) -> float:
    """MiB of this process by /proc/self/status: VmRSS now, VmHWM the peak."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(line):
            return int(row.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {line}: this benchmark needs Linux")


def demo_config(scratch: Path) -> str:
    from agentmerge.demo.family import cached_family

    return written(scratch, "demo", cached_family(), 200)


def wide_config(scratch: Path) -> str:
    """Base and two experts, random: what they say is worth nothing, and costs what a model does."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from agentmerge.demo.family import TinyFamily, cached_family

    tokenizer = cached_family().base
    directory = scratch / "wide"
    paths = [directory / name for name in ("base", "shift", "sort")]
    body = json.loads((tokenizer / "config.json").read_text())
    body |= {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    body |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    config = LlamaConfig(**(body | {"dtype": "bfloat16"}))
    torch.manual_seed(0)
    base = {n: p.detach() for n, p in LlamaForCausalLM(config).named_parameters()}
    for i, path in enumerate(paths):
        path.mkdir(parents=True)
        weights = {n: p + (0.002 * torch.randn_like(p) if i else 0) for n, p in base.items()}
        halves = {n: p.to(torch.bfloat16).contiguous() for n, p in weights.items()}
        save_file(halves, path / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).write_bytes((tokenizer / name).read_bytes())
    return written(
        scratch, "wide", TinyFamily(paths[0], tuple(paths[1:]), ("shift", "sort"), 0), 24
    )


def written(scratch: Path, name: str, family: Any, limit: int) -> str:
    import yaml

    from agentmerge.demo.tasks import demo_config, write_tasks

    tasks = write_tasks(scratch / f"{name}-tasks", family.skills)
    body = demo_config(family, tasks) | {"limit": limit, "task_search_path": [str(tasks)]}
    body["worker"] = {"kind": "hf", "batch_size": 16}
    path = scratch / f"{name}.yml"
    path.write_text(yaml.safe_dump(body))
    return str(path)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| family | items | method | pass | seconds | scores | peak MiB | model MiB | largest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        score = next(
            other["seconds"]
            for other in rows
            if (other["family"], other["method"]) == (row["family"], row["method"])
            and other["pass"] == "score"
        )
        lines.append(
            f"| {row['family']} | {row['items']} | {row['method']} | {row['pass']} | "
            f"{row['seconds']:.2f} | "
            f"{row['seconds'] / score:.1f} | {row['peak_mib']:.0f} | {row['model_mib']:.0f} | "
            f"{row['largest_tensor_mib']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
