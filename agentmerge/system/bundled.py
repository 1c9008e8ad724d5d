"""Our own files that are no Python modules: graphs and prompts."""

from __future__ import annotations

from pathlib import Path


def bundled(name: str) -> Path:
    """Their folder: in the wheel beside this package's code, in a checkout at its root."""
    package = Path(__file__).parents[1]
    inside = package / "_bundled" / name
    return inside if inside.is_dir() else package.parent / name
