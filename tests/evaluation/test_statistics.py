from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from agentmerge.evaluation.statistics import (
    Interval,
    PairedTask,
    figure,
    leads,
    paired_score_difference,
    wilson,
)


def paired_difference(a: list[float], b: list[float], seed: int) -> Interval | None:
    return paired_score_difference([(1.0, a, b)], seed)


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
        assert found is not None
        covered += found.low <= 0.15 * 0.22 <= found.high
    assert 180 <= covered <= 199


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    a = [1.0] * 90 + [0.0] * 110
    b = [1.0] * 80 + [0.0] * 120
    found = paired_difference(a, b, seed=1)
    assert found is not None
    assert found.mean == pytest.approx(0.05)
    assert found.excludes_zero
    assert wilson(a).low < wilson(b).high  # apart, they overlap


@pytest.mark.parametrize("n", [10, 20, 50, 400])
@pytest.mark.parametrize("won", [0.0, 1.0, -1.0, 0.3])
def test_items_that_all_say_the_same_are_no_certainty(n: int, won: float) -> None:
    found = paired_difference([won] * n, [0.0] * n, seed=0)
    assert found is not None
    assert found.mean == pytest.approx(won)
    assert found.high - found.low > 2 / n * abs(won or 1.0)
    assert found.low <= found.mean <= found.high
    assert found.low >= -1
    assert found.high <= 1
    if won == 0.0:  # about the rule of three
        assert 2.0 / n < found.high < 6.0 / n
        assert not found.excludes_zero


def test_below_ten_items_there_is_no_interval() -> None:
    assert paired_difference([1.0], [0.0], seed=0) is None
    assert paired_difference([1.0] * 9, [0.0] * 9, seed=0) is None
    two = [(0.5, [1.0] * 5, [0.0] * 5)] * 2  # ten in all
    assert paired_score_difference(two, seed=0) is not None


@pytest.mark.parametrize(("won", "lost", "ahead"), [(4, 0, False), (5, 0, False), (6, 0, True)])
def test_a_few_items_won_are_judged_as_by_a_sign_test(won: int, lost: int, ahead: bool) -> None:
    same = 200 - won - lost
    a = [1.0] * won + [0.0] * lost + [1.0] * same
    b = [0.0] * won + [1.0] * lost + [1.0] * same
    found = paired_difference(a, b, seed=3)
    assert found is not None
    # one-sided, by the coin: 1/16, 1/32 and 1/64 against 1/40
    assert (found.low > 0) is ahead


def test_a_score_of_which_every_item_is_right_is_no_certainty() -> None:
    for right in (0.0, 1.0):
        single = leads([PairedTask(1.0, np.full((20, 1), right))], seed=0)
        assert single is not None
        found, known = single.interval(), wilson([right] * 20)
        assert found is not None
        assert found.mean == right
        assert found.low == pytest.approx(known.low, abs=0.06)
        assert found.high == pytest.approx(known.high, abs=0.06)


def test_figures_are_short_however_large() -> None:
    assert [figure(0.5), figure(-0.1234, "+"), figure(0.1, "+", 4)] == [
        "0.500",
        "-0.123",
        "+0.1000",
    ]
    assert len(figure(-1.23456e70, "+")) < 12


def test_one_chosen_among_many_alike_is_held_to_more() -> None:
    """Of candidates that are equal in truth, the luckiest of many is seldom called ahead."""
    rng = np.random.default_rng(5)
    alone = jointly = 0
    for trial in range(100):
        theirs = (rng.random(150) < 0.6).astype(float)
        redrawn = rng.random((150, 60)) < 0.3
        mine = np.where(redrawn, rng.random((150, 60)) < 0.6, theirs[:, None]).astype(float)
        found = leads([PairedTask(1.0, mine, theirs)], trial, resamples=1000)
        assert found is not None
        best = int(mine.mean(0).argmax())
        interval = found.interval(best)
        assert interval is not None
        alone += interval.low > 0
        jointly += found.at_least()[best] > 0
    assert alone > 25
    assert jointly <= 7  # 2.5 expected


def test_weights_and_seed() -> None:
    rng = np.random.default_rng(1)
    tasks = [
        (0.7, rng.random(80).tolist(), rng.random(80).tolist()),
        (-0.3, (rng.random(40) < 0.5).astype(float).tolist(), [0.0] * 40),
    ]
    found = paired_score_difference(tasks, seed=4)
    assert found is not None
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
