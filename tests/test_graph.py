"""Graph: one picture of tables, what listens, reads and writes, what comes in, and what was seen to happen."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shop import Order, Shop

from anton import cli
from anton.errors import UnknownNode, UnknownTable
from anton.files import Files
from anton.graph import Graph, Node
from anton.outbox import action
from anton.poll import poll
from anton.query import sql
from anton.schedule import cron
from anton.sense import Webhook, post
from anton.table import Table
from anton.wiring import Part, Wiring, ask, wire
from anton.worker import Worker

REPO = Path(__file__).parent.parent


def some() -> Graph:
    graph = Graph()
    graph.add(Node("handler", "thank", place="main.py:3"))
    graph.join("route:POST /orders", "table:orders", "new")
    graph.join("table:orders", "handler:thank", "new")
    graph.join("handler:thank", "table:praise", "new")
    graph.join("table:customers", "handler:thank", "reads")
    graph.join("table:praise", "handler:send", "new")
    graph.join("handler:send", "action:SlackPostMessage")
    return graph


def test_downstream_and_upstream_are_what_comes_of_it_and_what_leads_to_it() -> None:
    assert set(some().downstream("orders").nodes) == {
        "table:orders", "handler:thank", "table:praise", "handler:send", "action:SlackPostMessage"}
    assert set(some().upstream("handler:thank").nodes) == {
        "handler:thank", "table:orders", "table:customers", "route:POST /orders"}
    with pytest.raises(UnknownNode, match='Did you mean "orders"'):
        some().downstream("ordrs")


def test_an_edge_that_is_declared_is_not_seen_alone() -> None:
    graph = some()
    graph.join("handler:thank", "table:praise", seen=True)
    graph.join("handler:thank", "table:log", seen=True)
    written = {target: (edge.how, edge.seen) for (source, target), edge in graph.edges.items()
               if source == "handler:thank"}
    assert written == {"table:praise": ({"new"}, False), "table:log": (set(), True)}
    graph.join("handler:thank", "table:log", "updated")
    assert graph.edges["handler:thank", "table:log"].seen is False


def test_a_loop_is_one_of_what_is_heard_and_not_of_what_is_read() -> None:
    graph = some()
    assert graph.loops() == []
    graph.join("handler:thank", "table:customers", "new")
    assert graph.loops() == []                                         # it reads customers, and hears nothing of them
    graph.join("handler:send", "table:orders", "updated")
    assert graph.loops() == []                                         # thank hears of new ones
    graph.join("handler:send", "table:orders", "new")
    assert graph.loops() == [["orders new", "thank", "praise new", "send", "orders new"]]


def test_mermaid_draws_every_node_and_edge() -> None:
    graph = some()
    graph.join("handler:send", 'table:"Odd"', seen=True)
    drawn = graph.mermaid()
    assert drawn.startswith("flowchart LR\n") and len(drawn.splitlines()) == 1 + len(graph.nodes) + len(graph.edges)
    assert '[("orders")]' in drawn and '(["route POST /orders"])' in drawn and '{{"SlackPostMessage"}}' in drawn
    assert "-.->|seen|" in drawn and '[("#quot;Odd#quot;")]' in drawn


IDS = st.sampled_from([f"{kind}:{name}" for kind in ("table", "handler") for name in "abcde"])


@given(st.lists(st.tuples(IDS, IDS)))
def test_any_graph_is_ordered_and_shown(pairs: list[tuple[str, str]]) -> None:
    graph = Graph()
    for source, target in pairs:
        graph.join(source, target, "new")
    assert sorted(graph.order()) == sorted(graph.nodes)
    place = {id: n for n, id in enumerate(graph.order())}
    if not any(source in graph.downstream(target).nodes for source, target in graph.edges):  # no loops
        assert all(place[source] < place[target] for source, target in graph.edges)
    assert graph.text() and graph.mermaid() and graph.facts()
    for source, target in graph.edges:
        assert target in graph.downstream(source).nodes and source in graph.upstream(target).nodes


FILES = {
    "sql/revenue.sql": "-- anton: model\n-- refresh: orders, @hourly\n-- key: customer\n"
                       "select customer, sum(total) as revenue, count(*) as n from paid group by customer",
    "sql/views.sql": "create or replace view paid as select id, customer, total from orders where status = 'paid';\n"
                     "create or replace function tidy() returns void language plpgsql as "
                     "$$ begin delete from praise; end $$;",
    "sql/flag.sql": "-- anton: handler\n-- on: orders new updated\n-- into: big\n"
                    "insert into big (order_id, sum) select o.id, o.total + p.total from new_records o "
                    "join paid p using (id)",
    "sql/clean.sql": "-- anton: schedule\n-- cron: 0 3 * * *\n-- title: Nightly\nselect tidy()",
    "migrations/0001_make_old.sql": "create table big (order_id bigint primary key, sum numeric);\n",
}


def declare() -> None:
    orders, praise, events = Table("orders", Order), Table("praise"), Table("events")
    loose = Table("loose")

    @action
    async def note() -> None: ...

    @post("/orders", verify=False)
    def create(order: Order) -> Order:
        praise.get(1)
        return orders.append(order)

    Webhook("/github", events, verify=False)
    Files("s3-fs", "in/*.csv").load(into=orders)

    @poll(every="1m", into=events)
    def news(cursor: object) -> list[object]:
        return []

    @cron.daily
    def nightly() -> None:
        events.select().delete()

    @orders.on_new_records
    def thank(records: object) -> None:
        list(sql("select sum from big"))
        praise.append({"text": "thanks"})
        loose_of(loose)

    @praise.on_new_records
    async def send(records: object) -> None:
        note.send()


def loose_of(table: Table[object]) -> None:
    table.append({"a": 1})


@pytest.fixture
def wired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wiring]:
    made = Shop("postgresql://localhost/none", tmp_path_factory.mktemp("shop"))
    for path, text in FILES.items():
        made.file(path, text)
    yield wire(made.declare(declare).app)


def edges(graph: Graph) -> set[tuple[str, str, str]]:
    return {(source, target, " ".join(sorted(edge.how)) or ("seen" if edge.seen else ""))
            for (source, target), edge in graph.edges.items()}


def test_the_code_alone_says_what_leads_to_what(wired: Wiring) -> None:
    assert edges(wired.graph) == {
        ("route:POST /orders", "table:orders", "new"), ("table:praise", "route:POST /orders", "reads"),
        ("webhook:/github", "table:events", "new"), ("poll:news", "table:events", "new"),
        ("schedule:nightly", "table:events", "deleted"),
        ("files:s3-fs/in/*.csv", "table:s3_fs_in_csv", "deleted new updated"),
        ("table:s3_fs_in_csv", "handler:load_orders", "new updated"), ("handler:load_orders", "table:orders", "new"),
        ("table:orders", "handler:thank", "new"), ("handler:thank", "table:praise", "new"),
        ("table:big", "handler:thank", "reads"), ("table:loose", "handler:thank", "uses"),
        ("table:praise", "handler:send", "new"), ("handler:send", "action:note", ""),
        ("table:orders", "view:paid", "reads"), ("function:tidy", "table:praise", "deleted"),
        ("table:orders", "model:revenue", "deleted new updated"), ("view:paid", "model:revenue", "reads"),
        ("model:revenue", "table:revenue", "deleted new rebuilt updated"),
        ("table:orders", "handler:flag", "new updated"), ("view:paid", "handler:flag", "reads"),
        ("handler:flag", "table:big", "new"), ("schedule:clean", "function:tidy", "calls"),
    }
    places = {node.id: node.place for node in wired.graph.nodes.values()}
    assert places["model:revenue"] == "sql/revenue.sql" and places["view:paid"] == "sql/views.sql"
    assert places["handler:thank"].startswith("tests/test_graph.py:")


def test_a_column_is_traced_through_views_to_where_it_began(wired: Wiring) -> None:
    revenue = {row["column"]: row for row in wired.columns_of("revenue")}
    assert revenue["revenue"]["from"] == [{"table": "paid", "column": "total", "by": "model:revenue"}]
    assert revenue["n"]["from"] == []
    assert wired.columns_text("revenue").splitlines()[3:] == [
        "revenue", "  <- paid.total  (model revenue sql/revenue.sql)",
        "    <- orders.total  (view paid sql/views.sql)", "n"]
    total = next(row for row in wired.columns_of("orders") if row["column"] == "total")
    assert total["to"] == [{"table": "big", "column": "sum", "by": "handler:flag"},
                           {"table": "paid", "column": "total", "by": "view:paid"}]
    assert [row["column"] for row in wired.columns_of("big")] == ["order_id", "sum"]
    with pytest.raises(UnknownTable, match='Did you mean "orders"'):
        wired.columns_of("ordrs")


def test_others_add_their_own(tmp_path: object) -> None:
    class Project:
        def graph(self) -> Part:
            return Part([Node("dbt", "daily", about="incremental")],
                        [("table:orders", "dbt:daily", "reads"), ("dbt:daily", "table:analytics.daily", "rebuilt")],
                        {("analytics.daily", "sum"): {("public.orders", "total")}}, ["dbt: one note"])

    shop = Shop("postgresql://localhost/none", tmp_path)  # type: ignore[arg-type]
    shop.declare(declare).app.graphed.append(Project())
    wired = wire(shop.app)
    assert ("dbt:daily", "table:analytics.daily", "rebuilt") in edges(wired.graph)
    assert "table:analytics.daily" in wired.graph.downstream("orders").nodes
    assert wired.columns_of("analytics.daily")[0]["from"][0]["column"] == "total"
    assert "dbt: one note" in wired.graph.notes


def test_the_database_adds_what_was_seen_and_who_else_listens(shop: Shop) -> None:
    def declare() -> None:
        orders, _ = Table("orders", Order), Table("praise")
        log = Table("log")

        @orders.on_new_records
        def thank(records: object) -> None:
            loose_of(log)

    shop.declare(declare).migrate()
    shop.sql("create view big as select id, total as sum from orders", "create table far (id bigint)",
             "create schema other", "create table other.one (id int)", "create view alone as select id from other.one",
             "select anton.handler('copy', 'orders', 'new', 'insert into far (id) select id from new_records')",
             "select anton.handler('back', 'log', 'new', 'insert into far (id) select id from new_records')",
             "select anton.schedule('tidy', '0 3 * * *', 'delete from far')",
             "insert into orders (id, customer, total) values (1, 'Ann', 3)")

    async def work() -> Wiring:
        await Worker(shop.db, shop.app).run_until_idle()
        async with shop.db.conn() as conn:
            told = await ask(shop.db, conn)
        await shop.db.close()
        return wire(shop.app, told)

    wired = asyncio.run(work())
    assert edges(wired.graph) == {
        ("table:orders", "handler:thank", "new"), ("handler:thank", "table:log", "seen"),
        ("table:log", "handler:thank", "uses"), ("table:orders", "view:big", "reads"),
        ("table:orders", "handler:sql.copy", "new"), ("handler:sql.copy", "table:far", "new"),
        ("table:log", "handler:sql.back", "new"), ("handler:sql.back", "table:far", "new"),
        ("schedule:sql.tidy", "table:far", "deleted")}
    assert "  new  thank" in wired.graph.text() and "-> log (seen)" in wired.graph.text()
    assert wired.columns_of("far")[0]["from"] == [{"table": "log", "column": "id", "by": "handler:sql.back"},
                                                  {"table": "orders", "column": "id", "by": "handler:sql.copy"}]


@pytest.mark.parametrize(("form", "words"), [("text", ()), ("mermaid", ("--mermaid",))])
def test_the_docs_show_what_the_example_draws(form: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO / "examples" / "slack_ai_bot")
    assert cli.main(["graph", "--offline", *words]) == 0
    drawn = capsys.readouterr().out
    page = (REPO / "docs" / "graph.md").read_text()
    block = re.search(rf"<!-- graph: {form} -->\n```{form}\n(.*?)```", page, re.DOTALL)
    assert block is not None and block[1] == drawn
