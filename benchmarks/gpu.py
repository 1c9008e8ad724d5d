"""What a device does with merges, as a table for docs/performance.md.

    python -m benchmarks.gpu                    every device that there is; the CPU where no other
    python -m benchmarks.gpu --elements 100_000_000 --json gpu.json

First `agentmerge doctor --selftest`'s trials of each device. Then, for each method, one tensor of
bfloat16 with a base and two experts, already on the device: the median time of a merge, of its
digest and finite check, and of copying one model's tensor there, which is the floor (times half of
one more than the models read). A GPU that runs other work gives figures of both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from agentmerge.merging.device import current
from agentmerge.merging.digests import checksum
from agentmerge.merging.engines import KERNELS, is_finite, merge_tensor
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.session.selftest import case, devices, try_device
from benchmarks.machine import machine

#: Of the tensor that is merged: a GPU's is as large as a model's largest ones.
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 20, 1 << 26


def timed(device: str, work: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    for _ in range(2):  # what is compiled, and what is remembered from then on
        work()
    taken = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def measured(device: str, methods: list[str], elements: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for method in methods:
        base, operands, shared = case(method, torch.bfloat16, (elements // 1024, 1024))
        base = None if base is None else base.to(device)
        operands = [replace(o, tensor=o.tensor.to(device), pair=o.key) for o in operands]
        target = torch.empty_like(operands[0].tensor)
        known = Statistics()

        def merge(
            method: str = method,
            base: Any = base,
            operands: Any = operands,
            shared: Any = shared,
            target: torch.Tensor = target,
            known: Statistics = known,
        ) -> None:
            merge_tensor(method, base, operands, shared, target, known)

        merge_ms = timed(device, merge, repeats)
        proof_ms = timed(device, lambda t=target: (checksum(t), is_finite(t)), repeats)
        copy_ms = timed(device, lambda t=target, o=operands: t.copy_(o[0].tensor), repeats)
        read = len(operands) + (base is not None)
        floor = copy_ms * (read + 1) / 2
        rows.append(
            {
                "device": device,
                "method": method,
                "elements": target.numel(),
                "floor_ms": floor,
                "merge_ms": merge_ms,
                "proof_ms": proof_ms,
                "of_floor": merge_ms / floor,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| device | method | million elements | floor, ms | merge, ms | of floor | proof, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['device']} | {row['method']} | {row['elements'] / 1e6:.1f} | "
            f"{row['floor_ms']:.2f} | {row['merge_ms']:.2f} | {row['of_floor']:.1f} | "
            f"{row['proof_ms']:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(sorted(KERNELS)))
    parser.add_argument("--elements", type=int, help="of the tensor; by default by device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write everything here")
    args = parser.parse_args()
    there = devices()
    if there == ["cpu"]:
        print("There is no GPU here: what follows is of the CPU, and says nothing of one.\n")
    else:
        there.remove("cpu")
    found, rows = [], []
    for device in there:
        name = machine(1)["processor"] if device == "cpu" else torch.cuda.get_device_name(device)
        print(f"{device}: {name}, torch {torch.__version__}\n")
        found += try_device(device)
        elements = args.elements or (CPU_ELEMENTS if device == "cpu" else GPU_ELEMENTS)
        with current(device):
            rows += measured(device, args.methods.split(","), elements, args.repeats)
    for finding in found:
        print(f"{'ok ' if finding.ok else 'NOT'} {finding.device} {finding.what}: {finding.detail}")
    print(f"\n{table(rows)}")
    if args.json is not None:
        body = {"machine": machine(1), "trials": [asdict(f) for f in found], "rows": rows}
        args.json.write_text(json.dumps(body, indent=2))
    return 0 if all(finding.ok for finding in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
