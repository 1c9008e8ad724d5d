"""Merge methods that are others' code, behind the kernels' contract (``contracts/method.py``).

As in ``borrowed.py``: values are given in float32 (float64 where a parent is), and what comes back
is rounded once. torch's generator of the device has a seed that follows from the merge's seed, the
models and the tensor, and is put back. What their code raises is that candidate's failure.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from agentmerge.errors import AgentmergeError, CandidateFailed, UserError
from agentmerge.merging.borrowed import by_mergekit, seeded
from agentmerge.merging.kernels import Operand, copied
from agentmerge.methods import METHODS, Method
from agentmerge.methods.added import of_mergekit, unchanged
from agentmerge.system.code import failed_in, run_file


def foreign(
    base: torch.Tensor | None,
    operands: Sequence[Operand],
    shared: Mapping[str, float],
    out: torch.dtype,
    *,
    method: str,
) -> torch.Tensor:
    """One tensor by a method that is not ours.

    Raises:
        CandidateFailed: its code fails, or gives something else than a tensor of that shape.
        UserError: its file cannot be run.
    """
    known = METHODS[method]
    if not operands or operands[0].tensor.numel() == 0:
        return copied(base if base is not None else operands[0].tensor, out)
    tensors = [*([] if base is None else [base]), *(operand.tensor for operand in operands)]
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    given = [tensor.to(torch.float64 if wide else torch.float32, copy=True) for tensor in tensors]
    values = _as_declared(known, [dict(operand.values) for operand in operands], dict(shared))
    kernel = kernel_of(known)
    seed = hashlib.sha256("\n".join(operand.key for operand in operands).encode()).digest()
    with seeded(given[0].device, int.from_bytes(seed[:7], "little")):
        try:
            if hasattr(kernel, "spec"):  # mergekit's
                result = by_mergekit(kernel, given, base is not None, *values)
            else:
                first = given.pop(0) if base is not None else None
                result = kernel(first, given, *values)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise CandidateFailed(f"{method} failed: {type(error).__name__}: {text}") from error
    if not isinstance(result, torch.Tensor) or result.shape != tensors[0].shape:
        said = list(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise CandidateFailed(f"{method} gave {said} for a tensor of {list(tensors[0].shape)}")
    return copied(result.detach().contiguous(), out)


def kernel_of(method: Method) -> Any:
    """Its code: a package's is there, a config's file is run once a process.

    Raises:
        UserError: the file was changed, cannot be run, or does not hold what the config declares.
    """
    return method.kernel if method.kernel is not None else _loaded(method)


@cache
def _loaded(method: Method) -> Any:
    file, _, name = method.home.rpartition(":")
    if not unchanged(method):
        raise UserError(
            f"the code of merge method {method.name!r} ({file}) is not what it was when this "
            "search began; put it back, or begin a new search"
        )
    path = Path(file).expanduser().absolute()
    sys.path.insert(0, str(path.parent))  # as a script's own: it may import what lies beside it
    try:
        found = getattr(run_file(path, "agentmerge_method"), name)
    except AgentmergeError:
        raise
    except Exception as error:
        raise UserError(failed_in(path, error)) from error
    finally:
        sys.path.remove(str(path.parent))
    return _as_declared_in(method, found)


def _as_declared_in(method: Method, found: Any) -> Any:
    """The kernel of what a file holds, if it takes what the config says."""
    here = f"{method.home} (merge method {method.name!r})"
    if isinstance(found, Method):
        theirs, kernel = found, found.kernel
    elif hasattr(found, "spec"):
        theirs, kernel = of_mergekit(found, method.name, bounded=False), found
    elif callable(found):
        return found  # a bare kernel: the config is all that is said of it
    else:
        raise UserError(f"{here} is no merge method")
    for scope in ("source", "shared"):
        ours = {p.name for p in getattr(method, scope)}
        known = {p.name: p.default for p in getattr(theirs, scope)}
        missing = {name for name, default in known.items() if default is None} - ours
        if odd := sorted(ours - known.keys()) or sorted(missing):
            raise UserError(
                f"{here} has the {scope} parameters {', '.join(known) or 'none'}; worker.methods "
                f"declares {', '.join(sorted(ours)) or 'none'}: {odd[0]!r} does not fit"
            )
    if theirs.base != method.base:
        raise UserError(f"{here} has base: {theirs.base}, and worker.methods says {method.base}")
    return kernel


def _as_declared(
    method: Method, own: list[dict[str, float]], shared: dict[str, float]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Whole numbers and switches as such."""
    kinds = {"int": int, "bool": bool}

    def typed(values: dict[str, float], parameters: Sequence[Any]) -> dict[str, Any]:
        of = {p.name: kinds.get(p.kind, float) for p in parameters}
        return {name: of[name](value) for name, value in values.items()}

    return [typed(values, method.source) for values in own], typed(shared, method.shared)
