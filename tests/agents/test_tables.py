"""Short prompts lose no fact: a scripted reader finds every one of a role's list again."""

from __future__ import annotations

import hashlib
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from agentmerge.agents import controller, critic, proposer
from agentmerge.agents.prompts import load_prompts
from agentmerge.agents.replies import digit_by_digit
from agentmerge.agents.tables import number, variables
from agentmerge.agents.view import (
    HistoryView,
    TaskView,
    clear_axes,
    elites,
    ends,
    integers,
    last_move,
    pressed,
    spread,
    standing,
)
from agentmerge.config import GenomeConfig
from agentmerge.contracts.advice import Guidance
from agentmerge.contracts.operators import CHEAP
from agentmerge.contracts.strategy import Observation, fittest, improved
from agentmerge.space.grouped import SearchSpace
from tests.reading import FACTS, Told

ROLES = {"critic": critic, "controller": controller, "proposer": proposer}
MOST_TOKENS = 1_500
DATA = Path(__file__).parents[1] / "data"
#: What a critic says where it uses the 80 words that it is given.
CRITIQUE = """Interference is the bottleneck: sort fell as expert-shift rose in the late layers, \
and the last generation gained nothing beyond noise.
- expert-shift layers 0-0: the best rows agree on 70 to 75, and the correlation is strongest.
- agentmerge_demo_sort stays at .825, behind expert-sort's 1, where layers 3-3 expert-sort is 0.
- agentmerge_demo_choice is above both parents where both models are kept early.
- Rows tied with the best differ widely in the late layers: these matter little so far."""
SIGMA = 0.08
SAID = Guidance(critique=CRITIQUE, sigma=SIGMA)

FAMILY = GenomeConfig(
    models=("/models/expert-shift", "/models/expert-sort"),
    merge_method="task_arithmetic",
    base_model="/models/base",
    layer_granularity=1,
)
SPACE = SearchSpace(FAMILY, num_layers=4, dtype="float32")
ACCURACY = (
    TaskView("agentmerge_demo_shift", 0.4, "exact_match,none", True),
    TaskView("agentmerge_demo_sort", 0.4, "exact_match,none", True),
    TaskView("agentmerge_demo_choice", 0.2, "acc,none", True),
)
PERPLEXITY = (
    TaskView("right", 0.75, "exact_match,none", True),
    TaskView("text", 0.125, "word_perplexity,none", False),
)
#: Milliseconds, all within a thousandth of each other: three digits would not tell them apart.
LARGE = (TaskView("latency", 1.0, "ms,none", False),)


def values(tasks: tuple[TaskView, ...], level: float, rng: random.Random) -> tuple[float, ...]:
    if tasks is LARGE:
        return (123_457.0 - level - rng.random() / 10,)
    if tasks is PERPLEXITY:
        return (round(level * 400) / 400, 9.0 + 40 * (1 - level) ** 2)
    return tuple(round(min(1.0, level * rng.uniform(0.8, 1.25)) * 40) / 40 for _ in tasks)


def scored(tasks: tuple[TaskView, ...], told: tuple[float, ...]) -> float:
    return sum(
        t.weight * (v if t.higher_is_better else -v) for t, v in zip(tasks, told, strict=True)
    )


