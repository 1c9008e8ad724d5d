"""Recipes from elsewhere on the command line: scored, explained and begun with alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentmerge.cli.app import run_app
from agentmerge.demo.family import TinyFamily
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER

#: One that only relative names fit, in mergekit's longest form, with a key that does nothing.
MODULES = """\
merge_method: task_arithmetic
base_model: models/base
modules:
  default:
    slices:
      - sources:
          - {model: models/north, layer_range: [0, 4], parameters: {weight: 0.7}}
          - {model: models/base, layer_range: [0, 4]}
lambda: 2
"""
BASE_ALONE = """\
merge_method: ties
base_model: models/base
models: [{model: models/base}]
"""


@pytest.fixture
def here(tmp_path: Path, fake_config: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of models under relative names, a config that has them, and recipes."""
    monkeypatch.chdir(tmp_path)
    for name in ("north", "south", "base"):
        (tmp_path / "models" / name).mkdir(parents=True)
    text = fake_config.replace("[north, south]", "[models/north, models/south]")
    Path("config.yml").write_text(text.replace("base_model: base", "base_model: models/base"))
    Path("modules.yml").write_text(MODULES)
    Path("base.yml").write_text(BASE_ALONE)
    return tmp_path


def test_evaluate_scores_every_form_and_names_what_does_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["evaluate", "modules.yml", "--config", "config.yml"]) == 0
    assert "note: lambda does nothing; write it under parameters:" in capsys.readouterr().err
    assert run_app(["evaluate", "modules.yml", "--config", "config.yml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reused"] is True
    assert found["notes"] == ["lambda does nothing; write it under parameters:"]
    assert run_app(["evaluate", "base.yml", "--config", "config.yml"]) == 0


def test_evaluate_takes_absolute_names_for_the_configs_relative_ones(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "absolute.yml").write_text(MODULES.replace("models/", f"{here}/models/"))
    for recipe in ("modules.yml", "absolute.yml"):
        assert run_app(["evaluate", recipe, "--config", "config.yml", "--json"]) == 0
    text = capsys.readouterr().out
    assert '"reused": true' in text, "it is the same merge"


def test_a_recipe_without_a_dtype_is_the_search_s_own_merge(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["run", "config.yml", "--name", "a", "-q"]) == 0
    told = (here / "runs" / "a" / "best.yml").read_text()
    bare = "".join(line for line in told.splitlines(True) if not line.startswith("dtype:"))
    assert bare != told
    Path("bare.yml").write_text(bare)
    capsys.readouterr()
    assert run_app(["evaluate", "bare.yml", "--config", "config.yml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reused"] is True
    begun = ["run", "config.yml", "--init", "bare.yml", "--name", "b", "-q"]
    assert run_app(begun) == 0
    with Ledger(here / "runs" / LEDGER) as ledger:
        known = {c.recipe_hash for c in ledger.candidates(ledger.run("a").id)}
        first = [c for c in ledger.candidates(ledger.run("b").id, 0) if c.operator == "init"]
        assert {c.recipe_hash for c in first} <= known


def test_explain_shows_every_form(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["explain", "modules.yml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][3][:2] == ["layer 0", "model.layers.0.self_attn.q_proj.weight and 2 more"]
    assert found["notes"] == ["lambda does nothing; write it under parameters:"]


@pytest.mark.parametrize("recipe", ["modules.yml", "base.yml"])
def test_a_search_begins_with_what_evaluate_takes(
    here: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["check", "config.yml", "--init", recipe]) == 0
    out = capsys.readouterr().out
    assert ("lambda does nothing" in out) == (recipe == "modules.yml")
    assert run_app(["run", "config.yml", "--init", recipe, "--name", "a", "-q"]) == 0
    with Ledger(here / "runs" / LEDGER) as ledger:
        row = ledger.run("a")
        first = [c for c in ledger.candidates(row.id, 0) if c.operator == "init"]
        assert [c.score is not None or c.twin is not None for c in first] == [True]
    capsys.readouterr()
    if recipe == "modules.yml":
        assert run_app(["show", "a"]) == 0
        assert "lambda does nothing" in capsys.readouterr().out


def test_a_misspelt_key_of_the_old_sections_stays_with_the_results(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("config.yml").read_text().replace("layer_granularity", "layer_granularty")
    Path("config.yml").write_text(text + "num_gpus: 2\n")
    told = "layer_granularty is not a known key; did you mean 'layer_granularity'?"
    assert run_app(["check", "config.yml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert [told in line for line in plan["warnings"]] == [True], "and num_gpus is a note"
    assert run_app(["run", "config.yml", "--name", "a"]) == 0
    said = capsys.readouterr()
    (warning,) = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert told in warning
    (closing,) = [line for line in said.out.splitlines() if line.startswith("warning: ")]
    assert told in closing
    assert run_app(["show", "a"]) == 0
    assert told in capsys.readouterr().out
    assert run_app(["branch", "a", "--at", "0", "--as", "b", "--json", "-q"]) == 0
    assert told in json.loads(capsys.readouterr().out)["warnings"][0], "a branch inherits it"
    assert run_app(["report", "a"]) == 0
    assert "layer_granularty" in (here / "runs" / "a" / "report.html").read_text()


def test_explain_refuses_what_its_models_cannot_be(
    family: TinyFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = family.experts
    recipe = tmp_path / "deep.yml"
    sources = "".join(
        f"\n  - {{model: {m}, layer_range: [0, 99], parameters: {{weight: 1}}}}" for m in (one, two)
    )
    recipe.write_text(f"merge_method: linear\nslices:\n- sources:{sources}\n")
    assert run_app(["explain", str(recipe), "--layers", "99"]) != 0
    assert "99" in capsys.readouterr().err
    recipe.write_text(recipe.read_text().replace(str(two), "nowhere"))
    assert run_app(["explain", str(recipe), "--layers", "99"]) == 0
    assert "not checked against its models" in capsys.readouterr().out


STACKED = """\
merge_method: passthrough
slices:
  - sources: [{model: models/north, layer_range: [0, 3]}]
  - sources: [{model: models/south, layer_range: [1, 4]}]
    parameters: {scale: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.25}]}
"""


MERGED = """\
merge_method: linear
parameters: {normalize: false}
slices:
  - sources:
      - {model: models/south, layer_range: [0, 3], parameters: {weight: 0.7}}
      - {model: models/north, layer_range: [0, 3], parameters: {weight: 0.5}}
  - sources: [{model: models/south, layer_range: [1, 4]}]
    parameters:
      weight: [{filter: o_proj, value: 0.5}, {filter: down_proj, value: 0.25}, {value: 1}]
"""


STAGED = f"""\
name: both
merge_method: slerp
base_model: models/north
models: [{{model: models/north}}, {{model: models/south}}]
---
{STACKED.replace("north", "both").replace("models/both", "both")}"""


@pytest.mark.parametrize(
    ("text", "of", "whole"),
    [
        (STACKED, "scale", "the model"),
        (MERGED, "weight", "weight 1"),
        (STAGED, "scale", "the model"),
    ],
)
def test_a_stack_of_layers_is_explained_scored_and_begun_with(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, of: str, whole: str
) -> None:
    Path("stack.yml").write_text(text)
    assert run_app(["explain", "stack.yml", "--layers", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == []
    rows = [row for row in found["rows"] if row[0] == "layer 4"]
    assert rows[0][2:] == ["south, layer 2", whole]
    said = {tuple(row[1:]) for row in found["rows"]}
    for place in (3, 4, 5):
        o, down = (
            f"model.layers.{place}.{n}.weight" for n in ("self_attn.o_proj", "mlp.down_proj")
        )
        assert (o, f"south, layer {place - 2}", f"{of} 0.5") in said
        assert (down, f"south, layer {place - 2}", f"{of} 0.25") in said
    assert run_app(["explain", "stack.yml", "--json"]) == 0
    unknown = json.loads(capsys.readouterr().out)
    assert "taken to have 4 layers" in unknown["notes"][0]
    assert unknown["hash"] == found["hash"]
    assert run_app(["evaluate", "stack.yml", "--config", "config.yml", "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["reused"] is False
    begun = ["run", "config.yml", "--init", "stack.yml", "--name", "a", "-q"]
    assert run_app(begun) == 0
    assert run_app(["run", "config.yml", "--name", "b", "-q"]) == 0
    with Ledger(here / "runs" / LEDGER) as ledger:
        (first,) = [c for c in ledger.candidates(ledger.run("a").id) if c.operator == "init"]
    assert first.score == scored["score"]
    capsys.readouterr()
    assert run_app(["compare", "a", "b", "--json"]) == 0
    assert run_app(["report", "a"]) == 0
    if text == STAGED:
        assert [
            next(row for row in found["rows"] if row[0] == "merge: layer 2")[i] for i in (0, 2, 3)
        ] == ["merge: layer 2", "north", "t 0.5 away"]


@pytest.mark.parametrize(
    "outputs",
    [("self_attn.dense", "mlp.fc2"), ("attention.dense", "mlp.dense_4h_to_h"), ("attn.c_proj",)],
)
def test_scales_of_a_stack_are_explained_whatever_its_outputs_are_called(
    outputs: tuple[str, ...],
) -> None:
    from agentmerge.recipe import Recipe
    from agentmerge.report.explain import explain_recipe

    filters = [{"filter": name, "value": 0.5 / k} for k, name in enumerate(outputs, 1)]
    away = [{"filter": "lm_head", "value": 0.7}, {"filter": "layers.2.mlp", "value": 0.9}]
    again = {"scale": [*filters, *away, {"value": 1.0}]}
    sources = [{"model": "a", "layer_range": [0, 3]}, {"model": "a", "layer_range": [1, 4]}]
    slices = [{"sources": [sources[0]]}, {"sources": [sources[1] | {"parameters": again}]}]
    recipe = Recipe.parse({"merge_method": "passthrough", "slices": slices})
    said = {tuple(row[1:]) for row in explain_recipe(recipe, None, None)["rows"]}
    for place in (3, 4, 5):
        for k, name in enumerate(outputs, 1):
            row = f"model.layers.{place}.{name}", f"a, layer {place - 2}", f"scale {0.5 / k:g}"
            assert row in said
    assert not any("lm_head" in row[0] or ".layers.2.mlp" in row[0][14:] for row in said)


def test_comparing_a_stack_with_a_merge_of_weights_shows_both_layer_by_layer() -> None:
    from agentmerge.config import GenomeConfig
    from agentmerge.recipe import Recipe
    from agentmerge.report.grid import grid, stack_depth
    from agentmerge.space.grouped import SearchSpace

    models = ("models/north", "models/south")
    genome = GenomeConfig(models=models, merge_method="linear", layer_granularity=2)
    space = SearchSpace(genome, 4, "float32")
    stack = Recipe.parse(STACKED).canonical(4)
    merge, _ = space.uniform()
    assert (stack_depth(stack, 4), stack_depth(merge, 4)) == (6, 0)
    one, other = grid(space, stack), grid(space, merge, 6)
    assert one.columns == other.columns == tuple(f"layer {k}" for k in range(6))
    assert one.rows["south", "layer", ""] == (None, None, None, 1, 2, 3)
    assert one.rows["north", "layer", ""] == (0, 1, 2, None, None, None)
    assert one.rows["south", "scale", "o_proj"] == (None, None, None, 0.5, 0.5, 0.5)
    weights = other.rows["south", "weight", ""]
    assert weights[:4] == (1.0,) * 4
    assert weights[4:] == (None, None)
