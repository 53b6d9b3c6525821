"""Images: whatever a column holds comes back as it was, whatever the settings of the session that wrote it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pg import Pg

SETTINGS = {
    "datestyle": ["ISO, YMD", "German", "SQL, DMY", "Postgres, MDY"],
    "intervalstyle": ["postgres", "sql_standard", "iso_8601", "postgres_verbose"],
    "timezone": ["UTC", "Asia/Kolkata", "America/St_Johns"],
    "extra_float_digits": ["1", "0", "-15"],
    "bytea_output": ["hex", "escape"],
    "standard_conforming_strings": ["on", "off"],
    "search_path": ["public", "pg_catalog", "elsewhere"],
    "quote_all_identifiers": ["off", "on"],
    "xmloption": ["content", "document"],
}
TYPES: dict[str, list[str]] = {
    "smallint": ["-32768"],
    "integer": ["2147483647"],
    "bigint": ["-9223372036854775808"],
    "numeric": ["NaN", "1.50", "-0.000000000000000000000000000001", "Infinity"],
    "numeric(12,2)": ["1.5"],
    "real": ["0.1", "1.17549435e-38", "NaN"],
    "double precision": ["0.1", "1e-300", "-Infinity", "0.30000000000000004"],
    "text": ["", " ", "NULL", "null", "{a,b}", "\\x41", 'a"b', "a\tb\nc", "ü\u2028"],
    "varchar(9)": ["x y "],
    "char(5)": ["ab"],
    '"char"': ["a"],
    "name": ["n"],
    "boolean": ["t", "f"],
    "bytea": ["\\x00ff5c27"],
    "uuid": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "date": ["2024-02-01", "infinity", "0044-03-15 BC", "12024-01-01"],
    "time": ["12:34:56.789012", "24:00:00"],
    "timetz": ["12:34:56.789012+05:30"],
    "timestamp": ["2024-02-01 03:04:05.678901", "-infinity", "0044-03-15 12:00:00 BC"],
    "timestamptz": ["2024-02-01 03:04:05.678901+02", "infinity", "1900-01-01 00:00:00+00:53:28"],
    "interval": ["1 year 2 mons -3 days 04:05:06.789", "-1 mons +2 days", "-00:00:00.000001"],
    "json": ['{"b": 1, "a": [1, 2.50, null], "a": "ü"}', "null"],
    "jsonb": ['{"a": [1, 2.50, null]}', "null", '"null"'],
    "integer[]": ["{}", "{1,NULL,3}", "[2:3]={1,2}"],
    "text[][]": ['{{a,"b,c"},{"NULL",NULL}}'],
    "timestamptz[]": ['{"2024-02-01 03:04:05+02"}'],
    "point": ["(0.1,-2)"],
    "box": ["(3,4),(1,2)"],
    "circle": ["<(0.1,2),3>"],
    "inet": ["10.0.0.1/8", "::1"],
    "cidr": ["10.0.0.0/8"],
    "macaddr": ["08:00:2b:01:02:03"],
    "bit(3)": ["101"],
    "varbit": ["10101", ""],
    "tsvector": ["'a':1 'b c':2A"],
    "tsquery": ["'a' & !'b'"],
    "int4range": ["[1,5)", "empty", "(,7)"],
    "tstzrange": ['["2024-01-01 00:00:00+00","2024-02-01 00:00:00+00")'],
    "int8multirange": ["{[1,3),[5,7)}"],
    "oid": ["4294967295"],
    "regclass": ["pg_catalog.pg_class"],
    "money": ["-12.34"],
    "mood": ["so so"],
    "positive": ["7"],
    "pair": ['(1,"a ""b""\\\\, c")'],
    "pair[]": ['{"(1,a)","(2,)"}'],
}


@pytest.fixture
def types(pg: Pg) -> Pg:
    pg.sql("create type public.mood as enum ('sad', 'so so')", "create domain public.positive as int check (value > 0)",
           "create type public.pair as (a int, b text)")  # fmt: skip
    return pg


def columns() -> Iterator[tuple[str, str]]:
    for number, type_ in enumerate(TYPES):
        yield f"c{number}", "public." + type_ if type_.split("[")[0] in ("mood", "positive", "pair") else type_


NAMES = [name for name, _ in columns()]


def make(pg: Pg, rows: int, key: str = "primary key") -> None:
    """Tables t, and kept: rows of every value of TYPES in turn, and of nulls."""
    pg.sql(
        f"create table t (id int {key}, v int default 0, {', '.join(f'{name} {type_}' for name, type_ in columns())})"
    )
    pg.sql("create table kept (like t including defaults)")
    casts = ", ".join(f"%s::{type_}" for _, type_ in columns())
    most = max(map(len, TYPES.values()))
    for row in range(rows):
        values = [texts[row % len(texts)] if row % (most + 1) < most else None for texts in TYPES.values()]
        pg.sql(f"insert into kept values (%s, 0, {casts})", args=(row, *values))


def same(pg: Pg, op: str, image: str, names: list[str] = NAMES) -> int:
    """How many images (n: new, o: old) of the changes of an op are the kept rows, value by value."""
    table, cols = pg.sql("select table_id, min(cols) from anton.change where op = %s group by 1", args=(op,))[0]
    select = pg.value("select anton.images_sql(%s, %s)", table, cols)
    for place, array in (("$1", "changes"), ("$2", "los"), ("$3", "his")):
        select = select.replace(place, array)
    equal = " and ".join(f"i.{image}_{name}::text is not distinct from k.{name}::text" for name in names)
    return int(
        pg.value(
            "with given as (select array_agg(change_id) as changes, array_agg(lo) as los, array_agg(hi) as his "
            f"from anton.job where op = '{op}') "
            "select count(*) from given "
            f"cross join lateral ({select}) i join kept k on i.{image}_id = k.id where {equal}"
        )
    )


@pytest.mark.parametrize("rows", [6, 30])
def test_every_type_comes_back_from_its_image_whatever_the_writers_settings(types: Pg, rows: int) -> None:
    make(types, rows)
    types.listen("t", "new", "updated", "deleted", read="change")
    for turn in range(4):
        types.sql("delete from anton.change", "delete from anton.job")
        with types.other(**{name: some[turn % len(some)] for name, some in SETTINGS.items()}) as writer:
            writer.sql(
                "insert into public.t select * from public.kept", "update public.t set v = 1", "delete from public.t"
            )
        assert [same(types, *of) for of in ("nn", "un", "uo", "do")] == [rows] * 4
        assert types.value("select count(*) from anton.change where degraded is not null") == 0


@pytest.mark.parametrize("rows", [6, 30])
def test_a_table_without_key_keeps_every_type_too(types: Pg, rows: int) -> None:
    make(types, rows, "")
    types.listen("t", "new")
    with types.other(**{name: some[1] for name, some in SETTINGS.items()}) as writer:
        writer.sql("insert into public.t select * from public.kept")
    assert same(types, "n", "n") == rows


def test_a_sql_handler_gets_every_type_in_its_new_and_old_records(types: Pg) -> None:
    make(types, 6)
    types.sql("create table seen (like t)", "select anton.handler('copy', 't', 'updated', "
              "'insert into seen select o.* from old_records o join new_records n using (id) where n.v > o.v')"
              )  # fmt: skip
    types.sql("insert into t select * from kept", "update t set v = 1")
    handler = types.value("select id from anton.handler")
    token, jobs = types.claim(handler)
    types.sql("select anton.run_sql(%s, %s, 1)", args=(token, [job.id for job in jobs]))
    different = " or ".join(f"s.{name}::text is distinct from k.{name}::text" for name in NAMES)
    assert types.value(f"select count(*) from kept k join seen s using (id) where not ({different})") == 6


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
BIG = 10**30
EPOCH, DOOM = datetime.datetime(1, 1, 2), datetime.datetime(9999, 12, 30)
ROW = st.fixed_dictionaries({
    "t": st.none() | TEXT,
    "f": st.none() | st.floats(),
    "r": st.none() | st.floats(width=32),
    "n": st.none() | st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-BIG, max_value=BIG),
    "b": st.none() | st.binary(),
    "at": st.none() | st.datetimes(EPOCH, DOOM, timezones=st.just(datetime.UTC)),
    "a": st.none() | st.lists(st.none() | TEXT),
    "j": st.none() | st.recursive(
        st.none() | st.booleans() | st.integers() | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=5),
})  # fmt: skip


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(ROW, min_size=1, max_size=25), choice=st.integers(0, 3))
def test_any_value_comes_back_as_it_was(pg: Pg, rows: list[dict[str, Any]], choice: int) -> None:
    pg.reset()
    pg.sql("create table t (id int primary key, t text, f float8, r real, n numeric, b bytea, "
           "at timestamptz, a text[], j jsonb)",
           "create table kept (like t)")  # fmt: skip
    pg.listen("t", "new", "updated", read="change")
    with pg.conn.cursor() as cursor:
        cursor.executemany("insert into kept values (%s, %s, %s, %s, %s, %s, %s, %s::text[], %s::jsonb)",
                           [(id, *(row[name] for name in "tfrnb"), row["at"], row["a"], json.dumps(row["j"]))
                            for id, row in enumerate(rows)])  # fmt: skip
    with pg.other(**{name: some[choice % len(some)] for name, some in SETTINGS.items()}) as writer:
        writer.sql("insert into public.t select * from public.kept",
                   "update public.t set f = 1.5, n = 7.123, t = coalesce(t, '') || 'x'")  # fmt: skip
    names = ["t", "f", "r", "n", "b", "at", "a", "j"]
    assert same(pg, "n", "n", names) == len(rows)
    assert same(pg, "u", "o", names) == len(rows)
