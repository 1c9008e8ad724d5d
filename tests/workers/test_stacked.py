"""A live stack of any architecture is the model that its checkpoint makes."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from agentmerge.merging.export import export_checkpoint
from agentmerge.merging.family import Family
from agentmerge.workers.stacked import LiveStack
from agentmerge.workers.targets import live_targets
from tests.merging.stack_cases import MERGED, STACK, pieces, stack, write_family

WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma3_text": {"sliding_window": 4, "layer_types": WINDOWS},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},  # a layer's experts are fused
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 64},
}


def open_stack(paths: dict[str, Path]) -> tuple[Any, Family, LiveStack]:
    family = Family.open(paths)
    model = transformers.AutoModelForCausalLM.from_pretrained(paths["a"]).eval()
    names = family.layout.by_name
    live = live_targets(model, names, (), lambda name: family.tensor("a", name))
    return model, family, LiveStack(model, family, live)


@torch.no_grad()
def answers(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(3, 21).reshape(2, 9)
    said = model.generate(tokens, max_new_tokens=6, do_sample=False)
    return model(tokens).logits, said


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_its_checkpoint(tmp_path: Path, kind: str) -> None:
    paths = write_family(tmp_path, kind, names=("a", "b", "base"), **KINDS[kind])
    model, family, live = open_stack(paths)
    before = answers(model)
    plain = pieces(("b", 2, 3), ("a", 0, 3), ("b", 1, 3))
    for index, recipe in enumerate((stack(STACK), stack(MERGED), plain, stack(MERGED))):
        loaded = live.load(family.plan(recipe))
        out = tmp_path / f"out{index}"
        assert export_checkpoint(recipe, paths, out, template_model="a").digest == loaded.digest
        made = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        for ours, theirs in zip(answers(model), answers(made), strict=True):
            assert torch.equal(ours, theirs)
    live.clear()
    for then, now in zip(before, answers(model), strict=True):
        assert torch.equal(then, now)


def test_loads_leave_no_memory_behind(tmp_path: Path) -> None:
    _, family, live = open_stack(write_family(tmp_path, "llama"))

    def held() -> int:
        gc.collect()
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()  # others warn when they are asked for their class
            if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta
        }
        return sum(found.values())

    live.load(family.plan(stack(STACK)))
    first = held()
    for _ in range(3):
        live.load(family.plan(pieces(("b", 0, 3), ("a", 0, 2))))
        live.load(family.plan(stack(STACK)))
    assert held() == first
