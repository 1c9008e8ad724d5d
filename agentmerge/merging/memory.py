"""How much memory there is: what this process uses, and what it may still take.

It asks the operating system and the device, and knows nothing of models or merges. It also knows
an error that says that there was no more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from agentmerge.errors import UserError

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


@dataclass(frozen=True, slots=True)
class Device:
    """A CUDA device: free_bytes are of the moment."""

    name: str
    free_bytes: int
    total_bytes: int


def cuda_devices() -> int:
    """How many CUDA devices this process may use; asked without a context on one."""
    import torch

    return torch.cuda.device_count()


def device_of(device: str) -> Device:
    """A CUDA device as it is now.

    A context takes half a gigabyte of the device and forbids to fork, so a process that has none is
    not given one: another process looks.

    Raises:
        UserError: it cannot be asked.
    """
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return Device(torch.cuda.get_device_name(device), *torch.cuda.mem_get_info(device))
    done = subprocess.run([sys.executable, "-c", _LOOK, device], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"the device {device!r} cannot be asked for its memory: {reason}")
    return Device(*json.loads(done.stdout.splitlines()[-1]))


def device_name(device: str) -> str:
    """What its maker calls it."""
    return _first_look(device).name


def device_total(device: str) -> int:
    """All of its memory, in bytes."""
    return _first_look(device).total_bytes


@cache
def _first_look(device: str) -> Device:
    """What does not change is asked once, before an engine hides other devices from its process."""
    return device_of(device)


def device_limit(device: str) -> Limit:
    """How much of a CUDA device's memory is free."""
    found = device_of(device)
    return Limit(found.free_bytes, f"free on {found.name}")


_LOOK = """\
import json, sys, torch
device = sys.argv[1]
print(json.dumps([torch.cuda.get_device_name(device), *torch.cuda.mem_get_info(device)]))
"""


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
