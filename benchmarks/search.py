"""``python -m benchmarks.search``: searches against each other at equal budgets.

    python -m benchmarks.search --suite tiny --arms cma_es,auto --seeds 20 --budget 100 --out DIR

Writes ``DIR/runs/*.json`` (one a search: stopped and started again, it goes on where it was),
``DIR/results.md`` (tables) and ``DIR/PROBLEM.png`` (medians and quartiles on the way). Arms are
strategies by name; ``auto`` asks for no gradients, ``auto_gradients`` does; ``botorch`` is Bayesian
optimisation on the score alone. Two begin by themselves, knowing no cheap rivals, with the whole
budget: ``cma_es_mergekit``, as mergekit-evolve does, and ``tpe_alone``, as optuna does (ten random
points). With --llm there are
``auto_llm`` and ``llm_evo_llm``, which a chat model advises, and their controls ``..._shuffled``,
where what it is told of scores is shuffled; one model a DIR.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agentmerge import plugins
from agentmerge.strategies.auto import Auto
from agentmerge.testing.functions import KNOWN
from benchmarks import comparing, plots
from benchmarks.advised import Adviser
from benchmarks.mergekit_rival import MergekitEvolve
from benchmarks.running import Arm, Make, run_suite


def problems_of(suite: str) -> dict[str, Make]:
    """Name -> what makes the problem of a seed."""
    if suite == "synthetic":
        return dict(KNOWN)
    if suite == "smollm2":
        from benchmarks.smollm2 import FAMILIES, SmolLM2Problem

        return {name: partial(SmolLM2Problem, name) for name in FAMILIES}
    from agentmerge.testing.tiny import SUITES, TINY, TinyProblem

    names = SUITES[suite]
    return {name: partial(TinyProblem, TINY[name]) for name in names}


#: Arms that a model advises -> (the strategy, whether what the model is told is shuffled).
ADVISED = {
    f"{own}_llm{ending}": (own, bool(ending))
    for own in ("auto", "llm_evo")
    for ending in ("", "_shuffled")
}


def arm_of(name: str, llm: str | None = None, base_url: str | None = None) -> Arm:
    if name in ADVISED:
        if llm is None:
            raise SystemExit(f"arm {name!r} needs --llm provider:model")
        own, shuffled = ADVISED[name]
        return Arm(name, arm_of(own).make, partial(Adviser.of, llm, base_url, shuffled))
    if name in ("auto", "auto_gradients"):
        return Arm(name, partial(Auto, gradients_from=None if name == "auto" else 1))
    if name == "cma_es_mergekit":
        return Arm(name, MergekitEvolve, alone=True)
    if name == "tpe_alone":
        return Arm(name, arm_of("tpe").make, alone=True)
    if name == "botorch":
        from benchmarks.botorch_rival import BoTorch

        return Arm(name, BoTorch)
    return Arm(name, partial(plugins.load, "agentmerge.strategies", name))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument(
        "--suite",
        choices=("synthetic", "tiny", "second", "no-headroom", "spare", "fine", "smollm2"),
        required=True,
    )
    parser.add_argument("--problems", help="comma-separated names of the suite's; by default all")
    parser.add_argument("--arms", default="cma_es,tpe,one_plus_one,null_llm,auto")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--llm", help="provider:model, for the arms that a model advises")
    parser.add_argument("--base-url", help="of a server that speaks the OpenAI protocol")
    parser.add_argument("--processes", type=int, default=1, help="that share the seeds")
    parser.add_argument("--against", default="cma_es")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    asked = parser.parse_args(arguments)
    known = problems_of(asked.suite)
    names = asked.problems.split(",") if asked.problems else list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"no problem {unknown[0]!r}; the suite has {', '.join(known)}")
    runs = run_suite(
        {name: known[name] for name in names},
        [arm_of(name, asked.llm, asked.base_url) for name in asked.arms.split(",")],
        range(asked.first_seed, asked.first_seed + asked.seeds),
        asked.budget,
        asked.out,
        asked.processes,
    )
    print(written(runs, asked.against, asked.out))


def written(runs: Sequence[dict[str, Any]], against: str, out: Path) -> str:
    """The tables as text, after they and the curves were written to ``out``."""
    against_one = (comparing.comparisons, comparing.sooner, comparing.standing)
    compared = [f(runs, against) for f in against_one]
    parts = [comparing.table(runs), *compared, comparing.harm(runs), comparing.advice(runs)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (out / "results.md").write_text(text)
    plots.curves(runs, out)
    return text


if __name__ == "__main__":
    main()
