"""The code that decides a task's answers, as a plain record: a function's own source, and every
file of its author's that it may reach through imports. Installed packages and Python itself are
known by their versions. What code reads besides (data files, the network) is not known here.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import site
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from agentmerge.errors import UserError

_INSTALLED = tuple(
    {
        str(Path(path).resolve())
        for path in (
            *(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")),
            *site.getsitepackages(),
            site.getusersitepackages(),
        )
    }
)

#: Known by their versions even where they are installed from a checkout.
_VERSIONED = ("agentmerge", "lm_eval")

#: What was described in this process: a file -> ``code_files`` of it.
_described: dict[Path, dict[str, str]] = {}


def described_code(function: Any) -> list[Any]:
    """[name, source, digests of the author's files by what their code calls them]."""
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    try:
        source = inspect.getsource(function)
        file = inspect.getsourcefile(function)
    except (TypeError, OSError):
        code = getattr(function, "__code__", None)
        return [name, code.co_code.hex() if code else ""]
    own = name.rpartition(".")[2]
    if file is None or not is_users(Path(file)):
        return [own, source]
    return [own, source, code_files(Path(file))]


def files_of(made: Any) -> dict[str, str]:
    """``code_files`` of the file that a function, a class or an object's class is written in; empty
    where there is none."""
    written = made if inspect.isroutine(made) or inspect.isclass(made) else type(made)
    file = inspect.getsourcefile(written)
    return code_files(Path(file)) if file else {}


def run_file(path: Path, prefix: str) -> ModuleType:
    """A user's Python file as a module of its own name; what it raises is raised.

    Raises:
        UserError: it is no file of Python's.
    """
    spec = spec_from_file_location(f"{prefix}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} cannot be loaded as Python")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # annotations are looked up there
    spec.loader.exec_module(module)
    return module


def failed_in(path: Path, error: Exception) -> str:
    """Where in a user's file an error rose, and which, in a line."""
    lines = [f":{at.lineno}" for at in extract_tb(error.__traceback__) if at.filename == str(path)]
    said = " ".join(str(error).split())
    return f"{path}{lines[-1] if lines else ''} cannot be loaded: {type(error).__name__}: {said}"


def is_users(file: Path) -> bool:
    """Whether a file is neither Python's own nor of an installed package."""
    path = str(file.resolve())
    return "site-packages" not in path and not path.startswith(_INSTALLED)


def code_files(file: Path) -> dict[str, str]:
    """A user's file and all of the user's files that it imports, and they: name -> SHA-256."""
    reached = _reached(file.resolve())
    found = {name: _read(other)[0] for name, other in reached.items()}
    _described[file.resolve()] = found
    return dict(sorted(found.items()))


def forget_changed() -> None:
    """Have Python read code anew of which a file was changed since it was described: a process that
    lives long (a server) would run what it read then, under the name of what is there now."""
    for file, then in list(_described.items()):
        reached = _reached(file) if file.is_file() else {}
        if {name: _read(other)[0] for name, other in reached.items()} != then:
            del _described[file]
            stale = {str(file), *map(str, reached.values())}
            for name, module in list(sys.modules.items()):
                if (getattr(module, "__file__", None) or "") in stale:
                    del sys.modules[name]


def _reached(file: Path) -> dict[str, Path]:
    """Every user's file that one leads to, by the name of its import; itself as ""."""
    found = {"": file}
    todo = [file]
    while todo:
        here = todo.pop()
        for name, other in _imported(here):
            if other not in found.values():
                found[name] = other
                todo.append(other)
    return found


def _imported(file: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every import of a file that leads to a user's file, wherever it stands."""
    for level, module, names in _read(file)[1]:
        folder = file.parent
        for _ in range(level - 1):
            folder = folder.parent
        # `from a import b`: b may be a module of its own.
        for dotted in (module, *(f"{module}.{name}".strip(".") for name in names)):
            if not dotted or dotted.partition(".")[0] in _VERSIONED:
                continue
            for path in _places(dotted, folder, relative=level > 0):
                if path.is_file() and is_users(path):
                    yield "." * level + dotted, path.resolve()


def _places(dotted: str, folder: Path, *, relative: bool) -> Iterator[Path]:
    """Where a module may lie: beside the file that imports it, or where Python finds it."""
    parts = dotted.split(".")
    roots = [folder]
    if not relative:
        roots += _roots(parts[0])
    for root in roots:
        for count in range(1, len(parts) + 1):
            place = root.joinpath(*parts[:count])
            yield place.with_name(place.name + ".py")
            yield place / "__init__.py"


def _roots(package: str) -> list[Path]:
    """The folders that hold a top-level module, by what is imported or could be."""
    try:
        spec: ModuleSpec | None = find_spec(package)
    except (ImportError, ValueError):
        loaded = getattr(sys.modules.get(package), "__file__", None)
        return [Path(loaded).parent] if loaded else []
    if spec is None or spec.origin in (None, "built-in", "frozen"):
        places = list(spec.submodule_search_locations or ()) if spec else []
        return [Path(place).parent for place in places]
    file = Path(str(spec.origin))
    return [file.parent.parent if file.name == "__init__.py" else file.parent]


def _read(file: Path) -> tuple[str, tuple[tuple[int, str, tuple[str, ...]], ...]]:
    """(SHA-256, imports) of a file."""
    stat = file.stat()
    return _parsed(file, stat.st_mtime_ns, stat.st_size)


@cache
def _parsed(
    file: Path, mtime_ns: int, size: int
) -> tuple[str, tuple[tuple[int, str, tuple[str, ...]], ...]]:
    content = file.read_bytes()
    found: list[tuple[int, str, tuple[str, ...]]] = []
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # not Python of this version: known by its bytes alone
        tree = ast.Module([], [])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            found.append((node.level, node.module or "", names))
    return hashlib.sha256(content).hexdigest(), tuple(found)
