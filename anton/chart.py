"""Chart: a graph as boxes and lines with their places, for a page to draw.

    chart(graph, {"table:orders": Fact("1,204", "12 a minute")}, tall=False).boxes

Causes stand before what comes of them, left to right, or from the top down; what leads back is drawn as a line back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anton.graph import PLACES, SOURCES, Graph

WIDTH, HEIGHT = 190, 58                                                # of a box, in pixels
ALONG, ASIDE = 74, 22                                                  # between two layers; between two of one layer
EDGE = 14                                                              # around all
LETTERS = 22                                                           # of a name that fit


@dataclass(frozen=True)
class Fact:
    """What is said of a node: a line below its name. tone: "", "busy", "waits" or "bad"."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Box:
    """A node at its place. kind: "in", "place", "out" or "step"."""

    id: str
    name: str
    full: str
    kind: str
    about: str
    fact: Fact
    x: int
    y: int


@dataclass(frozen=True)
class Line:
    """An edge: a path of SVG. tone: that of where it leads from."""

    path: str
    tone: str
    seen: bool


@dataclass(frozen=True)
class Chart:
    """All of it, with its size in pixels."""

    boxes: list[Box]
    lines: list[Line]
    width: int
    height: int


def chart(graph: Graph, facts: Mapping[str, Fact], *, tall: bool = False) -> Chart:
    """The places of a graph's nodes. tall: from the top down, as on a phone."""
    order = [id for id in graph.order() if not id.startswith("sql:")]
    rows = _layers(graph, order)
    widest = max((len(row) for row in rows), default=0)
    long, short = (HEIGHT + ALONG // 2, WIDTH + ASIDE) if tall else (WIDTH + ALONG, HEIGHT + ASIDE)
    boxes: dict[str, Box] = {}
    for n, row in enumerate(rows):
        shift = (widest - len(row)) * short // 2
        for k, id in enumerate(row):
            along, aside = EDGE + n * long, EDGE + shift + k * short
            boxes[id] = _box(graph, id, facts, *((aside, along) if tall else (along, aside)))
    lines = [_line(boxes[edge.source], boxes[edge.target], edge.seen, tall) for edge in graph.edges.values()
             if edge.source in boxes and edge.target in boxes]
    deep, wide = 2 * EDGE + max(0, len(rows) * long - (long - (HEIGHT if tall else WIDTH))), \
        2 * EDGE + max(0, widest * short - ASIDE)
    return Chart(list(boxes.values()), lines, *((wide, deep) if tall else (deep, wide)))


def _layers(graph: Graph, order: list[str]) -> list[list[str]]:
    """The nodes layer by layer; within one, those beside each other whose causes are."""
    at: dict[str, int] = {}
    before: dict[str, list[str]] = {}
    for source, target in graph.edges:
        before.setdefault(target, []).append(source)
    for id in order:
        at[id] = max((at[one] + 1 for one in before.get(id, ()) if one in at), default=0)
    rows: list[list[str]] = [[] for _ in range(max(at.values(), default=-1) + 1)]
    for id in order:
        rows[at[id]].append(id)
    place: dict[str, float] = {}
    for row in rows:
        middle = {id: _mean([place[one] for one in before.get(id, ()) if one in place], k) for k, id in enumerate(row)}
        row.sort(key=middle.__getitem__)
        place |= {id: k - len(row) / 2 for k, id in enumerate(row)}
    return rows


def _mean(numbers: list[float], otherwise: float) -> float:
    return sum(numbers) / len(numbers) if numbers else otherwise


def _box(graph: Graph, id: str, facts: Mapping[str, Fact], x: int, y: int) -> Box:
    node = graph.nodes[id]
    kind = "in" if node.kind in SOURCES else "out" if node.kind == "action" else \
        "place" if node.kind in PLACES else "step"
    name = node.name if len(node.name) <= LETTERS else node.name[:LETTERS - 1] + "…"
    return Box(id, name, node.name, kind, node.kind, facts.get(id, Fact(node.about)), x, y)


def _line(a: Box, b: Box, seen: bool, tall: bool) -> Line:
    if tall:
        x1, y1, x2, y2 = a.x + WIDTH // 2, a.y + HEIGHT, b.x + WIDTH // 2, b.y
        bend = max(16, abs(y2 - y1) // 2)
        path = f"M{x1} {y1}C{x1} {y1 + bend} {x2} {y2 - bend} {x2} {y2}"
    else:
        x1, y1, x2, y2 = a.x + WIDTH, a.y + HEIGHT // 2, b.x, b.y + HEIGHT // 2
        bend = max(24, abs(x2 - x1) // 2)
        path = f"M{x1} {y1}C{x1 + bend} {y1} {x2 - bend} {y2} {x2} {y2}"
    return Line(path, "busy" if "busy" in (a.fact.tone, b.fact.tone) else "", seen)
