"""Updates and deletes of what was read: whether it changed meanwhile."""

import asyncio
import random
from datetime import date
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written import Counter, T, batch

from anton import Table, sql, transaction
from anton.app import App, declaring
from anton.errors import RowChanged
from anton.write import Scope, commit, pick


def test_a_row_that_changed_since_it_was_read_is_a_conflict(t: T) -> None:
    t.counter.append(Counter(name="a", n=1))
    records = batch(1, 2)
    with Scope("handler", records) as scope:
        for record in records:
            if record["n"] == 2:
                read = t.counter.get("a")
                assert read is not None
                t.counter.select(name="a").update(n=read.n + 1)
            else:
                t.out.append({"n": 1})
    t.run("update counter set n = 50")
    with pytest.raises(RowChanged) as caught:
        t.db.run(commit(t.db, scope.ops))
    assert caught.value.owners == {1}
    assert t.rows("select n from counter") == [(50,)]
    assert t.rows("select * from out") == []


@pytest.mark.parametrize("how", ["argument", "scope"])
def test_overwrite_writes_regardless(t: T, how: str) -> None:
    t.counter.append(Counter(name="a", n=1))
    with Scope("handler", on_conflict="overwrite" if how == "scope" else "rerun") as scope:
        t.counter.get("a")
        t.counter.select(name="a").update(n=2, on_conflict="overwrite" if how == "argument" else None)
    t.run("update counter set n = 50")
    t.db.run(commit(t.db, scope.ops))
    assert t.rows("select n from counter") == [(2,)]


def test_a_row_that_vanished_since_it_was_read_is_a_conflict(t: T) -> None:
    t.counter.append(Counter(name="a", n=1))
    with Scope("handler") as scope:
        list(t.counter.select())
        t.counter.select(name="a").delete()
    t.run("delete from counter")
    with pytest.raises(RowChanged):
        t.db.run(commit(t.db, scope.ops))


@pytest.mark.parametrize("table", ["counter", "pair", "doc"])
def test_a_condition_that_means_several_rows_checks_those_that_were_read(t: T, table: str) -> None:
    t.run("insert into counter values ('a', 1), ('b', 1); insert into pair values (1, 'a', '1'), (2, 'b', '1');"
          "insert into doc (data) values ('{\"k\": \"a\"}'), ('{\"k\": \"b\"}')")
    which: Any = {"counter": t.counter, "pair": t.pair, "doc": t.doc}[table]
    read: Any = {"counter": {"name": "a"}, "pair": {"b": "a"}, "doc": {"k": "a"}}[table]
    change: Any = {"counter": {"n": 2}, "pair": {"note": "2"}, "doc": {"z": 2}}[table]

    def record() -> Scope:
        with Scope("handler") as scope:
            assert len(list(which.select(**read))) == 1
            which.select("true").update(**change)
        return scope

    scope = record()
    t.run("update counter set n = 9 where name = 'b'; update pair set note = 'x' where b = 'b';"
          "update doc set data = '{}' where data ->> 'k' = 'b'")
    outputs = t.db.run(commit(t.db, scope.ops))
    assert len(outputs[0].keys) == 2
    scope = record()
    t.run("update counter set n = 9 where name = 'a'; update pair set note = 'x' where b = 'a';"
          "update doc set data = '{\"k\": \"a\", \"y\": 1}' where data ->> 'k' = 'a'")
    with pytest.raises(RowChanged):
        t.db.run(commit(t.db, scope.ops))


def test_partitioned_tables_are_written_and_checked_like_others(t: T) -> None:
    t.run("create table part (day date, id bigint generated always as identity, n int, primary key (day, id)) "
          "partition by range (day); create table part_2 partition of part default;"
          "create table part_1 partition of part for values from ('2026-01-01') to ('2026-02-01')")
    with declaring(App()):
        part = Table("part")
    days = [date(2026, 1, 1), date(2026, 3, 1)]
    part.extend({"day": days[n % 2], "n": n} for n in range(40))
    first = part.append({"day": days[0], "n": 50})
    assert first.id == 41
    with Scope("handler") as scope:
        read = part.get(days[0], 1)
        assert read is not None
        part.select(day=days[0], id=1).update(n=read["n"] + 1)
        part.select("n > {x}", x=37).delete()
    t.db.run(commit(t.db, scope.ops))
    assert t.rows("select count(*), min(n) filter (where id = 1) from part") == [(38, 1)]
    with Scope("handler") as scope:
        assert part.get(days[0], 1) is not None
        part.select(day=days[0], id=1).update(n=9)
    t.run("update part set n = 0 where id = 1")
    with pytest.raises(RowChanged):
        t.db.run(commit(t.db, scope.ops))


def test_one_owner_may_change_a_row_twice_and_another_may_not(t: T) -> None:
    t.counter.append(Counter(name="a", n=1))
    records = batch(0, 1)
    with Scope("handler", records) as scope:
        for _ in records:
            read = t.counter.get("a")
            assert read is not None
            t.counter.select(name="a").update(n=read.n + 1)
            t.counter.select(name="a").update(n=sql("n + 1"))
            t.counter.select("n > 0").update(n=sql("n + 1"))
    with pytest.raises(RowChanged) as caught:
        t.db.run(commit(t.db, scope.ops))
    assert caught.value.owners == {1}
    t.db.run(commit(t.db, pick(scope.ops, {0})))
    assert t.rows("select n from counter") == [(4,)]


def test_an_upsert_of_a_row_that_was_read_does_not_stand_in_its_own_way(t: T) -> None:
    t.counter.append(Counter(name="a", n=1))
    with transaction():
        t.counter.get("a")
        t.counter.upsert({"name": "a", "n": 5})
        t.counter.select(name="a").update(n=6)
    assert t.rows("select n from counter") == [(6,)]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), times=st.integers(3, 12))
def test_eight_writers_of_one_row_end_at_the_exact_sum(t: T, seed: int, times: int) -> None:
    t.counter.upsert({"name": "sum", "n": 0})

    async def increment(by: random.Random) -> None:
        for _ in range(times):
            while True:
                try:
                    async with transaction():
                        if by.random() < 0.3:
                            t.counter.select(name="sum").update(n=sql("n + 1"))
                        else:
                            where: dict[str, Any] = {"name": "sum"} if by.random() < 0.5 else {}
                            (read,) = await t.counter.select(**where)
                            await asyncio.sleep(0)
                            t.counter.select(**where).update(n=read.n + 1)
                    break
                except RowChanged:
                    continue

    async def race() -> None:
        await asyncio.gather(*(increment(random.Random(seed + n)) for n in range(8)))

    t.db.run(race())
    read = t.counter.get("sum")
    assert read is not None
    assert read.n == 8 * times
