"""The SmolLM2 family's script without SmolLM2: items, tasks, config, training on a tiny base."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agentmerge.demo.family import TinyFamily
from agentmerge.errors import UserError
from benchmarks.smollm2_family import (
    CONFIG,
    PLAIN,
    Training,
    cached_family,
    scores,
    table,
    write_experts,
    write_search,
)
from benchmarks.smollm2_items import N_ITEMS, SKILLS, in_words, items


@pytest.mark.parametrize("skill", SKILLS)
def test_what_is_asked_was_never_trained_on(skill: str) -> None:
    trained, asked = (items(skill, held_out=side) for side in (False, True))
    assert len(set(asked)) == len(asked) >= N_ITEMS
    assert len(set(trained)) == len(trained) > N_ITEMS
    assert not {item.prompt for item in trained} & {item.prompt for item in asked}
    assert all(item.prompt.endswith("\n") for item in trained + asked)


def test_neither_the_same_sum_turned_round_nor_a_list_in_another_order_was_trained_on() -> None:
    for skill in ("addition", "reversal"):
        sides = [
            {frozenset(i.prompt.replace(",", "").replace("?", "").split()) for i in pool}
            for pool in (items(skill, held_out=False), items(skill, held_out=True))
        ]
        assert not sides[0] & sides[1]


def test_answers_are_right() -> None:
    assert [in_words(n) for n in (0, 19, 20, 42, 99)] == [
        "zero", "nineteen", "twenty", "forty-two", "ninety-nine",
    ]  # fmt: skip
    sums = {item.prompt: item.answer for item in items("addition", held_out=False)}
    sums |= {item.prompt: item.answer for item in items("addition", held_out=True)}
    assert len(sums) == 48**2
    assert sums["What is forty-two plus seven?\nAnswer:\n"] == "49"
    for item in items("reversal", held_out=True)[:5]:
        words = item.prompt.splitlines()[0].removeprefix("Reverse the list: ").split(", ")
        assert item.answer.split(", ") == words[::-1]


def test_a_family_is_trained_and_its_config_is_ready_to_search(
    family: TinyFamily, tmp_path: Path
) -> None:
    shutil.copytree(family.base, tmp_path / "base")
    write_experts(tmp_path, tuple(Training(skill, 2, 1e-3, 4) for skill in SKILLS))
    write_search(tmp_path, tmp_path, granularity=2)
    base = load_file(tmp_path / "base" / "model.safetensors")
    for skill in SKILLS:
        expert = load_file(tmp_path / f"expert-{skill}" / "model.safetensors")
        assert expert.keys() == base.keys()
        assert all(tensor.dtype == torch.float32 for tensor in expert.values())
        assert any(not torch.equal(expert[name], base[name]) for name in base)
    found = scores(tmp_path / CONFIG)
    assert [*found][:4] == ["base", *(f"expert-{skill}" for skill in SKILLS)]
    assert all(0 <= value <= 1 for row in found.values() for value in row)
    assert table(found).count("\n") == 1 + len(found)


def test_what_lies_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match="holds something else"):
        cached_family(PLAIN, tmp_path)
    assert os.listdir(tmp_path) == ["mine"]
