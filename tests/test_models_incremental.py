"""Incremental models: only the groups that a change names, and never anything else than a full rebuild."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shop import Shop

from anton.errors import MigrationError
from anton.worker import Worker

HEADER = "-- anton: model\n-- refresh: orders\n-- key: {key}\n-- incremental: orders.customer\n"
SUMS = (HEADER.format(key="customer") +
        "select customer, count(*) as n, sum(total) as total from orders where customer is not null group by customer")
ROWS = (HEADER.format(key="id") + "select id, customer, total,\n"
        "rank() over (partition by customer order by total, id) as place from orders")
LEFT = (HEADER.format(key="who") + "select c.who, count(o.id) as n from customers c left join orders o\n"
        "on o.customer = c.who group by c.who")
TABLES = ("create table orders (id int primary key, customer text, total int)",
          "create table customers (who text primary key)", "insert into customers values ('a'), ('b'), ('c')",
          "create table log (op text, key text)")
LOG = """create function note_{model}() returns trigger language plpgsql as $$begin
  if tg_op = 'INSERT' then insert into log select 'n{model}', {key} from new_table;
  elsif tg_op = 'DELETE' then insert into log select 'd{model}', {key} from old_table;
  else insert into log select 'u{model}', n.{key} from new_table n; end if; return null; end$$;
create trigger a after insert on {model} referencing new table as new_table for each statement
  execute function note_{model}();
create trigger b after update on {model} referencing new table as new_table for each statement
  execute function note_{model}();
