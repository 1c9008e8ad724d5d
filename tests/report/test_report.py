"""What the report says, read from a finished search; how it looks is ``test_page.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.contracts.strategy import Proposal
from agentmerge.contracts.worker import EngineInfo, ItemResult
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.report.content import comparisons, content
from agentmerge.report.grid import grid
from agentmerge.report.html import page
from agentmerge.report.items import ItemsAsked, asked, gains, paired, scores
from agentmerge.session import driving
from agentmerge.space.grouped import SearchSpace
from tests.report.conftest import CONFIG, search_family


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    search_family(folder)
    return folder


def test_the_report_is_one_file_that_asks_no_network(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["report", "first", "second", "--runs-dir", str(runs)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == runs / "first" / "report.html"
    text = path.read_text()
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "http" not in re.sub(r'<script type="application/json".*?</script>', "", outside)
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?!data:|#)", outside)


def test_numbers_are_the_ledgers(runs: Path) -> None:
    with Ledger(runs / LEDGER) as ledger:
        row = ledger.run("first")
        found = content(ledger, row)
        scored = [c for c in ledger.candidates(row.id) if c.score is not None and c.twin is None]
    assert row.result is not None
    assert len(found.points) == len(scored)
    assert found.points[-1].best_score == max(c.score or 0.0 for c in scored)
    assert found.answer is not None
    assert [found.answer.generation, found.answer.slot] == row.result["answer"]["candidate"]
    earned = sum(operator["earned"] for operator in found.operators)
    assert earned == pytest.approx(found.points[-1].best_score - found.points[0].best_score)
    assert found.failed, "the config makes some candidates fail"
    assert [name for name, _, _ in found.lineage] == ["first", "second"]


def test_differences_are_the_final_cards(runs: Path) -> None:
    """Computed from stored items alone, without tasks, they come out as the search said."""
    with Ledger(runs / LEDGER) as ledger:
        row = ledger.run("first")
        found = comparisons(content(ledger, row))
    assert row.result is not None
    told = {d["against"]: (d["mean"], d["low"], d["high"]) for d in row.result["differences"]}
    assert told
    assert len(found) > 1
    for row in found:
        name = row["name"].removeprefix("parent ").partition(" (")[0]
        assert tuple(row["difference"]) == pytest.approx(told[name])
    for entry in found:
        for task in entry["tasks"]:
            kinds = [task[key] for key in ("gained", "lost", "both", "neither")]
            assert sum(kinds) == task["items"] > 0


def test_items_that_were_asked_are_written_down(runs: Path) -> None:
    with Ledger(runs / LEDGER) as ledger:
        row = ledger.run("first")
        for part in ("search", "sealed"):
            question = asked(ledger, row, part)
            assert question is not None
            assert {task: len(keys) for task, keys in question.keys.items()} == {
                task: found[part] for task, found in row.facts["items"].items()
            }
            values = question.values(ledger, row.result["answer"]["recipe_hash"])
            assert values is not None
            assert set(values) == {"one", "two"}


def test_a_grid_holds_the_values_of_the_point() -> None:
    config = SearchConfig.from_text(CONFIG)
    space = SearchSpace(config.genome, 4, "float32")
    point = tuple((index % 7 + 1) / 10 for index in range(space.dimensions))
    found = grid(space, space.recipe(point))
    assert found.columns == ("layers 0-1", "layers 2-3")
    assert set(found.rows) == {
        (model, parameter, where)
        for model in ("north", "south", "east")
        for parameter in ("weight", "density")
        for where in ("self_attn", "other tensors")
    }
    densities = {
        (axis.model, axis.group, axis.filter or "other tensors"): axis.value(x)
        for axis, x in zip(space.axes, point, strict=True)
        if axis.parameter == "density"
    }
    for (model, parameter, where), values in found.rows.items():
        if parameter == "density":
            assert values == tuple(densities[model, group, where] for group in range(2))


def test_what_people_and_models_wrote_is_escaped(runs: Path, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    with Ledger(runs / LEDGER) as ledger:
        row = ledger.run("second")
        guidance = {"critique": evil, "thought": evil, "source": "model"}
        ledger.save_advice(row.id, 90, "critic", {"guidance": guidance, "failure": evil})
        refused = (Proposal((0.5,), "random", label=evil), "refused-x", "", evil)
        ledger.add_candidates(row.id, 91, [refused])
        text = page([content(ledger, ledger.run("second"))])
    assert evil not in text
    assert "alert(1)" in text


def test_a_search_that_has_scored_nothing_still_has_a_page(tmp_path: Path) -> None:
    text = CONFIG.replace("max_weight>0.99", "max_weight>-1")
    config = tmp_path / "config.yml"
    config.write_text(text)
    where = ["--runs-dir", str(tmp_path)]
    assert run_app(["run", str(config), "--name", "none", "-q", *where]) == 1
    assert run_app(["report", "none", *where]) == 0
    text = (tmp_path / "none" / "report.html").read_text()
    assert "Nothing has been scored yet" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    assert json.loads(data[1])["charts"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nobody"], "no run called 'nobody'"),
        (["report", "first", "--to", "/proc/nowhere/x.html"], "cannot be written"),
        (["report"], "Missing argument"),
    ],
)
def test_mistakes_are_one_sentence(
    runs: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app([*arguments, "--runs-dir", str(runs)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rebuild", "higher", "one", "other", "counts"),
    [
        ("plain", True, ItemResult(1.0), ItemResult(0.0), (1, 0)),
        ("plain", False, ItemResult(0.2), ItemResult(0.4), (1, 0)),
        ("weighted", False, ItemResult(-10.0), ItemResult(-20.0), (1, 0)),
        ("class", True, ItemResult(2.0, margin=0.5), ItemResult(1.0, margin=-1.0), (1, 0)),
        ("class", True, ItemResult(2.0), ItemResult(1.0), (0, 0)),
    ],
)
def test_an_item_is_gained_by_what_its_task_calls_better(
    rebuild: str, higher: bool, one: ItemResult, other: ItemResult, counts: tuple[int, int]
) -> None:
    """A perplexity's items are log-likelihoods, an f1's predicted classes."""
    objective = {
        "name": "t",
        "signed_weight": 1.0,
        "higher_is_better": higher,
        "leaves": ["t"],
        "by_size": False,
        "mean": rebuild == "plain",
        "rebuild": [rebuild],
    }
    engine = EngineInfo("fake", "1", "cpu", "float32", "1")
    question = ItemsAsked("search", {"t": ["k"]}, {"t": "p"}, engine, [objective], 0)
    row = gains({"t": {"k": one}}, {"t": {"k": other}}, question)[0]
    assert (row["gained"], row["lost"]) == counts
    difference = paired({"t": {"k": one}}, {"t": {"k": other}}, question)
    assert difference is None, "one item has no interval, and a metric of the whole needs its task"


#: Here another cheap merge than the uniform one is the best.
CHEAP = """\
genome:
  {models: [red, blue], base_model: base, merge_method: task_arithmetic, normalize: false}
