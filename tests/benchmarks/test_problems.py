"""Problems for others: one protocol, a table of answers that is a problem too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agentmerge.demo.family import TinyFamily
from agentmerge.errors import UserError
from agentmerge.strategies.auto import Auto
from agentmerge.strategies.random import Random
from agentmerge.testing import stored
from agentmerge.testing.functions import KNOWN
from agentmerge.testing.problems import problem, searched
from agentmerge.testing.stored import StoredProblem, grown
from agentmerge.testing.tiny import TINY
from benchmarks import table


@pytest.mark.parametrize("name", [n for n in KNOWN if n.split("-")[1] in ("2", "5")])
def test_a_function_keeps_to_the_protocol(name: str) -> None:
    here = problem(name, seed=3)
    assert here.name == name
    points = [vector for _, _, vector in here.first_points()]
    assert len(points) > here.space.dimensions
    for vector in points:
        outcome = here.evaluate(vector)
        assert outcome.score == here.evaluate(vector).score
        if name.endswith("noisy"):
            assert outcome.evidence is not None
            items = outcome.evidence.items
            assert outcome.score == pytest.approx(outcome.evidence.values @ items.weight)
            assert ((outcome.evidence.signals > 0) == (outcome.evidence.values > 0)).all()
    sealed = [here.sealed(vector).sum() for vector in points]
    assert len({round(float(s), 9) for s in sealed}) > 1
    assert problem(name, seed=4).sealed(points[0]).sum() != sealed[0]


def test_a_name_that_nobody_knows_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="no problem 'sphere-3'; there are tiny-so-8, "):
        problem("sphere-3")


def test_a_search_is_driven_from_the_first_points() -> None:
    here = problem("sphere-5-noisy")
    first = len(here.first_points())
    mine, theirs = (searched(here, s, 34, seed=1) for s in (Auto(None), Random()))
    assert [len(mine), len(theirs)] == [34, 34]
    assert [o.vector for o in mine[:first]] == [o.vector for o in theirs[:first]]
    best = [max(h, key=lambda o: o.score or 0.0).vector or () for h in (mine, theirs)]
    assert here.sealed(best[0]).sum() > here.sealed(best[1]).sum()


def test_a_stored_problem_answers_as_the_one_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "ROUND", 80)
    monkeypatch.setattr(stored, "ELITES", 4)
    here = problem("rosenbrock-5-noisy", seed=2)
    *_, last = grown(here, 2, 200)
    last.write(tmp_path / "t.npz")
    read = StoredProblem.read(tmp_path / "t.npz")
    assert read.points.shape == (200, 5)
    assert read.space.axes == here.space.axes
    for point in read.points[::17].tolist():
        mine, theirs = read.evaluate(point), here.evaluate(point)
        assert mine.score == pytest.approx(theirs.score)
        assert mine.evidence is not None
        assert theirs.evidence is not None
        assert (mine.evidence.values == theirs.evidence.values).all()
        np.testing.assert_allclose(mine.evidence.signals, theirs.evidence.signals, rtol=1e-3)
        assert read.sealed(point).sum() == float(here.sealed(point).sum() > 0)
    scores = [here.evaluate(point).score or 0.0 for point in read.points.tolist()]
    assert np.mean(scores[80:160]) > np.mean(scores[:80]) + 0.05, "no steps from the best points"


def test_what_is_not_stored_is_refused_and_a_search_takes_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "ROUND", 80)
    *_, here = grown(problem("sphere-2-noisy"), 0, 240)
    with pytest.raises(UserError, match=r"none of the 240 stored points; ask nearest\(\)"):
        here.evaluate((0.123, 0.456))
    found = searched(here, Auto(None), 30)
    points = [o.vector for o in found]
    assert len(set(points)) == 30  # each point of the table is asked once
    assert all(here.evaluate(point or ()).score is not None for point in points)
    rivals = [o.score or 0.0 for o in found[: len(here.first_points())]]
    assert max(o.score or 0.0 for o in found) > max(rivals)
    assert searched(here, Auto(None), 30) == found


def test_a_table_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "ROUND", 40)
    here = problem("sphere-5-noisy")
    *_, whole = grown(here, 0, 150)
    found = None
    for count in (13, 40, 61, 150):
        *_, found = grown(here, 0, count, found)
    assert found is not None
    assert (found.points == whole.points).all()
    assert (found.margins == whole.margins).all()


def test_the_command_writes_one_of_a_family(
    family: TinyFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.npz"
    table.main(["--points", "12", "--out", str(out)])
    table.main(["--points", "16", "--out", str(out)])
    assert "16 points" in capsys.readouterr().out
    here, real = StoredProblem.read(out), problem("tiny-so-8")
    assert here.tasks == TINY["tiny-so-8"].skills
    points = [vector for _, _, vector in here.first_points()]
    firsts = [vector for _, _, vector in real.first_points()]
    np.testing.assert_allclose(points, firsts, atol=1e-6)
    for point in (points[0], points[-1]):
        assert here.evaluate(point).score == pytest.approx(real.evaluate(point).score)
        assert (here.sealed(point) == real.sealed(point)).all()
    with pytest.raises(SystemExit):
        table.main(["--points", "16", "--seed", "1", "--out", str(out)])
    out.write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="no stored problem"):
        StoredProblem.read(out)


def test_what_has_no_margins_is_not_stored() -> None:
    with pytest.raises(UserError, match="has no margins to store"):
        next(grown(problem("sphere-2"), 0, 10))
