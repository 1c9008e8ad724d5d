"""Mistakes that a first user makes: found before the search, said in one line, nothing left."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmerge.cli.app import run_app

RECIPES = {
    "half": "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
    "- {model: north, parameters: {weight: 0.5}}\n- {model: south, parameters: {weight: 0.25}}\n",
    "cancelling": "merge_method: linear\nmodels:\n"
    "- {model: north, parameters: {weight: 1}}\n- {model: south, parameters: {weight: -1}}\n",
    "too deep": "merge_method: linear\nslices:\n"
    "- sources: [{model: north, layer_range: [0, 9], parameters: {weight: 1}}]\n",
    "stranger": "merge_method: linear\nmodels: [{model: west, parameters: {weight: 1}}]\n",
}


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def place(tmp_path: Path, fake_config: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config and recipes, where the command line runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yml").write_text(fake_config)
    for name, text in RECIPES.items():
        (tmp_path / f"{name.replace(' ', '-')}.yml").write_text(text)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run_app([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return code, captured.out, captured.err


def names(capsys: pytest.CaptureFixture[str]) -> list[str]:
    code, out, _ = call(capsys, "list", "--json")
    return [row["name"] for row in json.loads(out)] if code == 0 else []


def change(place: Path, old: str, new: str) -> None:
    path = place / "c.yml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("layer_granularity: 2", "layer_granularity: 3", "use 0 (one group) or one of [1, 2, 4]"),
        ("merge_method: task_arithmetic", "merge_method: soup", "'soup' is not known"),
        ("[north, south]", "[north]", "at least two"),
        ("population: 5", "populaton: 5", "c.yml:11: search.populaton is not a known key"),
        ("algorithm: cma_es", "algorithm: cma", "did you mean 'cma_es'"),
        ("kind: fake", "kind: fakes", "did you mean 'fake'"),
        ("[north, south]", "[north, south]\n  tokenizer_source: west", "tokenizer_source 'west'"),
    ],
)
def test_a_fault_of_the_config_is_found_by_run_and_check_alike(
    place: Path,
    command: str,
    old: str,
    new: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(place, old, new)
    code, out, err = call(capsys, command, "c.yml")
    assert (code, out) == (2, "")
    assert words in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert not (place / "runs").exists()


def test_check_names_every_fault_as_json(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(place, "population: 5", "populaton: 5")
    change(place, "limit: 40", "limit: 0")
    code, out, err = call(capsys, "check", "c.yml", "--json")
    found = json.loads(out)
    assert (code, err, found["ok"]) == (2, "", False)
    assert len(found["faults"]) == 2


def test_check_shows_the_plan_and_then_the_time(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan() -> dict[str, Any]:
        code, out, _ = call(capsys, "check", "c.yml", "--json")
        assert code == 0
        found: dict[str, Any] = json.loads(out)["plan"]
        return found

    before = plan()
    assert before["seconds_per_candidate"] is None
    assert (before["dimensions"], before["population"], before["max_evaluations"]) == (4, 5, 19)
    assert before["items"] == 80
    assert not (place / "runs").exists(), "check writes nothing"
    assert call(capsys, "run", "c.yml", "-q")[0] == 0
    assert 0 < plan()["seconds_per_candidate"] < 60
    assert "time" in call(capsys, "check", "c.yml")[1]


def test_a_warm_start_is_a_candidate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--init", "half.yml", "--init", "cancelling.yml", "--name", "a", "--json", "-q"]
    code, out, _ = call(capsys, "run", "c.yml", *arguments)
    assert code == 0
    assert json.loads(out)["evaluations"]["failed"] == 1, "weights that cancel: data, not an end"
    assert json.loads(out)["evaluations"]["total"] == 19


@pytest.mark.parametrize(
    "recipe",
    [
        "too-deep.yml",
        "stranger.yml",
        "nowhere.yml",
        ".",
    ],
)
def test_a_warm_start_that_cannot_be_is_refused_before_a_run_begins(
    place: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "run", "c.yml", "--init", recipe, "-q")
    assert names(capsys) == []
    assert code == 2
    assert recipe.removesuffix(".") in err


def test_a_branch_keeps_to_its_budget(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run", "c.yml", "--name", "a", "-q")[0] == 0
    options = ["--limit", 30, "--max-evaluations", 3, "--json", "-q"]
    code, out, _ = call(capsys, "branch", "a", "--at", 1, "--as", "b", *options)
    assert code == 0
    assert json.loads(out)["evaluations"]["total"] <= 3


@pytest.mark.parametrize("budget", [1, 2, 9, 10, 13, 23])
def test_a_run_uses_exactly_its_budget(
    place: Path, budget: int, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "run", "c.yml", "--max-evaluations", budget, "--json", "-q")
    assert code == 0
    found = json.loads(out)
    assert found["evaluations"]["total"] == budget
    assert found["best"] is not None


def test_a_branch_records_its_parent_and_a_resume_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "run", "c.yml", "--name", "a", "-q")[0] == 0
    before = call(capsys, "show", "a", "--json")[1]
    code, out, _ = call(
        capsys, "branch", "a", "--at", 1, "--as", "b", "--search", "random", "--json", "-q"
    )
    assert code == 0
    found = json.loads(out)
    assert found["parent"] == {"run": "a", "generation": 1}
    assert found["search"] == "random"
    assert call(capsys, "show", "a", "--json")[1] == before
    code, out, _ = call(capsys, "resume", "b", "--max-evaluations", 22, "--json", "-q")
    assert code == 0
    assert json.loads(out)["evaluations"]["total"] == 22


def test_a_recipe_is_scored_once_and_remembered(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "half.yml", "--config", "c.yml", "--json"]
    first, second = (json.loads(call(capsys, *arguments)[1]) for _ in range(2))
    assert (first.pop("reused"), second.pop("reused")) == (False, True)
    assert first == second
    assert first["items"] == 80
    assert set(first["tasks"]) == {"one", "two"}
    fewer = json.loads(call(capsys, *arguments, "--limit", 20)[1])
    assert fewer["reused"], "a subset of what is known costs nothing"


@pytest.mark.parametrize("recipe", ["cancelling.yml", "too-deep.yml", "nowhere.yml", "."])
def test_a_recipe_that_cannot_be_scored_is_one_line(
    place: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "evaluate", recipe, "--config", "c.yml")
    assert code in (1, 2)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "unexpected" not in err


def test_explain_shows_effective_values(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "add --model DIR or --layers N" in call(capsys, "explain", "half.yml")[2]
    code, out, _ = call(capsys, "explain", "half.yml", "--layers", 2, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["canonical"]["merge_method"] == "task_arithmetic"
    text = json.dumps(found["rows"])
    for words in ("layer 0", "layer 1", "before the layers", "weight 0.5", "weight 0.25", "base"):
        assert words in text


def test_explain_shows_what_weights_come_to_and_where_layers_go(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = "".join(
        f"  - {{model: {name}, parameters: {{weight: {weight}}}}}\n"
        for name, weight in (("north", 0.3), ("south", 0.9))
    )
    (place / "even.yml").write_text(
        f"merge_method: linear\nmodels:\n{models}parameters: {{normalize: true}}\ndtype: float32\n"
    )
    found = json.loads(call(capsys, "explain", "even.yml", "--layers", 2, "--json")[1])
    text = json.dumps(found["rows"])
    assert "weight 0.25" in text
    assert "weight 0.75" in text
    assert "0.333" not in text
    (place / "turned.yml").write_text(
        "merge_method: linear\ndtype: float32\nslices:\n"
        "- sources: [{model: north, layer_range: [1, 2], parameters: {weight: 1}}]\n"
        "- sources: [{model: north, layer_range: [0, 1], parameters: {weight: 1}}]\n"
    )
    text = call(capsys, "explain", "turned.yml", "--layers", 2)[1]
    assert "north, layer 1" in text
    assert "north, layer 0" in text


@pytest.mark.parametrize("ends", [(99_999_999_999,), (9_000, 9_000)])
def test_explain_refuses_a_depth_that_no_model_has(
    place: Path, capsys: pytest.CaptureFixture[str], ends: tuple[int, ...]
) -> None:
    source = "{{model: a, layer_range: [0, {}], parameters: {{weight: 1}}}}"
    slices = "\n".join(f"  - sources: [{source.format(end)}]" for end in ends)
    (place / "deep.yml").write_text(f"merge_method: linear\nslices:\n{slices}\n")
    code, _, said = call(capsys, "explain", "deep.yml")
    assert code == 2
    assert "10,000" in said
    assert call(capsys, "explain", "half.yml", "--layers", 10**9)[0] == 2


@pytest.mark.parametrize("command", [["show"], ["best"], ["report"], ["compare", "a"], ["resume"]])
def test_a_name_of_bytes_that_are_no_text_is_unknown(
    place: Path, capsys: pytest.CaptureFixture[str], command: list[str], fake_config: str
) -> None:
    (place / "fake.yml").write_text(fake_config)
    assert call(capsys, "run", "fake.yml", "--name", "a", "--max-evaluations", 1)[0] == 0
    code, _, said = call(capsys, *command, "\udcff")
    assert code == 2
    assert "no run called" in said


@pytest.mark.parametrize("option", ["documents: 10000000000", "groups: {one: 100000000}"])
def test_a_fake_workers_sizes_are_bounded(
    place: Path, capsys: pytest.CaptureFixture[str], option: str, fake_config: str
) -> None:
    text = fake_config.replace("kind: fake", f"kind: fake, options: {{{option}}}")
    (place / "fake.yml").write_text(text)
    code, _, said = call(capsys, "check", "fake.yml")
    assert code == 2
    assert f"worker.options.{option.partition(':')[0]}" in said


def test_explain_refuses_a_negative_depth(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "explain", "half.yml", "--layers", -1)[0] == 2


def test_gc_frees_and_says_what_it_freed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run", "c.yml", "--name", "a", "-q")[0] == 0
    shown = call(capsys, "show", "a", "--json")[1]
    would = json.loads(call(capsys, "gc", "--dry-run", "--json")[1])
    did = json.loads(call(capsys, "gc", "--json")[1])
    assert would["checkpoints"] == did["checkpoints"] > 0
    assert did["freed_bytes"] > 0
    assert json.loads(call(capsys, "gc", "--json")[1])["checkpoints"] == 0
    assert call(capsys, "show", "a", "--json")[1] == shown
    assert call(capsys, "branch", "a", "--at", 0, "--as", "b", "-q")[0] == 0


def test_an_unknown_strategy_is_called_a_strategy(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        "'nope' is not one of the strategies" in call(capsys, "run", "c.yml", "--search", "nope")[2]
    )


def test_a_storage_path_that_is_a_file_is_said_before_the_search(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--storage-path", "half.yml", "--no-save-final-model", "-q"]
    code, _, err = call(capsys, "run", "c.yml", *arguments)
    assert (code, "unexpected" in err) == (2, False)
    assert names(capsys) == []


@pytest.mark.parametrize(
    "options",
    [
        "{num_layers: x}",
        "{documents: 0}",
    ],
)
def test_wrong_worker_options_are_faults(
    place: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(place, "{kind: fake}", f"{{kind: fake, options: {options}}}")
    code, _, err = call(capsys, "run", "c.yml")
    assert (code, "unexpected" in err) == (2, False)


def test_what_a_file_says_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A template that came with a model is quoted in errors, and may hold any characters."""
    from agentmerge.cli.terminal import failed, tell_notes, warned

    said = "boo \x1b[2Jhi \x9b5m \u202eolleh\x07\rgone\tkept é 家"
    failed(f"{said}\nsecond", 2)
    tell_notes([said], as_json=False)
    print(warned(said))
    shown = "boo [2Jhi 5m olleh"
    out, err = capsys.readouterr()
    rest = "gone\tkept é 家"
    lines = [f"error: {shown}", f"error: {rest}", "error: second", f"note: {shown}{rest}"]
    assert err.splitlines() == lines
    assert out == f"warning: {shown}{rest}\n"
