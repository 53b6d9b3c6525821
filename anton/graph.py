"""Graph: what leads to what: tables, and all that listens to them, writes them and comes in from outside.

    graph = Graph()
    graph.add(Node("table", "orders"), Node("handler", "thank", place="main.py:12"))
    graph.join("table:orders", "handler:thank", "new")            what happens to orders, and thank hears of
    graph.join("handler:thank", "table:praise", "new")            what thank does to praise
    graph.downstream("orders").mermaid()

Others add nodes and edges of their own, such as a dbt project's manifest; wiring.py adds an app's.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from anton.errors import UnknownNode

SOURCES = ("route", "webhook", "schedule", "poll", "files")            # where something comes in
STEPS = ("handler", "sql", "model", "dbt", "function")                 # what hears, reads and writes
PLACES = ("table", "view", "action")                                   # where something is kept, or leaves
KINDS = (*SOURCES, *STEPS, *PLACES)
_SHAPES = {"table": '[("{}")]', "view": '[("{}")]', "action": '{{{{"{}"}}}}', "model": '[["{}"]]', "dbt": '[["{}"]]',
           "handler": '["{}"]', "sql": '["{}"]', "function": '["{}"]'}
_COMES_IN = '(["{}"])'


@dataclass(frozen=True)
class Node:
    """A thing. kind: one of KINDS. app: "" for what belongs to none. place: "main.py:12". about: "Daily, at 03:00"."""

    kind: str
    name: str
    app: str = ""
    place: str = ""
    about: str = ""

    @property
    def id(self) -> str:
        """ "table:orders". """
        return f"{self.kind}:{self.name}"


@dataclass(frozen=True)
class Edge:
    """One thing leads to another, from source to target, both ids.

    how: what happens to the table at one end: ops such as "new"; "reads"; "uses": there is no saying. seen: learnt from
    what was run; no declaration says so.
    """

    source: str
    target: str
    how: frozenset[str] = frozenset()
    seen: bool = False


@dataclass
class Part:
    """What others add. edges: (source id, target id, *words). columns: (table, column) -> where it comes from."""

    nodes: Sequence[Node] = ()
    edges: Sequence[tuple[str, ...]] = ()
    columns: Mapping[tuple[str, str], Iterable[tuple[str, str]]] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass
class Graph:
    """Nodes by id, edges by (source, target, seen or not). notes: what could not be found out."""

    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[tuple[str, str], Edge] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, *nodes: Node) -> None:
        """Adds nodes. Of two with one id the first stays, with what it lacks from the second."""
        for node in nodes:
            there = self.nodes.get(node.id, node)
            self.nodes[node.id] = replace(there, app=there.app or node.app, place=there.place or node.place,
                                          about=there.about or node.about)

    def join(self, source: str, target: str, *how: str, seen: bool = False) -> None:
        """Adds an edge between two ids; one that is there gets its words, too. What is declared is not "seen"."""
        there = self.edges.get((source, target))
        if there is not None:
            how, seen = (*there.how, *(() if seen else how)), there.seen and seen
        self.edges[source, target] = Edge(source, target, frozenset(how), seen)
        for id in (source, target):                                    # a table that nobody declared
            kind, _, name = id.partition(":")
            self.add(Node(kind, name))

    def find(self, name: str) -> list[str]:
        """The ids of a name, with its kind or without: "orders", "handler:orders". Raises UnknownNode."""
        found = [id for id, node in self.nodes.items() if name in (id, node.name)]
        if not found:
            raise UnknownNode(name, [node.name for node in self.nodes.values()])
        return found

    def downstream(self, name: str) -> Graph:
        """What comes of it: it, and all that its edges lead to."""
        return self._reached(name, [(edge.source, edge.target) for edge in self.edges.values()])

    def upstream(self, name: str) -> Graph:
        """What leads to it."""
        return self._reached(name, [(edge.target, edge.source) for edge in self.edges.values()])

    def _reached(self, name: str, pairs: Iterable[tuple[str, str]]) -> Graph:
        beyond: dict[str, list[str]] = {}
        for source, target in pairs:
            beyond.setdefault(source, []).append(target)
        found = dict.fromkeys(self.find(name))
        waiting = deque(found)
        while waiting:
            for id in beyond.get(waiting.popleft(), ()):
                if id not in found:
                    found[id] = None
                    waiting.append(id)
        return Graph({id: node for id, node in self.nodes.items() if id in found},
                     {pair: edge for pair, edge in self.edges.items() if {*pair} <= found.keys()}, list(self.notes))

    def loops(self) -> list[list[str]]:
        """Ways that lead back to where they begin: ["orders new", "thank", "orders new"]; one of each loop at least."""
        found: dict[str, list[tuple[str, str]]] = {}
        for heard in self.edges.values():
            if not heard.source.startswith(("table:", "view:")):
                continue
            for done in self.edges.values():
                if done.source == heard.target and done.target.startswith(("table:", "view:")):
                    for op in heard.how - {"reads", "uses"}:
                        for other in sorted(meant(done.how)):
                            ways = found.setdefault(f"{heard.source} {op}", [])
                            ways.append((heard.target, f"{done.target} {other}"))
        return [[word.partition(":")[2] for word in chain] for chain in cycles(found)]

    def order(self) -> list[str]:
        """The ids, causes before what comes of them, as far as there are no loops."""
        before = dict.fromkeys(self.nodes, 0)
        after: dict[str, list[str]] = {}
        for source, target in self.edges:
            before[target] += 1
            after.setdefault(source, []).append(target)
        done: dict[str, None] = {}
        while len(done) < len(before):
            left = [id for id in before if id not in done]
            for id in [id for id in left if not before[id]] or left[:1]:   # a loop: begin it anywhere
                done[id] = None
                for target in after.get(id, ()):
                    before[target] -= 1
        return list(done)

    # How it is shown

    def facts(self) -> dict[str, Any]:
        """For --json and other programs."""
        return {"nodes": [{"id": node.id, "kind": node.kind, "name": node.name, "app": node.app, "place": node.place,
                           "about": node.about} for node in map(self.nodes.__getitem__, self.order())],
                "edges": [{"from": edge.source, "to": edge.target, "how": sorted(edge.how), "seen": edge.seen}
                          for edge in self.edges.values()],
                "loops": self.loops(), "notes": self.notes}

    def text(self) -> str:
        """For people: what comes in, then each table with what listens to it and what that leads to."""
        order = self.order()
        lines: list[tuple[str, str, str]] = []
        for id in order:
            if self.nodes[id].kind in SOURCES:
                lines.append((self._said(id), self._beyond(id), self._where(id)))
        for id in order:
            if self.nodes[id].kind in PLACES:
                listed = [edge for edge in self.edges.values() if edge.source == id]
                alone = not listed and any(edge.target == id for edge in self.edges.values())
                if not alone:                                          # else it is said where it is written
                    lines.append((self._said(id), "", self._where(id)))
                lines += [self._heard(edge) for edge in listed]
        heard = {edge.target for edge in self.edges.values() if self.nodes[edge.source].kind in PLACES}
        for id in order:
            if self.nodes[id].kind in STEPS and id not in heard:
                lines.append((self._said(id), self._beyond(id), self._where(id)))
        widths = [max((len(line[n]) for line in lines), default=0) for n in range(2)]
        shown = ["  ".join((a.ljust(widths[0]), b.ljust(widths[1]), c)).rstrip() for a, b, c in lines]
        shown += [f"a loop: {' -> '.join(chain)}" for chain in self.loops()]
        return "\n".join((*shown, *self.notes)) or "nothing is declared"

    def _heard(self, edge: Edge) -> tuple[str, str, str]:
        """A line below a table. What comes of a step that reads several is said where it listens."""
        node = self.nodes[edge.target]
        name = node.name if node.kind == "handler" else self._said(node.id)
        listens = any(one.target == node.id and one.how - {"reads", "uses"} for one in self.edges.values())
        beyond = "" if node.kind in SOURCES or (listens and edge.how <= {"reads", "uses"}) else self._beyond(node.id)
        return f"  {' '.join(sorted(edge.how)) or '->'}  {name}", beyond, self._where(node.id)

    def _said(self, id: str) -> str:
        node = self.nodes[id]
        return node.name if node.kind == "table" else f"{node.kind} {node.name}"

    def _beyond(self, id: str) -> str:
        """ "-> praise, letters (updated)". """
        said = []
        for edge in self.edges.values():
            if edge.source == id:
                how = " ".join(sorted(edge.how - {"new"})) if not edge.seen else "seen"
                said.append(self._said(edge.target) + (f" ({how})" if how else ""))
        return f"-> {', '.join(said)}" if said else ""

    def _where(self, id: str) -> str:
        node = self.nodes[id]
        return "  ".join(part for part in (node.place, node.about) if part)

    def mermaid(self) -> str:
        """A flowchart that GitHub and others draw."""
        ids = {id: f"{_plain(id)}{n}" for n, id in enumerate(self.order(), 1)}
        lines = ["flowchart LR"]
        for id, short in ids.items():
            node = self.nodes[id]
            label = (node.name if node.kind in (*STEPS, *PLACES) else f"{node.kind} {node.name}").replace('"', "#quot;")
            lines.append("  " + short + _SHAPES.get(node.kind, _COMES_IN).format(label))
        for edge in self.edges.values():
            arrow = "-.->" if edge.seen else "-->"
            how = "seen" if edge.seen else " ".join(sorted(edge.how))
            lines.append(f"  {ids[edge.source]} {arrow}{f'|{how}|' if how else ''} {ids[edge.target]}")
        return "\n".join(lines)


def meant(ops: Iterable[str]) -> set[str]:
    """What can be heard of these: of a rebuild its records, too; where nobody said what is done, any change."""
    found = set(ops)
    return found if found - {"rebuilt"} else found | {"new", "updated", "deleted"}


def _plain(id: str) -> str:
    return re.sub(r"\W", "_", id.partition(":")[2], flags=re.ASCII)


def cycles(edges: Mapping[str, Sequence[tuple[str, str]]]) -> list[list[str]]:
    """Ways that lead back to where they begin: ["orders new", handler, …, "orders new"]; one of every loop at least."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(path: list[str]) -> None:
        for handler, table in edges.get(path[-1], ()):
            if table in path[::2]:
                found.append([*path[path.index(table):], handler, table])
            elif table not in done:
                walk([*path, handler, table])
        done.add(path[-1])

    for start in sorted(edges):
        if start not in done:
            walk([start])
    return found
