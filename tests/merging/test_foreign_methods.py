"""Merge methods of packages and of a config's file: searched as ours are, run only where said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from agentmerge.config import SearchConfig
from agentmerge.errors import CandidateFailed, ConfigError, UserError
from agentmerge.merging.family import Family
from agentmerge.merging.foreign import kernel_of
from agentmerge.methods import METHODS, Method, Parameter
from agentmerge.methods.added import checked
from agentmerge.recipe import Recipe
from agentmerge.space.grouped import SearchSpace
from tests.merging.merge_cases import LAYERS

pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")

#: As mergekit's page on methods of one's own has it, with bounds.
MERGEKITS = """
from typing import Annotated

import torch
from pydantic import Field
from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
from mergekit.merge_methods.easy_define import merge_method

with open(__file__ + ".ran", "a") as ran:
    ran.write("x")


@merge_method(
    name="pulled", pretty_name="Pulled", contract=InputContract(base=BasePolicy.REQUIRED)
)
def pulled(
    group: TensorGroup,
    weight: PerNonBase[Annotated[float, Field(ge=0, le=2)]],
    power: Annotated[float, Field(ge=0.5, le=2)] = 1.0,
    halves: Annotated[int, Field(ge=0, le=3)] = 0,
    flip: bool = False,
) -> torch.Tensor:
    base = group.base.tensor
    total = sum(
        w * (e.tensor - base) for w, e in zip(weight.values_for(group.non_base), group.non_base)
    )
    total = total.sign() * total.abs() ** power / 2**halves
    return base - total if flip else base + total
