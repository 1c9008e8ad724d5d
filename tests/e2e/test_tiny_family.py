"""The whole path on real parts: a trained family, lm-eval tasks, a checkpoint that scores alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from agentmerge.cli.app import run_app
from agentmerge.config import SearchConfig
from agentmerge.demo.family import TinyFamily
from agentmerge.demo.tasks import demo_config, skill_task, write_tasks
from agentmerge.errors import UserError
from agentmerge.ledger import Ledger
from agentmerge.preflight.prepare import prepare
from agentmerge.recipe import Recipe
from agentmerge.recipe.names import short_name
from agentmerge.session import driving
from agentmerge.session.export import export_run
from tests.session.conftest import trace_of


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), ("shift", "sort"), n_items=200)


def body_of(family: TinyFamily, tasks: Path, **genome: object) -> dict:
    body = demo_config(family, tasks)
    body["genome"] |= genome
    body |= {
        "limit": 30,
        "task_search_path": [str(tasks)],
        "budget": {"max_evaluations": 14},
        "search": {"seed": 3, "algorithm": "random", "population": 4},
        "worker": {"batch_size": 64, "options": {"threads": 1}},
    }
    return body


def config_of(family: TinyFamily, tasks: Path, **genome: object) -> SearchConfig:
    return SearchConfig.from_text(yaml.safe_dump(body_of(family, tasks, **genome)))


@pytest.mark.parametrize(
    "genome",
    [
        {"merge_method": "dare_ties", "normalize": True, "filters": ["self_attn", "mlp"]},
        {"merge_method": "ties", "normalize": None, "smooth": True},
        {"merge_method": "slerp"},
        {"merge_method": "linear", "normalize": None, "layer_granularity": 2},
    ],
    ids=lambda genome: genome["merge_method"],
)
def test_search_export_and_score_from_disk(
    family: TinyFamily, tasks: Path, tmp_path: Path, genome: dict
) -> None:
    config = config_of(family, tasks, **genome)
    row = driving.run(config, name="a", runs_dir=tmp_path)
    assert row.status == "done"
    report = export_run("a", tmp_path / "merged", runs_dir=tmp_path)
    assert report["equal"] is True
    assert report["differing_items"] == 0
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.tie_word_embeddings
    assert tokenizer("s:abcde=").input_ids
    saved = Recipe.parse(tmp_path / "merged" / "mergekit_config.yml")
    best = Recipe.parse(tmp_path / "a" / "best.yml")
    assert saved.canonical(4) == best.renamed(short_name).canonical(4), "no path of this machine"


def test_evaluate_any_recipe_and_pay_once(family: TinyFamily, tasks: Path, tmp_path: Path) -> None:
    config = config_of(family, tasks)
    recipe = Recipe.parse(
        {
            "merge_method": "linear",
            "models": [
                {"model": str(expert), "parameters": {"weight": 0.5}} for expert in family.experts
            ],
        }
    )
    first = driving.evaluate(recipe, config, runs_dir=tmp_path)
    second = driving.evaluate(recipe, config, runs_dir=tmp_path)
    assert not first["reused"]
    assert second["reused"]
    assert second["score"] == first["score"]
    assert first["items"] == 90


def test_parents_score_what_they_are_known_for_and_a_second_search_costs_nothing(
    family: TinyFamily, tasks: Path, tmp_path: Path
) -> None:
    config = config_of(family, tasks)
    driving.run(config, name="a", runs_dir=tmp_path)
    driving.run(config, name="b", runs_dir=tmp_path)
    first, second = trace_of(tmp_path, "a"), trace_of(tmp_path, "b")
    assert first["candidates"] == second["candidates"]
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        assert all(c.reused for c in ledger.candidates(ledger.run("b").id) if c.state == "scored")
        found = ledger.candidates(ledger.run("a").id, 0)
    parents = {c.label.rsplit("/", 1)[-1]: dict(c.tasks) for c in found if c.operator == "parent"}
    assert parents["expert-shift"][skill_task("shift")] > 0.9
    assert parents["expert-shift"][skill_task("sort")] < 0.2
    assert parents["expert-sort"][skill_task("sort")] > 0.9
    assert parents["base"][skill_task("shift")] < 0.2


def test_a_changed_task_file_is_noticed_on_resume(
    family: TinyFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_tasks(tmp_path / "tasks", ("shift", "sort"), n_items=200)
    driving.run(config_of(family, own), name="a", runs_dir=tmp_path)
    path = own / f"{skill_task('sort')}.yaml"
    path.write_text(path.read_text().replace("max_gen_toks: 8", "max_gen_toks: 4"))
    with pytest.raises(UserError, match="definition of task 'agentmerge_demo_sort' changed"):
        driving.resume("a", runs_dir=tmp_path, overrides={"budget.max_evaluations": 20})
    assert run_app(["resume", "a", "--runs-dir", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_old_outputs_stand_where_they_used_to(
    family: TinyFamily, tasks: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yml"
    body = body_of(family, tasks)
    path.write_text(yaml.safe_dump({k: body[k] for k in body if k not in ("search", "budget")}))
    storage = tmp_path / "storage"
    arguments = ["run", str(path), "--storage-path", str(storage), "--runs-dir", str(tmp_path)]
    arguments += ["--max-fevals", "10", "--random-seed", "1", "--strategy", "pool", "--in-memory"]
    assert run_app(arguments) == 0
    assert Recipe.parse(storage / "best_config.yaml").merge_method == "task_arithmetic"
    assert (storage / "final_model" / "model.safetensors").is_file()


def test_check_reads_no_weights_and_says_the_plan(
    family: TinyFamily, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(body_of(family, tasks)))
    assert run_app(["check", str(path), "--runs-dir", str(tmp_path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["dimensions"] == plan["freedoms"] == 8
    assert plan["items"] == 90
    assert plan["seconds_per_candidate"] is None


def test_check_finds_every_fault_at_once(
    family: TinyFamily, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = body_of(family, tasks, layer_granularity=3)
    body["genome"]["models"] = [*body["genome"]["models"], str(tmp_path / "nowhere")]
    body["tasks"][0]["metric"] = "exact_macth,none"
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(body))
    assert run_app(["check", str(path), "--json"]) == 2
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert any("nowhere" in fault for fault in faults)
    body["genome"]["models"].pop()
    path.write_text(yaml.safe_dump(body))
    assert run_app(["check", str(path), "--json"]) == 2
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert any("layer_granularity 3" in fault for fault in faults)
    assert any("exact_macth" in fault and "exact_match" in fault for fault in faults)


def test_relative_paths_mean_the_same_from_anywhere(
    family: TinyFamily, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = family.base.parent
    body = body_of(family, tasks, base_model="base")
    body["genome"]["models"] = [expert.name for expert in family.experts]
    monkeypatch.chdir(home)
    row = driving.run(
        SearchConfig.from_text(yaml.safe_dump(body)), name="a", runs_dir=tmp_path / "runs"
    )
    monkeypatch.chdir(tmp_path)
    assert str(home) in (tmp_path / "runs" / "a" / "best.yml").read_text()
    more = {"budget.max_evaluations": 16}
    assert driving.resume("a", runs_dir="runs", overrides=more).status == row.status == "done"


def test_prepared_facts_are_stable(family: TinyFamily, tasks: Path) -> None:
    config = config_of(family, tasks)
    assert prepare(config).facts() == prepare(config).facts()


def test_a_parent_with_an_adapter_from_search_to_disk(
    family: TinyFamily, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model+adapter` is a parent like any other, and stands in the recipe as mergekit reads it."""
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "cache"))
    adapter = small_adapter(family.experts[0], tmp_path / "adapter")
    names = [f"{family.experts[0]}+{adapter}", str(family.experts[1])]
    body = body_of(family, tasks, models=names)
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(body))
    assert run_app(["check", str(path), "--runs-dir", str(tmp_path)]) == 0
    assert not (tmp_path / "cache" / "parents").exists(), "check makes nothing"
    assert run_app(["run", str(path), "--name", "a", "--runs-dir", str(tmp_path), "-q"]) == 0
    report = export_run("a", tmp_path / "merged", runs_dir=tmp_path)
    assert report["equal"] is True
    recipe = Recipe.parse(tmp_path / "a" / "best.yml")
    assert set(recipe.models) <= {*names, str(family.base)}
    with Ledger(tmp_path / driving.LEDGER) as ledger:
        found = ledger.candidates(ledger.run("a").id, 0)
    assert {c.state for c in found} == {"scored"}
    alone = driving.evaluate(
        Recipe.of_model(str(family.experts[0]), 4),
        SearchConfig.from_file(path),
        runs_dir=tmp_path,
    )
    assert not alone["reused"], "the adapter makes another model of it"


