"""What a real model's advice is worth, and what it costs: the same searches with and without it.

    python -m benchmarks.agents --base-url http://localhost:8000/v1 --model qwen3-8b --seeds 5
    python -m benchmarks.agents --gguf model.gguf --seeds 2

Any server that speaks the OpenAI protocol will do; --gguf starts llama-cpp-python's own on loopback
(pip install 'llama-cpp-python[server]'). Both arms are the same search (--algorithm) on the tiny
family of the demo, with the same seeds and first generation; only the words differ. Prints a table
and what the words added, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml

from agentmerge import SearchConfig
from agentmerge.cli.render import table
from agentmerge.demo.family import cached_family
from agentmerge.demo.tasks import demo_config, write_tasks
from agentmerge.ledger.folder import opened
from agentmerge.report.summary import run_summary
from agentmerge.session import driving

SKILLS = ("shift", "sort")
START_S = 300.0


@contextmanager
def served(gguf: Path) -> Iterator[str]:
    """The base URL of llama-cpp-python's server on a model file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--n_ctx", "8192"]
    process = subprocess.Popen([*line, "--host", "127.0.0.1", "--port", str(port)])
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5)
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the model server did not start") from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def one(folder: Path, arm: str, seed: int, options: Any, url: str | None) -> dict[str, Any]:
    """One search; what it found and what its agents cost."""
    tasks = write_tasks(folder / "tasks", SKILLS)
    body = demo_config(cached_family(SKILLS, 0), tasks)
    body |= {
        "task_search_path": [str(tasks)],
        "limit": options.items,
        "search": {"algorithm": options.algorithm, "seed": seed, "sealed_share": 0.75},
        "budget": {"max_evaluations": options.budget},
        "worker": {"batch_size": 200, "options": {"threads": 1}},
    }
    if arm == "model":
        body["agents"] = {
            "llm": f"openai:{options.model}",
            "base_url": url,
            "timeout_s": options.timeout,
            "max_tokens": 1500,
        }
    config = SearchConfig.from_text(yaml.safe_dump(body))
    began = time.monotonic()
    row = driving.run(config, name=f"{arm}-{seed}", runs_dir=folder)
    with opened(folder) as ledger:
        summary = run_summary(ledger, row)
        advice = ledger.advice(row.id)
    assert row.result is not None
    answer = row.result["answer"]
    return {
        "arm": arm,
        "seed": seed,
        "search": answer["score"],
        "sealed": answer.get("sealed_score"),
        "seconds": time.monotonic() - began,
        "used": sum(word["guidance"]["source"] == "model" for word in advice),
        "advice": len(advice),
        "agents": summary["agents"],
    }


def report(found: list[dict[str, Any]]) -> str:
    rows = [["arm", "seeds", "search", "sealed", "advice used", "calls", "failed", "tokens", "s"]]
    for arm in ("none", "model"):
        mine = [run for run in found if run["arm"] == arm]
        if not mine:
            continue
        agents = [run["agents"] for run in mine]
        used, asked = (sum(run[key] for run in mine) for key in ("used", "advice"))
        rows.append(
            [
                arm,
                str(len(mine)),
                f"{statistics.median(run['search'] for run in mine):.3f}",
                f"{statistics.median(run['sealed'] or 0.0 for run in mine):.3f}",
                f"{used} of {asked}" if arm == "model" else "-",
                str(sum(a["calls"] for a in agents)),
                str(sum(a["failures"] for a in agents)),
                str(sum(a["tokens_in"] + a["tokens_out"] for a in agents)),
                f"{statistics.median(run['seconds'] for run in mine):.0f}",
            ]
        )
    return "\n".join([table(rows), uplift(found)])


def uplift(found: list[dict[str, Any]]) -> str:
    """With the model minus without, seed by seed, on sealed items."""
    sealed = {(run["arm"], run["seed"]): run["sealed"] or 0.0 for run in found}
    seeds = sorted(seed for arm, seed in sealed if arm == "model")
    gaps = [sealed["model", seed] - sealed["none", seed] for seed in seeds]
    each = ", ".join(f"{gap:+.3f}" for gap in gaps)
    return f"sealed, with the model minus without: mean {statistics.fmean(gaps):+.3f} ({each})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--base-url", help="a server that speaks the OpenAI protocol")
    parser.add_argument("--gguf", type=Path, help="a model file to serve instead")
    parser.add_argument("--model", default="local")
    parser.add_argument("--algorithm", default="llm_evo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/agents"))
    options = parser.parse_args()
    if not options.base_url and not options.gguf:
        parser.error("give --base-url or --gguf")
    os.environ.setdefault("OPENAI_API_KEY", "none")
    folder = options.out / time.strftime("%Y%m%d-%H%M%S")
    server = served(options.gguf) if options.gguf else nullcontext(options.base_url)
    found: list[dict[str, Any]] = []
    with server as url:
        for seed in range(options.seeds):
            for arm in ("none", "model"):
                found.append(one(folder, arm, seed, options, url))
                (folder / "agents.json").write_text(json.dumps(found, indent=2))
                print(f"{arm} {seed}: sealed {found[-1]['sealed']}", file=sys.stderr, flush=True)
    print(report(found))


if __name__ == "__main__":
    main()
