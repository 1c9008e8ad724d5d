"""How the results database holds up: size an item result, and the time of the reading commands.

    python -m benchmarks.ledger --candidates 100000 --items 1000

Fills a database as searches do (real recipes of a space, packed blocks of invented results, most
of them repeated under other hashes), then times ``list``, ``show``, ``best``, ``compare`` and
``ledger stats`` as whole commands, each in a process of its own, so that starting Python is in the
figure. The least of three runs counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from agentmerge.config import SearchConfig
from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import EngineInfo, ItemResult
from agentmerge.ledger import Ledger, ResultKey, RunRow
from agentmerge.ledger.archive import stats
from agentmerge.ledger.folder import LEDGER
from agentmerge.preflight.facts import settings_hash
from agentmerge.preflight.prepare import prepare

CONFIG = """\
genome:
  models: [north, south]
  base_model: base
  merge_method: task_arithmetic
  layer_granularity: 4
tasks: [{{name: one, metric: "acc,none"}}]
limit: {items}
search: {{algorithm: cma_es, seed: 1, sealed_share: 0.0}}
worker: {{kind: fake, options: {{num_layers: 16, base: base, documents: {items}}}}}
budget: {{max_evaluations: 1000000}}
"""
GENERATION = 100
#: Candidates that are made one by one; the others repeat their rows and blocks under other hashes.
MADE = 5_000


def fill(path: Path, candidates: int, items: int, searches: int) -> None:
    """``searches`` runs with ``candidates`` between them, every one scored on ``items`` items."""
    prepared = prepare(SearchConfig.from_text(CONFIG.format(items=items)))
    task = prepared.taskset.tasks[0]
    refs = task.part("search")
    engine = EngineInfo(**prepared.facts()["engine"])
    rng = np.random.default_rng(0)
    with Ledger(path) as ledger:
        for number in range(searches):
            row = _row(prepared, number)
            ledger.add_run(row)
            ledger.save_items(row.id, task.name, "search", refs)
            wanted = candidates // searches // GENERATION
            made = min(wanted, MADE // searches // GENERATION)
            for generation in range(made):
                points = rng.random((GENERATION, prepared.space.dimensions))
                _generation(ledger, prepared, row.id, generation, points, (refs, engine, rng))
            for copy in range(1, -(-wanted // made)):
                _again(ledger, row.id, copy * made, min(made, wanted - copy * made))


def _again(ledger, run_id: str, shift: int, generations: int) -> None:
    """The first generations of a search once more, as other merges."""
    hashed = f"recipe_hash || '-{shift}'"
    those = f"run_id = '{run_id}' AND generation < {generations}"
    columns = [row[0] for row in ledger._rows("SELECT name FROM pragma_table_info('candidates')")]
    own = {"generation": f"generation + {shift}", "recipe_hash": hashed}
    own |= {"operator": "'cma_es'", "score": f"score - 1e-6 * {shift}"}
    with ledger._writing() as conn:
        conn.execute(
            f"INSERT INTO recipes SELECT hash || '-{shift}', yaml FROM recipes WHERE hash IN "
            f"(SELECT recipe_hash FROM candidates WHERE {those})"
        )
        conn.execute(
            "INSERT INTO results (recipe_hash, engine_id, protocol_id, item_set_id, block, "
            f"fingerprint, seconds, created) SELECT {hashed}, engine_id, protocol_id, item_set_id, "
            "block, fingerprint, seconds, created FROM results WHERE recipe_hash IN "
            f"(SELECT recipe_hash FROM candidates WHERE {those})"
        )
        conn.execute(
            f"INSERT INTO candidates ({', '.join(columns)}) "
            f"SELECT {', '.join(own.get(c, c) for c in columns)} FROM candidates WHERE {those}"
        )


def _row(prepared, number) -> RunRow:
    return RunRow(
        id=f"id-{number}",
        name=f"search-{number}",
        created=float(number),
        status="done",
        stop_reason="budget",
        config=prepared.config.to_yaml(),
        settings_hash=settings_hash(prepared),
        seed=1,
        algorithm="cma_es",
        parent_run=None,
        parent_generation=None,
        facts=prepared.facts(),
        result=None,
    )


def _generation(ledger, prepared, run_id, generation, points, asked) -> None:
    refs, engine, rng = asked
    task = prepared.taskset.tasks[0]
    rows = []
    for slot, point in enumerate(points):
        recipe = prepared.space.recipe(tuple(point))
        operator = "parent" if generation == 0 and slot < 3 else "cma_es"
        proposal = Proposal(tuple(point), operator, label=f"model-{slot}" if slot < 3 else "")
        rows.append((proposal, recipe.hash(prepared.identities), recipe.to_yaml(), ""))
    ledger.add_candidates(run_id, generation, rows)
    right = rng.random((len(rows), len(refs))) < rng.uniform(0.2, 0.9, (len(rows), 1))
    margins = np.where(right, 1, -1) * rng.exponential(2.0, right.shape)
    losses = -np.log1p(np.exp(-margins))
    with ledger._writing() as conn:  # one commit a generation: filling is not what is measured
        for slot, (_, recipe_hash, _, _) in enumerate(rows):
            results = [
                ItemResult(float(v), float(ll), float(m))
                for v, ll, m in zip(right[slot], losses[slot], margins[slot], strict=True)
            ]
            key = ResultKey(recipe_hash, engine, task.protocol_hash)
            ledger._insert_results(conn, key, task.name, refs, results, "", 0.5)
            conn.execute(
                "UPDATE candidates SET state = 'scored', score = ?, tasks = ?, seconds = 0.5 "
                "WHERE run_id = ? AND generation = ? AND slot = ?",
                (
                    float(right[slot].mean()),
                    json.dumps([[task.name, float(right[slot].mean())]]),
                    run_id,
                    generation,
                    slot,
                ),
            )


def seconds(runs: Path, *command: str) -> tuple[float, float]:
    """The least wall and processor time of three runs of a whole command."""
    walls, processors = [], []
    for _ in range(3):
        began, used = time.perf_counter(), _children()
        subprocess.run(
            [sys.executable, "-m", "agentmerge", *command, "--runs-dir", str(runs)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        walls.append(time.perf_counter() - began)
        processors.append(_children() - used)
    return min(walls), min(processors)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=1_000)
    parser.add_argument("--searches", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="fill (or use) this folder and leave it there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = asked.keep or Path(folder)
        if not (runs / LEDGER).is_file():
            fill(runs / LEDGER, asked.candidates, asked.items, asked.searches)
        with Ledger(runs / LEDGER) as ledger:
            found = stats(ledger)
        print(
            f"{found['candidates']} candidates in {found['searches']} searches, "
            f"{found['item_results']} item results: {found['bytes'] / 1e6:.0f} MB on disk, "
            f"{found['bytes_per_item']:.2f} bytes an item result in blocks, "
            f"{found['bytes'] / found['item_results']:.2f} with everything else"
        )
        for command in (
            ["list"],
            ["show", "search-0"],
            ["best", "search-0"],
            ["compare", "search-0", "search-1"],
            ["ledger", "stats"],
        ):
            wall, processor = seconds(runs, *command)
            print(f"{' '.join(command):28} {wall:.2f} s, of them {processor:.2f} s computing")


if __name__ == "__main__":
    main()
