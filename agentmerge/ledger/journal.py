"""Which journal a database can have where it lies: WAL needs memory that its users share, and the
hosts of a network file system share none (https://sqlite.org/wal.html)."""

from __future__ import annotations

from pathlib import Path

MOUNTS = Path("/proc/self/mounts")
#: Types of file systems that several hosts can mount, as the kernel names them.
NETWORK = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "daos", "drvfs", "gfs", "gfs2",
        "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs",
        "prl_fs", "pvfs2", "smb", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "wekafs",
    }
)  # fmt: skip
#: FUSE names the program after the dot; these are of one host.
_LOCAL_FUSE = frozenset(
    {"appimage", "exfat", "fuse-overlayfs", "fusectl", "gocryptfs", "lxcfs", "mergerfs", "ntfs"}
)


def journal_mode(path: Path) -> str:
    """SQLite's journal for a database at this path: "WAL", or "DELETE" on a network."""
    try:
        mounts = MOUNTS.read_text(errors="replace")
    except OSError:
        return "WAL"  # not Linux: as SQLite has it by itself
    return "DELETE" if on_network(path.absolute().parent.resolve(), mounts) else "WAL"


def on_network(folder: Path, mounts: str) -> bool:
    """Whether a mount table (lines of device, mount point, type, ...) has a folder on a network.

    folder: absolute, without links. Of nested mounts the innermost counts, of two on one place the
    later.
    """
    depth, kind = -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(_unescaped(fields[1]))
        if len(point.parts) >= depth and folder.is_relative_to(point):
            depth, kind = len(point.parts), fields[2]
    name, _, program = kind.partition(".")
    return kind in NETWORK or (name == "fuse" and bool(program) and program not in _LOCAL_FUSE)


def _unescaped(text: str) -> str:
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(code, character)
    return text
