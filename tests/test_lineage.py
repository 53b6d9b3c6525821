"""Lineage: which column comes from which, and what a text of SQL reads, writes and makes."""

from __future__ import annotations

import pytest

from anton.lineage import Tables
from anton.sqlread import columns, hidden, read, split

TABLES = Tables({
    "public.orders": ["id", "customer_id", "total", "status", "data"],
    "public.customers": ["id", "name", "city"],
    "public.big": ["id", "total"],
    'public."Odd Ones"': ["Id", "plain"],
    "shop.items": ["order_id", "sku", "n"],
})

EXPECTED = {  # SQL: {output: "table.column …"}, tables of public without their schema
    "select id, total from orders": {"id": "orders.id", "total": "orders.total"},
    "select o.id, c.name as who from orders o join customers c on c.id = o.customer_id":
        {"id": "orders.id", "who": "customers.name"},
    "with x as (select id, total * 2 as t from orders) select id, t + 1 as t1 from x":
        {"id": "orders.id", "t1": "orders.total"},
    "with a as (select * from orders), b as (select * from a) select id, status from b":
        {"id": "orders.id", "status": "orders.status"},
    "with recursive t (n, m) as (select id, total from orders union all select n + 1, m from t where n < 9) "
    "select n, m from t":
        {"n": "orders.id", "m": "orders.total"},
    "select id, name from customers union all select customer_id, status from orders":
        {"id": "customers.id orders.customer_id", "name": "customers.name orders.status"},
    "select sum(total) over (partition by customer_id order by id) as running from orders":
        {"running": "orders.total orders.customer_id orders.id"},
    "select city, count(*), sum(o.total) from customers c left join orders o on o.customer_id = c.id group by city":
        {"city": "customers.city", "count": "", "sum": "orders.total"},
    "select 1 as one, 'x', null::text as nothing, now() from orders":
        {"one": "", "?column?": "", "nothing": "", "now": ""},
    "select string_agg(name, ','), date_trunc('day', max(city::date)), count(distinct id) filter (where id > 1) "
    "from customers":
        {"string_agg": "customers.name", "date_trunc": "customers.city", "count": "customers.id"},
    "select * from customers": {"id": "customers.id", "name": "customers.name", "city": "customers.city"},
    "select o.total, c.* from orders o, customers c":
        {"total": "orders.total", "id": "customers.id", "name": "customers.name", "city": "customers.city"},
    "select t.t from (select max(total) as t from orders) t": {"t": "orders.total"},
    "select name, (select max(o.total) from orders o where o.customer_id = c.id) as best, (select c.city) "
    "from customers c":
        {"name": "customers.name", "best": "orders.total", "city": "customers.city"},
    "select id, total, name from orders join customers using (id)":
        {"id": "orders.id customers.id", "total": "orders.total", "name": "customers.name"},
    'select "Id" as "My Id", PLAIN from "Odd Ones"': {"My Id": 'Odd Ones".Id', "plain": 'Odd Ones".plain'},
    "select id as total, total as id from orders order by total": {"total": "orders.id", "id": "orders.total"},
    "select case when total > 1 then status else 'x' end, coalesce(status, data ->> 'a'), total::int from orders":
        {"case": "orders.total orders.status", "coalesce": "orders.status orders.data", "total": "orders.total"},
    "select i.order_id, l.sku from shop.items i cross join lateral (select sku from shop.items j where j.n = i.n) l":
        {"order_id": "shop.items.order_id", "sku": "shop.items.sku"},
    "select x.a, u from orders o, jsonb_to_recordset(o.data) as x(a int), unnest(array[o.total]) u":
        {"a": "orders.data", "u": "orders.total"},
    "select row_to_json(o) as row from orders o": {"row": "orders.*"},
    "select a, b from (values (1, 2)) v (a, b)": {"a": "", "b": ""},
    "select distinct on (customer_id) customer_id, total from orders order by customer_id, total desc":
        {"customer_id": "orders.customer_id", "total": "orders.total"},
    'select "o"."id" from "db"."public"."orders" as "o"': {"id": "orders.id"},
    "select id, id as id from orders union select total, null from big": {"id": "orders.id big.total"},
    "select * from nosuch": {"*": "nosuch.*"},
    "table customers": {"id": "customers.id", "name": "customers.name", "city": "customers.city"},
}


def spelled(sources: set[tuple[str, str]]) -> str:
    return " ".join(sorted(f"{table}.{column}".removeprefix("public.").removeprefix('"') for table, column in sources))


@pytest.mark.parametrize("sql", EXPECTED)
def test_each_output_comes_from_these_columns(sql: str) -> None:
    found = {name: spelled(sources) for name, sources in columns(sql, TABLES).items()}
    assert found == {name: " ".join(sorted(text.split(" ") if "Odd" not in text else [text])) for name, text in
                     EXPECTED[sql].items()}


