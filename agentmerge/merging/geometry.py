"""Task vectors of a family, compared: how long each is and how alike two are, by part of the model.

Read from the checkpoints once, tensor by tensor, and remembered under the parents' fingerprints.
Knows no recipe and no score.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch

from agentmerge.merging.weights import ParentFiles, TensorSource
from agentmerge.parents.layout import Layout, read_layout
from agentmerge.system.temporary import cache_dir, write_at_once


@dataclass(frozen=True, slots=True)
class PartGeometry:
    """One part of the model: a layer group, or None outside the layers; a filter, or None.

    length: model -> length of its task vector there, as a share of the origin's own length.
    cosine: (one model, another) -> cosine of their task vectors; 0 where one is zero.
    """

    group: int | None
    filter: str | None
    length: tuple[tuple[str, float], ...]
    cosine: tuple[tuple[str, str, float], ...]


def task_vectors(
    paths: Mapping[str, Path],
    identities: Mapping[str, str],
    base: str | None,
    groups: int,
    filters: Sequence[str] = (),
) -> list[PartGeometry]:
    """Lengths and cosines of the models' differences from their origin, part by part.

    identities: fingerprints, to remember the answer by. base: the origin; without one it is the
    mean of the models. groups: equal layer groups. filters: substrings of tensor names that have
    parts of their own.

    Raises:
        ParentError: the models are no family.
    """
    asked = [sorted(identities.items()), base, groups, list(filters)]
    name = sha256(json.dumps(asked).encode()).hexdigest()[:24]
    cached = cache_dir() / "geometry" / f"{name}.json"
    if cached.is_file():
        return [_read(row) for row in json.loads(cached.read_text())]
    layout = read_layout(paths, base)
    found = _measured(ParentFiles(paths), layout, base, groups, filters)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_at_once(cached, json.dumps([asdict(row) for row in found]))
    return found


def _measured(
    source: TensorSource, layout: Layout, base: str | None, groups: int, filters: Sequence[str]
) -> list[PartGeometry]:
    models = [name for name in layout.parents if name != base]
    # Part -> dot products of every pair, and of the origin with itself under the key ("", "").
    sums: dict[tuple[int | None, str | None], dict[tuple[str, str], float]] = {}
    for spec in layout.tensors:
        group = None if spec.layer is None else spec.layer * groups // layout.num_layers
        into = sums.setdefault((group, next((f for f in filters if f in spec.name), None)), {})
        tensors = {name: source.tensor(name, spec.name).float() for name in models}
        if base is not None:
            origin = source.tensor(base, spec.name).float()
        else:
            origin = torch.stack([*tensors.values()]).mean(0)
        into["", ""] = into.get(("", ""), 0.0) + _dot(origin, origin)
        deltas = {name: tensor - origin for name, tensor in tensors.items()}
        for one, other in combinations_with_replacement(models, 2):
            into[one, other] = into.get((one, other), 0.0) + _dot(deltas[one], deltas[other])
    ordered = sorted(sums, key=lambda part: (part[0] is None, part[0] or 0, part[1] or ""))
    return [_part(*part, models, sums[part]) for part in ordered]


def _part(
    group: int | None,
    filter_: str | None,
    models: Sequence[str],
    dots: Mapping[tuple[str, str], float],
) -> PartGeometry:
    own = math.sqrt(dots["", ""]) or 1.0
    size = {name: math.sqrt(dots[name, name]) for name in models}
    cosines = []
    for one, other in combinations_with_replacement(models, 2):
        if one != other:
            product = size[one] * size[other]
            cosines.append((one, other, dots[one, other] / product if product else 0.0))
    return PartGeometry(
        group, filter_, tuple((name, size[name] / own) for name in models), tuple(cosines)
    )


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double().flatten() @ b.double().flatten()).item())


def _read(row: Mapping[str, Any]) -> PartGeometry:
    return PartGeometry(
        row["group"],
        row["filter"],
        tuple((name, value) for name, value in row["length"]),
        tuple((one, other, value) for one, other, value in row["cosine"]),
    )