@pytest.mark.slow
def test_shards_in_bfloat16_with_other_vocabularies_from_search_to_disk(
    family: TinyFamily, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "cache"))
    paths = []
    for index, path in enumerate((family.base, *family.experts)):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if index:
            tokenizer.add_tokens(["<other>", "<same>"][2 - index :])
            model.resize_token_embeddings(model.config.vocab_size + index)
        paths.append(tmp_path / f"parent-{index}")
        model.save_pretrained(paths[-1], max_shard_size="200KB")
        tokenizer.save_pretrained(paths[-1])
        assert (paths[-1] / "model.safetensors.index.json").is_file()
    body = body_of(family, tasks, base_model=str(paths[0]), models=[str(p) for p in paths[1:]])
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(body))
    assert run_app(["check", str(config), "--json"]) == 2, "vocabularies differ"
    body["genome"]["tokenizer_source"] = "union"
    config.write_text(yaml.safe_dump(body))
    assert run_app(["run", str(config), "--name", "a", "--runs-dir", str(tmp_path), "-q"]) == 0
    report = export_run("a", tmp_path / "merged", runs_dir=tmp_path)
    assert report["equal"] is True
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
    assert {"<other>", "<same>"} <= words.keys()
    assert merged.config.tie_word_embeddings
    assert merged.get_input_embeddings().weight.shape[0] == len(words)
    assert merged.dtype is torch.bfloat16


def small_adapter(model: Path, directory: Path) -> Path:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.data += 0.01 * torch.randn_like(value)
    adapted.save_pretrained(directory)
    return directory
