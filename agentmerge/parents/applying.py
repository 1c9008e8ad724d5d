"""Makes the model that an adapter makes of a model, layer by layer, by peft's own layers.

peft wraps a model without weights; each wrapped layer gets its weight from the file, merges in
float32, and the result is rounded once, to the dtype in which the file stores the tensor. That is,
bit for bit, peft's ``merge_and_unload`` of the model in float32, rounded; memory holds one layer.
What the adapter does not touch is copied bit for bit. It knows no recipes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from agentmerge.errors import ParentError
from agentmerge.parents.headers import TensorHeader, read_headers
from agentmerge.parents.low_rank import Factors, exact_products, write_factors
from agentmerge.parents.naming import NameIndex
from agentmerge.parents.skeleton import skeleton
from agentmerge.parents.writing import entry_of, refuse_full_disk, stored_tensor, write_weights


def apply_adapter(
    model: Path, adapter: Path, out_dir: Path, *, trust_remote_code: bool = False
) -> None:
    """Write the weights that ``adapter`` makes of ``model``'s into ``out_dir``, which is there,
    and beside them the factors of what it adds.

    Raises:
        ParentError: peft cannot apply it, or it makes numbers that are not finite.
        UserError: the disk is full.
    """
    headers = read_headers(model)
    entries = [entry_of(name, header) for name, header in headers.items()]
    merged = Adapted(model, adapter, headers, trust_remote_code)
    found = {name: own for name in merged.changed if (own := merged.factors(name)) is not None}
    size_bytes = sum(e.size_bytes for e in entries) + sum(f.size_bytes for f in found.values())
    refuse_full_disk(out_dir, size_bytes, out_dir.parent)
    write_factors(out_dir, model, found)
    for _ in write_weights(out_dir, entries, merged.tensor):
        pass
    if left := merged.untouched():
        raise ParentError(
            f"{adapter}: {len(left)} layers of the adapter reached no tensor of the model, the "
            f"first is {left[0]}"
        )


class Adapted:
    """The tensors of a model after an adapter, by their names in the files, each asked for once."""

    def __init__(
        self,
        model: Path,
        adapter: Path,
        headers: Mapping[str, TensorHeader],
        trust_remote_code: bool,
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        self._headers = headers
        wrapped = _wrapped(model, adapter, trust_remote_code).base_model.model
        files = NameIndex(headers)
        self._layers: dict[str, tuple[str, Any, str]] = {}  # file name -> (module, layer, part)
        self._given: dict[str, torch.Tensor] = {}  # whole tensors that the adapter brings
        inside = ""
        for path, module in wrapped.named_modules():
            if inside and path.startswith(inside):
                continue
            if isinstance(module, ModulesToSaveWrapper):
                inside = f"{path}."
                saved = module.modules_to_save[module.active_adapters[0]]
                for part, value in saved.named_parameters():
                    self._give(files, f"{path}.{part}", value)
            elif isinstance(module, BaseTunerLayer):
                inside = f"{path}."
                for part, value in module.get_base_layer().named_parameters(recurse=False):
                    name = files.find(f"{path}.{part}")
                    if name is None:
                        raise ParentError(f"{adapter}: {path}.{part} is not in the model's files")
                    if not isinstance(value, _Placeholder):
                        self._given[name] = value.detach()
                    self._layers[name] = (path, module, part)
            else:
                for part, value in module.named_parameters(recurse=False):
                    if not isinstance(value, _Placeholder):  # a bias, trained too
                        self._give(files, f"{path}.{part}", value)
        self.changed = self._layers.keys() | self._given.keys()
        self._done: dict[str, dict[str, torch.Tensor]] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the result, at its stored dtype.

        Raises:
            ParentError: it has numbers that are not finite, and the model's has not.
        """
        value = self.value(name)
        if name in self.changed and not torch.isfinite(value).all():
            raise ParentError(f"the adapter makes numbers of {name} that are not finite")
        return value

    def value(self, name: str) -> torch.Tensor:
        """The same, whatever its numbers are."""
        stored = stored_tensor(self._headers[name], name)
        if name in self._layers:
            path, _, part = self._layers[name]
            if path not in self._done:
                self._done[path] = self._merge(path)
            value = self._done[path].pop(part)
        elif name in self._given:
            value = self._given.pop(name)
        else:
            return stored
        return value.to(stored.dtype)

    def factors(self, name: str) -> Factors | None:
        """Of what is added to a linear module's weight; None where it is no plain product of two,
        or the weight itself is the adapter's."""
        _, layer, part = self._layers.get(name, ("", None, ""))
        which = next(iter(getattr(layer, "active_adapters", ())), "")
        if part != "weight" or name in self._given or which not in getattr(layer, "lora_A", {}):
            return None
        a, b = layer.lora_A[which], layer.lora_B[which]
        if layer.lora_variant or type(a) is not torch.nn.Linear or b.bias is not None:
            return None  # DoRA and the like
        turned = bool(getattr(layer, "fan_in_fan_out", False))
        return Factors(b.weight.detach(), a.weight.detach(), layer.scaling[which], turned)

    def untouched(self) -> list[str]:
        """Layers and tensors of the adapter that no tensor of the files has asked for."""
        return sorted({path for path, _, _ in self._layers.values()} - self._done.keys()) + sorted(
            self._given.keys() - self._layers.keys()
        )

    def _merge(self, path: str) -> dict[str, torch.Tensor]:
        parts = {p: (n, layer) for n, (at, layer, p) in self._layers.items() if at == path}
        layer = next(layer for _, layer in parts.values())
        base = layer.get_base_layer()
        for part, (name, _) in parts.items():
            value = self._given.get(name, None)
            value = (
                stored_tensor(self._headers[name], name).float() if value is None else value.float()
            )
            setattr(base, part, torch.nn.Parameter(value, requires_grad=False))
        with exact_products():
            layer.merge(safe_merge=False)
        result = {part: getattr(base, part).detach() for part in parts}
        for part in parts:
            setattr(base, part, torch.nn.Parameter(torch.empty(0)))
        return result

    def _give(self, files: NameIndex, name: str, value: torch.Tensor) -> None:
        found = files.find(name)
        if found is not None:
            self._given[found] = value.detach()


