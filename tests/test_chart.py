"""Chart: causes stand before what comes of them, nothing lies on another, and a loop ends."""

from __future__ import annotations

import pytest

from anton.chart import HEIGHT, WIDTH, Fact, chart
from anton.graph import Graph, Node


def shop() -> Graph:
    graph = Graph()
    graph.add(Node("route", "POST /orders"), Node("table", "orders"), Node("handler", "thank"), Node("action", "mail"),
              Node("handler", "count"), Node("table", "totals"))
    for source, target in (("route:POST /orders", "table:orders"), ("table:orders", "handler:thank"),
                           ("table:orders", "handler:count"), ("handler:thank", "action:mail"),
                           ("handler:count", "table:totals")):
        graph.join(source, target, "new")
    return graph


@pytest.mark.parametrize("tall", [False, True])
def test_causes_come_first_and_no_box_lies_on_another(tall: bool) -> None:
    drawn = chart(shop(), {"table:orders": Fact("3 records", "busy")}, tall=tall)
    at = {box.id: (box.y if tall else box.x) for box in drawn.boxes}
    assert all(at[source] < at[target] for source, target in shop().edges)
    for a in drawn.boxes:
        assert 0 <= a.x <= drawn.width - WIDTH and 0 <= a.y <= drawn.height - HEIGHT
        assert not [b for b in drawn.boxes if b is not a and abs(a.x - b.x) < WIDTH and abs(a.y - b.y) < HEIGHT]
    assert len(drawn.lines) == 5 and sum(line.tone == "busy" for line in drawn.lines) == 3
    assert {box.kind for box in drawn.boxes} == {"in", "place", "step", "out"}


def test_a_loop_is_drawn_and_ends() -> None:
    graph = Graph()
    graph.join("table:a", "handler:b", "new")
    graph.join("handler:b", "table:a", "new")
    drawn = chart(graph, {})
    assert len(drawn.boxes) == 2 and len(drawn.lines) == 2


def test_nothing_is_drawn_of_nothing() -> None:
    assert chart(Graph(), {}).boxes == []
