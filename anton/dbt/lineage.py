"""Lineage: what a dbt project adds to the graph of an app: its nodes, what they read, where their columns come from.

Columns are read from the SQL that dbt compiled; what sqlglot does not understand is known by its tables alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from anton.db import quote
from anton.dbt.manifest import Manifest
from anton.graph import Node, Part

if TYPE_CHECKING:
    from anton.lineage import Column

CHANGES = ("new", "updated", "deleted", "truncate")


def part(manifest: Manifest, tables: Mapping[str, Iterable[str]], default: str, app: str,
         heard: Collection[str] = ()) -> Part:
    """The project as nodes and edges. tables: columns of the app's Tables, by "public.orders". default: its schema.

    heard: sources and nodes whose changes have what is downstream of them built.
    """
    nodes, edges = [], list[tuple[str, ...]]()
    heard = {*heard, *manifest.downstream(heard)}
    for node in manifest.nodes.values():
        if node.materialized == "ephemeral":
            continue
        nodes.append(Node("dbt", node.name, app, node.file, node.materialized))
        edges.append((f"dbt:{node.name}", f"table:{_shown(manifest, node.id, default)}", "rebuilt"))
        for parent in sorted(manifest.reads(node.id)):
            above = manifest.nodes.get(parent)
            words = ("reads",) if parent not in heard else CHANGES if above is None else ("rebuilt",)
            edges.append((f"table:{_shown(manifest, parent, default)}", f"dbt:{node.name}", *words))
    return Part(nodes, edges, columns(manifest, tables, default))


def columns(manifest: Manifest, tables: Mapping[str, Iterable[str]], default: str) -> dict[Column, set[Column]]:
    """(table, column) -> the columns it is made of, for each node whose compiled SQL is known."""
    coded = [id for id, node in manifest.nodes.items() if node.code and node.materialized != "ephemeral"]
    if not coded:
        return {}
    sqlread, known = importlib.import_module("anton.sqlread"), dict(tables)   # takes a while to import
    found: dict[Column, set[Column]] = {}
    for level in manifest.levels(coded):
        for id in level:
            outputs = sqlread.columns(manifest.nodes[id].code, sqlread.Tables(known, default))
            name = relation(manifest, id)
            found |= {(name, column): sources for column, sources in outputs.items()}
            known.setdefault(name, list(outputs))
    return found


def relation(manifest: Manifest, id: str) -> str:
    """A node's or a source's table, as SQL names it: "public.orders"."""
    node = manifest.nodes.get(id)
    schema, alias = (node.schema, node.alias) if node is not None else (
        manifest.sources[id]["schema"], manifest.sources[id]["alias"])
    return f"{quote(schema)}.{quote(alias)}"


def _shown(manifest: Manifest, id: str, default: str) -> str:
    return relation(manifest, id).removeprefix(f"{quote(default)}.")
