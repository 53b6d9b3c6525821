"""Keys of records that are appended: final at once, taken in blocks."""

import os

import pytest
from written import T, batch, restricted

from anton import Table, transaction
from anton.app import App, declaring
from anton.errors import MissingPrivilege, WriteRefused
from anton.write import Scope, commit


def test_append_says_the_final_key_at_once(t: T) -> None:
    with transaction():
        parent = t.out.append({"n": 1})
        t.child.append({"parent": parent.id})
        document = t.doc.append({"x": [1]})
        assert document["x"] == [1]
    assert t.rows("select parent from child") == [(parent.id,)]
    assert t.rows("select id, data from doc") == [(document.id, {"x": [1]})]


def test_keys_come_in_growing_blocks_and_unused_ones_go_back(t: T) -> None:
    for expected in (1, 2, 3):
        with transaction():
            assert t.out.append({"n": 0}).id == expected
    with transaction():
        assert [t.out.append({"n": 0}).id for _ in range(5000)] == list(range(4, 5004))


def test_blocks_that_others_interrupt_give_the_keys_they_got(t: T) -> None:
    t.run("create sequence s; create function skip() returns bigint language sql as $$ select nextval('s') * 10 $$;"
          "create table odd (id bigint primary key default skip(), n int)")
    with declaring(App()):
        odd = Table("odd")
    odd.extend({"n": n} for n in range(20))
    assert t.rows("select id from odd order by id") == [(n * 10,) for n in range(1, 21)]


def test_a_forked_process_takes_keys_of_its_own(t: T) -> None:
    with transaction():
        for _ in range(10):
            t.out.append({"n": 0})
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with Scope("handler") as scope:
            keys = [t.out.append({"n": 1}).id for _ in range(100)]
        os.write(write_end, " ".join(map(str, keys)).encode())
        assert scope.ops
        os._exit(0)
    os.waitpid(child, 0)
    theirs = {int(key) for key in os.read(read, 10_000).split()}
    with transaction():
        mine = {t.out.append({"n": 0}).id for _ in range(100)}
    assert len(theirs) == len(mine) == 100
    assert not theirs & mine


def test_keys_without_the_right_to_the_sequence_name_the_grant(t: T) -> None:
    with restricted(t, "insert, select on out") as db, Scope("transaction", db=db):
        with pytest.raises(MissingPrivilege, match="grant usage on sequence public.out_id_seq to writer_"):
            t.out.append({"n": 1})


def test_row_security_is_respected(t: T) -> None:
    t.run("alter table out enable row level security; create policy p on out using (true) with check (n < 100)")
    with restricted(t, "insert, select on out", "usage on sequence out_id_seq") as db:
        with Scope("handler", batch(1, 2), db) as scope:
            t.out.extend({"n": n} for n in range(50))
        db.run(commit(db, scope.ops))
        assert t.rows("select count(*) from out") == [(50,)]
        with Scope("handler", batch(1, 2), db) as scope:
            t.out.extend({"n": n} for n in range(90, 110))
        with pytest.raises(WriteRefused, match="row-level security"):
            db.run(commit(db, scope.ops))


@pytest.mark.parametrize("rows", [1, 100], ids=["by INSERT", "by COPY"])
def test_a_sequence_that_was_set_back_costs_one_refused_write(t: T, rows: int) -> None:
    with transaction():
        last = [t.out.append({"n": 0}).id for _ in range(5000)][-1]   # and keys are left over
    t.run("truncate out, child restart identity; insert into out (n) select 1 from generate_series(1, 20000)")
    with pytest.raises(WriteRefused):
        t.out.extend({"n": 2} for _ in range(rows))
    t.out.extend({"n": 3} for _ in range(rows))
    assert t.rows("select count(*), min(id) > 20000 from out where n = 3") == [(rows, True)]
    assert last < 20000