def history(tasks: tuple[TaskView, ...], count: int, *, failing: bool = False) -> list[Observation]:
    """Generation 0 as ``auto`` has it, then single candidates around a better and better point."""
    rng = random.Random(count)
    found: list[Observation] = []

    def add(generation: int, slot: int, vector: tuple[float, ...], level: float, *how: str) -> None:
        told = values(tasks, level, rng)
        named = tuple((task.name, value) for task, value in zip(tasks, told, strict=True))
        made = Observation(generation, slot, vector, how[0], scored(tasks, told), named,
                           recipe_hash=f"{generation}.{slot}", label=" ".join(how[1:]))  # fmt: skip
        if failing and generation and (slot + generation) % 5 == 0:
            why = "the worker ran out of memory at layer 3 and was begun again"
            made = replace(made, score=None, tasks=(), failure=why)
        found.append(made)

    add(0, 0, (0.0,) * 8, 0.05, "parent", "/models/base")
    add(0, 1, (2 / 3, 0.0) * 4, 0.5, "parent", "/models/expert-shift")
    add(0, 2, (0.0, 2 / 3) * 4, 0.45, "parent", "/models/expert-sort")
    add(0, 3, (1 / 3,) * 8, 0.4, "uniform", "uniform")
    for slot, weight in enumerate((0.4, 0.55, 0.7, 0.85, 1), 4):
        add(0, slot, (weight / 1.5,) * 8, 0.2 + weight / 2, "scale", f"uniform weight {weight:g}")
    add(0, 9, (0.3, 0.6) * 4, 0.3, "depth", "uniform weight 0.4 to 1 by depth")
    for at in range(10, count):
        generation, slot = divmod(at - 10, 2)
        level = min(0.97, 0.55 + 0.45 * at / 100 + rng.uniform(-0.1, 0.06))
        vector = tuple(min(1.0, max(0.0, level + rng.gauss(0, 0.2))) for _ in range(7))
        add(generation + 1, slot, (*vector, 1.0 if level > 0.8 else rng.random()), level, "margins")
    return found


def view(tasks: tuple[TaskView, ...] = ACCURACY, count: int = 100, **changes) -> HistoryView:
    entries = tuple(changes.pop("entries", history(tasks, count)))
    found = HistoryView(
        space=SPACE,
        tasks=tasks,
        entries=entries,
        sigma=0.12,
        sigma_low=0.05,
        sigma_high=0.2,
        improved_last=bool(entries) and improved(entries),
        budget_left=37,
        forecasts="7 tried, on average 0.031 too high; rank correlation with what came +0.62",
        noise=lambda a, b: 0.014 if tasks is not LARGE else 0.05,
        moves=("method ties: opened, on trial",),
    )
    return replace(found, **changes)


def broken(entries: list[Observation]) -> list[Observation]:
    """Two of the best break a constraint, and the second best was stopped half-way."""
    first, second, third = fittest(entries[10:], 3)
    changed = {
        id(first): replace(first, violation=0.025),
        id(second): replace(second, rung=0.5),
        id(third): replace(third, violation=0.11),
    }
    return [changed.get(id(entry), entry) for entry in entries]


VIEWS = {
    "the middle": view(count=50),
    "the end": view(),
    "a perplexity": view(PERPLEXITY),
    "large and close": view(LARGE),
    "failures": view(entries=history(ACCURACY, 80, failing=True)),
    "a constraint": view(entries=broken(history(ACCURACY, 90))),
    "a wide generation": view(
        entries=[*history(ACCURACY, 60),
                 *(replace(o, generation=40, slot=i)
                   for i, o in enumerate(history(ACCURACY, 81)[50:80]))]
    ),
    "a pool": view(absent=("/models/x", "y"), room=True, deeper=3),
}  # fmt: skip


def ask(role: str, shown: HistoryView, guidance: Guidance = SAID) -> Told:
    return Told(ROLES[role].messages(shown, load_prompts(), guidance))


def near(told: float, value: float) -> bool:
    """As far as three digits go."""
    return abs(told - value) <= 0.006 * abs(value) + 5e-5


def same(told, values) -> bool:
    return len(told) == len(values) and all(map(near, told, values))


def check_baselines(told, known) -> None:
    rivals = {f"{e.operator} {e.label}".replace("/models/", ""): e for e in known.standing.rivals}
    assert max(told, key=lambda name: told[name][0]) == max(rivals, key=lambda n: rivals[n].score)
    parents = {name for name, entry in rivals.items() if entry.operator == "parent"}
    assert parents < told.keys(), "each parent with its tasks, and the best cheap merge"
    for name, (score, tasks) in told.items():
        assert near(score, rivals[name].score)
        assert same(tasks, [value for _, value in rivals[name].tasks])


def check_others(told, known) -> None:
    rivals = {f"{e.operator} {e.label}".replace("/models/", ""): e for e in known.standing.rivals}
    shown = {name for name, entry in rivals.items() if entry.operator not in CHEAP}
    assert told.keys() >= shown
    assert len(told) == len(rivals) - 4
    assert all(near(score, rivals[name].score) for name, score in told.items())


