"""How long a candidate's merge takes: against copying the weights, and against mergekit.

    python -m benchmarks.merge [--json PATH] [--quick] [--threads N]

What is timed, in one run, on random Llama checkpoints in bfloat16 (a base and experts):
    copy: torch copies one model's tensors into another's. The floor of a merge of s models follows
        from it: (s + 1) / 2 copies, since a copy reads one model and writes one.
    ours: every tensor of a planned merge, written into live tensors by a resident family; the
        median of several recipes, each with new weights and densities, so that nothing which is
        remembered of a density helps. The first merge of a method, which also compiles loops and
        computes what is remembered of the parents, is told apart as the first.
    load: the same through ``LiveWeights``: planned before, merged, and proved by reading all back.
    mergekit: its executor, planned before, on tensors that are in memory; every result dropped.
With one thread, time is the process's own processor time, which other programs do not lengthen;
with more it is the clock's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from agentmerge.merging.digests import digest
from agentmerge.merging.engines import has_fused
from agentmerge.merging.family import Family
from agentmerge.merging.live import LiveWeights
from agentmerge.recipe import Recipe
from benchmarks.families import LAYERS, Shape, recipe, write_family
from benchmarks.machine import machine
from benchmarks.peers import forget, mergekit_merge

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")
OTHERS = ("dare_linear", "breadcrumbs", "breadcrumbs_ties", "della")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, at which size and how often."""

    parameters: int = 115_600_000
    experts: int = 3
    groups: int = 5
    repeats: int = 9
    peer_repeats: int = 3
    methods: tuple[str, ...] = (*METHODS, *OTHERS)
    sizes: tuple[int, ...] = (1_000_000, 10_000_000, 37_600_000, 115_600_000, 500_000_000)
    expert_counts: tuple[int, ...] = (2, 3, 4, 6, 8)
    group_counts: tuple[int, ...] = (1, 2, 5, 10)


QUICK = Plan(
    parameters=1_000_000,
    repeats=2,
    peer_repeats=1,
    sizes=(200_000, 1_000_000),
    expert_counts=(2, 4),
    group_counts=(1, 5),
)


class Bench:
    """A family at hand, and the stopwatch."""

    def __init__(self, paths: dict[str, Path], threads: int) -> None:
        self.paths = paths
        self.family = Family.open(paths, base="base", placement="device")
        layout = self.family.layout
        self.targets = {
            spec.name: torch.empty(spec.shape, dtype=torch.bfloat16) for spec in layout.tensors
        }
        self._clock = time.process_time if threads == 1 else time.perf_counter
        self._draw = torch.Generator().manual_seed(0)

    def seconds(self, run: Callable[[], object]) -> float:
        gc.collect()
        start = self._clock()
        run()
        return self._clock() - start

    def copy_s(self, repeats: int) -> float:
        def copy() -> None:
            for name, target in self.targets.items():
                target.copy_(self.family.tensor("base", name))

        copy()
        return statistics.median(self.seconds(copy) for _ in range(2 * repeats))

    def body(self, method: str, groups: int) -> dict[str, object]:
        return recipe(method, list(self.paths), groups, self._draw)

    def ours(self, method: str, groups: int, repeats: int) -> dict[str, float]:
        """The first merge and the median of the next ones, in seconds."""

        def merge() -> float:
            planned = self.family.plan(Recipe.parse(self.body(method, groups)).canonical(LAYERS))

            def run() -> None:
                for item in planned.tensors:
                    target = self.targets[item.spec.name]
                    self.family.merge_into(item, planned.merge_seed, target)

            return self.seconds(run)

        first = merge()
        return {"first_s": first, "seconds": statistics.median(merge() for _ in range(repeats))}

    def load_s(self, method: str, groups: int, repeats: int) -> float:
        live = LiveWeights(self.family, self.targets)

        def load() -> float:
            planned = self.family.plan(Recipe.parse(self.body(method, groups)).canonical(LAYERS))
            return self.seconds(lambda: live.load(planned))

        load()
        return statistics.median(load() for _ in range(repeats))

    def one_group_s(self, method: str, groups: int, repeats: int) -> float:
        """A load in which one layer group's numbers differ from those of the load before."""
        live = LiveWeights(self.family, self.targets)
        body: Any = self.body(method, groups)
        live.load(self.family.plan(Recipe.parse(body).canonical(LAYERS)))
        times = []
        for _ in range(repeats):
            body["slices"][groups // 2] = self.body(method, groups)["slices"][groups // 2]  # type: ignore[index]
            planned = self.family.plan(Recipe.parse(body).canonical(LAYERS))
            times.append(self.seconds(lambda planned=planned: live.load(planned)))
        return statistics.median(times)

    def digest_s(self, repeats: int) -> float:
        return statistics.median(
            self.seconds(lambda: digest(self.targets.items())) for _ in range(repeats)
        )

    def mergekit_s(self, method: str, groups: int, repeats: int) -> float:
        body = _named_by_path(self.body(method, groups), self.paths)
        run = mergekit_merge(body, self.paths)
        if method not in ("ties", "dare_ties"):
            run()  # the slow ones are not warmed up: it would change nothing and take a minute
        return statistics.median(self.seconds(run) for _ in range(repeats))

    def floor_s(self, method: str, copy_s: float) -> float:
        sources = {"linear": len(self.paths) - 1, "slerp": 2}.get(method, len(self.paths))
        return copy_s * (sources + 1) / 2


@contextmanager
def bench(parameters: int, experts: int, threads: int) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="agentmerge-benchmark-") as root:
        paths = write_family(Path(root), Shape.near(parameters), experts, torch.bfloat16)
        yield Bench(paths, threads)
    forget()


