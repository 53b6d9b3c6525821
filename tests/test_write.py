"""Writes: where they go, whom they belong to, what is written."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from written import Counter, T, batch

from anton import sql, transaction, write
from anton.errors import InvalidRecord, NoScope, ScopeClosed, SyncInLoop, WriteError
from anton.write import WHOLE, Rows, Scope, apply, commit, merge

# Where writes go


def test_a_script_commits_each_write_at_once(t: T) -> None:
    record = t.out.append({"n": 1, "s": "a"})
    assert t.rows("select id, n, s from out") == [(record.id, 1, "a")]
    t.out.select(n=1).update(s="b")
    assert t.rows("select s from out") == [("b",)]
    t.out.select(n=1).delete()
    assert t.rows("select * from out") == []


def test_async_code_with_nothing_around_is_told_of_the_transaction(t: T) -> None:
    async def write_alone() -> None:
        t.out.append({"n": 1})

    with pytest.raises(NoScope, match=r"async with transaction\(\):"):
        asyncio.run(write_alone())


def test_a_transaction_commits_all_or_nothing(t: T) -> None:
    with transaction():
        t.out.append({"n": 1})
        t.doc.append({"x": 1})
        assert t.rows("select * from out") == []
    with pytest.raises(ZeroDivisionError), transaction():
        t.out.append({"n": 2})
        raise ZeroDivisionError
    assert t.rows("select n from out") == [(1,)]
    assert t.doc.select().count() == 1


async def test_a_transaction_in_async_code(t: T) -> None:
    async with transaction():
        record = t.out.append({"n": 1})
    assert [row["n"] for row in await t.out.select(id=record.id)] == [1]
    with pytest.raises(SyncInLoop, match=r"async with transaction\(\)"), transaction():
        pass


def test_a_transaction_inside_another_joins_it(t: T) -> None:
    with transaction():
        t.out.append({"n": 1})
        with transaction():
            t.out.append({"n": 2})
        with pytest.raises(ZeroDivisionError), transaction():
            t.out.append({"n": 3})
            raise ZeroDivisionError
        t.out.append({"n": 4})
        assert t.rows("select * from out") == []
    assert t.rows("select n from out order by id") == [(1,), (2,), (4,)]


def test_writes_after_the_end_are_refused(t: T) -> None:
    with Scope("handler", batch(1)) as scope:
        inside = copy_context()
    with pytest.raises(ScopeClosed, match="this handler has ended"):
        inside.run(t.out.append, {"n": 1})
    with pytest.raises(ScopeClosed):
        inside.run(t.out.select(n=1).delete)
    assert scope.ops == []


# Whom a write belongs to


def owners(scope: Scope) -> list[tuple[int, Any]]:
    runs = [zip(op.owners, op.rows, strict=True) for op in scope.ops if isinstance(op, Rows)]
    return [(who, row[-1]) for run in runs for who, row in run]


def test_iterating_marks_the_current_record(t: T) -> None:
    records = batch(10, 11, 12)
    with Scope("handler", records) as scope:
        t.out.append({"n": 0})
        for record in records:
            t.out.append({"n": record["n"]})
        t.out.append({"n": 1})
        [t.out.append({"n": record["n"]}) for record in records]
        t.out.extend({"n": record["n"]} for record in records if record["n"] > 10)
        for record in records[1:]:
            t.out.append({"n": record["n"]})
            break
        t.out.append({"n": 2})
    assert owners(scope) == [(WHOLE, 0), (0, 10), (1, 11), (2, 12), (WHOLE, 1), (0, 10), (1, 11), (2, 12),
                             (1, 11), (2, 12), (1, 11), (WHOLE, 2)]


def test_nested_iterations_come_back_to_the_outer_record(t: T) -> None:
    records = batch(10, 11)
    with Scope("handler", records) as scope:
        for _ in records:
            for _ in records:
                t.out.append({"n": 0})
            t.out.append({"n": 1})
    assert [who for who, _ in owners(scope)] == [0, 1, 0, 0, 1, 1]


async def test_tasks_and_threads_keep_the_record_they_were_started_for(t: T) -> None:
    records = batch(10, 11, 12)

    async def later(n: int) -> None:
        await asyncio.sleep(0)
        await asyncio.to_thread(t.out.append, {"n": n})
        t.out.append({"n": n})

    with Scope("handler", records) as scope:
        await asyncio.gather(*[asyncio.create_task(later(record["n"])) for record in records])
    assert sorted(owners(scope)) == [(0, 10), (0, 10), (1, 11), (1, 11), (2, 12), (2, 12)]


def test_of_names_the_record_or_the_batch(t: T) -> None:
    records = batch(10, 11)
    with Scope("handler", records) as scope:
        t.out.append({"n": 1}, of=records[1])
        for _ in records:
            t.out.append({"n": 2}, of=records)
            t.out.extend([{"n": 3}], of=records[0])
        with pytest.raises(WriteError, match="none of the records"):
            t.out.append({"n": 4}, of={"n": 10})
        t.out.append({"n": 5})
    assert owners(scope) == [(1, 1), (WHOLE, 2), (0, 3), (WHOLE, 2), (0, 3), (WHOLE, 5)]


def test_a_thread_started_by_hand_must_say_of(t: T) -> None:
    records = batch(10, 11)
    with Scope("handler", records) as scope, ThreadPoolExecutor(1) as pool:
        with pytest.raises(NoScope, match="of=record"):
            pool.submit(t.out.append, {"n": 1}).result()
        with pytest.raises(NoScope, match="of=record"):
            pool.submit(t.out.select(n=1).delete).result()
        pool.submit(t.out.append, {"n": 2}, of=records[1]).result()
    assert owners(scope) == [(1, 2)]


def test_in_a_worker_no_thread_writes_without_a_scope(t: T) -> None:
    write.as_worker(1)
    try:
        with pytest.raises(NoScope, match="asyncio.to_thread"):
            t.out.append({"n": 1})
    finally:
        write.as_worker(-1)


def test_threads_of_one_scope_do_not_mix_rows_and_owners(t: T) -> None:
    records = batch(*range(8))
    with Scope("handler", records) as scope:
        def fill(n: int) -> None:
            for _ in range(2000):
                t.out.append({"n": n}, of=records[n])

        threads = [threading.Thread(target=copy_context().run, args=(fill, n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = owners(scope)
    assert len(found) == 16_000
    assert all(who == n for who, n in found)
    ids = [row[0] for op in scope.ops if isinstance(op, Rows) for row in op.rows]
    assert len(set(ids)) == 16_000


# What is written


def test_rows_with_different_columns_get_their_defaults(t: T) -> None:
    t.out.extend([{"n": 1}, {"s": "b"}, {"s": "c", "n": 3}, {}])
    assert t.rows("select n, s from out order by n, s") == [(1, None), (3, "c"), (None, "b"), (None, None)]


@pytest.mark.parametrize("count", [1, 3, 16, 17, 2500])
def test_any_number_of_rows(t: T, count: int) -> None:
    t.out.extend({"n": n, "s": str(n)} for n in range(count))
    t.doc.extend({"n": n} for n in range(count))
    assert t.rows("select count(*), sum(n), count(distinct s) from out") == [(count, sum(range(count)), count)]
    assert t.rows("select count(*), sum((data ->> 'n')::int) from doc") == [(count, sum(range(count)))]


def test_a_script_extends_by_a_million_in_one_transaction(t: T) -> None:
    def rows() -> Any:
        for n in range(30_000):
            if n == 25_000:
                assert t.rows("select count(*) from out") == [(0,)]
            yield {"n": n}
            if n == 29_999 and fail:
                raise ZeroDivisionError

    fail = True
    with pytest.raises(ZeroDivisionError):
        t.out.extend(rows())
    assert t.rows("select count(*) from out") == [(0,)]
    fail = False
    t.out.extend(rows())
    assert t.rows("select count(*) from out") == [(30_000,)]


def test_upsert_inserts_or_sets(t: T) -> None:
    t.counter.upsert(Counter(name="a", n=1))
    with transaction():
        for n in range(5):
            t.counter.upsert({"name": "a", "n": n})
            t.counter.upsert({"name": "b", "n": n * 10})
    assert t.rows("select * from counter order by name") == [("a", 4), ("b", 40)]
    t.doc.upsert({"id": 7, "x": 1})
    t.doc.upsert({"id": 7, "x": 2})
    assert t.rows("select id, data from doc") == [(7, {"x": 2})]
    t.pair.upsert({"a": 1, "b": "x", "note": "old"})
    t.pair.upsert({"a": 1, "b": "x", "note": "new"})
    t.pair.upsert({"a": 1, "b": "x"})
    assert t.rows("select * from pair") == [(1, "x", "new")]


def test_upsert_without_its_key_is_refused_at_once(t: T) -> None:
    with pytest.raises(InvalidRecord, match='upsert needs the key: {"id": 7'):
        t.doc.upsert({"x": 1})
    with pytest.raises(InvalidRecord, match="upsert needs the key: b"):
        t.pair.upsert({"a": 1})
    with pytest.raises(InvalidRecord, match="upsert needs the key: id"):
        t.out.upsert({"n": 1})


def test_writes_keep_their_order(t: T) -> None:
    with transaction():
        record = t.out.append({"n": 1})
        t.out.select(id=record.id).update(n=sql("n + 10"))
        t.out.select(n=11).update(s="eleven")
        t.out.append({"n": 11})
        t.out.select(s="eleven").delete()
    assert t.rows("select n, s from out") == [(11, None)]


def test_an_expression_is_evaluated_in_the_database(t: T) -> None:
    t.counter.append(Counter(name="a", n=5))
    t.counter.select(name="a").update(n=sql("n * {by}", by=3))
    assert t.counter.get("a") == Counter(name="a", n=15)
    t.doc.append({"n": 1, "keep": True})
    t.doc.select(n=1).update(n=sql("(data ->> 'n')::int + 1"), word="x")
    assert t.rows("select data from doc") == [({"n": 2, "keep": True, "word": "x"},)]


# Parts


def test_outputs_say_keys_and_owners(t: T) -> None:
    records = batch(1, 2)
    with Scope("handler", records) as scope:
        for record in records:
            t.out.append({"n": record["n"]})
            t.pair.append({"a": record["n"], "b": "x"})
        t.out.append({"n": 9})
        t.pair.select(a=2).update(note="y")

    async def work() -> Any:
        async with t.db.tx() as conn:
            return await apply(conn, scope.ops)

    found = {output.relation.name: (output.keys, output.owners) for output in t.db.run(work())}
    assert found == {"out": ([1, 2, 3], [0, 1, WHOLE]), "pair": ([[1, "x"], [2, "x"], [2, "x"]], [0, 1, WHOLE])}


def test_merge_gives_each_part_one_owner(t: T) -> None:
    parts = []
    for n in range(3):
        with Scope("route") as scope:
            t.out.append({"n": n})
            t.out.select(n=n).update(s=str(n))
        parts.append((n, scope.ops))
    merged = merge(parts)
    assert [op.owners if isinstance(op, Rows) else op.owner for op in merged] == [[0], 0, [1], 1, [2], 2]
    t.db.run(commit(t.db, merged))
    assert t.rows("select n, s from out order by n") == [(0, "0"), (1, "1"), (2, "2")]
