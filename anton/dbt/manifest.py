"""Manifest: what Anton knows of a dbt project: its nodes, their relations, and what depends on what.

Made by child.py of dbt's own manifest, and kept in .anton/dbt/PROJECT.json for the next start of an app.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anton.errors import DeclarationError, did_you_mean

SKIPPED = (".git", ".anton", "__pycache__", ".venv", "node_modules")    # at a project's root: nothing of dbt's
WRITTEN = {"target-path": "target", "log-path": "logs"}                # where dbt writes, unless dbt_project.yml says


@dataclass(frozen=True)
class Node:
    """A model, seed or snapshot. id: dbt's unique_id. key: columns that tell its rows apart, () when none are known."""

    id: str
    name: str
    type: str
    schema: str
    alias: str
    materialized: str
    file: str
    parents: tuple[str, ...]
    key: tuple[str, ...]
    tags: tuple[str, ...]
    columns: Mapping[str, Mapping[str, Any]]
    code: str | None = None                                            # as dbt compiled it

    @property
    def stored(self) -> bool:
        """Whether it is a table, whose rows can be compared; a view or an ephemeral model is not."""
        return self.materialized not in ("view", "ephemeral", "materialized_view")


class Manifest:
    """A project. nodes, sources, tests, exposures: by dbt's unique_id. macros: Anton's, that it has itself."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self.project: str = facts["project"]
        self.nodes = {id: Node(id, node["name"], node["type"], node["schema"], node["alias"], node["materialized"],
                               node["file"], tuple(node["parents"]), tuple(node["key"]), tuple(node["tags"]),
                               node["columns"], node.get("code")) for id, node in facts["nodes"].items()}
        self.sources: Mapping[str, Any] = facts["sources"]
        self.tests: Mapping[str, Any] = facts["tests"]
        self.exposures: Mapping[str, Any] = facts["exposures"]
        self.macros: Collection[str] = facts["macros"]
        self._children: dict[str, list[str]] = {}
        for node in self.nodes.values():
            for parent in node.parents:
                self._children.setdefault(parent, []).append(node.id)

    def node(self, name: str) -> Node:
        """A model, seed or snapshot by its name. Raises DeclarationError with the likely meaning."""
        found = [node for node in self.nodes.values() if name in (node.name, node.id)]
        if len(found) == 1:
            return found[0]
        if found:
            raise DeclarationError(f'dbt project "{self.project}" has several models "{name}": '
                                   f"{', '.join(node.id for node in found)}. Name one of these", name=name)
        known = sorted(node.name for node in self.nodes.values())
        raise DeclarationError(f'dbt project "{self.project}" has no model "{name}".{did_you_mean(name, known)} '
                               f"It has: {', '.join(known) or 'none'}", name=name)

    def children(self, id: str) -> list[str]:
        """What reads a node or a source itself."""
        return self._children.get(id, [])

    def downstream(self, ids: Iterable[str]) -> set[str]:
        """What is made of these, directly or not, without themselves."""
        return self._closure(ids, lambda id: self._children.get(id, ()))

    def upstream(self, ids: Iterable[str]) -> set[str]:
        """What these are made of, without themselves and without sources."""
        return {id for id in self._closure(ids, self._parents) if id in self.nodes}

    def of_tables(self, tables: Iterable[tuple[str, str]]) -> set[str]:
        """Sources, and nodes, that are these (schema, table)."""
        wanted = set(tables)
        return {id for id, source in self.sources.items() if (source["schema"], source["alias"]) in wanted} | {
            node.id for node in self.nodes.values() if (node.schema, node.alias) in wanted}

    def levels(self, ids: Collection[str]) -> list[list[str]]:
        """These in the order to build them: each level needs only those before it. Ephemeral ones are seen through."""
        depth: dict[str, int] = {}

        def of(id: str) -> int:
            if id not in depth:
                depth[id] = 0                                          # dbt has no cycles
                above = max((of(parent) for parent in self._parents(id)), default=0)
                depth[id] = above + (1 if id in ids else 0)
            return depth[id]

        found: dict[int, list[str]] = {}
        for id in sorted(ids):
            found.setdefault(of(id), []).append(id)
        return [found[level] for level in sorted(found)]

    def reads(self, id: str) -> set[str]:
        """What a node reads: sources, and nodes that are stored or views; ephemeral ones are looked through."""
        found: set[str] = set()
        for parent in self._parents(id):
            node = self.nodes.get(parent)
            found |= self.reads(parent) if node is not None and node.materialized == "ephemeral" else {parent}
        return found

    def reads_of_test(self, id: str) -> set[str]:
        """What a test reads, likewise."""
        found: set[str] = set()
        for parent in self.tests[id]["parents"]:
            node = self.nodes.get(parent)
            found |= self.reads(parent) if node is not None and node.materialized == "ephemeral" else {parent}
        return found

    def _parents(self, id: str) -> tuple[str, ...]:
        node = self.nodes.get(id)
        return node.parents if node is not None else ()

    @staticmethod
    def _closure(ids: Iterable[str], step: Any) -> set[str]:
        found: set[str] = set()
        todo = list(ids)
        while todo:
            for other in step(todo.pop()):
                if other not in found:
                    found.add(other)
                    todo.append(other)
        return found


def fingerprint(folder: Path) -> tuple[int, str]:
    """Of all files of a project, but those that dbt writes: how many, and a hash of paths, sizes and times."""
    count, found = 0, hashlib.blake2b(digest_size=16)
    skipped = _skipped(folder)
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(one for one in folders if Path(root, one) not in skipped)
        for file in sorted(files):
            try:
                stat = Path(root, file).stat()
            except OSError:
                continue
            count += 1
            path = f"{root[len(str(folder)):]}/{file}"
            found.update(f"{path}\0{stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return count, found.hexdigest()


def _skipped(folder: Path) -> set[Path]:
    """Folders of a project that hold nothing of it; others of such names, as models/logs, are read."""
    try:
        text = (folder / "dbt_project.yml").read_text()
    except (OSError, UnicodeDecodeError):
        text = ""
    said = dict(re.findall(r"""^(target-path|log-path)\s*:\s*["']?([^"'#\n]*[^"'#\s])""", text, re.MULTILINE))
    written = {Path(os.path.normpath(folder / said.get(key, usual))) for key, usual in WRITTEN.items()}
    return {folder / name for name in SKIPPED} | written - {folder}