tasks:
  - {name: one, metric: "acc,none"}
  - {name: two, metric: "acc,none", weight: 0.5}
limit: 60
search: {algorithm: random, seed: 3}
worker: {kind: fake, options: {num_layers: 4, base: base}}
budget: {max_evaluations: 14}
"""


def test_scores_by_task_are_of_sealed_items_for_every_contender(tmp_path: Path) -> None:
    row = driving.run(SearchConfig.from_text(CHEAP), name="first", runs_dir=tmp_path)
    with Ledger(tmp_path / LEDGER) as ledger:
        found = content(ledger, row)
        question = asked(ledger, row, "sealed")
    assert question is not None
    assert row.result is not None
    told = {tuple(r["candidate"]): r for r in [row.result["answer"], *row.result["parents"]]}
    assert {c.kind for c in found.contenders} == {"answer", "parent", "best cheap merge", "uniform"}
    for contender in found.contenders:
        if contender.kind == "uniform":  # the best cheap merge alone is asked the sealed items
            assert contender.sealed is None
            continue
        assert contender.values is not None
        by_items = scores(contender.values, question)
        assert contender.sealed_tasks == pytest.approx(by_items)
        assert contender.sealed == pytest.approx(by_items["one"] + 0.5 * by_items["two"])
        place = (contender.candidate.generation, contender.candidate.slot)
        if place in told:
            assert told[place]["sealed_tasks"] == pytest.approx(by_items)