def check_rows(told, known) -> None:
    by_place = {(e.generation, e.operator): [] for e in known.entries}
    for entry in known.entries:
        by_place[entry.generation, entry.operator].append(entry)
    assert [row.score for row in told] == sorted(row.score for row in told)
    assert len(told) >= 6
    top = fittest(known.entries, 3)
    found = []
    for row in told:
        entry = next(
            e for e in by_place[row.generation, row.operator]
            if tuple(integers(e.vector)) == row.genome and near(row.score, e.score)
        )  # fmt: skip
        found.append(entry)
        assert near(row.score, entry.score)
        tied = (entry.generation, entry.slot) in known.tied
        mark = f"~{entry.rung:.0%}" if entry.censored else "=" if tied else ""
        if entry.violation and not entry.censored:
            assert near(float(row.mark.removeprefix("!")), entry.violation)
        else:
            assert row.mark == mark
        if row.tasks is None:
            assert tied, "its tasks are those of the best before it"
        else:
            assert same(row.tasks, [value for _, value in entry.tasks])
    assert [e for e in found if e in top] == top[::-1]
    last = fittest(known.last, len(known.last))
    assert all(entry in found for entry in (last[:1] + last[-1:])), "the last generation's ends"
    told_apart = {row.score for row in told}
    assert len(told_apart) >= 0.8 * len({e.score for e in found}), "digits tell rows apart"


def check_scores(told, known) -> None:
    assert [score for score, *_ in told] == sorted(score for score, *_ in told)
    assert near(told[-1][0], known.standing.best.score)
    assert (told[-1][2], told[-1][3]) == (
        known.standing.best.generation,
        known.standing.best.operator,
    )


def failures(known) -> tuple[int, list[tuple]]:
    failed = [entry for entry in known.entries if entry.score is None]
    shown = [(e.generation, e.slot, e.failure, tuple(integers(e.vector))) for e in failed[-2:]]
    return len(failed), shown


def check_progress(told, known) -> None:
    last = [entry.score for entry in known.last if entry.score is not None]
    assert (told["at"], told["operator"]) == (
        known.standing.best.generation,
        known.standing.best.operator,
    )
    assert (told["generation"], told["size"]) == (known.generation, len(known.last))
    assert told["improved"] == known.improved_last
    assert near(told["best"], known.standing.best.score)
    assert near(told["top"], max(last))
    assert near(told["median"], statistics.median(last))


def check_standings(told, known) -> None:
    for task in known.tasks:
        relation, champion, best, reach = standing(known, task)
        value, said, name, other = told[task.name]
        assert (said, name) == (relation, champion.label.replace("/models/", ""))
        assert near(value, best)
        assert near(other, reach)


def check_moved(told, known) -> None:
    before, after, steps = last_move(known)
    assert near(told[0], before.score)
    assert near(told[1], after.score)
    assert told[2] == {name.removesuffix(" weight"): (old, new) for name, old, new in steps}


#: What has its digits cut is compared by a function, the rest as it is.
ABOUT = {
    "baselines": check_baselines,
    "others": check_others,
    "rows": check_rows,
    "scores": check_scores,
    "progress": check_progress,
    "standings": check_standings,
    "moved": check_moved,
}
EXACTLY = {
    "method": lambda v: (
        "task_arithmetic; normalize is off: weights count as they are. " + v.space.method.doc
    ),
    "models": lambda v: ("expert-shift", "expert-sort"),
    "base": lambda v: "base",
    "tasks": lambda v: [(t.name, t.metric, t.higher_is_better, t.weight) for t in v.tasks],
    "axes": lambda v: [(axis.name, "0 is 0, 100 is 1.5") for axis in v.axes],
    "failures": failures,
    "correlations": lambda v: (
        clear_axes(v)[0],
        {name.removesuffix(" weight"): round(r, 2) for name, r in clear_axes(v)[1][:3]},
    ),
    "spread": lambda v: round(spread(elites(v))),
    "pressed": lambda v: {
        name.removesuffix(" weight"): int(value)
        for name, _, value in (one.rpartition(" at ") for one in pressed(v, elites(v)))
    },
    "failed": lambda v: sum(entry.score is None for entry in v.last),
    "noise": lambda v: f"about {v.noise(*fittest(v.entries, 2)):.3f}",
    "sigma": lambda v: str(v.sigma),
    "range": lambda v: (v.sigma_low, v.sigma_high),
    "left": lambda v: v.budget_left,
    "dimensions": lambda v: v.space.dimensions,
    "critic": lambda v: CRITIQUE,
    "moves": lambda v: v.moves[0],
    "forecasts": lambda v: v.forecasts,
    "next_sigma": lambda v: SIGMA,
    "layers": lambda v: v.space.num_layers,
    "room": lambda v: v.absent,
}


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize("role", ROLES)
def test_every_fact_of_a_role_is_read_back(role: str, case: str) -> None:
    told, known = ask(role, VIEWS[case]), VIEWS[case].released
    for fact in FACTS[role]:
        found = getattr(told, fact)
        if fact in ABOUT:
            ABOUT[fact](found, known)
        else:
            assert found == EXACTLY[fact](known), fact


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize("role", ROLES)
def test_a_prompt_of_the_default_search_is_short(role: str, case: str) -> None:
    """With all that a critic may say; marks, failures and experts to let in are told besides."""
    most = MOST_TOKENS + 100 * (case in ("failures", "a constraint", "a pool", "large and close"))
    assert digit_by_digit(ROLES[role].messages(VIEWS[case], load_prompts(), SAID)) <= most


