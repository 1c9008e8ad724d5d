"""The demo family and its tasks, as plain transformers and plain lm-eval see them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agentmerge.demo import (
    TinyFamily,
    cached_family,
    demo_config,
    language,
    make_family,
    training,
    write_skill_tasks,
    write_tasks,
)
from agentmerge.demo import family as recipe
from agentmerge.demo import tasks as demo_tasks
from agentmerge.errors import UserError

SKILLS = ("shift", "sort")


@pytest.fixture
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training cut to two steps a model: useless models, made by the real code."""
    short = replace(recipe.SCHEDULE, base_steps=2, expert_steps=2, merge_steps=2)
    monkeypatch.setattr(recipe, "SCHEDULE", short)


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), SKILLS)


def test_importing_the_demo_loads_no_torch():
    heavy = "[name for name in ('torch', 'transformers', 'lm_eval') if name in sys.modules]"
    code = f"import sys, agentmerge.demo; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The checkpoints


def test_checkpoints_load_with_plain_transformers_and_are_tied(family: TinyFamily):
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, GenerationConfig

    for path in (family.base, *family.experts):
        model = AutoModelForCausalLM.from_pretrained(path)
        assert model.dtype == torch.float32
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        assert 440_000 < model.num_parameters() < 450_000
        assert GenerationConfig.from_pretrained(path).eos_token_id == model.config.eos_token_id
        with safe_open(path / "model.safetensors", "pt") as weights:
            assert set(weights.keys()) == {name for name, _ in model.named_parameters()}


def test_tokenizer_makes_one_token_a_character_and_comes_back(family: TinyFamily):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family.base)
    line = "s:abcdj=bcdek\n"
    ids = tokenizer.encode(line)
    assert tokenizer.is_fast
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(line)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == line


def test_lm_eval_sees_the_tokens_that_were_trained_on(family: TinyFamily):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(family.base), device="cpu")
    context, answer = model._encode_pair("s:abcde=", "bcdef")
    [trained] = training.encode([("s:abcde=", "bcdef")]).tolist()
    assert [*context, *answer, model.eot_token_id] == trained


def test_held_out_inputs_are_never_trained_on():
    rng = training.stream(0, "base")
    lines = training.sample_lines(recipe._base_mixture(), 20_000, rng)
    texts = {question[2:-1] for question, _ in lines}
    assert len(texts) > 10_000
    asked, ended = set(language.inputs(held_out=True)), set(language.validation_inputs())
    assert not texts & (asked | ended)
    assert not asked & ended


def test_each_expert_has_its_own_skill_only(family: TinyFamily, tasks_dir: Path):
    base = scores(family.base, tasks_dir, limit=200)
    assert max(base.values()) <= 0.15
    for path, own in zip(family.experts, family.skills, strict=True):
        found = scores(path, tasks_dir, limit=200)
        assert found.pop(demo_tasks.skill_task(own)) >= 0.95
        assert found.pop(demo_tasks.CHOICE_TASK) == pytest.approx(0.5, abs=0.15)
        assert max(found.values()) <= 0.15


def test_the_best_uniform_merge_has_a_part_of_every_skill_and_leaves_some(family: TinyFamily):
    """What ended the training, measured again on the tasks' own items: true of any family."""
    from agentmerge.testing.tiny import TINY, TinyProblem

    problem = TinyProblem(TINY["tiny-so-8"], 0)
    found = {
        label: problem.sealed(point).sum()
        for operator, label, point in problem.first_points()
        if operator != "depth"
    }
    parents = max(found.pop(path.name.removeprefix("expert-")) for path in family.experts)
    assert found.pop("base") <= 0.05
    assert 0.45 <= parents <= 0.55 < max(found.values()) < 0.9


def test_what_ended_the_training_is_kept_with_the_family(family: TinyFamily):
    told = json.loads((family.base.parent / recipe.MARKER).read_text())
    assert told["made"] == recipe.how_made(SKILLS, 0)
    right = {name: row["right"] for name, row in told["measured"].items()}
    goals = recipe.SCHEDULE
    assert right["base"] >= goals.base_goal
    assert min(right["shift"], right["sort"]) >= goals.expert_goal
    assert right["merge"] >= goals.merge_goal


@pytest.mark.usefixtures("two_steps")
def test_a_goal_out_of_reach_is_said_and_training_ends(tmp_path: Path):
    said: list[str] = []
    make_family(tmp_path, skills=SKILLS, on_progress=said.append)
    short = [line for line in said if line.endswith("was wanted: going on")]
    assert [line.split(" has ")[0] for line in short] == [
        "base", "expert-shift", "expert-sort", "the best uniform merge",
    ]  # fmt: skip


def scores(model: Path, tasks_dir: Path, limit: int) -> dict[str, float]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = [path.stem for path in tasks_dir.glob("*.yaml")]
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model)},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        limit=limit,
        batch_size=200,
        device="cpu",
        bootstrap_iters=0,
    )["results"]
    metrics = ("exact_match,none", "acc,none")
    return {name: next(found[name][m] for m in metrics if m in found[name]) for name in names}


# Making and keeping


