"""Groups: what a changed row can touch, and what makes keys distinct."""

from __future__ import annotations

import pytest

from anton.groups import Cannot, Functions, Select, parse, tables

COLUMNS = {("public", "orders"): {"id": "int", "who": "text", "total": "int", "day": "date"},
           ("public", "people"): {"id": "text", "name": "text"}}
FUNCTIONS = Functions(frozenset({"mode_of"}), frozenset({"parts"}), frozenset({"lookup"}))


def outputs(sql: str) -> set[str]:
    return set(Select(parse(sql), "public", COLUMNS, FUNCTIONS).outputs(("public", "orders"), "who"))


@pytest.mark.parametrize(("sql", "expected"), [
    ("select who, sum(total) as total from orders group by 1", {"who"}),
    ("select * from orders", {"who"}),
    ("select o.who as a, o.who as b from public.orders as o", {"a", "b"}),
    ('select "o"."who" as "Who" from orders "o"', {"Who"}),
    ("select p.id, count(*) as n from orders o join people p on p.id = o.who group by 1", {"id"}),
    ("select p.id, count(*) as n from orders o, people p where p.id = o.who and total > 1 group by 1", {"id"}),
    ("select p.id, count(o.id) n from people p left join orders o on o.who = p.id and total > 0 group by 1", {"id"}),
    ("select o.who, p.name from orders o left join people p on p.id = o.who", {"who"}),
    ("select a.id, b.id as other, a.who from orders a join orders b on a.who = b.who", {"who"}),
    ("with a as (select who, sum(total) as t from orders group by 1), "
     "b as (select who, count(*) as n from orders group by 1) select a.who, t, n from a join b on a.who = b.who",
     {"who"}),
    ("select who, total from orders union all select id, 0 from people", {"who"}),
    ("select who from orders except select who from orders where total > 3", {"who"}),
    ("select who, id, rank() over (partition by who order by id) as r from orders", {"who"}),
    ("select who, id, rank() over w as r from orders window w as (partition by who order by id)", {"who"}),
    ("select distinct on (who) who, total from orders order by who, total desc", {"who"}),
    ("select x.who, x.n from (select who, count(*) as n from orders group by 1) x where x.n > 2", {"who"}),
    ("select mode_of(total) as m, who from orders group by 2", {"who"}),
    ("select o.who, (select name from people p where p.id = o.who) as name from orders o", {"who"}),
])
def test_a_column_that_carries_the_group_is_found(sql, expected):
    assert outputs(sql) == expected


@pytest.mark.parametrize(("sql", "why"), [
    ("select sum(total) as t from orders", "without GROUP BY"),
    ("select mode_of(total) as t, 'x' as who from orders", "without GROUP BY"),
    ("select day, count(*) as n from orders group by day", "does not group by who"),
    ("select day, max(who) as who from orders group by day", "does not group by who"),
    ("select who, count(*) as n from orders group by rollup (who)", "group"),
    ("select who, total, sum(total) over () as all_ from orders", "across groups"),
    ("select who, rank() over w as r from orders window w as (order by id)", "across groups"),
    ("select who, sum(total) as t, rank() over (order by sum(total)) as r from orders group by who", "across groups"),
    ("select lower(who) as who from orders", "who is none of its columns"),
    ("select who, total from orders order by total limit 3", "LIMIT"),
    ("select * from (select who from orders order by total limit 3) x", "LIMIT"),
    ("select a.who, b.id from orders a join orders b on a.total < b.total", "without an equality on who"),
    ("select a.who, b.id from orders a cross join orders b", "without an equality on who"),
    ("select o.who, count(*) n from people p left join orders o on o.who = p.id group by 1", "does not group by who"),
    ("select p.id, count(o.id) as n from people p left join orders o on true group by 1", "without an equality on who"),
    ("select p.id from orders o right join people p on p.id = o.who", "RIGHT join"),
    ("select p.id from orders o full join people p on p.id = o.who", "FULL join"),
    ("select p.id from people p where exists (select from orders o where o.who = p.id)", "a subquery reads orders"),
    ("select who, total - (select avg(total) from orders) as d from orders", "a subquery reads orders"),
    ("select p.id, x.n from people p cross join lateral (select 1 n from orders o where o.who = p.id) x", "orders"),
    ("select who, total from orders union all select name, 0 from people union all select id::text, 0 from orders",
     "none of its columns"),
    ("select who, 1 as n from orders union all select 'x', count(*) from orders", "without GROUP BY"),
    ("with recursive r as (select who from orders union select who || 'x' from r) select who from r", "recursive"),
    ("select distinct on (day) who, day from orders order by day", "DISTINCT ON"),
    ("select who, lookup(id) as n from orders", "not IMMUTABLE"),
    ("select id, (select lookup(1)) as n from people", "not IMMUTABLE"),
    ("select id from people", "does not read orders"),
    ("select who from orders tablesample bernoulli (10)", "sample"),
])
def test_what_may_touch_other_groups_is_refused_with_the_reason(sql, why):
    with pytest.raises(Cannot, match=why):
        outputs(sql)


@pytest.mark.parametrize(("sql", "key", "expected"), [
    ("select who, sum(total) as t from orders group by 1", ["who"], True),
    ("select who, day, sum(total) as t from orders group by who, day", ["day", "who"], True),
    ("select who, day, sum(total) as t from orders group by who, day", ["who"], False),
    ("select who, sum(total) as t from orders group by who, day", ["who"], False),
    ("select distinct who, day from orders", ["who", "day"], True),
    ("select distinct who, day from orders", ["who"], False),
    ("select distinct on (who) who, day from orders order by who", ["who"], True),
    ("select id, who from orders", ["id"], False),
    ("select who, parts(who) as part from orders group by who", ["who"], False),
    ("select who, unnest(array[1, 2]) as part from orders group by who", ["who"], False),
    ("select who from orders group by who union all select id from people", ["who"], False),
    ("select who from orders group by cube (who)", ["who"], False),
])
def test_distinct_keys_are_seen_by_the_form_alone(sql, key, expected):
    assert Select(parse(sql), "public", COLUMNS, FUNCTIONS).tells_apart(key) is expected


def test_tables_are_those_that_it_reads_and_not_its_own_names():
    sql = "with a as (select 1 from orders) select * from a join shop.items i on true where exists (select from people)"
    assert tables(parse(sql)) == {("", "orders"), ("shop", "items"), ("", "people")}


@pytest.mark.parametrize("sql", ["delete from orders", "select from where", "select nothing from orders"])
def test_what_cannot_be_read_is_said(sql):
    with pytest.raises(Cannot):
        outputs(sql)
