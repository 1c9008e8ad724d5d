"""What depth costs: seconds a candidate of stacks of several depths, on the vllm worker and on hf.

    python -m benchmarks.depth [--config FILE] [--extra 0 4 8] [--candidates 4] [--kinds vllm hf]
        [--processor-time] [--json FILE]

Without a config: the demo family. Each engine (kind, and layers beyond the models') has a process
of its own. Stacks are the merge with layers of it once more between, whose outputs are scaled to
nothing, so that all depths give the same answers, of the same length. A deep vLLM engine is asked a
merge of the models' depth too. Medians; the first candidate is left out. "scales" is a load of
which only the layers' scales are new, "gradient" one pass over all items where a worker has it.

With --processor-time, seconds are the processor's, as in ``benchmarks.evaluate``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.evaluate import processor_s
from benchmarks.gradient import demo_config
from benchmarks.machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.depth", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", help="a search's config, of models as Llama has them")
    parser.add_argument("--extra", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=["vllm", "hf"])
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        config = asked.config or demo_config(Path(scratch))
        for kind in asked.kinds:
            for extra in asked.extra:
                with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                    given = (config, kind, extra, asked.candidates, asked.processor_time)
                    rows += alone.submit(measured, *given).result()
                print(table(rows).splitlines()[-1], flush=True)
    print(table(rows))
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine(1), "rows": rows}, indent=1))


def measured(config: str, kind: str, extra: int, candidates: int, processor: bool) -> Any:
    """A row for each depth that is asked of one engine."""
    from agentmerge.config import SearchConfig
    from agentmerge.contracts.worker import Differentiator
    from agentmerge.preflight.prepare import prepare
    from agentmerge.workers.kinds import worker_class

    changed: dict[str, Any] = {"worker.kind": kind}
    if kind == "vllm":
        changed |= {"worker.canary_every": 0, "worker.engine_args": {"max_model_len": 256}}
    if extra:
        changed["genome.layers"] = extra
    prepared = prepare(SearchConfig.from_file(config, changed), allow_benchmarks=True)
    clock = processor_s if processor else time.perf_counter
    start = clock()
    worker = worker_class(prepared.spec)(prepared.spec, prepared.taskset)
    started = clock() - start
    refs = prepared.taskset.refs()
    base, *experts = sorted(
        dict(prepared.spec.parents), key=lambda name: name != prepared.spec.options["base"]
    )
    layers, rows, said = prepared.space.num_layers, [], {}
    for more in sorted({0, extra} if kind == "vllm" else {extra}):
        seconds = []
        for turn in range(candidates + 1):
            recipe = stack(base, experts, 0.5 + 0.4 * turn / candidates, layers, more)
            begin = clock()
            worker.load(recipe)
            loaded = clock()
            results = worker.score(refs)
            seconds.append((loaded - begin, clock() - loaded))
            assert said.setdefault(turn, [one.value for one in results]) == [
                one.value for one in results
            ]
        load, score = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        scales = []
        for turn in range(candidates + 1):
            recipe = stack(base, experts, 0.5, layers, more, 0.01 * (1 + turn))
            begin = clock()
            worker.load(recipe)
            scales.append(clock() - begin)
        slopes = []
        for _ in range(candidates if isinstance(worker, Differentiator) else 0):
            begin = clock()
            worker.gradient(recipe, refs)
            slopes.append(clock() - begin)
        rows.append({
            "kind": kind, "engine": layers + extra * (kind == "vllm"), "layers": layers + more,
            "items": len(refs), "start_s": started, "load_s": load, "score_s": score,
            "scales_s": statistics.median(scales[1:]),
            "gradient_s": statistics.median(slopes) if slopes else None,
        })  # fmt: skip
    worker.close()
    return rows


def stack(
    base: str, experts: list[str], weight: float, layers: int, more: int, scale: float = 0.0
) -> Any:
    """A task arithmetic of the experts, and so many layers of it once more, scaled."""
    from agentmerge.recipe import Recipe

    weights = {base: 1 - weight * len(experts), **dict.fromkeys(experts, weight)}
    counts = [1 + more // layers + (k < more % layers) for k in range(layers)]
    slices = []
    for layer, count in enumerate(counts):
        for again in range(count):
            sources = []
            for model, value in weights.items():
                given: Any = value
                if again:
                    outputs = ("o_proj", "down_proj")
                    scaled = [{"filter": f, "value": scale * value} for f in outputs]
                    given = [*scaled, {"value": value}]
                span = {"model": model, "layer_range": [layer, layer + 1]}
                sources.append(span | {"parameters": {"weight": given}})
            slices.append({"sources": sources})
    body = {"merge_method": "linear", "slices": slices, "parameters": {"normalize": False}}
    return Recipe.parse(body).canonical(layers)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| worker | layers of the engine | of the candidate | start | load | score | candidate | "
        "scales | gradient |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        whole = row["load_s"] + row["score_s"]
        slope = "-" if row["gradient_s"] is None else f"{row['gradient_s']:.2f} s"
        engine = row["engine"] if row["kind"] == "vllm" else "-"
        lines.append(
            f"| {row['kind']} | {engine} | {row['layers']} | {row['start_s']:.1f} s | "
            f"{row['load_s']:.3f} s | {row['score_s']:.2f} s | {whole:.2f} s | "
            f"{row['scales_s']:.3f} s | {slope} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
