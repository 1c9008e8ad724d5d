"""A scripted reader of our prompts: every fact of a role's list, read back from what it is sent.

Knows the prompts' words and nothing of how they are made, so that what it finds is what a model can
find. ``FACTS`` is the list: what each role uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Role -> what it decides by; a field of ``Told`` each.
FACTS = {
    "critic": (
        "method", "models", "base", "tasks", "baselines", "others", "axes", "rows", "failures",
        "progress", "standings", "correlations", "spread", "pressed", "moved", "failed", "noise",
        "sigma", "left",
    ),
    "controller": (
        "method", "tasks", "baselines", "others", "dimensions", "scores", "progress", "standings",
        "correlations", "spread", "pressed", "moved", "failed", "critic", "noise", "sigma", "range",
        "left",
    ),
    "proposer": (
        "method", "models", "base", "tasks", "baselines", "others", "axes", "rows",
        "failures", "progress", "standings", "correlations", "spread", "pressed", "critic", "moves",
        "forecasts", "noise", "next_sigma", "left", "dimensions", "layers", "room",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A candidate. mark: "", "=" (has the best's score), "~" (estimated) or "!" (breaks
    constraints), with its number."""

    score: float
    mark: str
    tasks: tuple[float | None, ...] | None
    genome: tuple[int, ...] | None
    generation: int
    operator: str


