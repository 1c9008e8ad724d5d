"""Writes docs/reference from the code: every command, config key, merge method and
public name of Python.

mkdocs asks for the pages (``make docs``): none is stored, so none is out of date.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_origin

os.environ["COLUMNS"] = os.environ["TERMINAL_WIDTH"] = "96"

import typer
from pydantic import BaseModel

from agentmerge.cli.app import app
from agentmerge.config import _OWN_SECTIONS, GenomeConfig, TaskConfig, TasksConfig
from agentmerge.methods import METHODS


def commands() -> str:
    """The help of every command."""
    root = typer.main.get_command(app)
    parts = ["# Commands\n", "What `agentmerge COMMAND --help` prints.\n"]
    for name, command, context in _walk(root, typer.Context(root, info_name="agentmerge")):
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        parts.append(f"## {name}\n\n```text\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _walk(group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = typer.Context(command, info_name=name, parent=context)
        if hasattr(command, "list_commands"):
            yield from _walk(command, inner)
        else:
            yield inner.command_path, command, inner


def config() -> str:
    """Every key with its type and default."""
    parts = ["# Config keys\n", "What they mean is in [Configuration](../config.md).\n"]
    sections: list[tuple[str, Any, str]] = [("genome", GenomeConfig, "genome")]
    sections += [("tasks (each entry)", TaskConfig, "tasks[]"), ("top level", TasksConfig, "")]
    sections += [(name, model, name) for name, model in _OWN_SECTIONS.items()]
    hidden = {"tasks", "sealed_share", "companion", "seed"}  # of TasksConfig: set elsewhere
    for title, model, prefix in sections:
        parts.append(f"## {title}\n\n| key | type | default |\n|---|---|---|")
        for name, info in model.model_fields.items():
            if model is TasksConfig and name in hidden:
                continue
            key = f"{prefix}.{name}" if prefix else name
            default = (
                "required"
                if info.is_required()
                else f"`{_plain(info.get_default(call_default_factory=True))}`"
            )
            parts.append(f"| `{key}` | {_type(info.annotation)} | {default} |")
        parts.append("")
    return "\n".join(parts)


def _plain(value: Any) -> str:
    return (
        {True: "true", False: "false"}.get(value, value)
        if isinstance(value, bool)
        else ("not set" if value is None else "[]" if value == () else str(value))
    )


def _type(annotation: Any) -> str:
    text = str(annotation) if not isinstance(annotation, type) else annotation.__name__
    for old, new in (("typing.", ""), ("agentmerge.config.", ""), (" | None", ""), ("|", "or")):
        text = text.replace(old, new)
    return f"`{text}`"


def methods() -> str:
    """Every merge method with its parameters."""
    parts = ["# Merge methods\n", "What `agentmerge methods` prints, as tables.\n"]
    for method in METHODS.values():
        row = method.to_dict()
        paper = str(row["paper"])
        link = paper if "://" in paper else f"https://arxiv.org/abs/{paper}"
        parts.append(f"## {method.name}\n\n{method.doc}\n")
        parts.append(
            f"base_model {row['base_model']}; computed by {row['engine']}; [paper]({link})\n"
        )
        if row["parameters"]:
            parts.append(
                "| parameter | of | range | default | searched | |\n|---|---|---|---|---|---|"
            )
        for parameter in row["parameters"]:
            scope = "each model" if parameter["scope"] == "source" else "the merge"
            default = "required" if parameter["default"] is None else f"{parameter['default']:g}"
            parts.append(
                f"| `{parameter['name']}` | {scope} | {parameter['low']:g} to "
                f"{parameter['high']:g} | {default} | "
                f"{'yes' if parameter['searched'] else 'where named'} | {parameter['doc']} |"
            )
        parts.append("")
    return "\n".join(parts)


def python() -> str:
    """Every public name with its signature and docstring."""
    parts = [
        "# Python\n",
        "What may be imported; every other module may change with any release.\n",
    ]
    for name in ("agentmerge", "agentmerge.contracts"):
        module = import_module(name)
        parts.append(f"## {name}\n\n{_docstring(module)}")
        for public in module.__all__:
            if not public.startswith("_"):
                parts.append(f"### {public}\n\n{_described(public, getattr(module, public))}")
    return "\n".join(parts)


def _described(name: str, value: Any) -> str:
    """Head and docstring; of a class, those of its methods as well."""
    if not callable(value) or get_origin(value) is not None:
        text = str(value).replace("typing.", "").replace("collections.abc.", "")
        return f"```python\n{name} = {text}\n```\n"
    if not inspect.isclass(value):
        return f"```python\ndef {_head(name, value)}\n```\n\n{_docstring(value)}"
    lines, docs = [f"class {_head(name, value)}"], [_docstring(value)]
    for method, found in vars(value).items():
        if method.startswith("_"):
            continue
        if isinstance(found, property):
            lines.append(f"    {method}  # property")
        elif inspect.isroutine(getattr(value, method)):
            head = _head(method, getattr(value, method))
            lines.append(f"    def {head}".replace("\n", "\n    "))
        else:
            continue
        if said := _docstring(found):
            docs.append(f"`{method}`: {said}")
    return f"```python\n{chr(10).join(lines)}\n```\n\n{chr(10).join(docs)}"


class _Written(str):
    """An annotation as it stands in the code."""

    __repr__ = str.__str__


def _head(name: str, value: Any) -> str:
    """Name and parameters, one a line where they are long."""
    if inspect.isclass(value) and (
        issubclass(value, (Exception, BaseModel)) or hasattr(value, "_is_protocol")
    ):
        return f"{name}({value.__mro__[1].__name__})"
    signature = inspect.signature(value)
    for own in (parameters := dict(signature.parameters)):
        kept = parameters[own]
        if isinstance(kept.annotation, str):
            parameters[own] = kept.replace(annotation=_Written(kept.annotation))
    back = signature.return_annotation
    back = _Written(back) if isinstance(back, str) else back
    whole = signature.replace(parameters=list(parameters.values()), return_annotation=back)
    text = str(whole).replace("typing.", "")
    if len(name + text) <= 90:
        return name + text
    lines = [str(one) for one in parameters.values()]
    first = next(
        (n for n, one in enumerate(parameters.values()) if one.kind == one.KEYWORD_ONLY), None
    )
    if first is not None:
        lines.insert(first, "*")
    tail = text[text.rindex(")") + 1 :]
    return "\n".join([f"{name}(", *(f"    {line}," for line in lines), f"){tail}"])


def _docstring(value: Any) -> str:
    """Its paragraphs as they are written, code for code."""
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    text = inspect.cleandoc(own or "").replace("``", "`")
    return f"{text}\n" if text else ""


PAGES = {
    "commands.md": commands,
    "config-keys.md": config,
    "methods.md": methods,
    "python.md": python,
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks here for more pages; nothing is written into docs/."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}", content=page()))
    return files
