"""The benchmarks that others rely on run, and find nothing lost."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agentmerge.config import SearchConfig
from agentmerge.ledger import Ledger
from agentmerge.session import driving

ROOT = Path(__file__).parents[2]


def bench(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_nothing_is_lost_repeated_or_diverges() -> None:
    assert "lost 0, repeated 0, diverged 0" in bench("kill", "--kills", "5")


@pytest.mark.slow
def test_the_ledger_stays_small() -> None:
    said = bench("ledger", "--candidates", "400", "--items", "1000", "--searches", "2")
    each = float(said.split(" bytes an item result")[0].rpartition(" ")[2])
    assert each < 7


def test_databases_of_different_moments_go_on_alike(
    tmp_path: Path, fake_config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut; a hundred of them: ``python -m benchmarks.kill --power-cuts 100``."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.kill import start, traces
    from benchmarks.power_cut import cut

    path = tmp_path / "c.yml"
    path.write_text(fake_config.replace("kind: fake", "kind: fake, options: {delay_s: 0.05}"))
    config = SearchConfig.from_file(path)
    driving.run(config, name="search", runs_dir=tmp_path / "calm")
    found = cut(
        tmp_path,
        [lambda: start(tmp_path / "source", "run", str(path), "--name", "search")],
        {"search": lambda runs, emit: driving.run(config, name="search", runs_dir=runs, emit=emit)},
        traces(tmp_path / "calm"),
        trials=4,
        rng=random.Random(0),
    )
    assert (found.trials, found.lost, found.repeated, found.diverged) == (4, 0, 0, 0)
    assert 0 < found.journals <= 8
    assert found.gone_on > 0


def test_a_trial_counts_what_it_costs(tmp_path: Path, fake_config: str) -> None:
    """A resume that begins anew, as if the ledger were not the memory, is found out."""
    from benchmarks.kill import traces
    from benchmarks.power_cut import Cuts, trial

    config = SearchConfig.from_text(fake_config)
    driving.run(config, name="search", runs_dir=tmp_path / "calm")
    taken = tmp_path / "taken" / "0"
    taken.mkdir(parents=True)
    for name in (driving.LEDGER, driving.CHECKPOINTS):
        shutil.copyfile(tmp_path / "calm" / name, taken / name)
    with Ledger(taken / driving.LEDGER) as ledger:
        ledger.update_run(ledger.run("search").id, name="renamed", status="running")
    cuts = Cuts()
    other = SearchConfig.from_text(fake_config, overrides={"search.seed": 4})
    searches = {"search": lambda runs, emit: driving.run(other, name="search", runs_dir=runs)}
    trial(tmp_path / "taken", tmp_path / "trial", searches, traces(tmp_path / "calm"), cuts,
          random.Random(0))  # fmt: skip
    assert cuts.diverged > 0
