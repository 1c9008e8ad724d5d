"""The benchmark of fronts: its problems are told as a search tells them, and its areas compare."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import front


def test_a_search_for_the_front_beats_chance_on_a_landscape_of_lengths() -> None:
    there = front.Lengths(0)
    found = {arm: front.run(there, arm, 0, 14) for arm in ("auto", "random")}
    again = front.run(front.Lengths(0), "auto", 0, 14)
    assert again == found["auto"], "the same seed, the same search"
    score, tokens, evidence = there.ask((0.5,) * there.space.dimensions)
    assert evidence.items.tokens is not None
    assert float(evidence.values @ evidence.items.tokens) == pytest.approx(tokens)
    assert float(evidence.values @ evidence.items.weight) == pytest.approx(score)
    parents = found["auto"]["parents"]
    assert front.area(parents, parents) > 0
    better = [*parents, (max(s for s, _ in parents) + 0.1, min(t for _, t in parents))]
    assert front.area(better, parents) > front.area(parents, parents)


def test_the_table_is_a_share_of_the_best_of_its_seed() -> None:
    parents = [[0.2, 10.0], [0.6, 20.0]]
    runs = {
        (arm, seed): {"fronts": {"50": points}, "parents": parents}
        for seed in (0, 1)
        for arm, points in (("a", [[0.9, 10.0]]), ("b", [[0.6, 20.0], [0.2, 10.0]]))
    }
    said = front.table(runs, ["a", "b"], 2, [50])
    assert "| a | 1.000 ± 0.000 |" in said
    share = front.area(parents, parents) / front.area([[0.9, 10.0]], parents)
    assert f"| b | {share:.3f} ± 0.000 |" in said
    assert np.isfinite(share)
