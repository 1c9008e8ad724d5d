"""How much memory there is: what this process uses, and what it may still take.

It asks the operating system and the device, and knows nothing of models or merges. It also knows
an error that says that there was no more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Limit:
    """Bytes, and what sets them."""

    size_bytes: int
    source: str


def resident_bytes() -> int:
    """What this process has in memory now."""
    found = _fields(_PROC / "self" / "status").get("VmRSS")
    if found is not None:
        return found
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def host_limit(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Limit:
    """How much more memory this process may take: the least of what the machine has available,
    what its control groups (v1 or v2) leave, and ``RLIMIT_AS``."""
    limits = [_physical(proc), *_cgroup_limits(proc, cgroups), *_address_space(proc)]
    return min(limits, key=lambda limit: limit.size_bytes)


def device_limit(device: str) -> Limit:
    """The same of a CUDA device's own memory."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return Limit(free, f"free on {torch.cuda.get_device_name(device)}")


def ran_out(error: BaseException) -> bool:
    """Whether it says that there was no more memory, in Python's, torch's or the system's words."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said


def _physical(proc: Path) -> Limit:
    found = _fields(proc / "meminfo")
    if "MemAvailable" in found:
        return Limit(found["MemAvailable"], "available on this machine")
    return Limit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of this machine")


def _cgroup_limits(proc: Path, cgroups: Path) -> list[Limit]:
    """One of each group from this process's up to the root that has a limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = next((r for r in (cgroups, cgroups / "unified") if r.is_dir()), cgroups)
            names = ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
                "total_active_file",
            )
        else:
            continue
        # In a container the path is often the host's, and the group is mounted at the root.
        group = root / path.lstrip("/")
        groups = [group, *group.parents] if group.is_dir() else [root]
        for directory in groups:
            left = _left(directory, *names)
            if left is not None:
                limits.append(Limit(left, "left by the control group"))
            if directory == root:
                break
    return limits


def _left(
    directory: Path, limit_file: str, usage_file: str, inactive: str, active: str
) -> int | None:
    try:
        limit = int((directory / limit_file).read_text())  # "max": no limit
        usage = int((directory / usage_file).read_text())
    except (OSError, ValueError):
        return None
    if limit >= _UNLIMITED:
        return None
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        lines = []
    stat = dict(line.split() for line in lines if len(line.split()) == 2)
    cached = int(stat.get(inactive, 0)) + int(stat.get(active, 0))  # given up when it is needed
    return max(0, limit - usage + cached)


def _address_space(proc: Path) -> list[Limit]:
    try:
        import resource
    except ImportError:  # no such limits on this system
        return []
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return []
    used = _fields(proc / "self" / "status").get("VmSize", 0)
    return [Limit(max(0, soft - used), "left by the address space limit (ulimit -v)")]


def _fields(file: Path) -> dict[str, int]:
    """``Name:  123 kB`` lines of a file in /proc, in bytes; empty where there is no such file."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    rows = [line.split() for line in lines]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[2:] == ["kB"]}