create trigger c after delete on {model} referencing old table as old_table for each statement
  execute function note_{model}()"""
MODELS = {"sums": "customer", "ranked": "id", "counts": "who"}


@pytest.fixture
def three(shop: Shop) -> Shop:
    shop.sql(*TABLES)
    for name, text in (("sums", SUMS), ("ranked", ROWS), ("counts", LEFT)):
        shop.file(f"sql/{name}.sql", text)
    shop.migrate()
    for name, key in MODELS.items():
        shop.sql(LOG.format(model=name, key=key))
    return shop


def work(shop: Shop) -> None:
    asyncio.run(Worker(shop.db, shop.app).run_until_idle())


def full(shop: Shop, model: str) -> list[tuple[Any, ...]]:
    body = shop.sql(f"select body from anton.model where name = '{model}'")[0][0]
    return sorted(shop.sql(body), key=repr)


def test_only_the_groups_that_changed_are_looked_at(three):
    three.sql("insert into orders select g, chr(97 + g % 3), g from generate_series(1, 300) g")
    work(three)
    # a row that no group of the change holds is left as it is, right or wrong
    three.sql("update sums set n = 0 where customer in ('a', 'b')")
    three.sql("update orders set total = total + 1 where customer = 'b'")
    work(three)
    assert three.sql("select customer, n from sums order by 1") == [("a", 0), ("b", 100), ("c", 100)]
    assert three.sql("select is_full from anton.model") == [(False,)] * 3
    three.sql("select anton.refresh('sums', true)")
    assert three.sql("select customer, n from sums order by 1") == [("a", 100), ("b", 100), ("c", 100)]


customer = st.sampled_from(["a", "b", "c", "d", None])
row = st.tuples(st.integers(1, 12), customer, st.integers(0, 3))
step = st.one_of(
    st.tuples(st.just("insert"), st.lists(row, min_size=1, max_size=25)),
    st.tuples(st.just("move"), st.integers(1, 12), customer),
    st.tuples(st.just("total"), customer, st.integers(0, 3)),
    st.tuples(st.just("rekey"), st.integers(1, 12), st.integers(13, 20)),
    st.tuples(st.just("delete"), st.integers(1, 12), st.integers(1, 12)),
    *(st.tuples(st.just(word)) for word in ("truncate", "work", "commit", "late")))


def run(conn: psycopg.Connection[Any], one: tuple[Any, ...]) -> None:
    if one[0] == "insert":
        with conn.cursor() as cursor:
            cursor.execute("insert into orders select distinct on (id) * from unnest(%s::int[], %s::text[], %s::int[]) "
                           "v (id, c, t) on conflict (id) do update set customer = excluded.customer, "
                           "total = excluded.total", [list(column) for column in zip(*one[1], strict=True)])
    elif one[0] == "move":
        conn.execute("update orders set customer = %s where id = %s", (one[2], one[1]))
    elif one[0] == "total":
        conn.execute("update orders set total = %s where customer is not distinct from %s", (one[2], one[1]))
    elif one[0] == "rekey":
        conn.execute("update orders set id = %s where id = %s and not exists (select from orders where id = %s)",
                     (one[2], one[1], one[2]))
    elif one[0] == "delete":
        conn.execute("delete from orders where id between %s and %s", one[1:])
    else:
        conn.execute("truncate orders")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(step, min_size=1, max_size=12))
def test_incremental_refreshes_end_where_a_full_rebuild_does_and_their_events_are_the_difference(three, steps):
    three.sql("truncate orders")
    work(three)
    three.sql("truncate log")
    seen = {model: {one[0]: one for one in three.sql(f"table {model}")} for model in MODELS}
    with psycopg.connect(three.url, autocommit=True) as now, psycopg.connect(three.url) as late:
        for one in steps:
            if one[0] == "work":
                seen = compare_events(three, seen, lambda: work(three))
            elif one[0] == "commit":
                late.commit()
            elif one[0] == "late":                                     # a row that is committed after later ones
                late.execute("insert into orders (id, customer, total) select coalesce(max(id), 0) + 100, 'b', 1 "
                             "from (select max(id) as id from orders union all select 1000) x (id)"
                             " on conflict do nothing")
            else:
                if late.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                    late.commit()                                      # it may hold the rows that this one waits for
                run(now, one)
        late.commit()
    compare_events(three, seen, lambda: work(three))
    for model in MODELS:
        assert sorted(three.sql(f"table {model}"), key=repr) == full(three, model)
    assert three.sql("select count(*) from anton.job") == [(0,)] == three.sql("select count(*) from anton.dead")


def compare_events(shop: Shop, before: dict[str, dict[Any, Any]], act: Any) -> dict[str, dict[Any, Any]]:
    """What the triggers of the models' tables saw is what became different, each key once."""
    act()
    after = {model: {one[0]: one for one in shop.sql(f"table {model}")} for model in MODELS}
    expected = []
    for model in MODELS:
        old, new = before[model], after[model]
        expected += [(f"n{model}", str(key)) for key in new.keys() - old.keys()]
        expected += [(f"d{model}", str(key)) for key in old.keys() - new.keys()]
        expected += [(f"u{model}", str(key)) for key in new.keys() & old.keys() if new[key] != old[key]]
    assert sorted(shop.sql("select op, key from log")) == sorted(expected)
    shop.sql("truncate log")
    return after


@pytest.mark.parametrize(("select", "why"), [
    ("select customer, sum(total) / (select sum(total) from orders) as part from orders group by 1",
     "a subquery reads orders; make it a join"),
    ("select customer, id, row_number() over (order by id) as n from orders", "a window function goes across groups"),
    ("select total as customer, count(*) as n from orders group by 1", "it does not group by customer"),
    ("select customer, sum(total) as total from orders group by 1 order by 2 limit 3", "it has a LIMIT"),
    ("select customer, total from orders union all select id::text, 0 from orders", "customer is none of its columns"),
    ("select 'all' as customer, sum(total) as total from orders", "it aggregates without GROUP BY"),
    ("select v.customer, v.total from orders_view v join orders o using (id)", "orders_view, which is a view"),
    ("select customer, mine(id) as n from orders", r"mine\(\) is not IMMUTABLE"),
])
def test_incremental_is_refused_where_it_cannot_be_right(shop, select, why):
    shop.sql(*TABLES, "create view orders_view as table orders",
             "create function mine(int) returns bigint language sql stable as 'select count(*) from orders'")
    shop.file("sql/m.sql", HEADER.format(key="customer") + select)
    with pytest.raises(MigrationError, match=f'"-- incremental: orders.customer" cannot be right: .*{why}'):
        shop.migrate()
