"""Traces of whole searches, stored: what a change that changes no behaviour must leave as it is.

    python -m tests.golden                  compare every search with its stored trace
    python -m tests.golden --write          store them anew: where a search was meant to change
    python -m tests.golden --to DIR NAME    write the trace of one search elsewhere

Searches run in a process whose BLAS has one thread and the kernels of ``KERNELS``, since last
digits of a strategy's linear algebra decide what it proposes. A trace says which arithmetic it is
of. Where a machine has another, only searches that do none (``PLAIN``) are compared, and numbers to
nine digits; on a real worker only what was asked, unless parents and engine are the very same: what
torch makes of one training is another processor's otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from agentmerge.config import SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.preflight.facts import arithmetic
from agentmerge.report.summary import trace
from agentmerge.session import driving
from agentmerge.testing.scripted import ScriptedServer
from tests.session.conftest import OBJECTIVES, command, config, config_text
from tests.session.test_agents import adviser
from tests.session.test_replay import asking_first
from tests.session.test_resume import kill_after
from tests.session.test_structure import mover

STORED = Path(__file__).parent / "data" / "golden"
#: What numpy and its BLAS compute with: kernels that every x86 machine of today has.
KERNELS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL",
    "OPENAI_API_KEY": "sk-golden",
}
#: Searches whose strategies do no linear algebra: the same on every machine, but for last digits.
PLAIN = ("random", "sobol", "one_plus_one", "null_llm", "llm_evo", "racing", "shadow", "workers")

#: A perplexity beside right and wrong without margins, and failures in places.
ODD = OBJECTIVES["perplexity"]
#: A loss that should be low beside margins of two scales.
LOSS = OBJECTIVES["loss"]
FAILING = {"fail_when": "max_weight>0.9"}

Search = Callable[[Path], str]
SEARCHES: dict[str, Search] = {}


def search(make: Search) -> Search:
    """Adds a search: it runs in a folder and returns the name of the run whose trace counts."""
    SEARCHES[make.__name__] = make
    return make


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Sections of a config, later ones over earlier ones, two levels deep."""
    found: dict[str, Any] = {}
    for section, body in [item for part in parts for item in part.items()]:
        known = found.get(section, {})
        if isinstance(body, dict):
            both = {key: known[key] | value if isinstance(value, dict) and key in known else value
                    for key, value in body.items()}  # fmt: skip
            body = known | both
        found[section] = body
    return found


def by(algorithm: str, *parts: dict[str, Any], evaluations: int = 34, **more: Any) -> SearchConfig:
    """A config of a search by an algorithm. more: settings of its ``search`` section."""
    own = {"search": {"algorithm": algorithm} | more, "budget": {"max_evaluations": evaluations}}
    return config(**merged(*parts, own))


def run(folder: Path, asked: SearchConfig) -> str:
    return driving.run(asked, name="a", runs_dir=folder).name


@contextmanager
def models(script: Any) -> Iterator[dict[str, Any]]:
    """The section of a config whose agents are answered by a script."""
    with ScriptedServer(script) as server:
        yield {"agents": {"llm": "openai:adviser", "base_url": server.base_url, "timeout_s": 30.0}}


def failing(where: str = "max_weight>0.9") -> dict[str, Any]:
    return {"worker": {"options": {"fail_when": where}}}


@search
def random(folder: Path) -> str:
    return run(folder, by("random", ODD, failing()))


@search
def sobol(folder: Path) -> str:
    return run(folder, by("sobol", LOSS, random_init=True))


@search
def cma_es(folder: Path) -> str:
    return run(folder, by("cma_es", LOSS, failing(), evaluations=50))


@search
def cma_es_one_by_one(folder: Path) -> str:
    return run(folder, by("cma_es", ODD, population=1, evaluations=26))


@search
def one_plus_one(folder: Path) -> str:
    return run(folder, by("one_plus_one", ODD, population=1, evaluations=22))


@search
def tpe(folder: Path) -> str:
    return run(folder, by("tpe", LOSS, population=2, evaluations=24))


