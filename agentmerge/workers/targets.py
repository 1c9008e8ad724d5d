"""Which part of a live model each tensor of a checkpoint's files is, and the proof of it.

transformers names tensors otherwise than files do, and fuses some (a layer's experts) into one. Its
own table of conversions, read backwards as for saving, gives each file's tensor as a view of the
live ones; a name that the table does not know is found by its ending. A live model that was loaded
from those files proves the pairs: every value is the file's. It knows one model and its files; it
knows no merging.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from agentmerge.errors import ParentError
from agentmerge.parents.configs import quiet_logs
from agentmerge.parents.naming import NameIndex

_OTHER_LOADER = "; worker.kind: vllm, which has loaders of its own, may take them"


def live_targets(
    model: Any,
    names: Collection[str],
    carried: Collection[str],
    tensor_of: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """File name -> the part of the live model that it is, a view, of each of ``names``.

    model: as loaded from the files. carried: tensors of the files that nothing is merged into;
        they and ``names`` are all that the model may have. tensor_of: a file's tensor by its name.

    Raises:
        ParentError: names or values do not pair off.
    """
    live = stored_tensors(model)
    targets, faults = _paired(model, live, names, carried)
    if faults:
        raise ParentError("\n".join(faults))
    for name, target in targets.items():
        stored = tensor_of(name)
        same = stored.shape == target.shape
        if not same or not torch.equal(stored.to(target.device, target.dtype), target):
            raise ParentError(
                f"transformers loads other values than {name} has in the files, so merges cannot "
                "be written there"
            )
    return targets


def pairing_faults(
    model: Any, shapes: Mapping[str, tuple[int, ...]], carried: Collection[str]
) -> list[str]:
    """Why files whose tensors have these shapes cannot be merged into a model, which may be
    without memory (``merging.skeleton``): names and shapes alone are looked at."""
    targets, faults = _paired(model, stored_tensors(model), shapes, carried)
    if faults:
        return faults
    odd = [name for name, shape in shapes.items() if tuple(targets[name].shape) != shape]
    if not odd:
        return []
    kind = type(model).__name__
    return [
        f"{len(odd)} tensors have other shapes than transformers' {kind} gives them, the first is "
        f"{odd[0]}: {list(shapes[odd[0]])} in the files, and {list(targets[odd[0]].shape)}"
    ]


def stored_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of numbers that a model saves, detached, by its live name; one
    that is tied to another by both names."""
    saved = model.state_dict().keys()
    found = dict(model.named_parameters(remove_duplicate=False))
    for name, value in model.named_buffers(remove_duplicate=False):
        if name in saved and value.is_floating_point():
            found[name] = value
    return {name: value.detach() for name, value in found.items()}


def _paired(
    model: Any, live: Mapping[str, torch.Tensor], names: Collection[str], carried: Collection[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The view that each name is, and why that cannot be told of all."""
    known = not live.keys() >= {*names, *carried}
    views = file_views(model, live, [*names, *carried]) if known else live
    index = NameIndex(views)
    found = {name: index.find(name) for name in names}
    kept = {name: index.find(name) for name in carried}
    targets = {name: views[own] for name, own in found.items() if own is not None}
    others = [views[own] for own in kept.values() if own is not None]
    lost = sorted(name for name, own in found.items() if own is None)
    homes = {home_of(tensor): name for name, tensor in reversed([*live.items()])}
    covered: Counter[str] = Counter()
    for target in targets.values():
        covered[homes.get(home_of(target), "")] += target.numel()
    carried_homes = {*map(home_of, others)}
    strange = sorted(
        name for home, name in homes.items() if name not in covered and home not in carried_homes
    )
    twice = sorted(n for n, count in covered.items() if n and count > live[n].numel())
    kind = type(model).__name__
    if lost or strange or twice:
        said = [
            f"{len(lost)} only in the files (e.g. {', '.join(lost[:2])})" if lost else "",
            f"{len(strange)} only in the model (e.g. {', '.join(strange[:2])})" if strange else "",
            f"{len(twice)} are several in the files (e.g. {twice[0]})" if twice else "",
        ]
        return {}, [
            f"transformers' {kind} has other tensors than the files, so merges cannot be written "
            f"into it: {', '.join(filter(None, said))}{_OTHER_LOADER}"
        ]
    moved = [name for name, target in targets.items() if home_of(target) not in homes]
    moved += [name for name, count in covered.items() if name and count < live[name].numel()]
    if moved:
        return {}, [
            f"transformers' {kind} rearranges what the files hold, so merges cannot be written "
            f"into it, e.g. {moved[0]}{_OTHER_LOADER}"
        ]
    return targets, []


def home_of(tensor: torch.Tensor) -> int:
    """What views of one tensor have in common, with memory or without."""
    return int(tensor.untyped_storage()._cdata)


def file_views(
    model: Any, live: Mapping[str, torch.Tensor], names: Collection[str]
) -> dict[str, torch.Tensor]:
    """``live`` under the names that files have for it, fused tensors in their parts.

    names: of the files, which tell what of transformers' table has been at work. A part that is
    not in one place of a live tensor is a copy.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightRenaming,
            rename_source_key,
            revert_weight_conversion,
        )
    except ImportError:  # a transformers that has moved it: names are found by their endings
        return dict(live)
    with quiet_logs():
        table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if not isinstance(entry, WeightRenaming)]
    for name in sorted(names):
        rename_source_key(name, renamings, converters, model.base_model_prefix, live)
    model._weight_conversions = [entry for entry in table if entry.was_used()]
    with torch.no_grad(), _WithoutCopies():
        found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(live))
    return found


class _WithoutCopies(TorchFunctionMode):
    """Within: a part of a tensor stays a view of it where code asks to have it contiguous."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))


def parts_of(
    model: Any, targets: Mapping[str, torch.Tensor]
) -> Iterator[tuple[torch.nn.Parameter, dict[str, tuple[Any, ...]]]]:
    """Each parameter with what ``targets`` has of it: name -> (size, stride, offset) inside it."""
    by_storage: dict[int, dict[str, torch.Tensor]] = {}
    for name, target in targets.items():
        by_storage.setdefault(home_of(target), {})[name] = target
    for parameter in model.parameters():
        start = parameter.storage_offset()
        yield (
            parameter,
            {
                name: (target.size(), target.stride(), target.storage_offset() - start)
                for name, target in by_storage.get(home_of(parameter), {}).items()
            },
        )
