from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from agentmerge.evaluation.statistics import (
    Interval,
    paired_difference,
    paired_score_difference,
    wilson,
)


def test_wilson_known_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = wilson([1] * hits + [0] * (n - hits))
        assert found == pytest.approx((hits / n, low, high), abs=5e-5)
    with pytest.raises(ValueError, match="zeros and ones"):
        wilson([0.5])


def test_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        a = rng.random(300) < 0.72
        b = np.where(rng.random(300) < 0.15, rng.random(300) < 0.5, a)
        # b redraws 15 % of the items at 0.5: truly 0.15 * (0.72 - 0.5) worse
        found = paired_difference(a.astype(float).tolist(), b.astype(float).tolist(), trial)
        covered += found.low <= 0.15 * 0.22 <= found.high
    assert 180 <= covered <= 199


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    a = [1.0] * 90 + [0.0] * 110
    b = [1.0] * 80 + [0.0] * 120
    found = paired_difference(a, b, seed=1)
    assert found.mean == pytest.approx(0.05)
    assert found.excludes_zero
    assert wilson(a).low < wilson(b).high  # apart, they overlap


def test_no_difference_is_no_certainty() -> None:
    found = paired_difference([1.0] * 50, [1.0] * 50, seed=0)
    assert found == Interval(0.0, -0.06, 0.06)


def test_weights_and_seed() -> None:
    rng = np.random.default_rng(1)
    tasks = [
        (0.7, rng.random(80).tolist(), rng.random(80).tolist()),
        (-0.3, (rng.random(40) < 0.5).astype(float).tolist(), [0.0] * 40),
    ]
    found = paired_score_difference(tasks, seed=4)
    means = [np.mean(a) - np.mean(b) for _, a, b in tasks]
    assert found.mean == pytest.approx(0.7 * means[0] - 0.3 * means[1])
    assert found == paired_score_difference(tasks, seed=4)
    assert found != paired_score_difference(tasks, seed=5)
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1.0], [1.0, 0.0], seed=0)


def test_light_modules_load_no_torch() -> None:
    code = (
        "import agentmerge.evaluation.tasks, agentmerge.evaluation.statistics, sys\n"
        "import agentmerge.plugins, agentmerge.workers.fake, agentmerge.workers.pool\n"
        "heavy = {'torch', 'lm_eval', 'transformers', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
