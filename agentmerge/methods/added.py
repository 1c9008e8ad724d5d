"""Merge methods that others bring: a package by an entry point, a config by naming a file.

Nothing is imported before a package's method is asked for by its name. A config's file is run only
where tensors are merged (``merging/foreign.py``): all that is said of it here is in the config.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from agentmerge import plugins
from agentmerge.errors import UserError
from agentmerge.methods.kinds import Kind, Method, Parameter
from agentmerge.system.code import code_files, files_of

GROUP = "agentmerge.methods"
#: What axes that choose a model are called.
_TAKEN = frozenset({"base", "partner", "model"})
_KINDS = ("float", "log", "int", "bool")
_BASES = ("required", "optional", "ignored")


class MethodTable(Mapping[str, Method]):
    """Methods by name. Iterating gives ours and installed packages'; a config's own are found by
    the name that ``declare`` gave them.

    Raises, where a package's method is asked for:
        UserError: it cannot be imported, or is none.
    """

    def __init__(self, built_in: Mapping[str, Method]) -> None:
        self._built_in = dict(built_in)
        self._declared: dict[str, Method] = {}
        self._full: dict[str, str] = {}

    def __getitem__(self, name: str) -> Method:
        found = self._built_in.get(name) or self._declared.get(name)
        if found is None and name in (points := self._points()):
            found = _installed(points[name])
        if found is None:
            raise KeyError(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._declared or name in self._points()

    def __iter__(self) -> Iterator[str]:
        yield from self._built_in
        yield from self._points()

    def __len__(self) -> int:
        return len(self._built_in) + len(self._points())

    def declare(self, name: str, body: Mapping[str, Any]) -> tuple[str, str]:
        """Add a config's method: the name under which it is found from now on, everywhere, and the
        digest of its code.

        name: as the config has it. body: its ``worker.methods`` entry, as plain values, what is as
        usual left out. The full name ends in the digest of all that it is, so that a recipe never
        stands for two merges. Where ``digest`` is in ``body``, its file is not looked at.

        Raises:
            UserError: it is no legal method, or its file is not there.
        """
        digest = body.get("digest") or _digest_of_file(body["code"])
        method = Method(
            name,
            str(body.get("doc") or f"A method of {body['code']}."),
            _parameters(body.get("source"), name),
            _parameters(body.get("shared"), name),
            body.get("base", "required"),
            "",
            engine="foreign",
            least=body.get("least") or 1,
            most=body.get("most"),
            home=str(body["code"]),
            digest=digest,
        )
        told = {key: value for key, value in body.items() if key not in ("code", "doc", "digest")}
        said = json.dumps([told, digest], sort_keys=True)
        full = f"{name}@{hashlib.sha256(said.encode()).hexdigest()[:8]}"
        if name in self:
            raise UserError(f"merge method {name!r} is there already; call yours otherwise")
        self._declared[full] = replace(checked(method), name=full)
        self._full[name] = full
        return full, str(digest)

    def beside(self, method: Method) -> MethodTable:
        """The same table, with one of ours more."""
        found = MethodTable(self._built_in | {method.name: method})
        found._declared, found._full = self._declared, self._full
        return found

    def full_name(self, name: str) -> str:
        """Of a config's method, the one that was declared last; any other name as it stands."""
        return self._full.get(name, name)

    def _points(self) -> dict[str, EntryPoint]:
        points = plugins.known(GROUP)
        for name in points:
            if name in self._built_in:
                raise UserError(
                    f"merge method {name!r} is agentmerge's own, and {points[name].value} claims "
                    "its name; uninstall that package"
                )
        return points


def checked(method: Method) -> Method:
    """The method, if every space and recipe can live with it.

    Raises:
        UserError: what it lacks.
    """
    where, parameters = f"merge method {method.name!r}", (*method.source, *method.shared)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", method.name):
        raise UserError(f"{where}: a name has lower-case letters, digits and underscores")
    if method.base not in _BASES:
        raise UserError(f"{where}: base {method.base!r} must be one of {', '.join(_BASES)}")
    names = [parameter.name for parameter in parameters]
    for name in names:
        if names.count(name) > 1 or name in _TAKEN or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"{where}: a parameter cannot be called {name!r}, or is there twice")
    for parameter in parameters:
        _check(parameter, f"{where}, parameter {parameter.name!r}")
    return method


