"""A merge as a LoRA adapter of its base: the merged task vector in factors of low rank.

Where experts are LoRA adapters of the base and the method is a weighted sum, their factors are
concatenated and compressed without loss: nothing of the base's rounding is in them. Elsewhere the
difference of merge and base is cut to its largest singular values, a weight at a time. Norms, and
an embedding that is not the head too, are kept whole (peft's ``modules_to_save``, which vLLM does
not load) or left: what is left is as in the base, named and counted. Reads weights, no scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from agentmerge.errors import UserError
from agentmerge.merging.engines import merge_tensor
from agentmerge.merging.family import merged_tensor
from agentmerge.merging.kernels import Operand
from agentmerge.merging.loops.remembered import Statistics
from agentmerge.merging.plan import MergePlan, TensorPlan, plan
from agentmerge.merging.weights import ParentFiles
from agentmerge.parents.applying import Adapted
from agentmerge.parents.headers import TensorHeader, read_headers
from agentmerge.parents.layout import Layout, read_layout
from agentmerge.parents.naming import NameIndex
from agentmerge.parents.skeleton import skeleton
from agentmerge.parents.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Parent
from agentmerge.parents.writing import directory_at_once, stored_tensor, write_json
from agentmerge.recipe import Recipe

#: Methods whose merge is a weighted sum of the sources, tensor by tensor.
WEIGHTED_SUMS = ("linear", "task_arithmetic")
#: Singular values below this share of the largest are rounding.
NOTHING = 1e-6
#: Wider weights are cut by a randomised method, which errs by less than what is cut.
WIDE = 2048


@dataclass(frozen=True, slots=True)
class AdapterExport:
    """What was written. kept: the norm of what the adapter adds, as a share of the norm of what the
    merge adds to the base. exact: no singular value was cut. whole, left: modules that are kept
    whole, and tensors whose change an adapter has no place for."""

    path: Path
    rank: int
    kept: float
    exact: bool
    whole: tuple[str, ...]
    left: tuple[str, ...]


def base_of(parents: Mapping[str, Parent], recipe: Recipe, base: str | None) -> str:
    """The model that an adapter of a merge is for: what all experts are adapters of, or the base.

    Raises:
        UserError: there is none.
    """
    under = {
        name.partition("+")[0]
        for name in recipe.models
        if name != base and name in parents and parents[name].adapter is not None
    }
    if base is not None and base in parents and parents[base].adapter is not None:
        raise UserError(f"the base {base!r} is a model with an adapter, and adapters are of models")
    if base is not None:
        return base
    if len(under) == 1 and all(
        parents[name].adapter is not None or name in under for name in recipe.models
    ):
        return under.pop()
    raise UserError(
        "an adapter is of one base, and this merge has none: its experts are no adapters of one "
        "model, and genome.base_model is not set"
    )


def export_adapter(
    recipe: Recipe,
    paths: Mapping[str, Path],
    out_dir: Path,
    *,
    parents: Mapping[str, Parent],
    base: str,
    base_path: Path,
    rank: int | None = None,
    factors_only: bool = False,
    dtype: str | None = None,
    card: str = "",
    template: str | None = None,
    overwrite: bool = False,
    finish: Callable[[Path], None] = lambda folder: None,
) -> AdapterExport:
    """Write ``recipe``'s merge as an adapter of ``base`` to ``out_dir``, whole or not at all.

    paths: the family's plain checkpoints. parents: as they are named. base_path: the base's
    directory. rank: the most; None where nothing has to be cut. factors_only: keep no module whole.
    template: a chat template to go with it.

    Raises:
        UserError: the rank is needed and not given, or layers are added.
    """
    layout = read_layout(paths, base if base in paths else None)
    merge_plan = plan(recipe.canonical(layout.num_layers), layout, dtype=dtype)
    if merge_plan.layers is not None:
        raise UserError("this merge has other layers than its base, and an adapter adds none")
    maker = _Maker(recipe, paths, parents, base, base_path, merge_plan, layout, rank, factors_only)
    for item in merge_plan.tensors:
        maker.take(item)
    tensors, settings = maker.finished()
    with directory_at_once(out_dir, overwrite=overwrite) as scratch:
        save_file(tensors, scratch / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_json(scratch / ADAPTER_CONFIG, settings)
        (scratch / "mergekit_config.yml").write_text(recipe.to_yaml(), encoding="utf-8")
        (scratch / "README.md").write_text(card, encoding="utf-8")
        if template is not None:
            (scratch / "chat_template.jinja").write_text(template, encoding="utf-8")
        finish(scratch)
    return AdapterExport(
        out_dir,
        settings["r"],
        maker.kept,
        maker.exact,
        tuple(settings["modules_to_save"] or ()),
        tuple(maker.left),
    )


@dataclass
class _Maker:
    """Takes a merge's tensors one by one, and keeps each one's factors."""

    recipe: Recipe
    paths: Mapping[str, Path]
    parents: Mapping[str, Parent]
    base: str
    base_path: Path
    merge_plan: MergePlan
    layout: Layout
    rank: int | None
    factors_only: bool
    exact: bool = True
    left: list[str] = field(default_factory=list)
    _norms: list[tuple[float, float]] = field(default_factory=list)  # squared: whole, kept
    _pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    _whole: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._headers = read_headers(self.base_path)
        self._source = ParentFiles({name: self.paths[name] for name in self.recipe.models})
        self._modules = _modules(self.base_path, self._headers)
        self._adapted: dict[str, Adapted] = {}
        for name in self.recipe.models:
            parent = self.parents.get(name)
            # Of another model, it is no adapter of this base.
            if parent and parent.adapter and parent.model.resolve() == self.base_path.resolve():
                self._adapted[name] = Adapted(parent.model, parent.adapter, self._headers, False)

    def take(self, item: TensorPlan) -> None:
        name = item.spec.name
        before = stored_tensor(self._headers[name], name).float()
        path, kind = self._modules.get(name, ("", ""))
        pair = self._summed(item) if kind in ("plain", "turned") else None
        if pair is not None:
            self._keep(path, kind, *_compressed(*pair, self.rank))
            return
        change = merged_tensor(item, self.merge_plan.merge_seed, self._source).float() - before
        size = float(change.double().square().sum())
        if not size:
            return
        if kind in ("plain", "turned"):
            if self.rank is None:
                raise UserError(
                    "this merge is no plain sum of LoRA adapters, so it has to be cut to a rank: "
                    "name one with --rank"
                )
            self._keep(path, kind, *_cut(change.T if kind == "turned" else change, self.rank))
        elif kind == "whole" and not self.factors_only:
            self._whole[path] = before + change
            self._norms.append((size, size))
        else:
            self.left.append(name)
            self._norms.append((size, 0.0))

    def _summed(self, item: TensorPlan) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The concatenated factors, where the tensor is a weighted sum of the base's adapters."""
        effective = item.effective
        models = [model for model, _, _ in effective.sources]
        if effective.method not in WEIGHTED_SUMS or item.first:
            return None
        if not all(model in self._adapted or model == self.base for model in models):
            return None
        shares = _shares(item)
        if effective.base_model is None and abs(math.fsum(shares.values()) - 1) > NOTHING:
            return None  # a part of the base itself is added
        factors = []
        for model, share in shares.items():
            if model == self.base or item.spec.name not in self._adapted[model].changed:
                continue
            found = self._adapted[model].factors(item.spec.name)
            if found is None:
                return None
            b = share * (found.scale * found.b).double()
            factors.append((b, found.a.double()))
        if not factors:
            shape = self._headers[item.spec.name].shape
            return torch.zeros(shape[0], 0), torch.zeros(0, shape[1])
        return torch.cat([b for b, _ in factors], 1), torch.cat([a for _, a in factors], 0)

    def _keep(
        self, path: str, kind: str, b: torch.Tensor, a: torch.Tensor, sizes: tuple[float, float]
    ) -> None:
        self.exact &= sizes[1] >= sizes[0] * (1 - NOTHING)
        self._norms.append(sizes)
        if b.shape[1]:
            self._pairs[path] = b.float(), a.float()

    @property
    def kept(self) -> float:
        whole, kept = (math.fsum(sizes) for sizes in zip(*self._norms, strict=True))
        return math.sqrt(kept / whole) if whole else 1.0

    def finished(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, settings) of the adapter, all pairs at the largest rank that one needs: what
        runs adapters wants one rank, and each kind of module everywhere."""
        if not self._pairs and not self._whole:
            raise UserError("this merge adds nothing to its base that an adapter could hold")
        rank = max((b.shape[1] for b, _ in self._pairs.values()), default=1)
        kinds = sorted({path.rpartition(".")[2] for path in self._pairs})
        tensors: dict[str, torch.Tensor] = {}
        turned = False
        for name, (path, kind) in self._modules.items():
            if kind not in ("plain", "turned") or path.rpartition(".")[2] not in kinds:
                continue
            turned |= kind == "turned"
            height, width = self._headers[name].shape[:: -1 if kind == "turned" else 1]
            a, b = torch.zeros(rank, width), torch.zeros(height, rank)
            if path in self._pairs:
                own_b, own_a = self._pairs[path]
                a[: len(own_a)], b[:, : len(own_a)] = own_a, own_b
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
        for path, value in self._whole.items():
            tensors[f"base_model.model.{path}.weight"] = value.contiguous()
        folder = Path(self.base).expanduser().is_dir()
        model, _, revision = (self.base, "", "") if folder else self.base.partition("@")
        return tensors, {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "revision": revision or None,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": turned,
            "target_modules": kinds,
            "modules_to_save": sorted(self._whole) or None,
            "inference_mode": True,
        }


def _modules(base: Path, headers: Mapping[str, TensorHeader]) -> dict[str, tuple[str, str]]:
    """Weight's name in the files -> (its module, how an adapter holds it): "plain"; "turned", a
    linear one that is stored the other way around; or "whole"."""
    from transformers.pytorch_utils import Conv1D

    bare, files = skeleton(base), NameIndex(headers)
    tied = bool(getattr(bare.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    found: dict[str, tuple[str, str]] = {}
    for path, module in bare.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" not in own:
            continue
        name = files.find(f"{path}.weight")
        if name is None or name in found:
            continue
        if isinstance(module, torch.nn.Linear | Conv1D):
            found[name] = path, "plain" if isinstance(module, torch.nn.Linear) else "turned"
        elif set(own) == {"weight"} and not (tied and isinstance(module, torch.nn.Embedding)):
            found[name] = path, "whole"
    return found


def _shares(item: TensorPlan) -> dict[str, float]:
    """What each source's task vector counts in a weighted sum: the method's own arithmetic, asked
    of unit vectors."""
    effective = item.effective
    weights = {
        model: dict(own)["weight"]
        for model, _, own in effective.sources
        if model != effective.base_model
    }
    names = list(weights)
    units = torch.eye(len(names))
    operands = [Operand(u, weight=w) for u, w in zip(units, weights.values(), strict=True)]
    origin = None if effective.base_model is None else torch.zeros(len(names))
    target = torch.empty(len(names))
    merge_tensor(effective.method, origin, operands, dict(effective.shared), target, Statistics())
    return dict(zip(names, target.tolist(), strict=True))


def _compressed(
    b: torch.Tensor, a: torch.Tensor, rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """``b @ a`` in as few columns as it needs, at most ``rank``; its squared norm, and theirs."""
    if not b.shape[1]:
        return b, a, (0.0, 0.0)
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(upper @ lower.T)
    return _balanced(left @ u, s, v @ right.T, rank, float(s.square().sum()))


def _cut(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    whole = float(change.double().square().sum())
    if min(change.shape) <= WIDE:
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        return _balanced(u, s, v, rank, whole)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same adapter whenever it is asked for
        u, s, v = torch.svd_lowrank(change, min(rank + 16, min(change.shape)), niter=4)
    return _balanced(u, s, v.T, rank, whole)


def _balanced(
    u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int | None, whole: float
) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float]]:
    """Factors of equal size of the largest singular values."""
    needed = int((s > NOTHING * s[0]).sum()) if s.numel() and s[0] else 0
    count = needed if rank is None else min(rank, needed)
    root = s[:count].sqrt()
    kept = float(s[:count].double().square().sum())
    # What is nothing is not lost.
    return (
        u[:, :count] * root,
        root[:, None] * v[:count],
        (whole, whole if count == needed else kept),
    )
