"""What a merge method is to everybody but its kernel: names, numbers, one line of documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["float", "log", "int", "bool", "share"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a merge method.

    default: None where a recipe must say it.
    low, high: the bounds of its axis (a weight's high is 1 where only ratios count).
    kind: float; log (a float searched on a logarithmic scale); int and bool, whole numbers; share
        (of della's epsilon, searched as a share of the largest that its density allows).
    searched: an axis of every search; the others are axes where ``genome.evolve`` names them.
    """

    name: str
    doc: str
    default: float | None
    low: float = 0.0
    high: float = 1.0
    kind: Kind = "float"
    searched: bool = True

    @property
    def whole(self) -> bool:
        return self.kind in ("int", "bool")


@dataclass(frozen=True, slots=True)
class Method:
    """One merge method.

    source: parameters each source carries. shared: parameters of the whole merge or of a slice.
    base: "required" and "optional" (where the recipe names one) set the base apart, as the model
        that the others are compared with; "ignored" has none, or treats it like any other.
    random: draws masks from the merge seed.
    engine: "agentmerge", "mergekit" where mergekit's own function computes it, or "foreign": a
        plugin's or a config's code. What names of parameters mean to ours (``normalize``, a
        density's ends) they do not mean there.
    least, most: how many sources a slice may have besides a base that is set apart.
    kernel: a plugin's ``MergeKernel`` (or what mergekit's ``merge_method`` makes).
    identity: a plugin's word that a model with weight 1 beside others with 0 is the merge, bit for
        bit, and that the base is where all are 0.
    home, digest: where a config's code is, and what tells foreign code from other code; neither is
        a plugin's to give.
    """

    name: str
    doc: str
    source: tuple[Parameter, ...]
    shared: tuple[Parameter, ...]
    base: Literal["required", "optional", "ignored"]
    paper: str
    random: bool = False
    engine: Literal["agentmerge", "mergekit", "foreign"] = "agentmerge"
    least: int = 1
    most: int | None = None
    kernel: Callable[..., Any] | None = None
    identity: bool = False
    home: str = ""
    digest: str = ""

    @property
    def source_params(self) -> tuple[tuple[str, float | None], ...]:
        return tuple((parameter.name, parameter.default) for parameter in self.source)

    @property
    def shared_params(self) -> tuple[tuple[str, float | None], ...]:
        return tuple((parameter.name, parameter.default) for parameter in self.shared)

    @property
    def needs_base(self) -> bool:
        return self.base == "required"

    @property
    def pairwise(self) -> bool:
        """Whether a slice is two models, the base one of them, with a share t in place of
        weights."""
        ours = self.engine == "agentmerge" and self.base == "ignored"
        return ours and any(parameter.name == "t" for parameter in self.shared)

    def sets_apart(self, base_model: str | None) -> bool:
        """Whether ``base_model`` is what the sources are compared with, and has no parameters."""
        return base_model is not None and self.base != "ignored"

    @property
    def normalize_param(self) -> str | None:
        """What the parameter that divides by the sum of the weights is called, if there is one."""
        names = [p.name for p in self.shared if p.name in ("normalize", "normalize_weights")]
        return names[0] if names and self.engine != "foreign" else None

    @property
    def search_normalizes(self) -> bool:
        """What ``genome.normalize`` is where a config does not say: mergekit's own default, and
        mergekit-evolve's for dare_ties."""
        shared = {name: value or 0.0 for name, value in self.shared_params}
        return self.name == "dare_ties" or self.ratios_only(shared)

    @property
    def differentiable(self) -> bool:
        """Whether a merge has a slope in its weights (and lambda), masks and signs held fixed."""
        return self.engine == "agentmerge" and any(p.name == "weight" for p in self.source)

    def ratios_only(self, shared: Mapping[str, float]) -> bool:
        """Whether these shared parameters leave only the ratio of the weights to matter."""
        if self.normalize_param is None:
            return self.name == "nuslerp"
        return bool(shared[self.normalize_param])

    def to_dict(self) -> dict[str, Any]:
        """The row of ``agentmerge methods --json``."""

        def row(parameter: Parameter, scope: str) -> dict[str, Any]:
            return {
                "name": parameter.name,
                "scope": scope,
                "kind": parameter.kind,
                "default": parameter.default,
                "low": parameter.low,
                "high": parameter.high,
                "searched": parameter.searched,
                "doc": parameter.doc,
            } | (
                {"search_default": float(self.search_normalizes)}
                if parameter.name == self.normalize_param
                else {}
            )

        return {
            "name": self.name,
            "doc": self.doc,
            "base_model": self.base,
            "models": {"least": self.least, "most": self.most},
            "engine": self.engine,
            "random": self.random,
            "paper": self.paper,
            "parameters": [row(p, "source") for p in self.source]
            + [row(p, "shared") for p in self.shared],
        }
