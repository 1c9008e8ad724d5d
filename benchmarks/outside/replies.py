"""What a chat model's server says, mutated, in searches that go on being resumed and read.

Each draw is a search on the fake worker that a real HTTP server advises. Most of its replies are
broken in one way (what is said, the completion around it, tool calls, usage, status, or HTTP
itself). Then the search is resumed with a larger budget and a server that is well again, and one of
the commands that read a search reads it. Counted:

    advice lost   some generation went without its advice, and the search went on
    advice kept   every reply that was broken was mended on the second try, or was of use
    tokens, cost  the budget ended the search before its time, and resume went on
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.session import driving
from agentmerge.testing.scripted import Said, ScriptedServer
from benchmarks.fake import fake_config
from benchmarks.outside.mutations import KINDS
from benchmarks.outside.tally import Tally

#: What one search may take, broken server and all: seconds of the processor and of the clock, MB.
MOST_CPU_S, MOST_S, MOST_MB = 15.0, 90.0, 400.0
#: Of this many replies as many are broken as `BROKEN` says.
BROKEN = 0.7
EVALUATIONS, AGAIN = 20, 26
#: From so many draws on they are spread over processes.
MANY = 100
#: The commands that read a search; one is tried in each draw.
READING = (["list"], ["show", "a", "--json"], ["show", "a"], ["watch", "a"], ["report", "a"],
           ["tree"], ["replay", "a"])  # fmt: skip


def config_of(server: ScriptedServer, rng: random.Random, kind: str) -> SearchConfig:
    body: dict[str, Any] = fake_config(20) | {
        "tasks": [
            {"name": "one", "metric": "acc,none"},
            {"name": "two", "metric": "word_perplexity,none", "weight": 0.2},
        ],
        "search": {"algorithm": rng.choice(["llm_evo", "auto"]), "seed": 7, "population": 5},
        "budget": {"max_evaluations": EVALUATIONS},
        "agents": {
            "llm": "openai:scripted",
            "base_url": server.base_url,
            "timeout_s": 1.0,
            "max_retries": rng.choice([0, 0, 1]),
            "probes": 2 if kind == "tool calls" else rng.choice([0, 2]),
        },
    }
    if rng.random() < 0.3:
        body["budget"] |= {"max_tokens": 400_000, "max_cost_usd": 5.0}
        body["budget"]["prices"] = {"scripted": [1.0, 4.0]}
    return SearchConfig.from_text(json.dumps(body))


def good(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """What a model that is well answers whichever role asks."""
    told = json.dumps(body["messages"])
    if "You propose" in told:
        found = re.search(r"(\d+) integers", told)
        genome = [rng.randrange(30, 90) for _ in range(int(found.group(1)) if found else 4)]
        move = {"change": "none", "value": "", "why": ""}
        return {
            "thought": "between the two",
            "mean_genome": genome,
            "candidates": [{"genome": genome, "expected_score": 0.5}],
            "expected_score": 0.4,
            "structural_move": move,
        }
    if "You judge" in told:
        return {"summary": "south helps", "findings": ["task two lags"]}
    return {"thought": "small steps", "sigma": 0.1}


def main(draws: int, seed: int) -> Tally:
    """Many draws are spread over processes: half of a draw is waiting."""
    tally = Tally()
    if draws < MANY:
        _begin()
        found = map(partial(one, seed=seed), range(draws))
        for drawn in found:
            tally.merge(drawn)
        logging.disable(logging.NOTSET)
        return tally
    jobs = 2 * (os.cpu_count() or 1)
    # A process ends after so many: the search's libraries keep some of what they allocate.
    with get_context("spawn").Pool(jobs, _begin, maxtasksperchild=100) as pool:
        for done, drawn in enumerate(pool.imap_unordered(partial(one, seed=seed), range(draws)), 1):
            tally.merge(drawn)
            if done % 50 == 0:
                print(f"{done} draws, {tally.bad} bad", file=sys.stderr, flush=True)
    return tally


def _begin() -> None:
    os.environ.setdefault("OPENAI_API_KEY", "sk-none-000000")
    logging.disable(logging.CRITICAL)


def one(number: int, seed: int, kind: str | None = None) -> Tally:
    """One draw, by its own random numbers: draw 17 is the same whatever was before it.

    kind: of KINDS; by default one that is drawn.
    """
    tally = Tally()
    rng = random.Random(f"{seed}.{number}")
    drawn = rng.choice([*KINDS])
    kind = kind or drawn
    well = False

    def answer(body: dict[str, Any]) -> Said:
        # Its own for each request: a client that gave up may still be answered.
        rng = random.Random(f"{seed}.{number}.{len(server.requests)}")
        reply = good(body, rng)
        asked_for_tools = kind == "tool calls" and "tools" not in body
        if well or asked_for_tools or rng.random() >= BROKEN:
            return reply
        return KINDS[kind](reply, rng)

    with tempfile.TemporaryDirectory() as folder, ScriptedServer(answer) as server:
        runs, began, cpu_s = Path(folder), time.monotonic(), time.process_time()
        forget_peak()
        before = peak_mb()
        note = f"draw {number} of seed {seed}"
        try:
            row = driving.run(config_of(server, rng, kind), name="a", runs_dir=runs)
        except Exception as error:
            tally.add(kind, "unexpected", f"{note}: {type(error).__name__} {error}"[:400])
            return tally
        took = (time.process_time() - cpu_s, time.monotonic() - began, peak_mb() - before)
        if any(t > most for t, most in zip(took, (MOST_CPU_S, MOST_S, MOST_MB), strict=True)):
            tally.add(kind, "over bounds", f"{note}: CPU s, s, MB: {took}")
            return tally
        end = ending(runs, row.id, row.stop_reason)
        well = True
        fault = mended(runs, row.stop_reason, rng.choice(READING))
        if fault:
            tally.add(kind, "not mended", f"{note}: {fault}"[:400])
        else:
            tally.add(kind, end)
    return tally


def ending(runs: Path, run_id: str, stop: str) -> str:
    if stop in ("tokens", "cost"):
        return "tokens, cost"
    with Ledger(runs / driving.LEDGER) as ledger:
        lost = [word for word in ledger.advice(run_id) if word.get("failure")]
    return "advice lost" if lost else "advice kept"


def mended(runs: Path, stop: str, reading: Sequence[str]) -> str:
    """Why the search cannot be gone on with or read, or ""."""
    raised: dict[str, Any] = {"budget.max_evaluations": AGAIN}
    if stop in ("tokens", "cost"):
        raised |= {"budget.max_tokens": 10_000_000, "budget.max_cost_usd": 1_000.0}
    try:
        row = driving.resume("a", runs_dir=runs, overrides=raised)
    except Exception as error:
        return f"resume: {type(error).__name__} {error}"
    with Ledger(runs / driving.LEDGER) as ledger:
        scored = ledger.tally(row.id).evaluations
        last = [w for w in ledger.advice(row.id) if w["guidance"].get("source") == "model"]
    if row.status != "done" or scored < AGAIN:
        return f"resume ended {row.status} ({row.stop_reason}) after {scored} evaluations"
    if not last:
        return "no model was heard after the server was well again"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_app([*reading, "--runs-dir", str(runs)])
    if code:
        return f"{reading[0]}: exit {code}: {(out.getvalue() + err.getvalue())[-300:]}"
    return ""


def forget_peak() -> None:
    """Let the kernel count the highest memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1024 if found else 0.0
