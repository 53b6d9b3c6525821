"""Worker: from committed records to handlers' committed writes, each once; fair, bounded, resumable."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from working import Bench, pooled

from anton import Ctx, Records, Table
from anton.app import App
from anton.db import Database


class Item(BaseModel):
    id: int | None = None
    n: int
    name: str = "x"


async def test_records_flow_from_handler_to_handler_each_once(db: Database):
    def declare() -> None:
        a, b, c, d = Table("a"), Table("b"), Table("c"), Table("d")

        @a.on_new_records
        def plain(records: Records) -> None:
            for record in records:
                b.append({"n": record["n"] + 1})

        @b.on_new_records
        async def loop(records: Records) -> None:
            c.extend({"n": record["n"] * 2} for record in records)

        @c.on_new_records(each=True, into=d)
        async def each(record: Any) -> dict[str, int]:
            return {"n": record["n"]}

        @c.on_new_records(each=True)
        def each_plain(record: Any) -> None:
            d.append({"n": -record["n"]})

    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(500)))
    await bench.work()
    found = await bench.column("select (data->>'n')::int from d")
    assert Counter(found) == Counter([sign * 2 * (n + 1) for n in range(500) for sign in (1, -1)])
    assert await bench.left() == {}


async def test_models_come_and_go_and_their_keys_are_traced(db: Database):
    def declare() -> None:
        items, copies = Table("items", Item), Table("copies", Item)

        @items.on_new_records
        def copy(records: Records[Item]) -> None:
            for item in records:
                copies.append(Item(n=item.n, name=f"{type(item).__name__} {item.id}"))

    bench = await Bench.make(db, declare)
    await bench.sql("insert into items (n) select g from generate_series(1, 40) g")
    await bench.work()
    assert await bench.column("select name from copies order by n") == [f"Item {n}" for n in range(1, 41)]
    pairs = await bench.sql("""
        select c.name, i.key ->> 0 as input from anton.output o, unnest(o.ids, o.owners) x (id, owner), copies c,
               anton.inputs(o.receipt_id) i
         where c.id = x.id and i.position = x.owner""")
    assert len(pairs) == 40 and all(pair["name"] == f"Item {pair['input']}" for pair in pairs)


async def test_a_batch_takes_many_small_changes_up_to_its_limit(db: Database):
    sizes: list[int] = []

    def declare() -> None:
        a = Table("a")

        @a.on_new_records(batch=50, concurrency=1)
        def note(records: Records) -> None:
            sizes.append(len(records))

    bench = await Bench.make(db, declare)
    async with db.conn() as conn:
        for _ in range(120):
            await conn.execute("insert into a (data) values ('{}')")
    await bench.work()
    assert sizes == [50, 50, 20] and await bench.left() == {}


async def test_a_batch_holds_one_tenant(db: Database):
    tenants: list[list[str | None]] = []

    def declare() -> None:
        a, b = Table("a"), Table("b")

        @a.on_new_records(concurrency=1)
        def note(records: Records) -> None:
            tenants.append([change.tenant for change in records.changes])
            b.extend({} for _ in records)

        @b.on_new_records
        def note_too(records: Records) -> None:
            tenants.append([change.tenant for change in records.changes])

    bench = await Bench.make(db, declare)
    async with db.conn() as conn:
        for n in range(60):
            async with conn.transaction():
                await conn.execute("select set_config('anton.tenant', $1, true)", "one" if n % 3 else "two")
                await conn.execute("insert into a (data) values ('{}')")
    await bench.work()
    assert all(len(set(one)) == 1 for one in tenants)
    assert Counter(tenant for one in tenants for tenant in one) == {"one": 80, "two": 40}


async def test_a_job_larger_than_the_batch_of_today_is_cut(db: Database):
    sizes: list[int] = []

    def declare() -> None:
        a = Table("a")

        @a.on_new_records(batch=1000)
        def note(records: Records) -> None:
            sizes.append(len(records))

    bench = await Bench.make(db, declare)
    await bench.add("a", ({} for _ in range(1000)))
    await bench.sql("update anton.handler set batch = 300")
    await bench.work()
    assert sum(sizes) == 1000 and max(sizes) <= 300
    assert await bench.left() == {} and await bench.value("select sum(n) from anton.receipt") == 1000


async def test_what_is_gone_is_settled_and_counted_and_a_key_comes_once(db: Database):
    seen: list[int] = []

    def declare() -> None:
        a = Table("a")

        @a.on_changes(read="now")
        def note(records: Records) -> None:
            seen.extend(record.id for record in records)
            assert len(records.changes) == len(records)

    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(30)))
    await bench.sql("update a set data = '{\"n\": -1}' where id <= 10")
    await bench.sql("delete from a where id > 25")
    await bench.work()
    assert sorted(seen) == list(range(1, 31))  # once, though ten changed twice; five as deleted
    assert await bench.left() == {}
    assert await bench.value("select sum(n) from anton.receipt") == 45
    assert await bench.value("select sum(gone) from anton.receipt") == 5


async def test_images_are_what_was_committed(db: Database):
    seen: list[tuple[Any, ...]] = []

    def declare() -> None:
        items = Table("items", Item)

        @items.on_changes(read="change")
        def note(records: Records[Item]) -> None:
            for record, change in zip(records, records.changes, strict=True):
                assert record is (change.old if change.op == "deleted" else change.new)
                seen.append((change.op, change.key, change.old and change.old.n, change.new and change.new.n))

    bench = await Bench.make(db, declare)
    await bench.sql("insert into items (n) values (1), (2)")
    await bench.sql("update items set n = n + 10")
    await bench.sql("delete from items where n = 12")
    await bench.work()
    assert sorted(seen, key=str) == sorted(
        [
            ("new", 1, None, 1),
            ("new", 2, None, 2),
            ("updated", 1, 1, 11),
            ("updated", 2, 2, 12),
            ("deleted", 2, 12, None),
        ],
        key=str,
    )


async def test_composite_and_text_keys_work(db: Database):
    seen: list[Any] = []

    def declare() -> None:
        pairs = Table("pairs")

        @pairs.on_changes(read="now")
        def note(records: Records) -> None:
            seen.extend(
                (change.op, change.key, record["v"]) for record, change in zip(records, records.changes, strict=True)
            )

    await Bench.make(db, lambda: None)
    async with db.conn() as conn:
        await conn.execute("create table pairs (a text, b uuid, v int, primary key (a, b))")
    bench = await Bench.make(db, declare)
    key = "00000000-0000-0000-0000-000000000001"
    await bench.sql("insert into pairs select 'k' || g, $1, g from generate_series(1, 100) g", key)
    await bench.work()
    assert sorted(seen, key=lambda row: row[2]) == [("new", (f"k{n}", key), n) for n in range(1, 101)]
    assert await bench.left() == {}


async def test_a_table_without_a_key_is_handled_by_image(db: Database):
    seen: list[int] = []

    def declare() -> None:
        bare = Table("bare")

        @bare.on_new_records
        def note(records: Records) -> None:
            seen.extend(record["v"] for record in records)

    await Bench.make(db, lambda: None)
    async with db.conn() as conn:
        await conn.execute("create table bare (v int)")
    bench = await Bench.make(db, declare)
    await bench.sql("insert into bare select generate_series(1, 20)")
    await bench.work()
    assert sorted(seen) == list(range(1, 21)) and await bench.left() == {}


async def test_truncate_is_one_change_without_records(db: Database):
    seen: list[tuple[int, list[str]]] = []

    def declare() -> None:
        a = Table("a")

        @a.on_truncate
        def note(records: Records) -> None:
            seen.append((len(records), [change.op for change in records.changes]))

    bench = await Bench.make(db, declare)
    await bench.sql("truncate a")
    await bench.work()
    assert seen == [(0, ["truncate"])] and await bench.left() == {}


async def test_rows_that_do_not_fit_the_model_fail_alone(db: Database):
    seen: list[int] = []

    class Positive(BaseModel):
        id: int
        n: int

    def declare() -> None:
        legacy = Table("legacy", Positive)

        @legacy.on_new_records(attempts=1)
        def note(records: Records[Positive]) -> None:
            seen.extend(record.n for record in records)

    await Bench.make(db, lambda: None)
    async with db.conn() as conn:
        await conn.execute("create table legacy (id bigint primary key, n bigint not null)")
    bench = await Bench.make(db, declare)
    await bench.sql("alter table legacy alter n drop not null")
    await bench.sql("insert into legacy select g, case when g <> 7 then g end from generate_series(1, 20) g")
    await bench.work()
    assert sorted(seen) == [n for n in range(1, 21) if n != 7]
    assert await bench.column("select key ->> 0 from anton.dead") == ["7"]


async def test_the_context_knows_time_attempt_key_and_where_it_began(db: Database):
    told: dict[str, Any] = {}

    def declare() -> None:
        a, b, c = Table("a"), Table("b"), Table("c")

        @a.on_new_records
        def first(records: Records) -> None:
            for record in records:
                b.append({"n": record["n"]})

        @b.on_new_records
        def second(records: Records) -> None:
            for record in records:
                c.append({"n": record["n"]})

        @c.on_new_records
        async def third(records: Records, ctx: Ctx) -> None:
            for record in records:
                came = await ctx.aorigin(record)
                told[record["n"]] = came.table, came.key, came.record["from"], ctx.attempt, ctx.key.count(":")

        @c.on_new_records(each=True)
        def third_plain(record: Any, ctx: Ctx) -> None:
            came = ctx.origin(record)
            told[-record["n"]] = came.table, came.key, ctx.now.tzinfo is not None

    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n, "from": f"row {n}"} for n in range(1, 30)))
    await bench.work()
    assert told[7] == ("a", 7, "row 7", 1, 2) and told[-29] == ("a", 29, True) and len(told) == 58


async def test_schedules_run_as_jobs_with_the_time_they_were_planned_for(db: Database):
    from anton import cron
    ran: list[Any] = []

    def declare() -> None:
        b = Table("b")

        @cron.every("1h")
        def tell(ctx: Ctx) -> None:
            ran.append(ctx.planned_at)
            b.append({"at": str(ctx.planned_at)})

    await Bench(db, App("t")).full_hour()
    bench = await Bench.make(db, declare)
    await bench.work()
    await bench.advance(timedelta(hours=1))
    await bench.work()
    assert len(ran) == 1 and (ran[0].minute, ran[0].second) == (0, 0) and await bench.count("b") == 1


async def test_sql_handlers_made_in_psql_are_picked_up_by_a_running_worker(db: Database):
    bench = await Bench.make(db, lambda: None)
    await bench.sql("create table orders (id bigint generated always as identity primary key, total int)")
    await bench.sql("create table big (id bigint)")
    async with bench.running():
        await bench.sql("select anton.handler('flag_big', 'orders', 'new', "
                        "$$insert into big (id) select id from new_records$$, '{\"where\": \"total > 100\"}')")
        await bench.sql("insert into orders (total) select g * 10 from generate_series(1, 50) g")
        await bench.until("select count(*) = 40 from big")


async def test_backfill_feeds_rows_that_were_there_before(db: Database):
    def declare() -> None:
        a, b = Table("a"), Table("b")

        @a.on_new_records(since="beginning")
        def copy(records: Records) -> None:
            b.extend({"n": record["n"]} for record in records)

    await Bench.make(db, lambda: Table("a"))
    async with db.conn() as conn:
        await conn.execute("insert into a (data) select jsonb_build_object('n', g) from generate_series(1, 3000) g")
    bench = await Bench.make(db, declare)
    await bench.add("a", ({"n": n} for n in range(3001, 3101)))
    await bench.work()
    assert await bench.value("select count(distinct data->>'n') from b") == 3100 == await bench.count("b")


async def test_a_deleted_record_is_the_row_as_it_was_also_with_read_now(db: Database):
    seen: list[str] = []

    def declare() -> None:
        orders = Table("orders")

        @orders.on_deleted_records(read="now")
        def note(records: Records) -> None:
            seen.extend(record["name"] for record in records)

    async with db.conn() as conn:
        await conn.execute("create table orders (id bigint primary key, name text)")
    bench = await Bench.make(db, declare)
    await bench.sql("insert into orders values (1, 'one')")
    await bench.sql("delete from orders")
    await bench.work()
    assert seen == ["one"]


async def test_a_deletion_without_an_image_is_an_event_of_its_own_beside_others_of_its_key(db: Database):
    seen: list[tuple[str, Any, Any]] = []

    def declare() -> None:
        orders = Table("orders")

        @orders.on_changes(where="1 / total > 0")
        def note(records: Records) -> None:
            for change in records.changes:
                seen.append((change.op, change.key, change.new and change.new["total"]))
                if change.op == "deleted":
                    orders.select(id=change.key).update(noted=True)

    async with db.conn() as conn:
        await conn.execute("create table orders (id bigint primary key, total int, noted bool)")
    bench = await Bench.make(db, declare)
    for statement in ("insert into orders values (1, 0)", "delete from orders", "insert into orders values (1, 0)"):
        await bench.sql(statement)
    await bench.work()
    assert sorted(seen[:2]) == [("deleted", 1, None), ("new", 1, 0)]
    assert await bench.value("select string_agg(error, chr(10)) from anton.dead") is None


async def test_backfill_goes_on_past_ten_thousand_rows_that_its_filter_leaves_out(db: Database):
    def declare() -> None:
        orders, b = Table("orders"), Table("b")

        @orders.on_new_records(since="beginning", where="total > 12000")
        def copy(records: Records) -> None:
            b.extend({"n": record["total"]} for record in records)

    async with db.conn() as conn:
        await conn.execute("create table orders (id bigint generated always as identity primary key, total int)")
        await conn.execute("insert into orders (total) select generate_series(1, 12005)")
    bench = await Bench.make(db, declare)
    await bench.work()
    assert await bench.column("select (data->>'n')::int from b order by 1") == [12001, 12002, 12003, 12004, 12005]


@pytest.mark.parametrize("each", [False, True])
async def test_a_handler_that_was_renamed_goes_on_with_its_jobs(db: Database, each: bool):
    def before() -> None:
        a = Table("a")

        @a.on_new_records(each=each)
        def old(subject: Any) -> None: ...

    def after() -> None:
        a, b = Table("a"), Table("b")

        @a.on_new_records(each=each, was="old")
        def new(subject: Any) -> None:
            b.append({}, of=subject)

    bench = await Bench.make(db, before)
    await bench.add("a", [{}])
    bench = await Bench.make(db, after)
    await bench.work()
    assert await bench.count("b") == 1 and await bench.left() == {}


@pytest.mark.parametrize("read", ["now", "change"])
async def test_wide_rows_are_read_a_few_at_a_time(db: Database, read: Any):
    sizes: list[int] = []

    def declare() -> None:
        a = Table("a")

        @a.on_new_records(read=read)
        def note(records: Records) -> None:
            sizes.append(len(records))

    bench = await Bench.make(db, declare)
    await bench.sql("insert into a (data) select jsonb_build_object('text', repeat(md5(g::text), 31250)) "
                    "from generate_series(1, 60) g")                    # a megabyte each
    await bench.work()
    assert sum(sizes) == 60 and max(sizes) <= 16 and await bench.left() == {}


async def test_a_worker_works_through_a_transaction_pooler(db: Database, server: Any, tmp_path: Any):
    def declare() -> None:
        a, b, c = Table("a"), Table("b"), Table("c")

        @a.on_new_records
        def copy(records: Records) -> None:
            for record in records:
                b.append({"n": record["n"]})

        @b.on_new_records(each=True)
        async def copy_each(record: Any) -> None:
            if record["n"] == 3:
                raise ValueError(3)
            c.append({"n": record["n"]})

        b.on_new_records.sql("insert into c (data) select jsonb_build_object('n', -1) from new_records", name="in_sql")

    bench = await Bench.make(db, declare)
    with pooled(server, db.name, tmp_path) as url:
        there = Bench(Database(url, pooled=True), bench.app)
        async with there.running(lease=timedelta(seconds=2)):           # an answer lost on the way costs no more
            await bench.add("a", ({"n": n} for n in range(50)))
            await bench.until("select count(*) = 99 from c")
            await bench.until("select count(*) = 1 from anton.delayed")
            await bench.until("select not exists (select from anton.lease)")
        await there.db.close()