@search
def margins(folder: Path) -> str:
    return run(folder, by("margins", ODD, failing(), population=2, evaluations=24))


@search
def auto(folder: Path) -> str:
    """To where it has nothing more to gain, or as far as it comes."""
    return run(folder, by("auto", population=1, evaluations=40))


@search
def gradients(folder: Path) -> str:
    return run(folder, by("gradient", LOSS, population=1, evaluations=40))


@search
def null_llm(folder: Path) -> str:
    return run(folder, by("null_llm", ODD))


@search
def llm_evo(folder: Path) -> str:
    """Models that use tools, fail and talk nonsense."""
    asking_first.count = 0
    with models(asking_first) as agents:
        asked = by("llm_evo", ODD, failing("max_weight>0.95"), agents)
        return run(folder, asked.model_copy(update={"agents": asked.agents.model_copy(
            update={"probes": 2, "max_retries": 2})}))  # fmt: skip


@search
def racing(folder: Path) -> str:
    return run(folder, by("random", LOSS, racing={"rungs": [0.125, 0.25, 0.5]}))


@search
def workers(folder: Path) -> str:
    """Two workers, each in a process of its own."""
    two = {"worker": {"count": 2}}
    return run(folder, by("random", LOSS, two, racing={"rungs": [0.25, 0.5]}, evaluations=24))


@search
def constrained(folder: Path) -> str:
    bound = [{"task": "*", "max_drop": 0.05}]
    return run(folder, by("cma_es", LOSS, failing(), constraints=bound))


@search
def shadow(folder: Path) -> str:
    with models(adviser) as agents:
        return run(folder, by("llm_evo", LOSS, agents, shadow=0.4))


@search
def structure(folder: Path) -> str:
    """A model opens a space; then the ladder has its say."""
    script = mover(("method", "ties"), ("granularity", "1"))
    with models(script) as agents:
        return run(folder, by("cma_es", LOSS, agents, structure="free", evaluations=90))


@search
def branch(folder: Path) -> str:
    """Same questions, another strategy."""
    run(folder, by("random", ODD))
    overrides = {"search.algorithm": "auto", "search.population": 1}
    return driving.branch("a", at=2, name="b", runs_dir=folder, overrides=overrides).name


@search
def branch_asking_otherwise(folder: Path) -> str:
    """Fewer items and another weight: the past is knowledge, and constraints hold of it too."""
    bound = [{"task": "two", "max_drop": 0.1}]
    run(folder, by("cma_es", LOSS, failing(), constraints=bound))
    overrides = {"limit": 40, "search.algorithm": "margins", "search.population": 2,
                 "budget.max_evaluations": 22}  # fmt: skip
    return driving.branch("a", at=3, name="b", runs_dir=folder, overrides=overrides).name


@search
def resumed(folder: Path) -> str:
    """Killed twice, then gone on with under a larger budget."""
    slow = {"worker": {"options": {"delay_s": 0.02}}}
    path = folder / "config.yml"
    own = {"search": {"algorithm": "cma_es"}, "budget": {"max_evaluations": 28}}
    path.write_text(config_text(**merged(ODD, slow, own)))
    log = folder / "a" / "log.jsonl"
    process = command("run", path, "--name", "a", "--runs-dir", folder, "-q")
    for lines in (9, 14):
        if kill_after(process, log, lines, 0.01):
            process = command("resume", "a", "--runs-dir", folder, "-q")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return driving.resume("a", runs_dir=folder, overrides={"budget.max_evaluations": 40}).name


@search
def hf(folder: Path) -> str:
    """Real models, on the worker that merges tensors."""
    from agentmerge.demo.family import cached_family
    from agentmerge.demo.tasks import demo_config, write_tasks

    tasks = write_tasks(folder / "tasks", ("shift", "sort"), n_items=60)
    body = demo_config(cached_family(("shift", "sort"), 0), tasks)
    body |= {
        "limit": 20,
        "task_search_path": [str(tasks)],
        "budget": {"max_evaluations": 14},
        "search": {"seed": 3, "algorithm": "random", "population": 4},
        "worker": {"batch_size": 64, "options": {"threads": 1}},
    }
    return run(folder, SearchConfig.from_text(yaml.safe_dump(body)))


