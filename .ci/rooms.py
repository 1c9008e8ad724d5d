"""Draws the rooms of the package, and who imports whom, into docs/architecture.md.

python .ci/rooms.py            # writes the picture
python .ci/rooms.py --check    # fails where it is out of date
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "agentmerge"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- made by .ci/rooms.py -->\n", "<!-- end -->\n"
#: These have everything at hand, and are no rooms.
BESIDE = {"__init__", "__main__"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that its text imports, in whatever place."""
    files = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {full if full in files else node.module for full in named}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
        found[name] = {other for other in found[name] if other in files and other != name}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def rooms() -> dict[str, set[str]]:
    """Room, or module beside them -> those that it imports."""
    found: dict[str, set[str]] = {}
    for module, others in imports().items():
        mine = found.setdefault(room(module), set())
        mine |= {room(other) for other in others} - {room(module)} - BESIDE
    return {name: others for name, others in found.items() if name not in BESIDE}


def beyond(graph: dict[str, set[str]], start: Iterable[str]) -> set[str]:
    """All that these lead to."""
    found: set[str] = set()
    todo = [other for name in start for other in graph[name]]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += graph[name]
    return found


def charter(name: str) -> str:
    """The first sentence of a room's head."""
    path = PACKAGE / name / "__init__.py"
    path = path if path.exists() else PACKAGE / f"{name}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def picture() -> str:
    graph = rooms()
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max((height(other) for other in graph[name]), default=-1)
        return heights[name]

    ordered = sorted(graph, key=lambda name: (-height(name), name))
    lines = ["```mermaid", "flowchart TD"]
    for name in ordered:
        # An arrow that another way implies is left out.
        needed = sorted(graph[name] - beyond(graph, graph[name]))
        lines += [f"    {name} --> {other}" for other in needed]
    lines += ["```", "", "| room | what it is |", "|---|---|"]
    for name in ordered:
        shown = f"`{name}/`" if (PACKAGE / name).is_dir() else f"`{name}.py`"
        lines.append(f"| {shown} | {charter(name)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = before + BEGIN + picture() + END + after
    if new == text:
        return 0
    if "--check" in sys.argv:
        print("docs/architecture.md: the rooms have changed; run `python .ci/rooms.py`")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
