"""Context: what SQL finds for a prompt is what was asked for, and where it came from is kept."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from anton import sql
from anton.context import Context
from anton.db import Database
from anton.errors import QueryError

ONE, TWO, THREE = ["facts", [1]], ["facts", [2]], ["facts", [3]]


async def found(db: Database, query: str, **record: Any) -> tuple[str, Any]:
    async with db.conn() as conn:
        await conn.execute("""create table if not exists facts (id int primary key, about text, "text" text);
            create table if not exists "odd from" (id int primary key, fact int);
            insert into facts values (1, 'x', 'c'), (2, 'x', 'b'), (3, 'y', 'a') on conflict do nothing;
            insert into "odd from" values (7, 3) on conflict do nothing""")
    texts, origins = await Context({"facts": sql(query)}, "the test").fetch(db, record)
    origin = origins["facts"]
    return texts["facts"], [one[:2] for one in origin] if isinstance(origin, list) else origin["rows"]


@pytest.mark.parametrize("query, lines, origin", [
    ("select text from facts order by 1 limit 2", "- a\n- b", [THREE, TWO]),
    ("select f.text, f.id from facts as f order by 2 desc limit 1", '- {"text":"a","id":3}', [THREE]),
    ("SELECT text FROM facts WHERE about = {about} -- from nowhere\n ORDER BY id", "- c\n- b", [ONE, TWO]),
    ("select text || ' from facts, $$' from public.facts /* join x */ where id = 3;", "- a from facts, $$",
     [["public.facts", [3]]]),
    ("select (select max(id) from facts) from facts where about = 'y'", "- 3", [THREE]),
    ('select text from facts f, "odd from" o where o.fact = f.id', "- a", [THREE, ['"odd from"', [7]]]),
    ("with w as (select 2 as two) select text from w join facts on id = two", "- b", [TWO]),
    ("with facts as (select 'z' as text) select text from facts", "- z", 1),
    ("select text from (select * from facts where id = 1) facts", "- c", 1),
    ("select distinct about from facts order by 1", "- x\n- y", 2),
    ("select about, count(*) from facts group by 1 order by 1 desc limit 1", '- {"about":"y","count":1}', 1),
    ("select count(*) from facts", "- 3", 1),
    ("select text from facts where id = 1 union select 'd' order by 1", "- c\n- d", 2),
    ("select 1", "- 1", 1),
    ("values (1), (2)", "- 1\n- 2", 2),
])
async def test_the_rows_are_those_that_the_query_asks_for_and_their_keys_are_kept_where_they_are_known(
    query, lines, origin, db: Database
):
    assert await found(db, query, about="x") == (lines, origin)


async def test_what_fails_for_a_reason_of_its_own_is_told_and_not_asked_once_more(db: Database):
    with pytest.raises(QueryError, match="division by zero.*It was: select text"):
        await found(db, "select text from facts where 1 / (id - 1) > 0")
    with pytest.raises(QueryError, match="nothing"):
        await found(db, "select nothing from facts")
    with pytest.raises(asyncpg.QueryCanceledError):
        await found(db, "select pg_cancel_backend(pg_backend_pid()), pg_sleep(60), text from facts")