def _wrapped(model: Path, adapter: Path, trust_remote_code: bool) -> Any:
    """peft's model around one without weights, and the adapter's own."""
    import peft

    bare = skeleton(model, trust_remote_code=trust_remote_code)
    _fill(bare)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModel.from_pretrained(
                bare, str(adapter), low_cpu_mem_usage=True, torch_device="cpu"
            )
            # Again in float32: a stored half-precision base layer takes its adapter down with it.
            weights = peft.load_peft_weights(str(adapter), device="cpu")
            exact = {name: value.float() for name, value in weights.items()}
            peft.set_peft_model_state_dict(wrapped, exact, low_cpu_mem_usage=True)
    except Exception as error:  # peft raises what its kinds of adapters raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ParentError(f"{adapter}: peft cannot apply this adapter: {reason}") from error
    for value in wrapped.parameters():
        if not isinstance(value, _Placeholder):
            value.data = value.data.float()  # as peft has them on a model in float32
    return wrapped


class _Placeholder(torch.nn.Parameter):
    """A weight that is not there: it has a shape and a device, and no memory.

    peft puts an adapter's weights where its layer's are, so these cannot be on the meta device.
    """


def _fill(bare: Any) -> None:
    """A placeholder for each parameter; shared ones stay shared."""
    filled: dict[int, _Placeholder] = {}
    for module in bare.modules():
        for name, value in module._parameters.items():
            if value is not None:
                if id(value) not in filled:
                    nothing = torch.zeros((), dtype=value.dtype).expand(value.shape)
                    filled[id(value)] = _Placeholder(nothing, requires_grad=False)
                module._parameters[name] = filled[id(value)]
