"""``agentmerge explain``: the values a recipe really has, after mergekit's precedence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentmerge.errors import UserError
from agentmerge.methods import METHODS
from agentmerge.recipe import MOST_LAYERS, Effective, Recipe, length
from agentmerge.recipe.cancelling import cancelling_notes
from agentmerge.recipe.names import short_name

#: Stand-ins where no model says what its tensors are called.
_KINDS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def explain_recipe(recipe: Recipe, model: Path | None, layers: int | None) -> dict[str, Any]:
    """{hash, canonical, notes, rows, checked}: rows are a head and one for each group.

    checked: whether its models are here, and their headers say that they can be merged so.

    Raises:
        RecipeRejected: they cannot, as ``evaluate`` would say. ParentError: they do not fit.
        UserError: the depth is unknown: the recipe has no layer ranges and no model was named.
    """
    depth, names, carried = _tensors(recipe, model, layers)
    canonical = recipe.canonical(depth)
    # Parents that are aligned or unpickled first are other files than those that are here.
    checked = recipe.tokenizer_source is None and all(
        (Path(name) / "config.json").is_file() and any(Path(name).glob("*.safetensors"))
        for name in recipe.models
    )
    if checked:
        from agentmerge.merging.plan import plan
        from agentmerge.parents.layout import read_layout

        plan(
            canonical, read_layout({name: Path(name) for name in recipe.models}, recipe.base_model)
        )
    groups: list[tuple[str, str, Effective]] = []
    for name, layer, after in names:
        effective = canonical.effective(name, layer, after=after)
        where = "after the layers" if after else "before the layers"
        place = where if layer is None else f"layer {layer}"
        groups.append((place, name, effective))
    rows = [["where", "tensors", "source", "values"]]
    for place, name, effective in _grouped(groups):
        total, where = _total(effective), place
        for model_name, at, own in effective.sources:
            method = METHODS[effective.method]
            if method.sets_apart(effective.base_model) and model_name == effective.base_model:
                values = "base"
            else:
                found = own or effective.shared  # of a method without weights
                values = ", ".join(
                    f"{key} {value / total if key == 'weight' else value:g}" for key, value in found
                )
                values = values or "the model"
            if method.pairwise:
                t = dict(effective.shared)["t"]
                values = f"t {t:g} away" if model_name == effective.base_model else f"t {t:g}"
            moved = at is not None and f"layer {at}" != where
            source = short_name(model_name) + (f", layer {at}" if moved else "")
            rows.append([place, name, source, values])
            place = name = ""
    if carried:
        owner = recipe.base_model or recipe.models[0]
        rows.append(["outside the text model", carried, short_name(owner), "as it is there"])
    return {
        "hash": canonical.hash(),
        "canonical": canonical.to_dict(),
        "notes": [*recipe.notes, *cancelling_notes(canonical)],
        "rows": rows,
        "checked": checked,
    }


def _total(effective: Effective) -> float:
    """What weights are divided by: their sum, where only their ratios matter."""
    method = METHODS[effective.method]
    if not method.ratios_only(dict(effective.shared)):
        return 1.0
    return sum(dict(own).get("weight", 0.0) for _, _, own in effective.sources) or 1.0


def _tensors(
    recipe: Recipe, model: Path | None, layers: int | None
) -> tuple[int, list[tuple[str, int | None, bool]], str]:
    """Depth, tensors (name, layer, whether after the layers), and what no recipe touches."""
    if model is not None:
        from agentmerge.parents.checkpoint import parts_of
        from agentmerge.parents.layout import read_layout

        layout = read_layout({str(model): model}, None)
        tensors = [(t.name, t.layer, t.after) for t in layout.tensors]
        return layout.num_layers, tensors, parts_of(layout.carried)
    depth = layers or sum(length(piece) for piece in recipe.slices)
    if not depth:
        raise UserError(
            "the recipe does not say how deep the models are; add --model DIR or --layers N"
        )
    if depth > MOST_LAYERS:
        raise UserError(
            f"{depth:,} layers are more than any model has: {MOST_LAYERS:,} are shown at most"
        )
    names: list[tuple[str, int | None, bool]] = [("model.embed_tokens.weight", None, False)]
    for layer in range(depth):
        names += [(f"model.layers.{layer}.{kind}", layer, False) for kind in _KINDS]
    return depth, [*names, ("model.norm.weight", None, True)], ""


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
