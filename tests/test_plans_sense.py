"""Plans: how schedules, polls, files, loads, deliveries and calls of models read what has piled up, 60,000 deep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pg import Pg
from psycopg.types.json import Jsonb
from servers import Server
from test_plans import Watched

DEEP = ("tick", "poll_key", "delivery", "quarantine", "load", "load_reject", "lots", "call", "memo", "answer", "spent")
DEPTH = 60_000
FILL = """
insert into anton.tick (schedule_id, planned_at, state, fired_at, change_id)
  select s.id, '2020-01-01'::timestamptz + g * interval '1 min', 'done', anton.now(), g
    from anton.schedule s, generate_series(1, {depth} / 3) g where s.name <> 'idle';
insert into anton.poll (schedule_id) select id from anton.schedule where name = 'first';
insert into anton.poll_key (schedule_id, key, seen_at)
  select p.schedule_id, md5(g::text)::uuid, anton.now() - g * interval '1 s'
    from anton.poll p, generate_series(1, {depth}) g;
insert into anton.delivery (webhook, id, at, headers, body)
  select 'app/hook', 'd' || g, anton.now() - g * interval '1 s', '{{}}', 'x' from generate_series(1, {depth}) g;
insert into anton.quarantine (webhook, id, at, last_at, status, error, headers, body)
  select 'app/hook', 'q' || g, anton.now(), anton.now(), 422, 'x', '{{}}', 'x' from generate_series(1, {depth} / 10) g;
insert into anton.load (app, storage, path, version, table_name, state, started_at)
  select 'app', 'disk', 'lots/' || g, 'v', 'public.orders', 'done', anton.now() from generate_series(1, {depth}) g;
insert into anton.load_reject (load_id, row_number, data, error)
  select id, 1, 'x', 'x' from anton.load where id % 3 = 0;
insert into anton.budget (app, scope, name, period, unit, amount)
  values ('app', 'handler', 'one', 'minute', 'usd', 1000), ('app', 'handler', 'two', 'hour', 'tokens', 1000000);
insert into anton.spent (budget_id, period, settled)
  select b.id, '2020-01-01'::timestamptz + g * interval '1 min', 1 from anton.budget b,
         generate_series(1, {depth} / 2) g;
insert into anton.call (at, app, handler, provider, model, input_hash, state, cost, budgets, periods)
  select anton.now() - ({depth} - g) * interval '1 min', 'app', 'one', 'p', 'm', md5(g::text), 'done', 0,
         array(select id from anton.budget order by id),
         array_fill('2020-01-01'::timestamptz + g / 2 * interval '1 min', array[2])
    from generate_series(1, {depth}) g;
insert into anton.memo (hash, call_id, answer, at, expires_at)
  select input_hash, id, '{{"text": "x", "model": "m"}}', at, at + interval '30 days' from anton.call;
insert into anton.answer (call_id, key, memo, at) select id, '[1]', false, at from anton.call;
insert into lots (path, size, etag, modified)
  select 'lots/' || g, 1, 'v', '2026-01-01' from generate_series(1, {depth}) g;
