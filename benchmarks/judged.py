"""What a judge's noise does to a search: the same winner as without it, and nothing paid twice.

    python -m benchmarks.judged [--seeds 20] [--budget 25] [--conversations 60] [--noise 0.15]

The fake worker answers conversations; a scripted judge reads how good an answer is and compares it
with a fixed baseline's, in both orders. One judge is fair. The other is wrong in 15 of 100
comparisons and prefers what stands first where the two are near each other. For each seed `auto`
searches with both; then the fair judge says what both winners are worth. They are the same where
the difference's 95 % interval, paired by conversation, holds 0. Every question to a judge
is counted by what it was asked; one search a seed is cut off in its middle and resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import EngineInfo
from agentmerge.errors import RunFailed
from agentmerge.evaluation.statistics import Interval, paired_score_difference
from agentmerge.ledger import Ledger, ResultKey, RunRow
from agentmerge.ledger.folder import LEDGER
from agentmerge.recipe import Recipe
from agentmerge.session import driving
from agentmerge.testing import scripted_chat_model

#: How near two answers are where the biased judge prefers the first, of a level from 0 to 1.
NEAR = 0.1
_ANSWERS = re.compile(r"<answer \w+>\nlevel ([\d.]+)")


class Judge:
    """Counts every question; noise: the share of comparisons that come out wrong."""

    def __init__(self, noise: float, near: float, dies_at: int = 0) -> None:
        self.noise, self.near, self.dies_at = noise, near, dies_at
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.chat = scripted_chat_model(self.reply)

    def reply(self, messages: Any) -> Any:
        text = messages[-1].text
        with self.lock:
            self.asked[text] += 1
            if self.dies_at and sum(self.asked.values()) > self.dies_at:
                raise ConnectionResetError("the judge is gone")
            self.answered[text] += 1
            draw = hashlib.sha256(f"{text}{self.answered[text]}".encode()).digest()[0] / 256
        first, second = map(float, _ANSWERS.findall(text))
        better = "A" if first > second else "B" if second > first else "tie"
        if abs(first - second) < self.near:
            better = "A"
        elif draw < self.noise:
            better = {"A": "B", "B": "A", "tie": "A"}[better]
        return {"reason": "as scripted", "better": better}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.judged", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=25)
    parser.add_argument("--conversations", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.15)
    asked = parser.parse_args()
    same = repeated = cut = 0
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found = one_seed(Path(folder), seed, asked)
        same += not found["gap"].excludes_zero
        repeated += found["repeated"]
        cut += found["cut"]
        gap = found["gap"]
        print(
            f"seed {seed}: noisy winner minus noiseless winner {gap.mean:+.3f} ({gap.low:+.3f} to "
            f"{gap.high:+.3f}), agreement {found['agreement']:.0%}, {found['verdicts']} verdicts",
            flush=True,
        )
    print(f"the same winner within the interval: {same} of {asked.seeds} seeds")
    print(f"verdicts asked for twice: {repeated}")
    print(f"verdicts that a search which was cut off repeated: {cut}")
    sys.exit(0 if same >= 0.95 * asked.seeds and not (repeated or cut) else 1)


def one_seed(folder: Path, seed: int, asked: Any) -> dict[str, Any]:
    config = config_of(folder, seed, asked)
    fair, noisy = Judge(0.0, 0.0), Judge(asked.noise, NEAR)
    best = driving.run(config, name="a", runs_dir=folder / "fair", models=models(fair))
    row = driving.run(config, name="a", runs_dir=folder / "noisy", models=models(noisy))
    with Ledger(folder / "noisy" / LEDGER) as ledger:
        told = ledger.agreement(row.facts["judges"].values())
    dying = Judge(asked.noise, NEAR, sum(noisy.asked.values()) // 2)
    try:
        driving.run(config, name="a", runs_dir=folder / "cut", models=models(dying))
    except RunFailed:
        dying.dies_at = 0
        driving.resume("a", runs_dir=folder / "cut", models=models(dying))
    values = [true_values(folder, found, best) for found in (row, best)]
    return {
        "gap": gap_of(*values, seed),
        "verdicts": told.verdicts,
        "agreement": told.same / max(1, told.twice),
        "repeated": again(folder / "fair", fair) + again(folder / "noisy", noisy),
        "cut": again(folder / "cut", dying),
    }


def again(folder: Path, judge: Judge) -> int:
    """Verdicts that were given again to the same question, or given and not kept. A second opinion
    is another question."""
    query = (
        "SELECT count(*) AS answers, count(DISTINCT prompt_hash) AS questions FROM model_calls "
        "WHERE role = 'judge' AND ending = 'answered'"
    )
    with Ledger(folder / LEDGER) as ledger:
        (row,) = ledger.records(query)
    lost = sum(judge.answered.values()) - int(row["answers"])
    return lost + int(row["answers"]) - int(row["questions"])


def models(judge: Judge) -> Any:
    return {"judge": judge.chat}


def config_of(folder: Path, seed: int, asked: Any) -> SearchConfig:
    """A search of three experts; its conversations and the baseline's answers are of the seed."""
    rows = [{"id": n, "turns": [f"Seed {seed}: what is {n}?"]} for n in range(asked.conversations)]
    write(folder / "chats.jsonl", rows)
    # A baseline that is better at some conversations than at others.
    answers = [
        {"id": n, "answers": [f"level {0.35 + 0.3 * (n % 7) / 6:.6f}"]}
        for n in range(asked.conversations)
    ]
    write(folder / "baseline.jsonl", answers)
    judge = {
        "model": "openai:scripted",
        "conversations": str(folder / "chats.jsonl"),
        "against": str(folder / "baseline.jsonl"),
        "twice": 0.1,
        "at_once": 1,
    }
    body = {
        "genome": {
            "models": ["north", "south", "east"],
            "base_model": "base",
            "merge_method": "task_arithmetic",
        },
        "tasks": [{"name": "chats", "judge": judge}],
        "search": {"algorithm": "auto", "seed": seed, "sealed_share": 0},
        "budget": {"max_evaluations": asked.budget},
        "worker": {"kind": "fake", "options": {"base": "base"}},
    }
    return SearchConfig.from_text(json.dumps(body))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def true_values(folder: Path, found: RunRow, best: RunRow) -> list[float]:
    """What a search's answer is worth to the fair judge, conversation by conversation."""
    where = "fair" if found.id == best.id else "noisy"
    with Ledger(folder / where / LEDGER) as own:
        recipe = own.recipe(found.card.answer.recipe_hash, found.id)
    config = SearchConfig.from_text(found.config)
    judge = Judge(0.0, 0.0)
    scored = driving.evaluate(
        Recipe.parse(recipe), config, runs_dir=folder / "fair", models=models(judge)
    )
    with Ledger(folder / "fair" / LEDGER) as ledger:
        key = ResultKey(
            scored["recipe_hash"],
            EngineInfo(**best.facts["engine"]),
            best.facts["protocols"]["chats"],
        )
        results = ledger.results(key)
    return [results[item].value for item in sorted(results)]


def gap_of(mine: list[float], theirs: list[float], seed: int) -> Interval:
    gap = paired_score_difference([(1.0, mine, theirs)], seed)
    assert gap is not None
    return gap


if __name__ == "__main__":
    main()