WRITES = {  # SQL: reads, writes, {column written: sources}
    "insert into big (id) select id from new_records where total > {limit}":
        ("orders", "big new", {"big.id": "orders.id"}),
    "insert into big select n.id, n.total from new_records n on conflict (id) do update "
    "set total = big.total + excluded.total":
        ("orders", "big new, big updated", {"big.id": "orders.id", "big.total": "big.total orders.total"}),
    "insert into big values (1, (select max(total) from orders)), (2, {x})":
        ("orders", "big new", {"big.id": "", "big.total": "orders.total"}),
    "update big b set total = o.total from orders o, customers c left join shop.items i on i.n = c.id "
    "where o.id = b.id":
        ("customers orders shop.items", "big updated", {"big.total": "orders.total"}),
    "update big set (id, total) = (select id, total from orders limit 1)":
        ("orders", "big updated", {"big.id": "orders.id", "big.total": "orders.total"}),
    "update big set total = total * 2": ("", "big updated", {"big.total": "big.total"}),
    "delete from big using old_records o where o.id = big.id": ("orders", "big deleted", {}),
    "with gone as (delete from big where id in (select id from old_records) returning id, total)"
    " insert into orders (id, total) select id, total from gone":
        ("big orders", "big deleted, orders new", {"orders.id": "big.id", "orders.total": "big.total"}),
    "merge into big b using new_records n on n.id = b.id when matched then update set total = n.total"
    " when not matched then insert (id, total) values (n.id, 0)":
        ("orders", "big new, big updated", {"big.id": "orders.id", "big.total": "orders.total"}),
    "truncate big, shop.items": ("", "big truncate, shop.items truncate", {}),
    "copy big from stdin": ("", "big new", {}),
    "refresh materialized view concurrently sums": ("", "sums rebuilt", {}),
    "do $$ begin insert into big select id from orders; delete from shop.items; end $$":
        ("orders", "big new, shop.items deleted", {}),
    "insert into big (id) select id from only (orders)": ("", "big new", {}),
}


@pytest.mark.parametrize("sql", WRITES)
def test_a_statement_reads_and_writes_these(sql: str) -> None:
    found = read(sql, TABLES, "public.orders")
    reads, writes, fills = WRITES[sql]
    assert sorted(name.removeprefix("public.") for name in found.reads) == reads.split()
    assert sorted(f"{name.removeprefix('public.')} {op}" for name, op in found.writes) == (writes.split(", "))
    assert {f"{table.removeprefix('public.')}.{column}": spelled(set(sources))
            for (table, column), sources in found.fills.items()} == fills


def test_what_sqlglot_does_not_read_is_read_in_words_and_said() -> None:
    found = read("select 1;\n\ncreate policy p on orders using (true);\ndo $$ begin end $$", TABLES)
    assert found.warnings == ["line 4: read at table level only (sqlglot does not read such statements)"]
    assert read("select frm where from orders", TABLES).warnings[0].startswith("line 1: read at table level only (")


def test_what_is_made_is_known_with_its_columns() -> None:
    found = read("create view v (a, b) as select id, total from orders; create table t (x int, y text primary key);"
                 "create materialized view m as select count(*) as n from v;"
                 "create or replace function f() returns void language plpgsql as $$ begin delete from big; end $$",
                 TABLES)
    assert found.makes == {"public.v": "view", "public.t": "table", "public.m": "view"}
    assert found.fills["public.v", "b"] == {("public.orders", "total")}
    assert {column for table, column in found.fills if table == "public.t"} == {"x", "y"}
    assert found.bodies == {"f": (set(), {("public.big", "deleted")})}


def test_names_that_are_not_there_are_found_with_their_place_and_what_is() -> None:
    text = "select o.totl, nam\n  from orders o, customrs c where idd = 1"
    found = {one.name: (text[one.start:one.start + 8].split()[0].strip(","), one.known) for one in
             read(text, TABLES).unknown}
    assert found["totl"] == ("totl", TABLES.columns["public.orders"])
    assert found["nam"][0] == "nam" and found["idd"][0] == "idd"
    assert found["public.customrs"] == ("customrs", tuple(TABLES.columns))
    right = "select o.id, x.id, (o).id, ctid from orders o, (select id from big) x order by x.id"
    assert not read(right, TABLES).unknown


def test_placeholders_are_values_and_braces_in_text_are_braces() -> None:
    text = "select {a}, '{b}', \"{c}\" -- {d}\n, $${e}$$ from orders where id = {id}"
    assert hidden(text) == "select 'a', '{b}', \"{c}\" -- {d}\n, $${e}$$ from orders where id = 'id'"
    assert len(hidden(text)) == len(text)


def test_statements_end_at_their_semicolons_alone() -> None:
    text = "-- a;\nselect ';', E'\\';', $$;$$ ;\n/* ; */ select 2; ;"
    assert [text[start:end] for start, end in split(text)] == ["select ';', E'\\';', $$;$$", "select 2"]


@pytest.mark.parametrize("sql", ["", ";", "select", "'", "$$", "with", "insert into", "\x00", "select ((((",
                                 "merge into x", "update orders set", "create view v as", "🙂",
                                 "select * from (select * from", "copy", "select {", "select {}", "create function f()",
                                 "insert into big values", "truncate"])
def test_nothing_raises(sql: str) -> None:
    read(sql, TABLES, "public.orders")