def _check(parameter: Parameter, where: str) -> None:
    low, high, default = parameter.low, parameter.high, parameter.default
    if parameter.kind not in _KINDS:
        raise UserError(f"{where}: kind {parameter.kind!r} must be one of {', '.join(_KINDS)}")
    if not (abs(low) < 1e300 and abs(high) < 1e300 and low < high):
        raise UserError(f"{where}: low {low:g} must be below high {high:g}")
    if parameter.kind == "log" and low <= 0:
        raise UserError(f"{where}: low {low:g} must be above 0 on a logarithmic scale")
    if parameter.kind == "bool" and (low, high) != (0, 1):
        raise UserError(f"{where}: a switch is from 0 to 1")
    if parameter.whole and (low != int(low) or high != int(high)):
        raise UserError(f"{where}: {low:g} and {high:g} must be whole numbers")
    if default is not None and not low <= default <= high:
        raise UserError(f"{where}: default {default:g} must be from {low:g} to {high:g}")


def _parameters(raw: Mapping[str, Any] | None, method: str) -> tuple[Parameter, ...]:
    found = []
    for name, body in (raw or {}).items():
        default = body.get("default")
        doc = str(body.get("doc") or f"{name} of {method}.")
        given = {key: body[key] for key in ("low", "high", "kind", "searched") if key in body}
        found.append(Parameter(name, doc, None if default is None else float(default), **given))
    return tuple(found)


@cache
def _installed(point: EntryPoint) -> Method:
    found = plugins.load(GROUP, point.name)
    method = found if isinstance(found, Method) else of_mergekit(found, point.name)
    if method.name != point.name or not callable(method.kernel):
        raise UserError(
            f"{point.name!r} ({point.value}) is no merge method: it needs a kernel, and the name "
            f"{method.name!r} must be its entry point's"
        )
    package = f"{point.dist.name} {point.dist.version}" if point.dist else ""
    own = found if found is not method else method.kernel
    files = json.dumps(files_of(getattr(own, "implementation", own)))
    digest = hashlib.sha256(f"{package}\n{files}".encode()).hexdigest()
    return checked(replace(method, engine="foreign", digest=digest))


def _digest_of_file(code: str) -> str:
    file, colon, name = code.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UserError(f"{code!r} names no merge method; write FILE.py:NAME")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"no file at {path}; name an existing Python file")
    said = json.dumps([name, code_files(path)])
    return hashlib.sha256(said.encode()).hexdigest()


def unchanged(method: Method) -> bool:
    """Whether the file of a config's method is what it was when it was declared."""
    return _digest_of_file(method.home) == method.digest


def of_mergekit(found: Any, name: str, *, bounded: bool = True) -> Method:
    """What mergekit's ``@merge_method`` makes, with bounds from its annotations.

    bounded: whether it must have them.

    Raises:
        UserError: it is nothing of the kind, or has parameters without bounds.
    """
    spec = getattr(found, "spec", None)
    if spec is None or not hasattr(spec, "parameters") or not hasattr(spec, "contract"):
        raise UserError(
            f"{name!r} is no merge method: give a Method of agentmerge.contracts, or what "
            "mergekit's merge_method makes"
        )
    contract = spec.contract
    base = "ignored" if contract.base.value == "forbidden" else str(contract.base.value)
    scoped = [(p.scope.value, _parameter(p, name, bounded)) for p in spec.parameters]
    source = tuple(parameter for scope, parameter in scoped if scope != "shared")
    shared = tuple(parameter for scope, parameter in scoped if scope == "shared")
    if base != "ignored" and any(scope == "input" for scope, _ in scoped):
        raise UserError(f"{name!r} wants a value of the base too; annotate it with PerNonBase")
    doc = str(spec.pretty_name or f"mergekit's {name}.")
    apart = base != "ignored"
    return Method(
        name,
        doc,
        source,
        shared,
        base,  # type: ignore[arg-type]
        str(spec.reference_url or ""),
        least=max(1, (contract.min_non_base if apart else contract.min_inputs) or 1),
        most=contract.max_non_base if apart else contract.max_inputs,
        kernel=found,
    )


def _parameter(parameter: Any, method: str, bounded: bool) -> Parameter:
    kind, marks = parameter.value_type, []
    if get_origin(kind) is Annotated:
        kind, *marks = get_args(kind)
    marks += [inner for mark in marks for inner in getattr(mark, "metadata", ())]
    ends = {
        key: float(getattr(mark, key))
        for mark in marks
        for key in ("ge", "gt", "le", "lt")
        if getattr(mark, key, None) is not None
    }
    low, high = ends.get("ge", ends.get("gt")), ends.get("le", ends.get("lt"))
    if kind is bool:
        low, high = 0.0, 1.0
    if bounded and (low is None or high is None):
        raise UserError(
            f"{parameter.name!r} of merge method {method!r} has no bounds to search in; annotate "
            "it with them, as in Annotated[float, Field(ge=0, le=1)]"
        )
    default = None if parameter.required else float(parameter.default)
    named: Kind = "bool" if kind is bool else "int" if kind is int else "float"
    doc = f"{parameter.name} of {method}."
    return Parameter(parameter.name, doc, default, low or 0.0, 1.0 if high is None else high, named)
