"""The values a recipe has after mergekit's precedence: what ``agentmerge explain`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmerge.errors import UserError
from agentmerge.methods import PASSTHROUGH, RECIPE_METHODS
from agentmerge.parents.naming import layer_of
from agentmerge.recipe import MOST_LAYERS, Effective, Recipe
from agentmerge.recipe.cancelling import cancelling_notes
from agentmerge.recipe.copying import stacked_layers
from agentmerge.recipe.names import short_name

if TYPE_CHECKING:
    from agentmerge.parents.layout import Layout

#: Stand-ins where no model says what its tensors are called.
_KINDS: tuple[str, ...] = (
    "self_attn.q_proj.weight",
    "mlp.up_proj.weight",
    "input_layernorm.weight",
)
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
#: What scales of stacked layers are of, beside what a recipe's own filters name.
_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def explain_recipe(recipe: Recipe, model: Path | None, layers: int | None) -> dict[str, Any]:
    """{hash, canonical, notes, rows, checked}: rows are a head and one for each group.

    checked: whether its models are here, and their headers say that they can be merged so.

    Raises:
        RecipeRejected: they cannot, as ``evaluate`` would say. ParentError: they do not fit.
        UserError: the depth is unknown: the recipe has no layer ranges and no model was named.
    """
    # Parents that are aligned or unpickled first are other files than those that are here.
    checked = recipe.tokenizer_source is None and all(
        (Path(name) / "config.json").is_file() and any(Path(name).glob("*.safetensors"))
        for name in recipe.models
    )
    first = [merge.base_model for _, merge in recipe.merges]
    base = next(filter(None, (recipe.base_model, *first)), None)
    family = shown = None
    if checked or model is not None:
        from agentmerge.parents.layout import read_layout

        if checked:
            here = {name: Path(name) for name in recipe.models}
            family = read_layout(here, base)
        shown = read_layout({str(model): model}) if model is not None else None
    known = shown or family
    depth = layers or _depth(recipe) if known is None else known.num_layers
    canonical = recipe.canonical(depth)
    if family is not None:
        from agentmerge.merging.plan import plan

        plan(canonical, family)
    stacked, notes = stacked_layers(canonical, depth), [*recipe.notes]
    if stacked is not None and known is None and not layers:
        notes.append(
            f"its models are taken to have {depth} layers; --layers N or --model DIR says how many "
            "they have"
        )
    names, carried = _tensors(shown, depth, stacked, _filters(canonical))
    rows = [["where", "tensors", "source", "values"], *_rows(canonical, names)]
    for name, merge in canonical.merges:
        told = _rows(merge, _tensors(shown, depth, None)[0])
        rows += [[f"{name}: {place}" if place else "", *rest] for place, *rest in told]
    if carried:
        owner = base or recipe.models[0]
        rows.append(["outside the text model", carried, short_name(owner), "as it is there"])
    return {
        "hash": canonical.hash(),
        "canonical": canonical.to_dict(),
        "notes": [*notes, *cancelling_notes(canonical)],
        "rows": rows,
        "checked": checked,
    }


def _rows(recipe: Recipe, names: list[tuple[str, int | None, bool]]) -> list[list[str]]:
    """(where, tensors, source, values) of each group of tensors that are made alike."""
    groups: list[tuple[str, str, Effective]] = []
    for name, layer, after in names:
        effective = recipe.effective(name, layer, after=after)
        where = "after the layers" if after else "before the layers"
        place = where if layer is None else f"layer {layer}"
        groups.append((place, name, effective))
    rows = []
    for place, name, effective in _grouped(groups):
        total, where = _total(effective), place
        for model_name, at, own in effective.sources:
            method = RECIPE_METHODS[effective.method]
            if method.sets_apart(effective.base_model) and model_name == effective.base_model:
                values = "base"
            else:
                given = own or effective.shared  # of a method without weights
                values = ", ".join(
                    f"{key} {value / total if key == 'weight' else value:g}"
                    for key, value in given
                    if (key, value) not in PASSTHROUGH.source_params  # the model as it is
                )
                values = values or "the model"
            if method.pairwise:
                t = dict(effective.shared)["t"]
                values = f"t {t:g} away" if model_name == effective.base_model else f"t {t:g}"
            moved = at is not None and f"layer {at}" != where
            source = short_name(model_name) + (f", layer {at}" if moved else "")
            rows.append([place, name, source, values])
            place = name = ""
    return rows


def _total(effective: Effective) -> float:
    """What weights are divided by: their sum, where only their ratios matter."""
    method = RECIPE_METHODS[effective.method]
    if not method.ratios_only(dict(effective.shared)):
        return 1.0
    return sum(dict(own).get("weight", 0.0) for _, _, own in effective.sources) or 1.0


def _depth(recipe: Recipe) -> int:
    """How deep its models are, as far as the recipe tells: as deep as what it reads."""
    ranges = [s.layer_range for piece in recipe.slices for s in piece.sources if s.layer_range]
    depth = max((end for _, end in ranges), default=0)
    if not depth:
        raise UserError(
            "the recipe does not say how deep the models are; add --model DIR or --layers N"
        )
    return depth


def _filters(recipe: Recipe) -> list[str]:
    parameters = [*recipe.parameters]
    for piece in recipe.slices:
        parameters += piece.parameters
        parameters += (own for source in piece.sources for own in source.parameters)
    found = dict.fromkeys(name for _, setting in parameters for name in setting.filters)
    return [name for name in found if name is not None]


def _tensors(
    layout: Layout | None,
    depth: int,
    stacked: tuple[int, ...] | None,
    filters: Sequence[str] = (),
) -> tuple[list[tuple[str, int | None, bool]], str]:
    """Tensors (name, layer, whether after the layers), and what no recipe touches.

    filters: a stack's own, which say what its outputs are called where no model does.
    """
    if layout is not None:
        from agentmerge.parents.checkpoint import parts_of

        made = layout if stacked is None else layout.at_depth(stacked)
        return [(t.name, t.layer, t.after) for t in made.tensors], parts_of(layout.carried)
    if depth > MOST_LAYERS:
        raise UserError(
            f"{depth:,} layers are more than any model has: {MOST_LAYERS:,} are shown at most"
        )
    names: list[tuple[str, int | None, bool]] = [("model.embed_tokens.weight", None, False)]
    kinds = _KINDS
    if stacked is not None:
        kinds = (*_KINDS, *_OUTPUTS)
        known = (*(f"model.layers.{kind}" for kind in kinds), *_OUTSIDE)
        of_a_layer = (name for name in filters if layer_of(f"{name}.") is None)
        kinds += tuple(name for name in of_a_layer if not any(name in other for other in known))
    for layer in range(depth if stacked is None else len(stacked)):
        names += [(f"model.layers.{layer}.{kind}", layer, False) for kind in kinds]
    return [*names, ("model.norm.weight", None, True)], ""


def _grouped(
    groups: list[tuple[str, str, Effective]],
) -> list[tuple[str, str, Effective]]:
    """Neighbouring tensors of one place with the same values become one line."""
    found: list[tuple[str, list[str], Effective]] = []
    for place, name, effective in groups:
        if found and found[-1][0] == place and _values(found[-1][2]) == _values(effective):
            found[-1][1].append(name)
        else:
            found.append((place, [name], effective))
    return [
        (place, names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", effective)
        for place, names, effective in found
    ]


def _values(effective: Effective) -> Any:
    return [(model, own) for model, _, own in effective.sources], effective.shared
