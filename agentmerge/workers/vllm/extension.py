"""What a vLLM engine's worker processes learn from us: to keep parents and to merge them.

vLLM adds ``MergeExtension`` to its own worker class (``worker_extension_cls``), and the search
calls it by ``collective_rpc``: a recipe crosses as plain values, never a tensor, and a small report
comes back. A failure is a report too, since exceptions lose their type on the way. What is done
with the model is ``vllm_live.py``.

Importing this also decides how vLLM's CPU build keeps its weights, so that the GPU's way works and
is tested where there is no GPU; and that an engine's process ends with the search that started it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from agentmerge.errors import AgentmergeError
from agentmerge.merging.digests import digest
from agentmerge.workers.processes import end_with
from agentmerge.workers.vllm.live import LiveModel

#: Set to 0 to let vLLM's CPU build pack its weights, as it does by itself.
IN_PLACE = "AGENTMERGE_VLLM_IN_PLACE"

#: The search's process id, while the processes of its engine start.
SEARCH = "AGENTMERGE_SEARCH_PROCESS"

_own: dict[str, Any] = {}


def keep_in_place(wanted: bool) -> None:
    """Whether linear layers of the CPU build use their parameters on each call, as CUDA's do.

    Otherwise they pack them once into a form of their own, which only vLLM's ``reload_weights``
    can renew. Where the names have moved in this version of vLLM, that is what happens.
    """
    try:
        import vllm._custom_ops as ops
        import vllm.model_executor.layers.utils as layers
    except ImportError:
        return
    for place, name, value in (
        (ops, "_supports_onednn", False),
        (layers, "check_cpu_sgl_kernel", lambda *_, **__: False),
    ):
        if hasattr(place, name):
            own = _own.setdefault(name, getattr(place, name))
            setattr(place, name, value if wanted else own)


keep_in_place(os.environ.get(IN_PLACE, "1") != "0")


def _end_with_search() -> None:
    search = os.environ.get(SEARCH, "")
    if search not in ("", str(os.getpid())):
        end_with(int(search))


_end_with_search()  # a spawned process imports this anew
os.register_at_fork(after_in_child=_end_with_search)  # a forked one has it already


class MergeExtension:
    """What ``collective_rpc`` can call; the names are prefixed, since they join vLLM's own."""

    def agentmerge_open(self, options: dict[str, Any]) -> dict[str, Any]:
        """Load the parents. options: see ``LiveModel``."""

        def opened() -> dict[str, Any]:
            self._agentmerge = LiveModel(self, options)
            return self._agentmerge.facts()

        return _reported(opened)

    def agentmerge_load(self, recipe: dict[str, Any], way: str) -> dict[str, Any]:
        """Make a canonical recipe the live model; ``way``: map or reload."""
        return _reported(lambda: self._agentmerge.load(recipe, way))

    def agentmerge_state(self) -> str:
        """Digest of every live parameter, in vLLM's own layout, of this rank."""
        return digest(self._agentmerge.parameters().items())

    def agentmerge_zero(self) -> None:
        self._agentmerge.zero()


def _reported(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except AgentmergeError as error:
        return {"error": type(error).__name__, "message": str(error)}
