"""Writes that the database refuses are blamed on the records they belong to."""

from typing import Any

import asyncpg
import pytest
from written import T, batch

from anton import Table
from anton.app import App, declaring
from anton.errors import WriteRefused
from anton.write import WHOLE, Scope, commit, pick


def outcome(t: T, scope: Scope) -> Any:
    try:
        t.db.run(commit(t.db, scope.ops))
    except WriteRefused as refused:
        return refused.owners, type(refused.error).__name__
    return None


@pytest.mark.parametrize(("bad", "error"), [
    ({"n": -1, "s": "x"}, "CheckViolationError"), ({"n": "x", "s": "x"}, "TypeError"),
    ({"n": 2**40, "s": "x"}, "OverflowError"), ({"n": 1, "s": "\0"}, "CharacterNotInRepertoireError"),
    ({"n": 1, "s": 5}, "TypeError")])
def test_copy_blames_the_owner_of_the_row(t: T, bad: dict[str, Any], error: str) -> None:
    records = batch(*range(40))
    with Scope("handler", records) as scope:
        for record in records:
            t.out.append(bad if record["n"] == 23 else {"n": record["n"], "s": "ok"})
    assert outcome(t, scope) == ({23}, error)
    t.db.run(commit(t.db, pick(scope.ops, {23}, keep=False)))
    assert t.rows("select count(*), sum(n) from out") == [(39, sum(range(40)) - 23)]


def test_a_small_insert_blames_what_it_can(t: T) -> None:
    records = batch(1, 2, 3)
    with Scope("handler", records) as scope:
        for record in records:
            t.out.append({"n": "x" if record["n"] == 2 else 1})
    assert outcome(t, scope) == ({1}, "DataError")
    with Scope("handler", records) as scope:
        for record in records:
            t.out.append({"n": -1 if record["n"] == 2 else 1})
    assert outcome(t, scope) == (None, "CheckViolationError")
    assert outcome(t, _only(scope, 1)) == ({1}, "CheckViolationError")
    assert outcome(t, _only(scope, 0)) is None


def _only(scope: Scope, who: int) -> Any:
    other = Scope("handler")
    other.ops = pick(scope.ops, {who})
    return other


def test_a_foreign_key_is_blamed_by_the_callers_halving(t: T) -> None:
    with Scope("handler", batch(*range(20))) as scope:
        t.child.extend({"parent": 1} for _ in range(20))
    assert outcome(t, scope) == ({WHOLE}, "ForeignKeyViolationError")


def test_what_is_nobodys_fault_comes_through(t: T) -> None:
    t.out.append({"n": 1})
    t.run("alter table out rename to gone")
    with Scope("handler", batch(1)) as scope:
        t.out.append({"n": 1})
    with pytest.raises(asyncpg.UndefinedTableError):
        t.db.run(commit(t.db, scope.ops))


def test_tables_that_refuse_copy_take_inserts(t: T) -> None:
    t.run("create view shown as select id, n, s from out")
    with declaring(App()):
        shown = Table("shown")
    shown.extend({"n": n} for n in range(50))
    assert t.rows("select count(*) from out") == [(50,)]
    with pytest.raises(WriteRefused):
        shown.append({"n": -1})


def test_types_of_extensions_are_written_as_text(t: T) -> None:
    (name, value), *_ = [(name, value) for name, value in (("vector", [1.0, 2.0]), ("citext", "A"))
                         if t.rows(f"select name from pg_available_extensions where name = '{name}'")]
    t.run(f"create extension {name}; create table own (id bigint primary key, d {name})")
    with declaring(App()):
        own = Table("own")
    own.extend({"id": n, "d": value} for n in range(50))
    own.select(id=7).update(d=value)
    assert len(list(own.select(d=value))) == 50