"""


class Sensed(Watched):
    """Which tables are deep."""

    def _matters(self, relation: str) -> bool:
        return relation in DEEP and relation != self.but


@pytest.fixture(scope="module")
def sensed(server: Server, template: str) -> Iterator[Sensed]:
    """What has piled up; its statistics were taken when there was nothing."""
    name = server.clone(template)
    pg = Pg(server.url(name))
    try:
        pg.sql("create table lots (path text primary key, size bigint, etag text, modified timestamptz)",
               "create table orders (id bigint primary key)",
               *(f"select anton.schedule('{name}', '@every 60', 'select 1')" for name in ("first", "second", "third")),
               "select anton.schedule('idle', '0 3 * * *', 'select 1')",
               "analyze")
        watched = Sensed(pg, DEPTH, 0, 0, 0, 0)
        watched.fill(FILL)
        yield watched
    finally:
        pg.conn.close()
        server.drop(name)


def schedules(sensed: Sensed) -> None:
    sensed.pg.sql("update anton.schedule set next_at = date_trunc('minute', anton.now()) where name <> 'idle'")
    sensed.run("select anton.tick()")
    sensed.run("select anton.tick()")                                  # closes and opens ticks
    sensed.run("select anton.run_schedule('first')")
    sensed.run("select anton.next_tick()")
    sensed.run("select * from anton.unplanned()")


def polls(sensed: Sensed) -> None:
    (poll,) = sensed.run("select schedule_id, version from anton.begin_poll('sql', 'first', anton.now())")
    keys = "array(select md5(g::text)::uuid from generate_series(59500, 60500) g)"
    sensed.run(f"select anton.new_keys($1, {keys})", args=(poll[0],))
    sensed.run(f"select anton.finish_poll($1, $2, null, anton.now(), {keys}, 1, 0)", args=poll)
    sensed.run("select anton.forget_keys(anton.now())")
    sensed.run("select anton.forget_keys(anton.now() + interval '87 days')")


def scans(sensed: Sensed) -> None:
    """known_files() goes through all of the table, a page at a time."""
    (token,) = sensed.run("select anton.begin_scan('app', 'public.lots')")[0]
    for n in (1, 2000):
        first = sensed.pg.value("select count(*) from lots")
        found = (f"array(select 'lots/' || g from generate_series({first - n + 1}, {first + n}) g), "
                 f"array(select 2::bigint from generate_series(1, {2 * n})), "
                 f"array(select 'w' from generate_series(1, {2 * n})), "
                 f"array(select '2026-01-01'::timestamptz from generate_series(1, {2 * n}))")
        sensed.run(f"select anton.merge_files('app', 'public.lots', $1, {found}, '0')", args=(token,))
    sensed.run("select count(*) from anton.known_files('public.lots', 'lots/7', 5000)")
    sensed.run("select anton.drop_files('app', 'public.lots', $1, "
               "array(select 'lots/' || g from generate_series(1, 2000) g))", args=(token,))
    sensed.run("select anton.keep_scan('app', 'public.lots', $1)", args=(token,))
    sensed.run("select anton.end_scan('app', 'public.lots', $1, 1)", args=(token,))


def loads(sensed: Sensed) -> None:
    begin = "select id, reached from anton.begin_load('app', 'disk', 'lots/7', $1, 'public.orders')"
    sensed.run(begin, args=("v",))
    (one,) = sensed.run(begin, args=(sensed.state,))
    sensed.run("select anton.lock_load($1, $2)", args=one)
    sensed.run("select anton.advance_load($1, 10, 1, array[2::bigint], array['x'], array['y'])", args=(one[0],))
    sensed.run("select anton.end_load($1, 'done')", args=(one[0],))
    sensed.run(begin, args=("v",))                                     # put back: loaded anew


def deliveries(sensed: Sensed) -> None:
    fresh = "array(select $1 || g from generate_series(1, 100) g)"
    known = "array(select 'd' || g from generate_series(1, 100) g)"
    for ids in (fresh, known):
        sensed.run(f"select anton.deliver(array_fill('app/hook'::text, array[100]), {ids}, "
                   "array_fill('{}'::text, array[100]), array_fill('x'::bytea, array[100])), $1::text",
                   args=(f"new {sensed.state} ",), but="quarantine")  # whether there is any
    sensed.run("select anton.delivered('app/hook', 'd7')")
    sensed.run("select * from anton.answered('app/hook', 'd7')")
    sensed.run("select * from anton.answered('app/hook', 'q9')")       # one that is in quarantine
    for id in ("d7", f"kept {sensed.state}"):                          # known; new
        sensed.run("select anton.keep_delivery('app/hook', $1, '{}', 'x', 200)", args=(id,))
        sensed.run("select anton.keep_reply('app/hook', $1, 200, 'x', 'text/plain')", args=(id,))
    sensed.run("select anton.quarantine('app/hook', 'q7', '{}', 'x', 'x', 422)")
    sensed.run("select anton.forget_deliveries(anton.now())")


def calls(sensed: Sensed) -> None:
    budgets = [id for (id,) in sensed.pg.sql("select id from anton.budget order by id")]
    given = [{"n": n, "hash": f"{sensed.state} {n}", "ttl": 60, "quota": "q", "tokens": 9, "budgets": budgets,
              "app": "app", "handler": "one", "provider": "p", "model": "m", "reserved": 0.01, "reserved_tokens": 9,
              "lease": 60} for n in range(50)]
    begin = "select call_id from anton.begin_calls($1, 'w') where verdict = $2"
    begun = sensed.run(begin, args=(Jsonb(given), "send"))
    assert len(begun) == 50 == len(sensed.run(begin, args=(Jsonb(given), "wait")))
    sensed.run("select anton.lapse_calls()")
    ended = [{"id": id, "state": "done" if id % 2 else "unknown", "quota": "q", "over": 3, "ttl": 60, "limits": [],
              "answer": {"text": "x"}, "tokens_in": 1, "tokens_out": 1, "cost": 0.01} for (id,) in begun]
    sensed.run("select anton.end_calls($1)", args=(Jsonb(ended),))
    sensed.run("select anton.settle_call($1, 0)", args=(next(id for (id,) in begun if not id % 2),))
    sensed.run("select anton.forget_memos(array(select md5(g::text) from generate_series(1, 100) g))")
    sensed.run("select anton.forget_answers(anton.now(), 40)")
    sensed.run("select * from anton.list_costs(1)")
    sensed.run("select * from anton.list_budgets()")
    sensed.run("select * from anton.list_calls('unknown', 20)")
    sensed.run("select anton.show_call(7)")
    sensed.run("select * from anton.thoughts(array[7::bigint, 8])")


@pytest.mark.parametrize("check", [schedules, polls, scans, loads, deliveries, calls])
def test_what_has_piled_up_is_not_read_from_end_to_end(sensed: Sensed, check: object) -> None:
    assert callable(check)
    for state in ("fresh", "analyzed"):
        if state == "analyzed":
            sensed.pg.sql("analyze")
        for mode in ("auto", "force_generic_plan"):                    # planned for this call; planned for any
            sensed.pg.sql(f"set plan_cache_mode = {mode}", "discard plans")
            sensed.state = f"{check.__name__}, {state}, {mode}"
            check(sensed)
