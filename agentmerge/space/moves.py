"""Structural moves: the search space that a change of method, groups, filters or models opens, and
the one of layers beside the answer's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from agentmerge.config import GenomeConfig
from agentmerge.contracts.advice import StructuralMove
from agentmerge.errors import ConfigError, RecipeRejected, UserError
from agentmerge.methods import METHODS
from agentmerge.recipe import Recipe
from agentmerge.recipe.names import short_name
from agentmerge.space.grouped import SearchSpace

#: Rungs of filters, coarse to fine, for a space whose groups are single layers already.
FILTERS = (
    ("self_attn", "mlp"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def moved(space: SearchSpace, move: StructuralMove, under: str | None = None) -> SearchSpace:
    """The space that a move opens.

    under: the recipe whose layers a move to layers keeps.

    Raises:
        UserError: it opens none, with the reason.
    """
    if move.change == "layers":
        return _layered(space, under)
    if space.stacks is not None:
        raise UserError(f"{move.change} says nothing of layers, and those are searched now")
    genome = space.genome
    body: dict[str, Any] = genome.model_dump()
    if move.change == "method":
        body |= {"space": None} | _method(genome, move.value)
    elif move.change == "granularity":
        body["layer_granularity"] = int(move.value)
    elif move.change == "filters":
        body["filters"] = tuple(word.strip() for word in move.value.split(",") if word.strip())
    else:
        body |= _models(space, move)
    try:
        found = replace(space, genome=GenomeConfig(**body))
        _ = found.axes
    except (ValidationError, ConfigError) as error:
        raise UserError(_sentence(error)) from None
    if found.key == space.key:
        raise UserError(f"{move.change} {move.value!r} is what the search has already")
    return found


def subset(space: SearchSpace, models: Sequence[str]) -> SearchSpace:
    """The space of merges of these models of a pool."""
    body = space.genome.model_dump()
    return replace(space, genome=GenomeConfig(**(body | _with(space.genome, models))))


def _models(space: SearchSpace, move: StructuralMove) -> dict[str, Any]:
    """The genome's settings with other models."""
    models = space.genome.models
    out, arrow, into = (word.strip() for word in move.value.partition(" -> "))
    if move.change == "models":
        wanted = [name.strip() for name in move.value.split(", ")]
        return _with(space.genome, [_among(space.pool, name) for name in wanted])
    if move.change == "add_model":
        most = space.genome.pool.most if space.genome.pool else len(models)
        if len(models) >= most:
            raise UserError(f"merges have {most} models at most (genome.pool.most)")
        return _with(space.genome, [*models, _among(space.pool, move.value)])
    dropped = _among(models, out, "to drop")
    joined = [_among(space.pool, into)] if arrow else []
    return _with(space.genome, [*(m for m in models if m != dropped), *joined])


def _among(models: Sequence[str], name: str, what: str = "in the pool") -> str:
    found = next((model for model in models if short_name(model) == name), None)
    if found is None:
        raise UserError(f"there is no model {name!r} {what}")
    return found


def _with(genome: GenomeConfig, models: Sequence[str]) -> dict[str, Any]:
    body: dict[str, Any] = {"models": tuple(models)}
    if genome.layers is not None:
        gone = set(genome.models) - set(models) - {genome.base_model}
        named = [m for m in genome.layers.insert if m not in gone]
        body["layers"] = {**genome.layers.model_dump(), "insert": named or ["experts"]}
    return body


@lru_cache(maxsize=8)
def _layered(space: SearchSpace, under: str | None) -> SearchSpace:
    if space.genome.layers is None or space.outputs is None:
        raise UserError("genome.layers is not set, so no layers are searched")
    if space.stacks is not None:
        raise UserError("layers are searched already")
    if under is None:
        raise UserError("there is no such candidate, and its layers are to be kept")
    try:
        found = replace(space, under=Recipe.parse(under).canonical(space.num_layers))
        _ = found.axes
    except RecipeRejected as error:
        raise UserError(str(error)) from None
    return found


def finer(space: SearchSpace) -> StructuralMove | None:
    """One rung up the ladder: groups of fewer layers, then filters; None at the top."""
    if space.stacks is not None:
        return None
    step = space.genome.layer_granularity or space.num_layers
    if step > 1:
        fewer = max(n for n in range(1, step) if step % n == 0)
        return StructuralMove("granularity", str(fewer), "nothing more to gain in coarser groups")
    for filters in FILTERS:
        if len(space.genome.filters) < len(filters) and space.method.source:
            why = "nothing more to gain with fewer filters"
            return StructuralMove("filters", ", ".join(filters), why)
    return None


def _method(genome: GenomeConfig, name: str) -> dict[str, Any]:
    """The genome's other settings as far as the new method knows them."""
    method = METHODS.get(name)
    if method is None:
        raise UserError(f"there is no merge method {name!r}")
    known = {p.name for p in method.shared}
    return {
        "merge_method": name,
        "normalize": genome.normalize if method.normalize_param else None,
        "evolve": () if method.pairwise else tuple(p for p in genome.evolve if p in known),
        "filters": () if method.pairwise else genome.filters,
        "smooth": genome.smooth and not method.pairwise,
    }


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(e["msg"].removeprefix("Value error, ") for e in error.errors())
    return str(error)
