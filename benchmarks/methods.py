"""Every merge method against mergekit's own, on the same checkpoints.

    python -m benchmarks.methods [--json PATH] [--markdown PATH] [--quick] [METHOD ...]

A Llama of transformers and two models that differ from it everywhere are saved in float32 and in
bfloat16, with a tied head and without. What is compared of each method that mergekit has by name:
    ours: ``Family.merge`` of a recipe, as a search makes it;
    theirs: mergekit's in-memory interface (``merge_state_dicts``) on the tensors of the same files,
        asked to compute in float32 and to give what is stored, as ``dtype: float32`` does. Where
        float32 is stored it is also asked to compute in float64, as our own kernels do: what is
        left then is not its rounding after every operation.
No parameter is at its default where another value changes the result. mergekit draws its random
masks from torch's generator, which no two programs share: of those methods it is given our masks,
and what is compared is all the rest.
A difference is also told in roundings: units in the last place, in the stored dtype, of the largest
of the two results and the parents' values there. Elements where a parent's difference is as large
as others of which only some are kept (in bfloat16 many are equal) are counted apart: which of them
it is, is nobody's word. Seconds are the processor's, of one thread, after a first merge of each;
the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from agentmerge.merging.family import Family, mask_key
from agentmerge.merging.kernels import Operand
from agentmerge.merging.sparse import MASKS, crumbs_window
from agentmerge.methods import RECIPE_METHODS
from agentmerge.recipe import Recipe
from benchmarks.machine import machine

#: What a source has; the second one more of it.
OWN = {"weight": (0.35, 0.8), "density": (0.4, 0.7), "gamma": (0.05, 0.02), "epsilon": (0.1, 0.2),
       "scale": (0.7,)}  # fmt: skip
#: Of the whole merge, where the default would leave something out.
SHARED = {
    "normalize": 1.0, "lambda": 0.8, "rescale": 1.0, "t": 0.3, "select_topk": 0.6, "r": 0.6,
    "alpha": 0.5, "eps": 1e-6, "max_iter": 4.0, "tol": 1e-4, "filter_wise": 1.0,
    "nuslerp_flatten": 0.0,
}  # fmt: skip
#: Random methods that have kernels of their own, and whose masks theirs are.
_MASKS = MASKS | {"dare_ties": MASKS["dare_linear"]}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama, and how often a merge of it is timed."""

    hidden: int = 128
    layers: int = 4
    vocabulary: int = 512
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class Row:
    """A method on one family.

    ties: elements of which it is nobody's word whether they are kept; off: of the others, those
    that are not the same bit for bit, with the largest difference of these. wide: roundings from
    mergekit in float64.
    """

    method: str
    dtype: str
    tied: bool
    tensors: int
    elements: int
    ties: int
    off: int
    largest: float
    roundings: float
    wide: float
    ours_s: float
    mergekit_s: float


def write_family(root: Path, shape: Shape, dtype: torch.dtype, tied: bool) -> dict[str, Path]:
    """base, a and b, as transformers saves them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name in ("base", "a", "b"):
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    moved = 0.01 * torch.randn(parameter.shape) * (name != "base")
                    parameter.copy_(start[key] + moved)
            model.to(dtype).save_pretrained(root / name)
            model.float()
    return {name: root / name for name in ("base", "a", "b")}


def asked(method: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(our recipe, mergekit's parameters, the models in order)."""
    row = RECIPE_METHODS[method]
    experts = ["a", "b"][: row.most]
    shared = {p.name: SHARED.get(p.name, p.default) for p in row.shared}
    own = {p.name: OWN[p.name][: len(experts)] for p in row.source}
    models = [
        {"model": name, "parameters": {key: values[at] for key, values in own.items()}}
        for at, name in enumerate(experts)
    ]
    whole = {key: bool(v) if p.kind == "bool" else v for p in row.shared
             for key, v in ((p.name, shared[p.name]),)}  # fmt: skip
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": whole}
    names = experts
    if row.pairwise:
        recipe["base_model"] = "a"
    elif row.base != "ignored":
        recipe["base_model"] = "base"
        names = ["base", *experts]
    ints = {p.name for p in row.shared if p.kind == "int"}
    given = {key: int(value) if key in ints else value for key, value in whole.items()}
    return recipe, given | {key: list(values) for key, values in own.items()}, names


