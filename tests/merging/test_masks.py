"""The masks of dare_ties: what they depend on, what they do not, and that they are random."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmerge.merging.family import mask_key
from agentmerge.merging.kernels import BLOCK, KERNELS, Operand, random_mask

bounded = settings(max_examples=60, deadline=None, derandomize=True)


def documented(key: str, element: int) -> int:
    """The hash in plain Python, from the module's docstring."""
    words = hashlib.sha256(f"{key}\n{element >> 32}".encode()).digest()
    k0, k1 = int.from_bytes(words[:4], "little"), int.from_bytes(words[4:8], "little")
    h = (element + k0) % 2**32
    h ^= h >> 16
    h = h * 0x21F0AAAD % 2**32
    h ^= k1
    h ^= h >> 15
    h = h * 0x735A2D97 % 2**32
    return h ^ (h >> 15)


@bounded
@given(st.text(max_size=20), st.floats(0, 1), st.sampled_from([1, 5, BLOCK + 7]))
def test_the_mask_is_the_documented_one(key: str, density: float, count: int) -> None:
    mask = random_mask(key, count, density)
    if density == 1:
        assert mask is None
        return
    assert mask is not None
    for element in {0, count // 2, count - 1}:
        assert bool(mask[element]) == (documented(key, element) / 2**32 < density)


def test_known_answers_do_not_change() -> None:
    """Ledgers and exported recipes depend on these: a change here changes every old DARE merge."""
    mask = random_mask(mask_key(7, "f" * 64, "model.norm.weight"), 32, 0.5)
    assert mask is not None
    assert "".join("#" if kept else "." for kept in mask) == KNOWN


KNOWN = ".#.#.#.##.###.....#####..#.#.###"


@bounded
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_masks_nest_as_density_grows(one: float, two: float, seed: int) -> None:
    small, large = (random_mask(str(seed), 500, density) for density in sorted((one, two)))
    if large is not None:
        assert small is not None
        assert bool((small <= large).all())


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    count = 400_000
    mask = random_mask("share", count, density)
    assert mask is not None
    spread = math.sqrt(density * (1 - density) / count)
    assert abs(float(mask.float().mean()) - density) < 4 * spread
    # and so it is in every short stretch of it
    per_row = mask.reshape(-1, 400).float().mean(1)
    assert abs(float(per_row.std()) / math.sqrt(density * (1 - density) / 400) - 1) < 0.12


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (mask_key(0, "parent", "layer"), mask_key(1, "parent", "layer")),
        (mask_key(0, "parent", "layer"), mask_key(0, "other", "layer")),
        (mask_key(0, "parent", "layer.0"), mask_key(0, "parent", "layer.1")),
    ],
    ids=["seed", "parent", "tensor"],
)
def test_other_keys_give_unrelated_masks(one: str, two: str) -> None:
    count = 400_000
    first, second = (random_mask(key, count, 0.5) for key in (one, two))
    assert first is not None
    assert second is not None
    assert abs(correlation(first, second)) < 4 / math.sqrt(count)


@pytest.mark.parametrize("lag", [1, 2, 96, 256, 4096])
def test_neighbours_are_unrelated(lag: int) -> None:
    mask = random_mask("lags", 400_000, 0.5)
    assert mask is not None
    assert abs(correlation(mask[lag:], mask[:-lag])) < 4 / math.sqrt(400_000)


def test_a_weight_does_not_move_the_mask() -> None:
    base = torch.zeros(200)
    shared = {"normalize": 0.0, "lambda": 1.0, "rescale": 0.0}
    kept = []
    for weight in (0.3, 1.4):
        operand = Operand(torch.ones(200), weight, 0.4, "key")
        kept.append(KERNELS["dare_ties"](base, [operand], shared, torch.float32) != 0)
    assert torch.equal(*kept)


def test_an_element_of_a_huge_tensor_has_a_key_of_its_own() -> None:
    """The counter has 32 bits; what is above goes into the key."""
    assert documented("key", 5) != documented("key", 5 + 2**32)


def correlation(one: torch.Tensor, two: torch.Tensor) -> float:
    pair = torch.stack([one.double(), two.double()])
    return float(torch.corrcoef(pair)[0, 1])
