"""Whether ``agentmerge demo`` finds something whatever family a machine trains: seeds × kernels.

    OMP_NUM_THREADS=1 python -m benchmarks.demo --seeds 20 [--kernels default,compatible]
        [--worker hf] [--processes 1] [--out build/demo]

For every seed and kernel setting a process of its own trains the family of that seed and runs the
demo's search with that seed. A family trained by other kernels is another family, as on another
processor: ``compatible`` is MKL's ``MKL_CBWR=COMPATIBLE``. Each result is a file in OUT; a run that
is stopped goes on where it was, and a table of what there is comes at the end. An answer counts as
ahead when it is a searched merge whose paired difference to the best cheap rival, parents included
(the best of them on sealed items, picked afterwards, which favours it), is above zero by its 95 %
interval on sealed items.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

KERNELS = {"default": {}, "compatible": {"MKL_CBWR": "COMPATIBLE"}}
SKILLS = ("shift", "sort")
MAX_EVALUATIONS = 100


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--worker", default="hf")
    parser.add_argument("--processes", type=int, default=1, help="families at once")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.one:
        write(asked.one, one(asked.first_seed, asked.worker) | {"kernels": asked.kernels})
        return
    settings = asked.kernels.split(",")
    if unknown := sorted(set(settings) - set(KERNELS)):
        parser.error(f"no kernels {unknown[0]!r}; there are {', '.join(KERNELS)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    wanted = [(seed, kernels) for seed in seeds for kernels in settings]
    # threads that only wait: what computes is a process each, whose kernels its environment chooses
    with ThreadPoolExecutor(asked.processes) as pool:
        for future in [pool.submit(made, asked, *pair) for pair in wanted]:
            future.result()
    found = [json.loads(path_of(asked.out, *pair).read_text()) for pair in wanted]
    text = table(found)
    (asked.out / "results.md").write_text(text + "\n")
    print(text)


def path_of(out: Path, seed: int, kernels: str) -> Path:
    return out / f"{kernels}-{seed}.json"


def made(asked: argparse.Namespace, seed: int, kernels: str) -> None:
    """One family and its search in a process of its own; what is there is left."""
    path = path_of(asked.out, seed, kernels)
    if path.is_file():
        return
    line = [sys.executable, "-m", "benchmarks.demo", "--one", str(path), "--worker", asked.worker]
    line += ["--first-seed", str(seed), "--kernels", kernels]
    subprocess.run(line, env=os.environ | KERNELS[kernels], check=True)
    row = json.loads(path.read_text())
    print(
        f"{kernels} seed {seed}: sealed {row['sealed']:.3f}, best rival {row['rival']:.3f}, "
        f"{'ahead' if ahead(row) else 'NOT AHEAD'}; training {row['training_s']:.0f} s, "
        f"search {row['search_s']:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def one(seed: int, worker: str) -> dict[str, Any]:
    """Train, search, and what came of it. Seconds are the processor's, of this process."""
    import torch

    from agentmerge.config import SearchConfig
    from agentmerge.demo.family import MARKER, make_family
    from agentmerge.demo.tasks import demo_search
    from agentmerge.ledger.folder import opened
    from agentmerge.report.summary import run_summary
    from agentmerge.session import driving

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        begun = time.process_time()
        family = make_family(folder / "family", skills=SKILLS, seed=seed)
        trained = time.process_time()
        config = demo_search(
            family, folder, max_evaluations=MAX_EVALUATIONS, seed=seed, worker=worker
        )
        row = driving.run(SearchConfig.from_file(config), name="demo", runs_dir=folder / "runs")
        ended = time.process_time()
        with opened(folder / "runs") as ledger:
            used = run_summary(ledger, row)["evaluations"]["total"]
        measured = json.loads((folder / "family" / MARKER).read_text())["measured"]
    assert row.result is not None
    return read(row.result) | {
        "seed": seed,
        "used": used,
        "training_s": trained - begun,
        "search_s": ended - trained,
        "family": measured,
        "machine": machine(torch.get_num_threads())
        | {"instructions": torch.backends.cpu.get_cpu_capability()},
    }


def read(card: dict[str, Any]) -> dict[str, Any]:
    """The answer against the best of parents and cheap merges, all on sealed items."""
    answer = card["answer"]
    rows = [row for row in [*card["parents"], card["best_rival"]] if row is not None]
    rival = max(rows, key=lambda row: row["sealed_score"])
    gaps = [d for d in card["differences"] if d["against"] == rival["name"]]
    gap = gaps[0] if gaps else {"mean": 0.0, "low": 0.0, "high": 0.0}
    searched = answer["name"] not in {row["name"] for row in rows}
    return {
        "answer": answer["name"],
        "searched": searched,
        "search": answer["score"],
        "sealed": answer["sealed_score"],
        "rival_name": Path(rival["name"]).name,
        "rival": rival["sealed_score"],
        "difference": [gap["mean"], gap["low"], gap["high"]],
        "verdict": card["verdict"],
    }


def ahead(row: dict[str, Any]) -> bool:
    return bool(row["searched"]) and row["difference"][1] > 0


def write(path: Path, row: dict[str, Any]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(row, indent=1))
    draft.replace(path)


def table(found: Sequence[dict[str, Any]]) -> str:
    """Median (least to most) over seeds, a row a kernel setting."""
    figures = {
        "answer, sealed": lambda row: row["sealed"],
        "best cheap rival": lambda row: row["rival"],
        "difference": lambda row: row["difference"][0],
        "evaluations": lambda row: row["used"],
        "training s": lambda row: row["training_s"],
        "search s": lambda row: row["search_s"],
    }
    lines = ["| kernels | families | ahead | " + " | ".join(figures) + " |"]
    lines.append("|---" * (3 + len(figures)) + "|")
    for kernels in dict.fromkeys(row["kernels"] for row in found):
        rows = [row for row in found if row["kernels"] == kernels]
        cells = [kernels, str(len(rows)), str(sum(map(ahead, rows)))]
        cells += [spread([figure(row) for row in rows]) for figure in figures.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    form = ".3f" if max(map(abs, values)) < 2 else ".0f"
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
