"""The table of merge methods: their parameters, defaults and bounds, as mergekit 0.1.5 has them.

It knows names and numbers only. How a method is computed is ``merging/kernels.py``; which of its
parameters a search moves is ``genome.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from agentmerge.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method.

    source_params: parameters each source carries, with their defaults (None: required).
    shared_params: parameters of the whole merge, with their defaults.
    needs_base: the method works on task vectors (source minus base).
    paper: where the formula comes from.
    """

    name: str
    source_params: tuple[tuple[str, float | None], ...]
    shared_params: tuple[tuple[str, float], ...]
    needs_base: bool
    random: bool
    paper: str

    @property
    def default_normalize(self) -> bool:
        return bool(dict(self.shared_params).get("normalize", 0.0))


_TASK_VECTOR = (("weight", None), ("density", 1.0))

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("linear", (("weight", None),), (("normalize", 1.0),), False, False, "2203.05482"),
        Method("slerp", (), (("t", 0.5),), False, False, "https://en.wikipedia.org/wiki/Slerp"),
        Method(
            "task_arithmetic",
            _TASK_VECTOR[:1],
            (("normalize", 0.0), ("lambda", 1.0)),
            True,
            False,
            "2212.04089",
        ),
        Method(
            "ties",
            _TASK_VECTOR,
            (("normalize", 1.0), ("lambda", 1.0), ("rescale", 0.0)),
            True,
            False,
            "2306.01708",
        ),
        Method(
            "dare_ties",
            _TASK_VECTOR,
            (("normalize", 0.0), ("lambda", 1.0), ("rescale", 1.0)),
            True,
            True,
            "2311.03099",
        ),
    )
}

#: Methods in which only the ratio of weights matters once ``normalize`` is on, and in which a sum
#: of weights that cancels leaves nothing to divide by.
SUM_NORMALIZED = frozenset({"linear", "task_arithmetic"})

#: Parameters that mergekit accepts and that change nothing in the merged weights.
INERT_PARAMS = frozenset({"int8_mask"})


def method_named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        RecipeError: unknown, with the known names.
    """
    if name not in METHODS:
        raise RecipeError(
            f"merge_method {name!r} is not known; use one of {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]
