"""Sqlcheck: migrate refuses SQL that Postgres would refuse, and says where and what was meant."""

from __future__ import annotations

from shop import Shop, orders


def test_scratch(shop: Shop) -> None:
    shop.declare(orders())
    shop.migrate()
    shop.sql("create table log (t text)")
    shop.sql("select anton.handler('two', 'orders', 'new', 'insert into log select id::text from new_records; insert into log values (''b'')')")
    shop.sql("insert into orders values (1, 'a', 3)")
    import asyncio
    from anton.worker import Worker
    async def run():
        await Worker(shop.db, shop.app).run_until_idle()
        await shop.db.close()
    asyncio.run(run())
    print(shop.sql("table log"), shop.sql("select handler, state, why from anton.status"), shop.sql("select error from anton.dead"))
    assert 0