@contextmanager
def given_masks(masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, mergekit's random masks are these, in order."""
    original, left = torch.bernoulli, list(masks)

    def next_mask(probabilities: torch.Tensor) -> torch.Tensor:
        return left.pop(0).reshape(probabilities.shape).to(probabilities.dtype)

    if masks:
        torch.bernoulli = next_mask  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.bernoulli = original


def masks_of(family: Family, recipe: Recipe, names: Sequence[str]) -> list[torch.Tensor]:
    """What a random method keeps of every tensor of every model, in mergekit's order."""
    if recipe.merge_method not in _MASKS or not RECIPE_METHODS[recipe.merge_method].random:
        return []
    items = {item.spec.name: item for item in family.plan(recipe).tensors}
    found = []
    for tensor in names:
        base = family.tensor("base", tensor)
        for model, _, own in items[tensor].effective.sources:
            if model != "base":
                key = mask_key(recipe.merge_seed or 0, family.identities[model], tensor)
                operand = Operand(family.tensor(model, tensor), key=key, **dict(own))
                mask = _MASKS[recipe.merge_method](base, operand)
                found.append(torch.ones(base.numel(), dtype=torch.bool) if mask is None else mask)
    return found


def roundings(
    one: torch.Tensor, other: torch.Tensor, parents: Sequence[torch.Tensor]
) -> torch.Tensor:
    """How far two results are apart, element by element."""
    size = torch.stack([t.to(one.dtype).abs() for t in (one, other, *parents)]).amax(0)
    step = torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()
    return (one.double() - other.double()).abs() / step


def at_a_cut(
    method: str, base: torch.Tensor, experts: Sequence[torch.Tensor], own: Sequence[Any]
) -> torch.Tensor:
    """Where one expert's difference is as large as others of which only some are kept."""
    found = torch.zeros(base.shape, dtype=torch.bool)
    if method not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        return found
    for tensor, values in zip(experts, own, strict=True):
        size = (tensor.double() - base.double()).abs()
        largest = size.reshape(-1).sort(descending=True).values
        operand = Operand(tensor, **dict(values))
        cuts = crumbs_window(operand, base.numel())
        if method == "ties":
            cuts = (max(1, int(operand.density * base.numel())), 0)
        for cut in cuts:
            if 0 < cut < base.numel() and largest[cut - 1] == largest[cut]:
                found |= size == largest[cut]
    return found


def seconds(run: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def compare(
    method: str, paths: Mapping[str, Path], dtype: torch.dtype, tied: bool, shape: Shape
) -> Row:
    from mergekit.merge_methods.api import merge_state_dicts

    body, parameters, models = asked(method)
    family = Family.open(paths, base="base", placement="device")
    recipe = Recipe.parse(body).canonical(shape.layers)
    weights = {name: load_file(paths[name] / "model.safetensors") for name in models}
    masks = masks_of(family, recipe, list(weights[models[0]]))

    def theirs(working: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        with given_masks(masks), torch.no_grad():
            base = body.get("base_model")
            return merge_state_dicts(
                weights, method, parameters=parameters, base=base,
                dtype=working, out_dtype=dtype,
            )  # fmt: skip

    ours, wanted = dict(family.merge(recipe)), theirs()
    if ours.keys() != wanted.keys():
        raise RuntimeError(f"{method}: other tensors: {sorted(ours.keys() ^ wanted.keys())[:3]}")
    exact = theirs(torch.float64) if dtype == torch.float32 else wanted
    off, ties, elements, largest, most, wide = 0, 0, 0, 0.0, 0.0, 0.0
    for item in family.plan(recipe).tensors:
        name, own = item.spec.name, [values for _, _, values in item.effective.sources if values]
        tensor, parents = ours[name], [weights[model][name] for model in models]
        cut = at_a_cut(method, parents[0], parents[1:], own)
        gap = (tensor.double() - wanted[name].double()).abs().masked_fill(cut, 0)
        ties, off = ties + int(cut.sum()), off + int((gap > 0).sum())
        elements += tensor.numel()
        largest = max(largest, float(gap.max()))
        there = [roundings(tensor, x[name], parents).masked_fill(cut, 0) for x in (wanted, exact)]
        most, wide = (max(a, float(b.max())) for a, b in zip((most, wide), there, strict=True))
    return Row(
        method,
        str(dtype).removeprefix("torch."),
        tied,
        len(ours),
        elements,
        ties,
        off,
        largest,
        most,
        wide,
        seconds(lambda: dict(family.merge(recipe)), shape.repeats),
        seconds(theirs, shape.repeats),
    )


def measure(shape: Shape, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    from mergekit import merge_methods

    known = [method.spec.name for method in merge_methods.registered_methods()]
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tied in (False, True):
            with tempfile.TemporaryDirectory(prefix="agentmerge-benchmark-") as root:
                paths = write_family(Path(root), shape, dtype, tied)
                for method in names or known:
                    row = compare(method, paths, dtype, tied, shape)
                    rows.append(row)
                    say(" ".join(f"{key} {value}" for key, value in asdict(row).items()))
    judged = {name: version(name) for name in ("mergekit", "torch", "transformers", "numpy")}
    return {
        "machine": machine(1) | judged,
        "shape": asdict(shape),
        "rows": [asdict(row) for row in rows],
    }


HEAD = (
    "method", "tensors", "float32: differ", "largest", "roundings", "roundings from float64",
    "bfloat16: differ", "largest", "roundings", "ties", "ours ms", "mergekit ms",
)  # fmt: skip


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """One line a method: the worse of the tied and the untied family, a dtype each; times are of
    the untied one in bfloat16."""
    rows = [Row(**row) for row in result["rows"]]
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        line = [method, str(sum(row.tensors for row in own))]
        for dtype in ("float32", "bfloat16"):
            here = [row for row in own if row.dtype == dtype]
            share = sum(row.off for row in here) / sum(row.elements for row in here)
            line.append(f"{100 * share:.2g} %" if share else "none")
            line.append(f"{max(row.largest for row in here):.1e}" if share else "0")
            line.append(f"{max(row.roundings for row in here):.2g}")
            if dtype == "float32":  # mergekit's own functions are the same there
                line.append(f"{max(row.wide for row in here):.2g}" if share else "")
        line.append(f"{100 * max(row.ties / row.elements for row in own):.2g} %")
        timed = next(row for row in own if row.dtype == "bfloat16" and not row.tied)
        lines.append([*line, f"{1e3 * timed.ours_s:.1f}", f"{1e3 * timed.mergekit_s:.1f}"])
    return lines


def head(result: Mapping[str, Any]) -> str:
    there = result["machine"]
    judged = ", ".join(f"{name} {there[name]}" for name in ("mergekit", "torch", "transformers"))
    elements = max(row["elements"] for row in result["rows"])
    return (
        f"{judged}, Python {there['python']}; {there['processor']}, {there['cores']} cores, one "
        f"thread; {elements / 1e6:.1f} million parameters"
    )


def markdown(result: Mapping[str, Any]) -> str:
    lines = [list(HEAD), ["---"] * len(HEAD), *table(result)]
    return head(result) + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="by default all of mergekit's")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--quick", action="store_true", help="smaller models, timed once")
    options = parser.parse_args()
    console = Console(width=150)
    shape = replace(Shape(), hidden=32, layers=2, vocabulary=64, repeats=1)
    result = measure(shape if options.quick else Shape(), options.methods, console.print)
    shown = Table(*HEAD)
    for line in table(result):
        shown.add_row(*line)
    console.print(shown)
    console.print(head(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(result))


if __name__ == "__main__":
    main()
