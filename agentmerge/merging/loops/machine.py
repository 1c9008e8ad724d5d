"""Loops as machine code of this computer's own processor, and how they are called.

It knows LLVM (by llvmlite) and ctypes. What the loops compute is ``loops.py``.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence

from llvmlite import binding

from agentmerge.merging.loops.lanes import Loop, llvm_text

_CALL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 5)

#: What the loops need of an x86 processor; all have it that were made since 2013.
_NEEDED = ("avx2", "fma", "f16c")


class Compiled:
    """A loop as machine code; made by ``compiled``. Calls release the interpreter's lock."""

    def __init__(self, text: str) -> None:
        module = binding.parse_assembly(text)
        machine = binding.Target.from_default_triple().create_target_machine(
            cpu=binding.get_host_cpu_name(),
            features=binding.get_host_cpu_features().flatten(),
            opt=2,
        )
        options = binding.PipelineTuningOptions(speed_level=2)
        passes = binding.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        self._engine = binding.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self._call = _CALL(self._engine.get_function_address("loop"))

    def __call__(
        self,
        start: int,
        stop: int,
        addresses: Sequence[int],
        reals: Sequence[float] = (),
        words: Sequence[int] = (),
        *,
        sums: int = 0,
        counts: int = 1,
    ) -> tuple[list[float], list[int]]:
        """Run over elements ``start`` to ``stop``; the sums and counts that the body made.

        addresses: of each array's element 0. Every array must be contiguous and reach to ``stop``;
        nothing here can check it.
        """
        totals, found = (ctypes.c_double * max(1, sums))(), (ctypes.c_int64 * counts)()
        self._call(
            start,
            stop,
            (ctypes.c_int64 * len(addresses))(*addresses),
            (ctypes.c_double * max(1, len(reals)))(*reals),
            (ctypes.c_uint32 * max(1, len(words)))(*words),
            totals,
            found,
        )
        return list(totals), list(found)


def compiled(body: Callable[[Loop], None], stored: Sequence[str], working: str) -> Compiled:
    """``body`` as machine code; arguments as in ``Loop``. For one thread at a time."""
    return Compiled(llvm_text(body, stored, working))


def fits_processor() -> bool:
    """Whether this processor has what the loops are written for."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine().lower() in ("aarch64", "arm64")
    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in _NEEDED)


binding.initialize_native_target()
binding.initialize_native_asmprinter()
