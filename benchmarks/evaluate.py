"""What a candidate costs: merged and scored in a live vLLM engine, or on disk by a fresh lm-eval.

    python -m benchmarks.evaluate [--config FILE] [--candidates 8] [--fresh 2] [--repeats 3]
        [--questions N] [--processor-time] [--json FILE]

Without a config: the demo family. Three figures, medians, each printed and written as JSON:
    live     the vllm worker: seconds a candidate for merge and swap and for scoring, and the share
             that is not spent inside vLLM (the overhead)
    fresh    what mergekit-evolve does: write the merge, then ``lm_eval.simple_evaluate`` with its
             vLLM class in a process of its own
    choices  multiple-choice items a second: the worker's way, and lm-eval's own vLLM class on the
             same live engine, asked the same requests; of the config's own tasks, and with examples
             before each question

With --processor-time, seconds are the processor's, which other programs hardly lengthen. They mean
something only where all is computed there: on a CPU, with one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gradient import demo_config
from benchmarks.machine import machine

Clock = Callable[[], float]

SHOTS = 16
#: Room for the examples before a question.
ENGINE_CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", help="a search's config")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--fresh", type=int, default=2, help="candidates the on-disk way; 0: none")
    parser.add_argument("--repeats", type=int, default=3, help="passes over the choices each way")
    parser.add_argument("--questions", type=int, help="of the choices (all); 0: none")
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--simple", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.simple:
        simple_evaluate(json.loads(asked.simple))
        return
    with tempfile.TemporaryDirectory() as scratch:
        config = asked.config or demo_config(Path(scratch))
        result = measured(config, asked, Path(scratch))
    print(table(result))
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1))


def processor_s() -> float:
    """Of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measured(config: str, asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    import torch

    from agentmerge.config import SearchConfig
    from agentmerge.preflight.prepare import prepare
    from agentmerge.workers.vllm.worker import VllmWorker

    changed: dict[str, Any] = {"worker.kind": "vllm", "worker.canary_every": 0}
    changed["worker.engine_args"] = {"max_model_len": ENGINE_CONTEXT}
    prepared = prepare(SearchConfig.from_file(config, changed), allow_benchmarks=True)
    clock = processor_s if asked.processor_time else time.perf_counter
    start = clock()
    worker = VllmWorker(prepared.spec, prepared.taskset)
    started = clock() - start
    refs = prepared.taskset.refs()
    space = prepared.space
    recipes = [
        space.recipe([(0.17 + 0.61 * i + 0.23 * a) % 1.0 for a in range(space.dimensions)])
        for i in range(asked.candidates + 1)
    ]
    result: dict[str, Any] = {
        "machine": machine(torch.get_num_threads()) | {"engine": worker.info.version},
        "clock": "processor" if asked.processor_time else "wall",
        "family": Path(config).stem,
        "items": len(refs),
        "way": worker._engine.way,
        "start_s": started,
        "live": live(worker, recipes, refs, clock),
        "choices": choices(worker, prepared.taskset, asked, clock),
    }
    worker.close()
    if asked.fresh:
        result["fresh"] = on_disk(prepared, recipes[: asked.fresh], config, scratch, clock)
        result["times_as_many"] = result["fresh"]["candidate_s"] / result["live"]["candidate_s"]
    return result


def live(
    worker: Any, recipes: Sequence[Any], refs: Sequence[Any], clock: Clock
) -> dict[str, float]:
    """Medians over candidates; the first is left out, since it sets up what later ones share."""
    engine, rows = worker._engine, []
    for recipe in recipes:
        asked = {"forward_s": 0.0}
        with _Timed(engine, "ask", asked, clock):
            start = clock()
            worker.load(recipe)
            loaded = clock()
            worker.score(refs)
            end = clock()
        rows.append({
            "load_s": loaded - start, "score_s": end - loaded, "candidate_s": end - start, **asked
        })  # fmt: skip
    found = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
    return found | {"overhead": 1 - found["forward_s"] / found["candidate_s"]}


class _Timed:
    """Adds the seconds that a method takes to ``found["forward_s"]`` meanwhile."""

    def __init__(self, owner: Any, name: str, found: dict[str, float], clock: Clock) -> None:
        self._owner, self._name, self._found, self._clock = owner, name, found, clock

    def __enter__(self) -> None:
        method = getattr(self._owner, self._name)

        def call(*args: Any) -> Any:
            start = self._clock()
            try:
                return method(*args)
            finally:
                self._found["forward_s"] += self._clock() - start

        setattr(self._owner, self._name, call)

    def __exit__(self, *_: object) -> None:
        delattr(self._owner, self._name)


def choices(
    worker: Any, taskset: Any, asked: argparse.Namespace, clock: Clock
) -> dict[str, dict[str, float]]:
    """Multiple-choice requests of three kinds, both ways on the same engine, in turn."""
    own = [
        [(instance.args[0], instance.args[1]) for instance in instances]
        for task in taskset.tasks
        if task.output_type == "multiple_choice"
        for instances in (taskset.asked[task.name].requests[r.index] for r in task.part("search"))
    ]
    own, repeats = own[: asked.questions], asked.repeats
    if not own:
        return {}
    examples = "\n".join(context + more for (context, more), *_ in own[-SHOTS:]) + "\n"
    long = [[(examples + context, more) for context, more in item] for item in own[:-SHOTS]]
    single = [
        [(item[0][0], letter) for letter in dict.fromkeys(more[0] for _, more in item)]
        for item in long
    ]
    return {
        "as the tasks ask": both_ways(worker, own, repeats, clock),
        f"{SHOTS} examples before": both_ways(worker, long, repeats, clock),
        f"{SHOTS} examples, answers of one token": both_ways(worker, single, repeats, clock),
    }


def both_ways(
    worker: Any, items: Sequence[Sequence[tuple[str, str]]], repeats: int, clock: Clock
) -> dict[str, float]:
    """Items a second; each way begins with an empty cache."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.vllm_causallms import VLLM

    lm = worker._scorer._lm
    pairs = [pair for item in items for pair in item]
    encoded = lm.encode([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    ways = {
        "ours": lambda: lm.answer(encoded),
        "lm_eval": lambda: VLLM._loglikelihood_tokens(lm, encoded, disable_tqdm=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(repeats):
        for name, way in ways.items():
            worker._engine._llm.reset_prefix_cache()
            start = clock()
            answers[name] = way()
            seconds[name].append(clock() - start)
    rates = {f"{name}_items_s": len(items) / statistics.median(s) for name, s in seconds.items()}
    return {
        "tokens": statistics.mean(len(context) for _, context, _ in encoded),
        **rates,
        "faster": rates["ours_items_s"] / rates["lm_eval_items_s"],
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(*answers.values(), strict=True)),
    }


def on_disk(
    prepared: Any, recipes: Sequence[Any], config: str, scratch: Path, clock: Clock
) -> dict[str, float]:
    """Each candidate written, then scored by lm-eval in a fresh process."""
    from agentmerge.merging.export import export_checkpoint

    spec, rows = prepared.spec, []
    for recipe in recipes:
        start = clock()
        target = scratch / "candidate"
        paths = {name: Path(path) for name, path in spec.parents}
        export_checkpoint(
            recipe, paths, target, template_model=spec.template_model, base=spec.options["base"],
            dtype=spec.dtype,
        )  # fmt: skip
        written = clock()
        task = {"model": str(target), "config": config, "dtype": spec.dtype}
        task["clock"] = clock.__name__
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.evaluate", "--simple", json.dumps(task)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        shutil.rmtree(target)
        end = clock()
        inside = json.loads(done.stdout.splitlines()[-1])
        rows.append({"candidate_s": end - start, "write_s": written - start, **inside})
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def simple_evaluate(task: dict[str, str]) -> None:
    """In a fresh process: what it takes to start the engine, and to evaluate."""
    import lm_eval
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    clock = processor_s if task["clock"] == processor_s.__name__ else time.perf_counter
    start = clock()
    body = yaml.safe_load(Path(task["config"]).read_text())
    lm = VLLM(
        task["model"], dtype=task["dtype"], enforce_eager=True, kv_cache_memory_bytes=1 << 29,
        max_num_seqs=body.get("worker", {}).get("batch_size", 64),
    )  # fmt: skip
    started = clock()
    lm_eval.simple_evaluate(
        lm,
        tasks=[entry["name"] for entry in body["tasks"]],
        limit=body.get("limit"),
        num_fewshot=body.get("num_fewshot"),
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=body.get("task_search_path"), include_defaults=False),
    )
    print()
    print(json.dumps({"start_s": started - start, "evaluate_s": clock() - started}))


def table(result: dict[str, Any]) -> str:
    one, many = result["live"], result.get("fresh")
    lines = [
        f"{result['family']}: {result['items']} items a candidate, weights by {result['way']}, "
        f"{result['machine']['threads']} thread(s), {result['clock']} time",
        "",
        "| way | start | merge and swap or write | score | candidate | candidates an hour |",
        "|---|---|---|---|---|---|",
        f"| live | {result['start_s']:.1f} s once | {one['load_s']:.3f} s | "
        f"{one['score_s']:.2f} s | {one['candidate_s']:.2f} s | {3600 / one['candidate_s']:.0f} |",
    ]
    if many:
        lines.append(
            f"| on disk, fresh | {many['start_s']:.1f} s each | {many['write_s']:.3f} s | "
            f"{many['evaluate_s']:.2f} s | {many['candidate_s']:.2f} s | "
            f"{3600 / many['candidate_s']:.0f} |"
        )
        lines += ["", f"candidates an hour: {result['times_as_many']:.1f} times as many"]
    lines += [f"overhead beyond forward passes: {one['overhead']:.1%} of a candidate"]
    if result["choices"]:
        lines += [
            "",
            "| multiple choice | tokens of context | items a second | lm-eval's class | times | "
            "largest difference |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {row['tokens']:.0f} | {row['ours_items_s']:.3g} | "
            f"{row['lm_eval_items_s']:.3g} | {row['faster']:.1f} | "
            f"{row['largest_difference']:.1e} |"
            for name, row in result["choices"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