class Told:
    """What one prompt says. system, user: its two messages."""

    def __init__(self, messages: Sequence[Mapping[str, str]]) -> None:
        self.system, self.user = (message["content"] for message in messages[:2])

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), f"_{name}")(self)

    def _line(self, head: str) -> str:
        found = re.search(rf"^{re.escape(head)}: (.*)$", self.user, re.MULTILINE)
        assert found, f"no {head!r} in:\n{self.user}"
        return found[1]

    def _under(self, head: str) -> list[str]:
        """The lines between a heading and the next one."""
        _, found, rest = self.user.partition(f"\n{head}")
        assert found, f"no {head!r} in:\n{self.user}"
        lines = rest.splitlines()[1:]
        ends = [i for i, line in enumerate(lines) if re.match(r"[A-Z][A-Za-z ,]*( \(|: |:$)", line)]
        return lines[: ends[0]] if ends else lines

    def _method(self) -> str:
        return self._line("Method")

    def _models(self) -> tuple[str, ...]:
        return tuple(self._line("Models").partition("; base ")[0].split(", "))

    def _base(self) -> str:
        return self._line("Models").partition("; base ")[2]

    def _tasks(self) -> list[tuple[str, str, bool, float]]:
        found = []
        for line in self._under("Tasks, as in all tables"):
            kind, _, weighted = line.partition(": ")
            metric, _, direction = kind.rpartition(", ")
            for one in weighted.split(", "):
                name, _, weight = one.rpartition(" ")
                found.append((name, metric, direction == "higher", float(weight)))
        return found

    def _baselines(self) -> dict[str, tuple[float, tuple[float | None, ...]]]:
        rows = [r.split(" | ") for r in self._under("Parents and cheap merges") if " | " in r]
        return {name: (float(score), _numbers(tasks)) for score, tasks, name in rows}

    def _others(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for line in self._under("Parents and cheap merges"):
            if line.startswith("other scores: "):
                for group in line.removeprefix("other scores: ").split("; "):
                    head, colon, rest = group.rpartition(": ")
                    for one in rest.split(", "):
                        name, _, score = one.rpartition(" ")
                        found[f"{head} {name}" if colon else name] = float(score)
        return found

    def _axes(self) -> list[tuple[str, str]]:
        """(name, what its ends are), in order."""
        line = self._line("Axes, 0 to 100, in order")
        where, grouped, rest = line.partition("; in each ")
        names, _, shared = (rest if grouped else line).partition("; ")
        ends = [re.fullmatch(r"(.*?)(?: \((.*)\))?", one) for one in _split(names)]
        own = [(found[1], found[2] or shared) for found in ends if found]
        if not grouped:
            return own
        kind, _, places = where.rpartition(" ") if "," not in where else _kind(where)
        heads = [f"{kind} {place}".strip() for place in places.split(", ")]
        return [(f"{head} {name}", end) for head in heads for name, end in own]

    def _rows(self) -> list[Row]:
        return [_row(line) for line in self._under("Candidates, worst first") if " | " in line]

    def _scores(self) -> list[tuple[float, str, int, str]]:
        found = []
        for line in self._under("Candidates, worst first"):
            if not line.startswith("("):
                score, generation, operator = line.split(" ", 2)
                found.append((*_marked(score), int(generation), operator))
        return found

    def _failures(self) -> tuple[int, list[tuple[int, int, str, tuple[int, ...]]]]:
        """How many there are, and the latest."""
        said = self._line("Failures")
        found, places = [], []
        for line in self._under("Failures") if said != "none" else []:
            at, _, genome = line.partition(" | ")
            if line.startswith("for: "):
                found += [(*place, line.removeprefix("for: "), genes) for place, genes in places]
                places = []
            else:
                generation, slot = at.split(".")
                places.append(((int(generation), int(slot)), _integers(genome)))
        return int(said.split()[0]) if found else 0, found

    def _fact(self, pattern: str) -> list[re.Match[str]]:
        return list(re.finditer(rf"^- {pattern}$", self.user, re.MULTILINE))

    def _progress(self) -> dict[str, Any]:
        (found,) = self._fact(
            r"best (\S+) \(generation (\d+), (\w+)\); last generation (\d+) \(size (\d+)\): "
            r"(improved|no improvement), best (\S+), median (\S+)"
        )
        best, at, operator, generation, size, verdict, top, median = found.groups()
        return {
            "best": float(best), "at": int(at), "operator": operator,
            "generation": int(generation), "size": int(size), "improved": verdict == "improved",
            "top": float(top), "median": float(median),
        }  # fmt: skip

    def _standings(self) -> dict[str, tuple[float, str, str, float]]:
        found = self._fact(r"(\S+): best (\S+), (level with|ahead of|behind) (.*) (\S+)")
        return {m[1]: (float(m[2]), m[3], m[4], float(m[5])) for m in found}

    def _correlations(self) -> tuple[int, dict[str, float]]:
        (found,) = self._fact(r"correlations with the score \((\d+)\): (.*)")
        named = () if found[2] == "no axis" else found[2].split(", ")
        pairs = (one.rpartition(" ") for one in named)
        return int(found[1]), {name: float(r) for name, _, r in pairs}

    def _spread(self) -> int:
        (found,) = self._fact(r"the best 4 differ by (\d+) an axis")
        return int(found[1])

    def _pressed(self) -> dict[str, int]:
        found = self._fact(r"all press: (.*)")
        pairs = (one.rpartition(" at ") for match in found for one in match[1].split(", "))
        return {name: int(value) for name, _, value in pairs}

    def _moved(self) -> tuple[float, float, dict[str, tuple[int, int]]]:
        (found,) = self._fact(r"best before (\S+), of the last generation (\S+): moved (.*)")
        steps = (re.fullmatch(r"(.*) (\d+) to (\d+)", one) for one in found[3].split(", "))
        moved = {m[1]: (int(m[2]), int(m[3])) for m in steps if m}
        return float(found[1]), float(found[2]), moved

    def _failed(self) -> int:
        return sum(int(m[1]) for m in self._fact(r"(\d+) of \d+ of the last generation failed"))

    def _critic(self) -> str:
        rest = self.user.partition("\nThe critic: ")[2]
        return re.split(r"\nStructural moves so far|\nNoise of the two best", rest)[0]

    def _moves(self) -> str:
        return self._line("Structural moves so far")

    def _forecasts(self) -> str:
        return self._line("Your forecasts").partition(". Noise of")[0]

    def _noise(self) -> str:
        return self._within(r"Noise of the two best: (.*?)\.(?: |$)")

    def _sigma(self) -> str:
        return self._within(r"Sigma of the last step: (.*?)\. Ev")

    def _next_sigma(self) -> float:
        return float(self._within(r"Next sigma: (\S+) of an axis"))

    def _left(self) -> int:
        return int(self._within(r"Evaluations left: (\d+)\."))

    def _range(self) -> tuple[float, float]:
        found = re.search(r"from (\S+) to (\S+)\.\n", self.system)
        assert found
        return float(found[1]), float(found[2])

    def _dimensions(self) -> int:
        found = re.search(r"exactly (\d+) integers|^Axes: (\d+)\.$", self._all, re.MULTILINE)
        assert found
        return int(found[1] or found[2])

    def _layers(self) -> int:
        found = re.search(r"dividing\s+(\d+): ", self.system)
        assert found
        return int(found[1])

    def _room(self) -> tuple[str, ...]:
        """The experts that may be let in."""
        found = re.search(r"Experts that are not merged now: (.*?)\. One may be", self.system)
        return tuple(found[1].split(", ")) if found else ()

    def _within(self, pattern: str) -> str:
        found = re.search(pattern, self.user, re.MULTILINE)
        assert found, f"no {pattern!r} in:\n{self.user}"
        return found[1]

    @property
    def _all(self) -> str:
        return f"{self.system}\n{self.user}"

    @property
    def generation(self) -> int:
        """The last one that is told of."""
        return int(self._within(r"last generation (\d+)"))


def _row(line: str) -> Row:
    score, *tasks, genome, made = line.split(" | ")
    generation, operator = made.split(" ", 1)
    told = _numbers(tasks[0]) if tasks else None
    return Row(*_marked(score), told, _integers(genome), int(generation), operator)


def _marked(score: str) -> tuple[float, str]:
    found = re.fullmatch(r"([-+.\de]+?)((?:=|~|!).*)?", score)
    assert found, score
    return float(found[1]), found[2] or ""


def _numbers(text: str) -> tuple[float | None, ...]:
    return tuple(None if one == "-" else float(one) for one in text.split())


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(one) for one in re.findall(r"\d+", text))


def _split(text: str) -> list[str]:
    """At commas that are in no brackets."""
    return re.split(r", (?![^(]*\))", text)


def _kind(where: str) -> tuple[str, str, str]:
    """ "layers 0-1, 2-3" -> ("layers", "", "0-1, 2-3")."""
    first, _, rest = where.partition(", ")
    kind, _, place = first.rpartition(" ")
    return kind, "", f"{place}, {rest}"
