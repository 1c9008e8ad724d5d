"""Which live parameter each tensor of a checkpoint's files is, and the proof of it.

transformers names a wrapper's tensors otherwise than its files do. A live model that was loaded
from those files proves the pairs: names end alike, and every value is the file's. It knows one
model and its files; it knows no merging.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from agentmerge.errors import ParentError
from agentmerge.merging.naming import NameIndex


def live_targets(
    model: Any,
    names: Collection[str],
    carried: Collection[str],
    tensor_of: Callable[[str], torch.Tensor],
) -> dict[str, torch.nn.Parameter]:
    """File name -> live parameter, of each of ``names``.

    model: as loaded from the files. carried: tensors of the files that nothing is merged into;
        they and ``names`` are all that the model may have. tensor_of: a file's tensor by its name.

    Raises:
        ParentError: names or values do not pair off.
    """
    live: Mapping[str, torch.nn.Parameter] = dict(model.named_parameters())
    if set(live) == set(names):
        return dict(live)
    index = NameIndex(live)
    found = {name: index.find(name) for name in names}
    known = {name: index.find(name) for name in carried}
    lost = sorted(name for name, own in found.items() if own is None)
    taken = [own for own in found.values() if own is not None]
    strange = sorted(set(live) - set(taken) - set(known.values()))
    if lost or strange or len(set(taken)) != len(taken):
        raise ParentError(
            "transformers names this model's weights otherwise than its files do, and they do not "
            f"pair off: {len(lost)} only in the files (e.g. {lost[:2]}), {len(strange)} only in "
            f"the model (e.g. {strange[:2]})"
        )
    targets = {name: live[str(own)] for name, own in found.items()}
    for name, target in targets.items():
        stored = tensor_of(name)
        same = stored.shape == target.shape
        if not same or not torch.equal(stored.to(target.device, target.dtype), target.detach()):
            raise ParentError(
                f"transformers loads {found[name]} with other values than {name} has in the "
                "files, so merges cannot be written there"
            )
    return targets
