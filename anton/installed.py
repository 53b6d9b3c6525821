"""Installed: the components there are: those of the package anton_components, and those of others, by entry point.

    [project.entry-points."anton.components"]
    AcmePost = "acme_anton:AcmePost"
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from anton.component import Component
from anton.option import NONE, options

GROUP = "anton.components"
OURS = "anton_components"


@dataclass(frozen=True)
class Installed:
    """A component that could be used. cls: None when it cannot be imported; why says so. module: where it is."""

    name: str
    module: str
    cls: type[Component] | None
    why: str = ""

    @property
    def about(self) -> str:
        """The first sentence of its docstring."""
        return (inspect.getdoc(self.cls) or "").partition("\n\n")[0].replace("\n", " ") if self.cls else self.why

    def facts(self) -> dict[str, Any]:
        """All there is to say, for JSON."""
        known: dict[str, Any] = {"name": self.name, "module": self.module, "about": self.about}
        if self.cls is None:
            return known
        return {**known, "service": self.cls.service, "variable": self.cls.variable, "issued": self.cls.issued,
                "acts": self.cls.acts,
                "doc": inspect.getdoc(self.cls) or "", "options": options_of(self.cls)}


def installed() -> list[Installed]:
    """All of them by name. One that cannot be imported is among them, and hides no other."""
    found = {one.name: one for one in _ours()}
    for point in entry_points(group=GROUP):
        module = point.value.partition(":")[0]
        try:
            cls = point.load()
        except Exception as error:                                     # whatever another's module raises
            found[point.name] = Installed(point.name, module, None, f"cannot be imported: {error!r}")
            continue
        fits = isinstance(cls, type) and issubclass(cls, Component)
        found[point.name] = Installed(point.name, module, cls if fits else None,
                                      "" if fits else f"{point.value} is no Component")
    return [found[name] for name in sorted(found)]


def _ours() -> Iterator[Installed]:
    try:
        package = importlib.import_module(OURS)
    except ImportError:
        return
    for root in package.__path__:                                      # a namespace package: pkgutil sees no parts
        for file in sorted(Path(root).glob("vendor/*/*.py")):
            path = f"{OURS}.vendor.{file.parent.name}.{file.stem}"
            for name, value in vars(importlib.import_module(path)).items():
                if not isinstance(value, type) or name.startswith("_"):
                    continue
                if issubclass(value, Component) and value.__module__ == path:
                    yield Installed(name, path, value)


def options_of(cls: type[Component]) -> dict[str, dict[str, Any]]:
    """{name: {"type", "default", "about"}} of what it is given; no "default" where it must be."""
    return {one.name: {"type": one.text, **({} if one.default is NONE else {"default": one.default}),
                       "about": one.about} for one in options(cls).values()}


def page(one: Installed) -> str:
    """Its page in docs/components/, as Markdown."""
    assert one.cls is not None
    module = importlib.import_module(one.module).__doc__ or ""
    example = [line[4:] for line in module.splitlines() if line.startswith("    ")]
    lines = [f"# {one.name}", "", "<!-- made by: make components; edit the docstring -->", "",
             *(f"{part}\n" for part in _paragraphs(inspect.getdoc(one.cls) or "")),
             "```text", f"from {one.module} import {one.name}", "", *example, "```", "",
             "| option | type | default | what it is |", "|---|---|---|---|"]
    for name, option in options_of(one.cls).items():
        default = f"`{option['default']!r}`" if "default" in option else "must be given"
        kind = option["type"].replace("|", "\\|")
        about = option["about"].replace("|", "\\|")
        lines.append(f"| `{name}` | `{kind}` | {default} | {about} |")
    about = [f"Service: {one.cls.service or 'none'}."]
    if one.cls.variable:
        about.append(f"Credential: what is given, else `{one.cls.variable}`"
                     + (f", from <{one.cls.issued}>." if one.cls.issued else "."))
    about.append("It has effects out there: they are captured unless the process is live."
                 if one.cls.acts else "It has no effects out there.")
    if one.cls.example:
        about.append(f"It runs in [examples/{one.cls.example}](../../examples/{one.cls.example}/main.py).")
    return "\n".join([*lines, "", " ".join(about), ""])


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()).replace("|", "\\|") for part in text.split("\n\n")]