def made(name: str) -> dict[str, Any]:
    """The trace of a search of this name, run now, and what its numbers depend on."""
    with tempfile.TemporaryDirectory() as folder:
        run_name = SEARCHES[name](Path(folder))
        with Ledger(Path(folder) / driving.LEDGER) as ledger:
            row = ledger.run(run_name)
            found = trace(ledger, row)
    return {
        "arithmetic": arithmetic(),
        "engine": row.facts["engine"],
        "models": sorted(row.facts["identities"].values()),
        "stop": row.stop_reason,
        **_short(found),
    }


#: What a candidate has where nothing is said of it.
USUAL = {"failure": "", "loss": None, "gradient": None, "estimate": None, "rung": 1.0,
         "violation": 0.0}  # fmt: skip
#: Longer texts are stored as their beginning and their hash.
CHARACTERS = 60


def _short(value: Any) -> Any:
    """A trace without what is as usual or this machine's, and with long texts cut."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items() if k not in USUAL or v != USUAL[k]}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        return Path(value).name  # a model, by its folder
    if isinstance(value, str) and len(value) > CHARACTERS:
        return f"{value[:CHARACTERS]}... {sha256(value.encode()).hexdigest()[:12]}"
    return value


def text_of(found: dict[str, Any]) -> str:
    """As JSON, one line a candidate and a word, so that a difference is a line."""
    rows = {key: "[\n" + ",\n".join(json.dumps(row) for row in found[key]) + "\n]"
            for key in ("candidates", "advice")}  # fmt: skip
    parts = {key: rows.get(key) or json.dumps(value) for key, value in found.items()}
    return "{\n" + ",\n".join(f'"{key}": {body}' for key, body in parts.items()) + "\n}\n"


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STORED / f"{name}.json").read_text())
    return found


def differences(name: str, new: dict[str, Any]) -> list[str]:
    """Where a trace made now is not the stored one, as far as this machine can tell."""
    old, new = stored(name), json.loads(text_of(new))
    if old["models"] != new["models"] or old["engine"] != new["engine"]:
        old, new = _asked(old), _asked(new)
    elif old["arithmetic"] != new["arithmetic"]:
        if name not in PLAIN:
            return []
        old, new = (_rounded(found | {"arithmetic": None}) for found in (old, new))
    return list(_unequal(old, new, name))


def _asked(found: dict[str, Any]) -> dict[str, Any]:
    """What a search on other machines' models shares: what was asked, not what was answered."""
    keys = ("at", "operator", "vector", "state")
    return {"candidates": [{key: row[key] for key in keys} for row in found["candidates"]]}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items() if key != "recipe"}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _unequal(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _unequal(old.get(key), new.get(key), f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _unequal(one, other, f"{where}[{number}]")
    elif old != new:
        yield f"{where}: {json.dumps(old)[:200]} became {json.dumps(new)[:200]}"


def write_apart(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Traces of searches as files of a folder, by a process with the kernels of ``KERNELS``."""
    return subprocess.run(
        [sys.executable, "-m", "tests.golden", "--to", str(folder), *names],
        env=os.environ | KERNELS,
        capture_output=True,
        text=True,
        check=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which searches; by default all")
    parser.add_argument("--write", action="store_true", help="store the traces anew")
    parser.add_argument("--to", type=Path, help="write the traces here, in this very process")
    given = parser.parse_args()
    names = given.names or list(SEARCHES)
    if given.to is not None:
        for name in names:
            (given.to / f"{name}.json").write_text(text_of(made(name)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = STORED if given.write else Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        done = write_apart(folder, *names)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found = {name: json.loads((folder / f"{name}.json").read_text()) for name in names}
    lines = [line for name, new in found.items() for line in differences(name, new)]
    print("\n".join(lines) or f"{len(names)} searches are as stored")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