@pytest.mark.usefixtures("two_steps")
def test_a_family_depends_on_skills_and_seed_alone(tmp_path: Path):
    import torch

    first = make_family(tmp_path / "a", skills=SKILLS, seed=3)
    torch.manual_seed(99)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    second = make_family(tmp_path / "b", skills=SKILLS, seed=3)
    alone = make_family(tmp_path / "c", skills=("sort",), seed=3)
    other = make_family(tmp_path / "d", skills=("sort",), seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert weights(first.base) == weights(alone.base) != weights(other.base)
    assert [*map(weights, first.experts)] == [*map(weights, second.experts)]
    assert weights(alone.experts[0]) != weights(other.experts[0])


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def test_the_cache_key_changes_with_how_a_family_is_made(monkeypatch: pytest.MonkeyPatch):
    keys = [recipe.family_key(*args) for args in ((SKILLS, 0), (SKILLS, 1), (("shift",), 0))]
    monkeypatch.setenv("MKL_CBWR", "another")
    keys.append(recipe.family_key(SKILLS, 0))
    monkeypatch.setattr(recipe, "SCHEDULE", replace(recipe.SCHEDULE, merge_goal=0.5))
    keys.append(recipe.family_key(SKILLS, 0))
    monkeypatch.setattr(recipe, "FAMILY_VERSION", recipe.FAMILY_VERSION + 1)
    keys.append(recipe.family_key(SKILLS, 0))
    assert len(set(keys)) == 6


@pytest.mark.usefixtures("two_steps")
def test_a_cached_family_is_not_made_again(tmp_path: Path):
    said: list[str] = []
    made = cached_family(("sort",), 0, tmp_path, said.append)
    assert any(line.startswith("training expert-sort: step 2,") for line in said)
    said.clear()
    assert cached_family(("sort",), 0, tmp_path, said.append) == made
    assert said == []


@pytest.mark.usefixtures("two_steps")
def test_a_half_written_family_is_made_again(tmp_path: Path):
    made = cached_family(("sort",), 0, tmp_path)
    whole = weights(made.experts[0])
    (made.base.parent / recipe.MARKER).unlink()
    made.experts[0].joinpath("model.safetensors").write_bytes(b"half")
    assert weights(cached_family(("sort",), 0, tmp_path).experts[0]) == whole


@pytest.mark.usefixtures("two_steps")
def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path):
    def interrupt(message: str) -> None:
        if "expert" in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_family(("sort",), 0, tmp_path, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_cache_directory_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path))
    assert recipe.default_cache_dir() == tmp_path / "families"


@pytest.mark.parametrize("skills", [("shfit",), (), ("sort", "sort")])
def test_bad_skills_are_refused_before_any_training(tmp_path: Path, skills: tuple[str, ...]):
    with pytest.raises(UserError, match="skill"):
        cached_family(skills, 0, tmp_path)


# The tasks


def items(directory: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()]


def test_no_two_tasks_share_an_input_and_all_are_held_out(tmp_path: Path):
    write_tasks(tmp_path, tuple(language.SKILLS), n_items=2000)
    texts = [
        str(doc["prompt"])[2:-1]
        for path in tmp_path.glob("*.yaml")
        for doc in items(tmp_path, path.stem)
    ]
    assert len(texts) == len(set(texts)) == 4 * 2000
    assert set(texts) <= set(language.inputs(held_out=True))


def test_choices_differ_and_hold_the_answer_once(tasks_dir: Path):
    docs = items(tasks_dir, demo_tasks.CHOICE_TASK)
    by_tag = {skill.tag: skill for skill in language.SKILLS.values()}
    for doc in docs:
        tag, text = str(doc["prompt"])[0], str(doc["prompt"])[2:-1]
        assert len(set(doc["choices"])) == 4
        assert doc["choices"][doc["gold"]] == by_tag[tag].apply(text)
    for tag in ("s", "o"):
        assert sum(str(doc["prompt"])[0] == tag for doc in docs[:200]) == 100


def test_items_are_the_seeds_alone(tmp_path: Path, tasks_dir: Path):
    again = write_skill_tasks(tmp_path / "again", ("sort",))
    other = write_skill_tasks(tmp_path / "other", ("sort",), seed=1)
    name = demo_tasks.skill_task("sort")
    assert items(again, name) == items(tasks_dir, name) != items(other, name)


def test_too_many_items_are_refused_with_the_limit(tmp_path: Path):
    with pytest.raises(UserError, match="at most"):
        write_skill_tasks(tmp_path, ("sort",), n_items=100_000)


def test_demo_config_names_the_family_and_the_tasks_written(family: TinyFamily, tasks_dir: Path):
    config = demo_config(family, tasks_dir)
    assert config["genome"]["models"] == [str(path) for path in family.experts]
    assert {task["name"] for task in config["tasks"]} == {p.stem for p in tasks_dir.glob("*.yaml")}
    assert sum(task["weight"] for task in config["tasks"]) == pytest.approx(1)
    with pytest.raises(UserError, match="agentmerge_demo_shift"):
        demo_config(family, tasks_dir / "elsewhere")
