"""Migrate by roles that may little, and whom the runtime belongs to."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import psycopg
import pytest
from shop import Order, Shop, lambda_named

from anton.app import App, declaring
from anton.db import Database
from anton.errors import MissingPrivilege
from anton.migrate import migrate
from anton.table import Table


def as_role(url: str, role: str) -> str:
    return re.sub(r"//postgres(:[^@/]*)?@", f"//{role}@", url)


@pytest.fixture
def limited(server, bare) -> Iterator[str]:
    """The URL of an empty database for a role that may little."""
    server.sql("drop role if exists clerk", "create role clerk login")
    yield as_role(bare, "clerk")
    server.drop(bare.partition("?")[0].rpartition("/")[2])
    server.sql("drop role clerk")


def test_without_the_right_to_make_a_schema_it_says_what_to_run(limited, tmp_path):
    with pytest.raises(MissingPrivilege, match=r"grant create on database \w+ to clerk;"):
        Shop(limited, tmp_path).migrate()


def test_missing_rights_are_collected_and_the_rest_goes_on(limited, server, tmp_path):
    name = limited.partition("?")[0].rpartition("/")[2]
    server.sql(f"grant create on database {name} to clerk")
    server.sql("create schema shop", "create table shop.orders (id int primary key, customer text)",
               "grant usage on schema shop to clerk", "grant create on schema public to clerk", database=name)
    shop = Shop(limited, tmp_path)

    def code() -> None:
        Table("shop.orders").on_new_records(lambda_named("seen"))
        Table("prompts").on_new_records(lambda_named("score"))

    plan = shop.declare(code).migrate()
    assert "grant select, trigger on table shop.orders to clerk;" in plan.dba
    assert shop.sql("insert into prompts default values returning id") == [(1,)]
    server.sql(*plan.dba, database=name)
    assert not shop.migrate().dba
    server.sql("insert into shop.orders values (1)", database=name)
    assert shop.sql("select count(*) from anton.job") == [(2,)]
    assert not shop.migrate(check=True).drift


def test_the_runtime_belongs_to_a_role_nobody_logs_in_as(shop):
    owners = shop.sql("select relowner from pg_class where relnamespace = 'anton'::regnamespace "
                      "union select proowner from pg_proc where pronamespace = 'anton'::regnamespace")
    role = shop.sql("select oid, rolname, rolcanlogin, rolsuper from pg_roles where rolname = 'anton_owner'")[0]
    assert owners == [(role[0],)] and role[1:] == ("anton_owner", False, False)


def test_a_role_that_may_make_roles_gives_the_runtime_an_owner(server, bare, tmp_path):
    name = bare.partition("?")[0].rpartition("/")[2]
    server.sql("drop role if exists chief", "create role chief login createrole",
               f"grant create on database {name} to chief")
    server.sql("grant create on schema public to chief", database=name)
    app = App("shop", tmp_path)
    with declaring(app):
        Table("orders").on_new_records(lambda_named("seen"))
    db = Database(as_role(bare, "chief"), schema="cell_two")
    planned, made = asyncio.run(migrate(db, app, plan=True)), asyncio.run(migrate(db, app))
    assert planned.sql == made.sql and not asyncio.run(migrate(db, app, check=True)).drift
    done = server.sql("insert into orders default values", "select nspowner::regrole::text, "
                      "(select count(*) from cell_two.job) from pg_namespace where nspname = 'cell_two'", database=name)
    assert done == [("cell_two_owner", 1)]
    server.drop(name)
    server.sql("drop role cell_two_owner", "drop role chief")


def test_the_runtimes_schema_may_have_another_name(bare, tmp_path):
    db = Database(bare, schema="cell_one")
    app = App("shop", tmp_path)
    with declaring(app):
        Table("orders", Order).on_new_records(lambda_named("seen"))
    asyncio.run(migrate(db, app))
    assert not asyncio.run(migrate(db, app, check=True)).drift
    with psycopg.connect(bare, autocommit=True) as conn:
        conn.execute("insert into orders values (1, 'ann', 2)")
        assert conn.execute('select count(*) from cell_one.job').fetchall() == [(1,)]
        conn.execute('drop schema cell_one cascade; drop owned by cell_one_owner; drop role cell_one_owner')
