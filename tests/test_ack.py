"""Ack: a receipt says which record of which change each position was, whatever else the jobs carry."""

from __future__ import annotations

from datetime import timedelta


async def test_a_receipt_keeps_changes_and_keys_in_one_order_whatever_their_traces(db):
    async with db.conn() as conn:
        await conn.execute("create table t (id bigint primary key)")
        definition = {"app": "a", "name": "work", "table": "public.t", "ops": ["new"], "kind": "python"}
        handler = await db.call_value(conn, "put_handler", definition)
        await db.call(conn, "sync_triggers", await db.call_value(conn, "watch", "public.t"))
        for n, context in enumerate(("", "7,1,", "", "8,1,3", "9,1,", "")):
            async with conn.transaction():
                await conn.execute("select set_config('anton.context', $1, true)", context)
                await conn.execute("insert into t select $1::int * 10 + g from generate_series(1, 3) g", n)
        given = {row["change_id"]: row["ids"] for row in await conn.fetch("select change_id, ids from anton.job")}
        claimed = await db.call(conn, "claim", 1, 99, [handler], [10], [100], [0], timedelta(seconds=30))
        receipt = await db.call_value(conn, "ack", 99, [row["id"] for row in claimed], 1, 0.0)
        found: dict[int, list[int]] = {}
        for row in await db.call(conn, "inputs", receipt):
            found.setdefault(row["change_id"], []).extend(row["key"])
        causes = await conn.fetchrow("select change_ids, causes from anton.receipt where id = $1", receipt)
    assert found == given and len(given) == 6
    assert [cause for _, cause in sorted(zip(*causes, strict=True))] == [None, 7, None, 8, 9, None]