SPACES = {
    "one group": GenomeConfig(models=("a", "b"), merge_method="linear"),
    "densities": GenomeConfig(
        models=("a", "b"), merge_method="ties", base_model="c", layer_granularity=2,
        filters=("self_attn", "mlp"),
    ),
    "epsilons": GenomeConfig(models=("a", "b"), merge_method="della", base_model="c"),
    "knots": GenomeConfig(
        models=("a", "b"), merge_method="task_arithmetic", base_model="c", layer_granularity=1,
        smooth=True,
    ),
    "a pair": GenomeConfig(models=("a", "b"), merge_method="slerp", layer_granularity=2),
    "pairs": GenomeConfig(models=("a", "b", "c"), merge_method="slerp", layer_granularity=1),
    "negative": GenomeConfig(
        models=("a", "b"), merge_method="task_arithmetic", base_model="c",
        allow_negative_weights=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPACES)
def test_axes_are_read_back_in_any_space(kind: str) -> None:
    space = SearchSpace(SPACES[kind], num_layers=4)
    point = tuple(i / 40 for i in range(space.dimensions))
    entries = [Observation(0, 0, point, "random", 0.5, (("x", 0.5),))]
    shown = view((TaskView("x", 1.0, "acc", True),), space=space, entries=entries)
    told = ask("proposer", shown)
    assert told.axes == [(axis.name, ends(shown, axis)) for axis in space.axes]
    assert told.rows[0].genome == tuple(integers(point))
    for parameter in space.method.source:
        if parameter.name != "weight":
            assert f"{parameter.name}: {parameter.doc}" in told.user


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("shape", ["empty", "all failed", "outside", "missing", "infinite"])
def test_thin_and_odd_histories_are_told(role: str, shape: str) -> None:
    failed = Observation(0, 0, None, "random", None, failure="no such file")
    outside = Observation(1, 1, None, "agent", 0.7, (("agentmerge_demo_sort", 0.7),))
    endless = Observation(1, 2, (0.5,) * 8, "margins", -1e12, (("agentmerge_demo_sort", 1e12),))
    entries = {
        "empty": [],
        "all failed": [failed],
        "outside": [failed, outside],
        "missing": [replace(endless, score=0.25, tasks=()), outside],
        "infinite": [endless, replace(endless, slot=3, score=0.5, tasks=(("x", float("inf")),))],
    }[shape]
    told = ask(role, view(entries=entries, improved_last=False, sigma=None), Guidance())
    assert told.left == 37
    assert role == "proposer" or told.sigma == "none yet"
    assert role == "critic" or told.critic == "none"


def test_prompts_of_before_say_what_they_said() -> None:
    """Ejected files are written with the long variables, and stored searches replay by them."""
    old, shown = load_prompts(DATA / "prompts-1"), VIEWS["failures"]
    texts = [
        [message["content"] for message in ROLES[role].messages(shown, old, SAID)] for role in ROLES
    ]
    assert hashlib.sha256(repr(texts).encode()).hexdigest()[:16] == "8b356151ce4e7e55"


def test_the_rules_words_are_not_said_twice() -> None:
    shown = VIEWS["the end"]
    by_rules = critic.by_rules(shown, Guidance())
    assert "/models/expert-s" in by_rules.critique, "as it is stored"
    assert ask("proposer", shown, by_rules).critic == "nothing beyond the facts"
    endless = "\n".join(["first " * 20, *("- more and more " * 9 for _ in range(9))])
    told = ask("controller", shown, Guidance(critique=f"{endless}\n/models/expert-sort"))
    assert told.critic.startswith("first")
    assert len(told.critic) <= 700


def test_the_best_few_are_told_apart_whatever_the_others_are() -> None:
    one = (TaskView("text", 1.0, "word_perplexity,none", False),)
    levels = [9.0, 12.0, 30.0, 11.0, 2.1061, 2.1034, 2.1021]
    entries = [
        Observation(n // 5, n % 5, (0.5,) * 8, "margins", -level, (("text", level),),
                    recipe_hash=str(n))
        for n, level in enumerate(levels)
    ]  # fmt: skip
    shown = view(one, entries=entries, noise=lambda a, b: 1e-6)
    table = variables(shown)["candidates"]
    for value in ("-2.1021", "-2.1034", "2.1061"):
        assert value in table


def test_no_blank_of_a_folder_shows_it() -> None:
    folder = "/home/ann/My Models"
    names = tuple(f"{folder}/expert-{n}" for n in range(9))
    genome = GenomeConfig(models=names, merge_method="linear", layer_granularity=1)
    space = SearchSpace(genome, num_layers=4, dtype="float32")
    entries = [
        Observation(0, n, None, "parent", n / 10, tuple((t.name, n / 10) for t in ACCURACY),
                    recipe_hash=str(n), label=name)
        for n, name in enumerate(names)
    ]  # fmt: skip
    found = variables(view(space=space, entries=entries))
    assert "other scores: parent: expert-0 0, expert-1 .1, expert-2 .2" in found["baselines"]
    assert not [name for name, text in found.items() if "ann" in text and "home" in text]


def test_of_axes_the_shared_word_alone_is_left_out() -> None:
    names = ("weighted", "weights of maths")
    genome = GenomeConfig(models=names, merge_method="linear", layer_granularity=4)
    space = SearchSpace(genome, num_layers=4, dtype="float32")
    entries = [
        Observation(1, n, (1.0,) * space.dimensions, "margins", n / 10, recipe_hash=str(n))
        for n in range(6)
    ]
    said = variables(view(space=space, entries=entries))["facts"]
    pressed_line = next(line for line in said.splitlines() if "all press" in line)
    assert "weights of maths at 100" in pressed_line
    assert "weighted at 100" in pressed_line


@pytest.mark.parametrize("role", ["controller", "proposer"])
def test_no_folder_of_this_machine_is_in_any_critique(role: str) -> None:
    said = Guidance(critique="behind /models/expert-sort")
    for prompts in (load_prompts(), load_prompts(DATA / "prompts-1")):
        messages = ROLES[role].messages(VIEWS["the end"], prompts, said)
        assert "behind expert-sort" in messages[1]["content"]
        assert "/models/" not in messages[1]["content"]


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.9175, 0, ".917"), (0.92, 0, ".92"), (1.0, 0, "1"), (0.0, 3, "0"), (-0.5, 0, "-.5"),
        (9.213, 0, "9.21"), (9.213, 3, "9.213"), (123_456.78, 0, "123457"), (10.0, 1, "10"),
        (123_456.78, 1, "123456.8"), (0.00004, 0, "4e-05"), (-0.00001, 2, "-1e-05"),
        (0.00012, 0, ".00012"), (0.00014, 9, ".00014"), (0.91712345, 9, ".9171"),
        (float("inf"), 0, "inf"), (1e12, 0, "1e+12"), (100.0, 0, "100"), (0.99996, 0, "1"),
    ],
)  # fmt: skip
def test_numbers_are_short_and_as_exact_as_they_have_to_be(value, decimals, text) -> None:
    assert number(value, decimals) == text
