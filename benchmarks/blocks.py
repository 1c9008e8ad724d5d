"""``python -m benchmarks.blocks``: a SmolLM2 merge with each block of its layers run once more.

    OMP_NUM_THREADS=1 python -m benchmarks.blocks --make --out DIR   # without: what a table says

Of 30 layers there are 465 blocks (i to j, both included). Each is run a second time right after the
first, as it is and with what it adds to the stream halved, in the weight answer that
``benchmarks.stack`` finds for a seed, on 20 search items a skill; the ten of the least loss are
then asked all sealed items, beside the merge itself. The table is ``smollm2_blocks.json`` here, or
``--table``; stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.comparing import markdown
from benchmarks.machine import machine
from benchmarks.smollm2 import Sheet, SmolLM2Problem
from benchmarks.stack import FAMILIES, weight_answer
from benchmarks.stack_problem import Run, Stacks, as_arrays

TABLE = Path(__file__).with_name("smollm2_blocks.json")
SCALES = (1.0, 0.5)
ITEMS, CONFIRMED = 20, 10
Block = tuple[int, int, float]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--make", action="store_true", help="instead of reading the table")
    parser.add_argument("--family", choices=[f for f in FAMILIES if "smollm2" in f])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--table", type=Path, default=TABLE)
    asked = parser.parse_args(arguments)
    if asked.make:
        found = made(asked.family or "smollm2", asked.seed, asked.out)
        asked.table.write_text(_text(found))
    if not asked.table.is_file():
        parser.error(f"{asked.table} is not there; --make makes it")
    print(told(json.loads(asked.table.read_text())))


def made(family: str, seed: int, out: Path) -> dict[str, Any]:
    """The table; what was asked before is read from ``out``."""
    _, start = weight_answer(family, seed, out)
    problem = SmolLM2Problem(FAMILIES[family], seed, ITEMS)
    stacks, layers = Stacks(problem, start["vector"]), problem.space.num_layers
    log = out / f"blocks-{FAMILIES[family]}-{seed}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        row = json.loads(line)
        known[tuple(row[:3])] = row[3:]
    before = time.process_time()
    ask = asker(stacks, layers, problem._search)
    with log.open("a") as file:
        for block in blocks(layers):
            if block not in known:
                right, margins = ask(block)
                known[block] = [round(float(right.mean()), 4), round(_loss(margins), 4)]
                file.write(json.dumps([*block, *known[block]]) + "\n")
                file.flush()
    plain = (0, -1, 1.0)
    best = sorted((b for b in known if b != plain), key=lambda b: known[b][1])[:CONFIRMED]
    ask = asker(stacks, layers, problem._sealed)
    sealed = {block: ask(block) for block in (plain, *best)}
    rows = []
    for block, (right, margins) in sealed.items():
        ahead = right - sealed[plain][0]
        noise = 1.96 * float(ahead.std() / np.sqrt(len(ahead)))
        lead = float(ahead.mean())
        rows.append([*block, *(round(x, 4) for x in (right.mean(), _loss(margins), lead, noise))])
    return {
        "family": FAMILIES[family],
        "seed": seed,
        "weights": start["vector"],
        "layers": layers,
        "items": len(problem._items.task),
        "sealed_items": len(sealed[plain][0]),
        "machine": machine(1) | {"processor_s": round(time.process_time() - before)},
        "columns": ["first", "last", "scale", "right", "loss"],
        "blocks": [[*block, *known[block]] for block in blocks(layers)],
        "sealed_columns": ["first", "last", "scale", "right", "loss", "ahead", "+-"],
        "sealed": rows,
    }


def told(table: dict[str, Any]) -> str:
    """What a table says, in words and figures."""
    (*_, right, loss), *rows = table["blocks"]
    lines = [
        f"{table['family']}, seed {table['seed']}: {table['items']} search items; the merge as it "
        f"is answers {right:.3f} of them, its loss is {loss:.3f}.",
        "",
    ]
    cells = [["scale", "layers", "blocks", "more right", "less loss", "median right", "loss"]]
    for scale in SCALES:
        for low, high in ((1, 1), (2, 4), (5, 8), (9, 30)):
            own = [r for r in rows if r[2] == scale and low <= r[1] - r[0] + 1 <= high]
            better = [sum(r[3] > right for r in own), sum(r[4] < loss for r in own)]
            middle = [f"{np.median([r[i] for r in own]):.3f}" for i in (3, 4)]
            span = str(low) if low == high else f"{low} to {high}"
            cells.append([f"{scale:g}", span, str(len(own)), *map(str, better), *middle])
    lines += [markdown(cells), "", f"On {table['sealed_items']} sealed items:", ""]
    cells = [["layers", "scale", "right", "loss", "ahead", "95 %"]]
    for first, last, scale, *figures, ahead, noise in table["sealed"]:
        name = f"{first} to {last}" if last >= first else "none more"
        said = [f"{x:.3f}" for x in figures]
        interval = f"{ahead - noise:+.3f} to {ahead + noise:+.3f}"
        cells.append([name, f"{scale:g}", *said, f"{ahead:+.3f}", interval])
    return "\n".join([*lines, markdown(cells)])


def blocks(layers: int) -> Iterator[Block]:
    """None first, then all of them."""
    yield 0, -1, 1.0
    for scale in SCALES:
        for first in range(layers):
            for last in range(first, layers):
                yield first, last, scale


@torch.no_grad()
def asker(
    stacks: Stacks, layers: int, asked: Sequence[Sheet]
) -> Callable[[Block], tuple[np.ndarray, np.ndarray]]:
    """What says (right, margin) of each item with a block: what its first run ends with is the same
    for all blocks that end there, and worked out once."""
    plain = [_run(layer) for layer in range(layers)]
    streams: list[list[torch.Tensor]] = [[] for _ in asked]
    for sheet, kept in zip(asked, streams, strict=True):
        # One more, since of the last layer only the answers' places are worked out.
        stacks.logits([*plain, _run(0)], sheet.rows, kept=kept)

    @torch.no_grad()
    def ask(block: Block) -> tuple[np.ndarray, np.ndarray]:
        first, last, scale = block
        rest = [_run(layer, scale) for layer in range(first, last + 1)] + plain[last + 1 :]
        return as_arrays(
            [
                sheet.read(stacks.logits(rest, sheet.rows, begun=kept[last + 1]))
                for sheet, kept in zip(asked, streams, strict=True)
            ]
        )

    return ask


def _run(layer: int, scale: float = 1.0) -> Run:
    return None, layer, (scale, scale)


def _loss(margins: np.ndarray) -> float:
    return float(np.logaddexp(0.0, -margins).mean())


def _text(table: dict[str, Any]) -> str:
    """JSON, a row of the table a line."""
    parts = []
    for key, value in table.items():
        if key in ("blocks", "sealed"):
            body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in value)
            parts.append(f"{json.dumps(key)}: [\n{body}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