def measure(plan: Plan, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """say: is told every row as it comes."""
    torch.set_num_threads(threads)
    packages = {name: version(name) for name in ("torch", "llvmlite", "mergekit", "numpy")}
    result: dict[str, Any] = {
        "machine": machine(threads) | packages,
        "load_average": os.getloadavg(),
    }
    result["clock"] = "processor" if threads == 1 else "wall"
    with bench(plan.parameters, plan.experts, threads) as made:
        result["family"] = {
            "parameters": made.family.layout.parameters,
            "experts": plan.experts,
            "groups": plan.groups,
            "dtype": "bfloat16",
        }
        result["copy_s"], result["digest_s"] = made.copy_s(plan.repeats), made.digest_s(3)
        result["methods"] = {}
        for method in plan.methods:
            row = _method(made, method, plan, result["copy_s"])
            result["methods"][method] = row
            say(f"{method}: " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))
        result["groups"] = []
        for groups in plan.group_counts:
            row = {"groups": groups} | _times(made, groups, plan.repeats)
            result["groups"].append(row)
            say(str(row))
    for name, sizes in (
        ("parameters", [(size, plan.experts) for size in plan.sizes]),
        ("experts", [(min(plan.parameters, 37_600_000), count) for count in plan.expert_counts]),
    ):
        result[name] = []
        for size, experts in sizes:
            with bench(size, experts, threads) as made:
                row = {"parameters": made.family.layout.parameters, "experts": experts}
                row |= _times(made, plan.groups, plan.repeats)
            result[name].append(row)
            say(str(row))
    return result


def _method(made: Bench, method: str, plan: Plan, copy_s: float) -> dict[str, float]:
    repeats = plan.repeats if has_fused(method) else plan.peer_repeats
    row = made.ours(method, plan.groups, repeats)
    row["floor_s"] = made.floor_s(method, copy_s)
    row["over_floor"] = row["seconds"] / row["floor_s"]
    if method in METHODS:
        row["load_s"] = made.load_s(method, plan.groups, plan.repeats)
        row["one_group_s"] = made.one_group_s(method, plan.groups, plan.repeats)
        row["mergekit_s"] = made.mergekit_s(method, plan.groups, plan.peer_repeats)
        row["faster"] = row["mergekit_s"] / row["seconds"]
    return row


def _times(made: Bench, groups: int, repeats: int) -> dict[str, float]:
    row = {"copy_s": made.copy_s(repeats)}
    return row | {m: made.ours(m, groups, repeats)["seconds"] for m in METHODS}


def show(result: dict[str, Any], console: Console) -> None:
    family = result["family"]
    console.print(
        f"{result['machine']['processor']}, {result['machine']['threads']} thread(s); "
        f"{family['parameters'] / 1e6:.1f} M parameters in bfloat16, {family['experts']} experts, "
        f"{family['groups']} groups\none copy {1e3 * result['copy_s']:.1f} ms, "
        f"digest {1e3 * result['digest_s']:.1f} ms; times in ms"
    )
    columns = ("method", "floor", "ours", "of floor", "first", "load", "one group", "mergekit", "x")
    table = Table(*columns)
    for method, row in result["methods"].items():
        peer = [_ms(row.get("mergekit_s")), f"{row['faster']:.1f}" if "faster" in row else ""]
        ours = [_ms(row[key]) for key in ("floor_s", "seconds")]
        rest = [_ms(row.get(key)) for key in ("first_s", "load_s", "one_group_s")]
        table.add_row(method, *ours, f"{row['over_floor']:.2f}", *rest, *peer)
    console.print(table)
    for name in ("parameters", "experts", "groups"):
        if not result[name]:
            continue
        table = Table(name, "copy", *METHODS)
        for row in result[name]:
            label = f"{row[name] / 1e6:.1f} M" if name == "parameters" else str(row[name])
            table.add_row(label, *(_ms(row[key]) for key in ("copy_s", *METHODS)))
        console.print(table)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def _named_by_path(value: Any, paths: dict[str, Path]) -> Any:
    """The recipe with every model named by its absolute path, as mergekit wants it."""
    if isinstance(value, dict):
        return {key: _named_by_path(item, paths) for key, item in value.items()}
    if isinstance(value, list):
        return [_named_by_path(item, paths) for item in value]
    return str(paths[value]) if isinstance(value, str) and value in paths else value


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--quick", action="store_true", help="small models: tries it out")
    parser.add_argument("--methods", help="only these, with commas")
    parser.add_argument("--repeats", type=int, help="merges a median is of (default 9)")
    parser.add_argument("--peer-repeats", type=int, help="the same of mergekit (default 3)")
    parser.add_argument("--no-scaling", action="store_true", help="only the one family's methods")
    parser.add_argument("--threads", type=int, default=1, help="of both sides (default 1)")
    options = parser.parse_args()
    console = Console(width=120)
    plan = QUICK if options.quick else Plan()
    plan = replace(
        plan,
        methods=tuple(options.methods.split(",")) if options.methods else plan.methods,
        repeats=options.repeats or plan.repeats,
        peer_repeats=options.peer_repeats or plan.peer_repeats,
    )
    if options.no_scaling:
        plan = replace(plan, sizes=(), expert_counts=(), group_counts=())
    result = measure(plan, options.threads, console.print)
    show(result, console)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
