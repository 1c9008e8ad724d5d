"""The real rivals live: mergekit-evolve and mergenetic beside agentmerge, on the demo's family.

    python -m benchmarks.rivals setup          # an environment each, under build/rivals
    OMP_NUM_THREADS=1 python -m benchmarks.rivals run --seeds 5 --budget 60 [--arms a,b] [--out DIR]
    python -m benchmarks.rivals table [--out DIR]

The family is the demo's, trained here; a seed asks other items of it, and is the search's seed
(mergekit-evolve does not hand its own to CMA-ES). Arms of one seed are paired. Each search is a
process; its result is a file in OUT, so that a run that is stopped goes on where it was, and one
that failed says what ended it. What a search hands out is scored here, by one harness, on 3,000
items that no search has seen.

Seconds are of the whole command, start and final model with it. Those of the processor are of all
its processes, sampled once a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from agentmerge.demo.family import cached_family
from benchmarks.machine import machine
from benchmarks.rivals import orders, reading
from benchmarks.rivals.orders import ARMS, Program, Setting

BUILD = Path("build/rivals")
SKILLS = ("shift", "sort")
EVERY_S = 1.0

#: What pip is told, a line a step. mergekit-evolve asks for any lm_eval, and its own transformers
#: leaves it 0.4.4: others end at its import (docs/yardsticks.md). mergenetic's requirements are
#: its own but for vLLM, whose releases for its transformers are for CUDA alone.
STEPS: dict[Program, tuple[tuple[str, ...], ...]] = {
    "mergekit-evolve": (
        ("-c", "constraints.txt", "torch"),
        ("-c", "constraints.txt", "mergekit[evolve]==0.1.5"),
        ("lm_eval==0.4.4",),
    ),
    "mergenetic": (
        ("torch==2.13.0",),
        (
            *("torch==2.13.0", "accelerate==1.3.0", "bitsandbytes==0.45.4", "einops==0.7.0"),
            *("fasttext-numpy2", "git-python", "gradio==5.29.1", "lm-eval==0.4.8"),
            *("mergekit==0.0.6", "pandas==2.2.2", "plotly", "psutil==7.0.0", "pymoo==0.6.1.3"),
            *("pyyaml==6.0.1", "scikit-learn", "transformers==4.45.2", "wheel==0.41.2"),
            *("wrapt==1.16.0", "xxhash==3.4.1", "yarl==1.9.4", "prompt_toolkit==3.0.51"),
        ),
        ("--no-deps", "mergenetic==0.1.1"),
    ),
}
RAY_LATE = "The current node timed out during startup"
VERSIONS = ("torch", "transformers", "mergekit", "mergenetic", "ray", "lm_eval", "cma", "pymoo")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rivals", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("part", choices=("setup", "run", "table"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=60, help="evaluations a search")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--processes", type=int, default=1, help="searches at once")
    parser.add_argument("--out", type=Path, default=BUILD / "results")
    asked = parser.parse_args(arguments)
    arms = asked.arms.split(",")
    if unknown := sorted(set(arms) - set(ARMS)):
        parser.error(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if asked.part == "setup":
        set_up()
    if asked.part == "run":
        seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
        settings = [prepared(asked.out, seed) for seed in seeds]
        wanted = [(arm, setting) for setting in settings for arm in arms]
        with ThreadPoolExecutor(asked.processes) as pool:
            for future in [pool.submit(made, asked.out, *pair, asked.budget) for pair in wanted]:
                future.result()
    if asked.part != "setup":
        rows = [json.loads(path.read_text()) for path in sorted(asked.out.glob("*.json"))]
        print(table(rows))


def set_up() -> None:
    """Make what is not there; an environment is whole once its marker is."""
    for program, steps in STEPS.items():
        folder = BUILD / program
        if (folder / "whole").is_file():
            continue
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        for step in steps:
            line = [str(python_of(program)), "-m", "pip", "install", "-qq", *step]
            subprocess.run(line, check=True)
        (folder / "whole").touch()


def python_of(program: Program) -> Path:
    return (BUILD / program / "bin" / "python").absolute()


def prepared(out: Path, seed: int) -> Setting:
    """A seed's tasks and config over the demo's family, made once."""
    setting = Setting((out / f"seed-{seed}").absolute(), seed)
    if not setting.config.is_file():
        orders.prepare(cached_family(SKILLS, on_progress=print), setting)
    return setting


def made(out: Path, name: str, setting: Setting, budget: int) -> None:
    """One search in a process of its own, and its score; what is there is left."""
    path = out / f"{name}-{setting.seed}.json"
    if path.is_file():
        return
    arm = ARMS[name]
    with tempfile.TemporaryDirectory(prefix="rivals-") as scratch:
        work = Path(scratch)
        line = orders.command(arm, setting, work / "out", budget, python_of(arm.program))
        log = work / "log"
        code, wall_s, cpu_s = timed(line, log, environment(arm.program, work), work)
        text = log.read_text(errors="replace")
        shutil.copy(log, path.with_suffix(".log"))
        if code and RAY_LATE in text:  # the machine's fault, not the search's
            print(f"{name} seed {setting.seed}: Ray did not start in its 30 s; run this again")
            return
        row: dict[str, Any] = {"arm": name, "seed": setting.seed, "budget": budget}
        row |= {"wall_s": wall_s, "cpu_s": cpu_s, "versions": versions(arm.program)}
        row |= {"machine": machine(int(os.environ.get("OMP_NUM_THREADS", "0")))}
        if code:
            row["failed"] = reading.ended_by(text)
        else:
            model = orders.handed_out(arm, work / "out")
            row |= reading.found(arm, work / "out", text)
            row |= {"unseen": reading.unseen_score(model, setting, work / "scoring")}
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(row, indent=1))
    draft.replace(path)
    print(f"{name} seed {setting.seed}: {row.get('failed') or row['unseen']['score']}", flush=True)


def environment(program: Program, work: Path) -> dict[str, str]:
    """One thread and no network; the rivals see nothing of this checkout but their drivers."""
    given = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if program == "agentmerge":
        return given | {"PYTHONPATH": str(Path.cwd())}
    given |= {"PYTHONPATH": str(orders.HERE.absolute()), "RAY_TMPDIR": str(work)}
    given |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    given |= {"RAY_worker_niceness": "0"}  # Ray would lower its workers by 15 among other work
    return given | {"HF_DATASETS_CACHE": str(work / "data")}


def timed(
    line: Sequence[str], log: Path, given: dict[str, str], folder: Path
) -> tuple[int, float, float]:
    """(exit code, seconds, processor seconds) of a command in `folder`, whose words go to `log`."""
    begun = time.perf_counter()
    used: dict[tuple[int, float], float] = {}
    with log.open("w") as words:
        running = subprocess.Popen(
            line, env=given, cwd=folder, stdout=words, stderr=subprocess.STDOUT
        )
        while running.poll() is None:
            used |= processor_seconds(running.pid)
            time.sleep(EVERY_S)
    return running.returncode, round(time.perf_counter() - begun, 1), round(sum(used.values()), 1)


def processor_seconds(pid: int) -> dict[tuple[int, float], float]:
    """(process, its start) -> what it used so far, of a process and all below it."""
    found = {}
    try:
        top = psutil.Process(pid)
        for one in (top, *top.children(recursive=True)):
            spent = one.cpu_times()
            found[one.pid, one.create_time()] = spent.user + spent.system
    except psutil.Error:  # gone meanwhile
        pass
    return found


def versions(program: Program) -> dict[str, str]:
    python = sys.executable if program == "agentmerge" else str(python_of(program))
    code = (
        "import json, importlib.metadata as m\n"
        "have = {d.name.replace('-', '_').lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{n: have[n] for n in {VERSIONS!r} if n in have}}))"
    )
    said = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return dict(json.loads(said.stdout))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A row an arm: medians over its seeds, and ours less it, paired by seed."""
    head = ["search", "seeds", "evaluations", "s a candidate", "processor s a candidate"]
    head += ["score it saw", "unseen items", "`agentmerge` less it, paired (least to most)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    ended = [row for row in rows if "failed" not in row]
    ours = {row["seed"]: row["unseen"]["score"] for row in ended if row["arm"] == "agentmerge"}
    for name, arm in ARMS.items():
        mine = [row for row in rows if row["arm"] == name]
        ended = [row for row in mine if "failed" not in row]
        if not mine:
            continue
        cells = [f"{arm.program}, {arm.note}", f"{len(ended)} of {len(mine)}"]
        if ended:
            gaps = [ours[r["seed"]] - r["unseen"]["score"] for r in ended if r["seed"] in ours]
            cells += [f"{statistics.median(row['evaluations'] for row in ended):.0f}"]
            cells += [
                f"{statistics.median(row[key] / row['evaluations'] for row in ended):.1f}"
                for key in ("wall_s", "cpu_s")
            ]
            cells += [f"{statistics.median(row['search'] for row in ended):.3f}"]
            cells += [spread([row["unseen"]["score"] for row in ended])]
            cells += ["" if name == "agentmerge" or not gaps else spread(gaps, "+.3f")]
        else:
            cells += [mine[0]["failed"], "", "", "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    main()