"""
ROW = {
    "source": {"weight": {"low": 0, "high": 2}},
    "shared": {
        "power": {"default": 1.0, "low": 0.5, "high": 2},
        "halves": {"default": 0, "low": 0, "high": 3, "kind": "int"},
        "flip": {"default": 0, "kind": "bool", "searched": False},
    },
}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MERGEKITS)
    return path


def text_of(code: Path, /, **method: Any) -> str:
    body = {
        "genome": {
            "models": ["a", "b"],
            "base_model": "base",
            "merge_method": "pulled",
            "layer_granularity": 1,
        },
        "tasks": ["north"],
        "worker": {"methods": {"pulled": {"code": f"{code}:pulled"} | ROW | method}},
    }
    return yaml.safe_dump(body, sort_keys=False)


def test_its_parameters_are_axes_and_its_code_is_run_where_tensors_are_merged(
    code: Path, family_of: Callable[..., dict[str, Path]]
) -> None:
    config = SearchConfig.from_text(text_of(code))
    space = SearchSpace(config.genome, LAYERS, dtype="float32")
    assert [axis.parameter for axis in space.axes] == ["weight", "weight", "power", "halves"] * 2
    assert {(axis.low, axis.high) for axis in space.axes if axis.parameter == "weight"} == {(0, 2)}
    middle = [0.5] * space.dimensions
    recipe = space.recipe(middle)
    assert space.vector(recipe) is not None
    assert Recipe.parse(recipe.to_yaml()).canonical(LAYERS) == recipe
    assert SearchConfig.from_text(config.to_yaml()) == config
    ran = code.with_name("mine.py.ran")
    assert not ran.exists()
    paths = family_of(tied=True, dtype=torch.float32)
    family = Family.open(paths, base="base")
    before = dict(family.merge(recipe))
    assert ran.read_text() == "x"
    shared = dict(recipe.effective("x", 0).shared)
    for name, tensor in before.items():
        base, a, b = (family.tensor(model, name) for model in ("base", "a", "b"))
        moved = (a - base) + (b - base)
        moved = moved.sign() * moved.abs() ** shared["power"] / 2 ** int(shared["halves"])
        torch.testing.assert_close(tensor, base + moved)
    for at in range(4):  # every axis of the first layer's changes its layer, and no other's
        moved = [0.9 if axis == at else 0.5 for axis in range(space.dimensions)]
        after = dict(family.merge(space.recipe(moved)))
        other = [name for name in after if not torch.equal(after[name], before[name])]
        assert other
        assert not any("layers.1" in name for name in other)


def test_other_code_is_another_merge(code: Path) -> None:
    first = SearchConfig.from_text(text_of(code))
    name = first.genome.merge_method
    assert SearchConfig.from_text(text_of(code)).genome.merge_method == name
    kernel_of(METHODS[name])
    code.write_text(MERGEKITS.replace("base + total", "base + 2 * total"))
    second = SearchConfig.from_text(text_of(code))
    assert second.genome.merge_method != name
    recipes = [SearchSpace(config.genome, LAYERS).recipe([0.5] * 8) for config in (first, second)]
    assert recipes[0].hash() != recipes[1].hash()
    again = SearchConfig.from_text(first.to_yaml())  # as a stored search is read: no file is needed
    assert again.genome.merge_method == name
    kernel_of.__globals__["_loaded"].cache_clear()
    with pytest.raises(UserError, match="not what it was when this search began"):
        kernel_of(METHODS[name])
    code.unlink()
    assert SearchConfig.from_text(first.to_yaml()) == first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": "nowhere.py:x"}, "no file at nowhere.py"),
        ({"code": "mine"}, "write FILE.py:NAME"),
        ({"shared": {"power": {"low": 2, "high": 1}}}, "low 2 must be below high 1"),
        ({"shared": {"power": {"kind": "log"}}}, "must be above 0 on a logarithmic scale"),
        ({"shared": {"weight": {}}}, "a parameter cannot be called 'weight'"),
        ({"shared": {"power": {"default": 9}}}, "default 9 must be from 0 to 1"),
    ],
)
def test_what_is_no_method_is_one_sentence(code: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"worker\.methods\.pulled") as caught:
        SearchConfig.from_text(text_of(code, **change))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": {}}, "'weight' does not fit"),
        ({"shared": {"strength": {}}}, "'strength' does not fit"),
        ({"base": "ignored"}, "has base: required"),
    ],
)
def test_a_declaration_that_its_code_does_not_fit(
    code: Path, change: dict[str, Any], said: str
) -> None:
    config = SearchConfig.from_text(text_of(code, **change))
    with pytest.raises(UserError, match=said):
        kernel_of(METHODS[config.genome.merge_method])


def test_check_runs_none_of_it_unless_told(code: Path, fake_config: str) -> None:
    body = yaml.safe_load(fake_config)
    body["genome"] |= {"merge_method": "pulled", "normalize": None}
    body["genome"].setdefault("base_model", "base")
    body["worker"] = body.get("worker", {}) | {
        "methods": {"pulled": {"code": f"{code}:pulled"} | ROW}
    }
    config, ran = code.with_name("config.yml"), code.with_name("mine.py.ran")
    config.write_text(yaml.safe_dump(body))
    line = [sys.executable, "-m", "agentmerge", "check", str(config), "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "was not run; check --run-code runs it" in done.stdout + done.stderr
    assert not ran.exists()
    done = subprocess.run([*line, "--run-code"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ran.exists()


def test_what_its_code_raises_is_the_candidates_failure(
    tmp_path: Path, family_of: Callable[..., dict[str, Path]]
) -> None:
    file = tmp_path / "plain.py"
    file.write_text("def bad(base, tensors, own, shared):\n    return tensors[0][:1] / 0\n")
    row = {"code": f"{file}:bad", "shared": {"power": {"default": 0.5}}}
    name, _ = METHODS.declare("bad", row)
    family = Family.open(family_of(tied=True, dtype=torch.float32), base="base")
    recipe = Recipe.parse({"merge_method": "bad", "base_model": "base", "models": [{"model": "a"}]})
    assert recipe.merge_method == name
    with pytest.raises(CandidateFailed, match=r"gave .* for a tensor of"):
        dict(family.merge(recipe.canonical(LAYERS)))


def test_a_packages_method_needs_a_kernel_and_no_name_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, said in (("ties = own:METHOD", "agentmerge's own"), ("mine = own:METHOD", "kernel")):
        folder = tmp_path / value[:4].strip() / "own-1.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[agentmerge.methods]\n{value}\n")
        (folder.parent / "own.py").write_text(
            "from agentmerge.contracts import Method\n"
            "METHOD = Method('mine', 'Mine.', (), (), 'required', '')\n"
        )
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder.parent))
            with pytest.raises(UserError, match=said):
                METHODS["mine"]


def test_a_row_that_no_space_can_live_with() -> None:
    weight = Parameter("weight", "w", None)
    share = Parameter("x", "p", 0.0, kind="share")
    for method, said in (
        (Method("Mine", "m", (), (), "required", ""), "lower-case"),
        (Method("mine", "m", (weight,), (weight,), "required", ""), "twice"),
        (Method("mine", "m", (), (Parameter("partner", "p", 0.0),), "required", ""), "partner"),
        (
            Method("mine", "m", (), (share,), "required", ""),
            "kind",
        ),
    ):
        with pytest.raises(UserError, match=said):
            checked(method)
