"""Where the columns of dbt's models come from: the demo project, compiled, against what a reader sees in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from anton.dbt.lineage import columns, part
from anton.dbt.manifest import Manifest
from anton.graph import Graph

DEMO = Path(__file__).parent.parent / "dbt_project"
ORDERS = {"public.orders": ["id", "customer", "country", "total", "status", "placed_at"]}
PARENTS = {"orders_paid": ["source.demo.shop.orders"], "revenue_by_customer": ["model.demo.orders_paid"],
           "revenue_by_country": ["seed.demo.countries", "model.demo.orders_paid"],
           "revenue_by_day": ["model.demo.orders_paid"]}


def compiled(file: Path) -> str:
    """What dbt makes of a file of the demo: relations in place of ref() and source(), the rest of Jinja away."""
    text = re.sub(r"\{\{ config\(.*?\) \}\}", "", file.read_text(), flags=re.DOTALL)
    text = re.sub(r"\{% if .*?%\}.*?\{% endif %\}", "", text, flags=re.DOTALL)
    text = re.sub(r"\{\{ source\('shop', '(\w+)'\) \}\}", r'"db"."public"."\1"', text)
    return re.sub(r"\{\{ ref\('(\w+)'\) \}\}", r'"db"."public"."\1"', text)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    def node(name: str, type: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "type": type, "schema": "public", "alias": name, "materialized": "table", "tags": [],
                "key": [], "file": f"{name}.sql", "parents": PARENTS.get(name, []), "columns": {}, **more}

    files = sorted((DEMO / "models").glob("*.sql"))
    assert {file.stem for file in files} == set(PARENTS)               # a new model wants its expectations here
    return Manifest({"project": "demo", "tests": {}, "exposures": {}, "macros": [], "stamp": [],
                     "sources": {"source.demo.shop.orders": {"schema": "public", "alias": "orders", "name": "orders"}},
                     "nodes": {"seed.demo.countries": node("countries", "seed")} | {
                         f"model.demo.{file.stem}": node(file.stem, "model", code=compiled(file)) for file in files}})


def paid(*names: str) -> set[tuple[str, str]]:
    return {("public.orders_paid", name) for name in names}


EXPECTED = {
    ("orders_paid", "id"): {("public.orders", "id")},
    ("orders_paid", "customer"): {("public.orders", "customer")},
    ("orders_paid", "country"): {("public.orders", "country")},
    ("orders_paid", "total"): {("public.orders", "total")},
    ("orders_paid", "placed_at"): {("public.orders", "placed_at")},
    ("revenue_by_customer", "customer"): paid("customer"),
    ("revenue_by_customer", "orders"): set(),                          # count(*)
    ("revenue_by_customer", "revenue"): paid("total"),
    ("revenue_by_country", "code"): {("public.countries", "code")},
    ("revenue_by_country", "country"): {("public.countries", "country")},
    ("revenue_by_country", "revenue"): paid("total"),
    ("revenue_by_day", "day"): paid("placed_at"),
    ("revenue_by_day", "orders"): set(),
    ("revenue_by_day", "revenue"): paid("total"),
}


def test_each_column_of_the_demo_comes_from_where_a_reader_sees_it(manifest: Manifest) -> None:
    found = columns(manifest, {**ORDERS, "public.countries": ["code", "country"]}, "public")
    assert found == {(f"public.{table}", column): sources for (table, column), sources in EXPECTED.items()}


def test_the_project_is_nodes_and_edges_of_the_apps_graph(manifest: Manifest) -> None:
    found = part(manifest, ORDERS, "public", "shop")
    assert {node.id for node in found.nodes} == {f"dbt:{name}" for name in (*PARENTS, "countries")}
    assert {("table:orders", "dbt:orders_paid", "reads"), ("dbt:orders_paid", "table:orders_paid", "rebuilt"),
            ("table:countries", "dbt:revenue_by_country", "reads")} <= set(found.edges)


def test_a_loop_through_what_dbt_builds_is_one(manifest: Manifest) -> None:
    found = Graph()
    made = part(manifest, ORDERS, "public", "shop", ["source.demo.shop.orders"])
    found.add(*made.nodes)
    for source, target, *how in made.edges:
        found.join(source, target, *how)
    assert found.loops() == []
    found.join("table:revenue_by_day", "handler:again", "updated")
    found.join("handler:again", "table:orders", "new")
    assert found.loops() == [["orders_paid rebuilt", "revenue_by_day", "revenue_by_day updated", "again", "orders new",
                              "orders_paid", "orders_paid rebuilt"]]
    assert found.edges["table:countries", "dbt:revenue_by_country"].how == {"reads"}  # nobody waits for that


def test_a_model_that_sqlglot_does_not_understand_keeps_its_tables(manifest: Manifest) -> None:
    nodes = {id: {**node, "code": "select from from"} for id, node in manifest.facts["nodes"].items()}
    facts = {**manifest.facts, "nodes": nodes}
    found = part(Manifest(facts), ORDERS, "public", "shop")
    assert found.columns == {} and ("table:orders", "dbt:orders_paid", "reads") in found.edges
