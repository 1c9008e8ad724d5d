"""Prompt files: found, checked for their variables, and filled in.

Knows where prompts live and which variables each role has. Does not know what the variables hold
(history.py) nor who is asked (models.py).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentmerge.errors import PromptError
from agentmerge.system.bounded import read_text
from agentmerge.system.bundled import bundled

Message = dict[str, str]

#: Variables every role has: the search, its history so far and what the steps were.
COMMON = frozenset(
    {
        "models",
        "method",
        "axes",
        "dimensions",
        "tasks",
        "rivals",
        "generation",
        "history",
        "failures",
        "statistics",
        "sigma",
        "sigma_low",
        "sigma_high",
        "improved_last",
        "best_score",
        "budget_left",
        "forecasts",
        "noise",
        "layers",
        "methods",
        "moves",
        "deeper",
    }
)

#: The same in tables with few digits, as our own prompts say it: ``agents.tables``.
TABLES = frozenset(
    {
        "parents",
        "objectives",
        "baselines",
        "space",
        "candidates",
        "scores",
        "failed",
        "facts",
        "last_step",
        "parameters",
    }
)
#: In place of a variable that a role cannot do without.
SHORTER: Mapping[str, tuple[str, ...]] = {"history": ("candidates", "scores"), "axes": ("space",)}


@dataclass(frozen=True, slots=True)
class Variables:
    """The variables of one prompt: those it must use (or a shorter one of the same), and all it
    may use."""

    required: frozenset[str]
    allowed: frozenset[str]


VARIABLES: Mapping[str, Variables] = {
    "critic": Variables(frozenset({"history"}), COMMON | TABLES | {"failing"}),
    "controller": Variables(
        frozenset({"history", "sigma_low", "sigma_high"}),
        COMMON | TABLES | {"critique", "critic_said"},
    ),
    "proposer": Variables(
        frozenset({"history", "axes", "dimensions"}),
        COMMON | TABLES | {"critique", "critic_said", "next_sigma", "max_candidates", "failing"},
    ),
    "curator": Variables(
        frozenset({"experts", "most"}), COMMON | {"experts", "most", "max_subsets"}
    ),
}

_JUDGED = frozenset({"question", "reference", "category"})
#: And of a judge, with points and between two answers.
JUDGES: Mapping[str, Variables] = {
    "judge": Variables(
        frozenset({"question", "answer", "least", "most"}),
        _JUDGED | {"conversation", "answer", "least", "most"},
    ),
    "judge_pair": Variables(
        frozenset({"question", "answer_a", "answer_b"}),
        _JUDGED | {"conversation_a", "answer_a", "conversation_b", "answer_b"},
    ),
}

_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_SPLIT = re.compile(r"^---[ \t]*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One role's prompt. A line `---` parts the instructions (system) from the request (user)."""

    role: str
    path: Path
    text: str

    @property
    def sha(self) -> str:
        """Hash of the file's text, kept with every call."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def variables(self) -> frozenset[str]:
        return frozenset(_VARIABLE.findall(self.text))

    def check(self) -> Prompt:
        """This prompt, or a PromptError that names the file and the variable."""
        known = {**VARIABLES, **JUDGES}[self.role]
        for name in sorted(self.variables - known.allowed):
            near = difflib.get_close_matches(name, known.allowed, n=1)
            hint = f"did you mean {{{{{near[0]}}}}}?" if near else _one_of(known.allowed)
            raise PromptError(f"{self.path}: unknown variable {{{{{name}}}}}; {hint}")
        for name in sorted(known.required - self.variables):
            shorter = SHORTER.get(name, ())
            if not self.variables & {*shorter}:
                named = " or ".join(f"{{{{{variable}}}}}" for variable in (*shorter, name))
                raise PromptError(
                    f"{self.path}: variable {named} is missing; the {self.role} cannot do "
                    "without it, so put it where the model should read it"
                )
        stray = _VARIABLE.sub("", self.text).find("{{")
        if stray >= 0:
            raise PromptError(
                f"{self.path}: '{{{{' without a variable name and '}}}}'; write {{{{name}}}}, "
                + _one_of(known.allowed)
            )
        return self

    def render(self, **values: str) -> list[Message]:
        """The messages, with every variable filled in once: a value is never expanded again."""
        missing = sorted(self.variables - values.keys())
        if missing:
            raise PromptError(f"{self.path}: no value for {{{{{missing[0]}}}}}")
        parts = _SPLIT.split(self.text, maxsplit=1)
        roles = ("system", "user") if len(parts) == 2 else ("user",)
        return [
            {"role": role, "content": _VARIABLE.sub(lambda m: values[m[1]], part).strip()}
            for role, part in zip(roles, parts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a run."""

    proposer: Prompt
    critic: Prompt
    controller: Prompt
    curator: Prompt


def judge_prompt(text: str, path: Path, *, paired: bool) -> Prompt:
    """A judge's prompt, checked. path: where the text is from. Raises PromptError."""
    return Prompt("judge_pair" if paired else "judge", path, text).check()


def load_prompts(override_dir: Path | str | None = None) -> Prompts:
    """Every role's prompt, checked; a file in `override_dir` replaces ours of the same name.

    Raises PromptError for a missing folder, a file that no role reads, or a bad variable.
    """
    override = None if override_dir is None else Path(override_dir)
    if override is not None:
        _check_folder(override)
    found = {}
    for role in VARIABLES:
        path = bundled("prompts") / f"{role}.md"
        if override is not None and (override / path.name).exists():
            path = override / path.name
        found[role] = Prompt(role, path, _read(path)).check()
    return Prompts(**found)


def prompt_of(prompts: Prompts, name: str) -> Prompt:
    """One prompt by name.

    Raises:
        PromptError: there is no such one.
    """
    if name not in VARIABLES:
        raise PromptError(f"no prompt {name!r}; there are {', '.join(VARIABLES)}")
    found: Prompt = getattr(prompts, name)
    return found


def eject(directory: Path) -> list[Path]:
    """Copies our prompts to a folder, made if need be; what is there is left alone.

    Raises:
        PromptError: the folder cannot be written.
    """
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in VARIABLES:
            path = directory / f"{name}.md"
            if not path.exists():
                path.write_text(_read(bundled("prompts") / path.name), encoding="utf-8")
                written.append(path)
    except OSError as error:
        raise PromptError(f"{directory} cannot be written: {error.strerror}") from None
    return written


def prompt_hash(messages: Sequence[Message]) -> str:
    """Names what a model was asked: equal messages, equal hash."""
    plain = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise PromptError(f"prompts folder {folder} does not exist; make it, or leave it out")
    names = {path.stem for path in folder.glob("*.md")}
    if not names & VARIABLES.keys():
        raise PromptError(
            f"prompts folder {folder} has none of {', '.join(f'{r}.md' for r in VARIABLES)}"
        )
    for name in sorted(names - VARIABLES.keys()):
        near = difflib.get_close_matches(name, VARIABLES, n=1)
        if near:
            raise PromptError(f"{folder / name}.md is read by nobody; did you mean {near[0]}.md?")


def _read(path: Path) -> str:
    return read_text(path, PromptError)


def _one_of(names: frozenset[str]) -> str:
    return "use one of " + ", ".join(sorted(names))
