"""Plans: how each statement of the hot path reads the queue, empty and 1,000,000 jobs deep, fresh and after churn.

The statements live inside functions. auto_explain shows the plan of each one that runs; where the server does not
have it, the statistics of the transaction tell of sequential scans.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from pg import Pg
from servers import Server

from anton import read

QUEUE = ("job", "lease", "delayed", "change", "receipt", "output", "dead", "debounce", "turn", "rate", "rate_key")
DEPTHS = (0, 1_000, 1_000_000)
TOKEN = 7

# By depth: jobs that hold their keys, jobs of chunks of 1,000, changes with images, rows of the user's table.
FILL = """
insert into orders (n) select g from generate_series(1, {depth}) g;
insert into anton.job (handler_id, change_id, at, trace, lo, hi, op, ids)
  select {small}, g, clock_timestamp(), g, 1, 1, 'n', array[g] from generate_series(1, {depth}) g;
with c as (
  insert into anton.change (id, slot, at, xid, table_id, op, n, ids)
  select nextval('anton.change_seq'), anton.slot(t), t, pg_current_xact_id(), anton.watch('orders'), 'n', 1000,
         array(select k from generate_series(g * 1000 + 1, g * 1000 + 1000) k)
    from generate_series(0, {depth} / 1000 - 1) g, anton.now() t returning id, at)
insert into anton.job (handler_id, change_id, at, trace, lo, hi, op)
  select {large}, id, at, id, lo, lo + 499, 'n' from c, unnest(array[1, 501]) lo;
with c as (
  insert into anton.change (id, slot, at, xid, table_id, op, n, ids, cols, news, olds)
  select nextval('anton.change_seq'), anton.slot(t), t, pg_current_xact_id(), anton.watch('orders'), 'u', 1, array[g],
         '{{id,n}}', array[array[g::text], array['2']], array[array[g::text], array['1']]
    from generate_series(1, {depth} / 100) g, anton.now() t returning id, at)
insert into anton.job (handler_id, change_id, at, trace, lo, hi, op) select {images}, id, at, id, 1, 1, 'u' from c;
insert into anton.job (handler_id, change_id, at, trace, lo, hi, op, ids, tenant)
  select {shared}, g, clock_timestamp(), g, 1, 1, 'n', array[g], case when g % 100 > 0 then 'a' else 'b' || g % 7 end
    from generate_series(1, {depth} / 10) g;
insert into anton.delayed (handler_id, id, change_id, at, lo, hi, attempt, crashes, depth, op, ids, run_at)
  select {small}, nextval('anton.change_seq'), g, t, 1, 1, 0, 0, 0, 'n', array[g], t + interval '1 day'
    from generate_series(1, {depth} / 10) g, anton.now() t;
insert into anton.lease (handler_id, id, change_id, at, lo, hi, attempt, crashes, depth, op, ids, token, lease_until,
                         worker_id)
  select {small}, nextval('anton.change_seq'), g, t, 1, 1, 0, 0, 0, 'n', array[g], g / 100 + 1000, t + interval '1 day',
         1 from generate_series(1, {depth} / 10) g, anton.now() t;
insert into anton.debounce (handler_id, key, record, first_at, last_at, due_at)
  select {resting}, jsonb_build_array(-g), jsonb_build_array(g), t, t, t + interval '1 day'
    from generate_series(1, {depth} / 10) g, anton.now() t;
insert into anton.rate (handler_id, said, most, length_us) select {shared} + g, '9/1s', 9, 1000000
  from generate_series(1, 10000) g;
select anton.set_rate({small}, '1000/s');
insert into anton.rate_key (handler_id, key, ends, counts, until)
  select {small}, '[' || g || ']', '{{1,2}}', '{{1,1}}', t + interval '1 day'
    from generate_series(1, {depth} / 10) g, anton.now() t;
"""
PUT_MODEL = """select anton.put_model('{"app": "test", "name": "copies", "table": "copies", "key": ["id"],
  "body": "select id, n from orders", "refresh": ["public.orders"], "distinct_keys": true,
  "incremental": [{"table": "orders", "column": "id", "output": "id"}]}')"""
CHURN = """
delete from anton.job where id % 2 = 0;
delete from anton.lease where id % 2 = 0;
insert into anton.job (handler_id, change_id, at, trace, lo, hi, op, ids)
  select {small}, g, clock_timestamp(), g, 1, 1, 'n', array[g] from generate_series(1, {depth} / 2) g;
"""


class Watched:
    """A session that sees how its statements are run."""

    def __init__(self, pg: Pg, depth: int, small: int, large: int, images: int, sql: int, resting: int = 0,
                 shared: int = 0) -> None:
        self.pg, self.depth, self.small, self.large, self.images, self.sql_handler, self.shared = (
            pg,
            depth,
            small,
            large,
            images,
            sql,
            shared,
        )
        self.resting = resting
        self.plans: list[dict[str, Any]] = []
        self.explains = True
        self.state = ""
        try:
            pg.sql("load 'auto_explain'")
        except psycopg.errors.UndefinedFile:
            self.explains = False
            return
        for name, value in {
            "log_min_duration": 0,
            "log_nested_statements": "on",
            "log_format": "json",
            "log_level": "notice",
        }.items():
            pg.sql(f"set auto_explain.{name} = '{value}'")
        pg.conn.add_notice_handler(self._notice)

    def _notice(self, diagnostic: Any) -> None:
        head, found, plan = (diagnostic.message_primary or "").partition("plan:\n")
        if found and head.startswith("duration"):
            self.plans.append(json.loads(plan))

    def fill(self, text: str) -> None:
        self.pg.sql(*text.format(**self.__dict__).split(";\n")[:-1])

    def run(self, *statements: str, args: tuple[Any, ...] | None = None, but: str = "") -> list[tuple[Any, ...]]:
        """Runs them, and fails when one reads a table of the queue from end to end, but this one, or sorts it."""
        self.but = but
        self.plans.clear()
        with self.pg.conn.transaction():
            before, rows = self._scans(), []
            with psycopg.RawCursor(self.pg.conn) as cursor:
                for statement in statements:
                    cursor.execute(statement, args)
                    rows = cursor.fetchall() if cursor.description else []
            scanned = self._scans() - before
        assert self.plans or not self.explains
        for plan in self.plans:
            bad = [*self._bad(plan["Plan"])]
            assert not bad, f"{self.state}: {bad} in: {plan['Query Text']}\n{json.dumps(plan['Plan'], indent=1)}"
        assert not [name for name in scanned if self._matters(name)], (self.state, statements)
        return rows

    def _scans(self) -> Counter[str]:
        """Sequential scans of this session by table, where they are not counted for all yet."""
        return Counter(dict(self.pg.sql("select relname, seq_scan from pg_stat_xact_all_tables where seq_scan > 0")))

    def _matters(self, relation: str) -> bool:
        kind = relation.rstrip("0123456789_")
        if kind == "orders":
            return self.depth >= 1_000_000  # a small table is best read whole
        if kind == self.but or kind not in QUEUE:
            return False
        return bool(self.pg.value("select pg_relation_size(%s::regclass)", f"anton.{relation}"))

    def _bad(self, node: dict[str, Any]) -> Iterator[str]:
        relation = node.get("Relation Name", "")
        if node["Node Type"] == "Seq Scan" and self._matters(relation):
            yield f"Seq Scan on {relation}"
        if relation == "rate_key" and "Index" in node["Node Type"] and "(key = " not in node.get("Index Cond", ""):
            yield "all keys of a handler in rate_key"
        if "Sort" in node["Node Type"]:
            sorted_ = {name.rstrip("0123456789_") for name in _read(node)} & {"job", "delayed"}
            yield from (f"Sort of {name}" for name in sorted_)
        for child in node.get("Plans", ()):
            yield from self._bad(child)


def _read(node: dict[str, Any]) -> Iterator[str]:
    """The tables that a node's rows are read from directly, not by way of a CTE."""
    if "Relation Name" in node:
        yield node["Relation Name"]
    for child in node.get("Plans", ()):
        if child.get("Parent Relationship") not in ("InitPlan", "SubPlan"):
            yield from _read(child)


@pytest.fixture(params=DEPTHS, ids=lambda depth: f"{depth} deep")
def watched(request: Any, server: Server, template: str) -> Iterator[Watched]:
    """A queue that deep, whose statistics were taken when it was empty."""
    name = server.clone(template)
    pg = Pg(server.url(name))
    try:
        pg.sql(
            "create table orders (id bigint generated always as identity primary key, n int)",
            "create table letters (id bigint primary key)",
        )
        small, large = (pg.put(name, "orders", "new", read="now") for name in ("small", "large"))
        images = pg.put("images", "orders", "updated")
        resting = pg.put("resting", "orders", "updated", debounce="2 s", per="n")
        body = "insert into letters select id from new_records on conflict do nothing"
        sql = pg.put("sql", "orders", "new", kind="sql", body=body)
        pg.sql("create table copies (id bigint primary key, n int)", PUT_MODEL)
        pg.put("copies:orders", "orders", "new", "updated", "deleted", kind="sql", body="", model="copies")
        pg.sql("update anton.model set stale = false, built_at = anton.now()")
        pg.sql("analyze orders, letters, copies, anton.job, anton.lease, anton.delayed, anton.debounce")
        watched = Watched(pg, request.param, small, large, images, sql, resting,
                          pg.put("shared", "letters", "new"))
        pg.sql("alter table anton.rate drop constraint rate_handler_id_fkey")  # many rates, few handlers
        watched.fill(FILL)
        pg.sync("orders")
        yield watched
    finally:
        pg.conn.close()
        server.drop(name)


def claim(watched: Watched, *handlers: int, jobs: int = 20) -> list[Any]:
    n = len(handlers)
    return watched.run(
        "select id, change_id, lo, hi, ids from anton.claim(1, $1, $2, $3, $4, $5, '30 s')",
        args=(TOKEN, list(handlers), [jobs] * n, [4000] * n, [0] * n),
    )


def insert(watched: Watched, n: int) -> None:
    watched.run(f"insert into orders (n) select g from generate_series(1, {n}) g")


def settle(watched: Watched) -> None:
    """Leaves no lease under TOKEN."""
    watched.pg.sql(f"delete from anton.lease where token = {TOKEN}")


def capture(watched: Watched) -> None:
    for n in (1, 10, 100):
        insert(watched, n)
    watched.run("update orders set n = n + 1 where id = (select max(id) from orders)")
    watched.run("delete from orders where id = (select max(id) from orders)")


def claim_leased_and_ack(watched: Watched) -> None:
    insert(watched, 1)
    insert(watched, 20)
    for handler in (watched.small, watched.large, watched.images):
        jobs = claim(watched, handler)
        assert jobs or handler == watched.images
        watched.run("select * from anton.leased($1)", args=(TOKEN,))
        watched.run("select * from anton.heartbeat(1, $1, '30 s')", args=([TOKEN],))
        if jobs:
            receipt = watched.run("select anton.ack($1, $2, 1, 0)", args=(TOKEN, [job[0] for job in jobs]))
            watched.run("select anton.taint_of($1)", args=receipt[0])
    claim(watched, watched.small, watched.large, watched.images)
    settle(watched)


def fetch_of_rows_and_images(watched: Watched) -> None:
    insert(watched, 20)
    watched.pg.sql("update orders set n = n + 1 where id in (select id from orders order by id desc limit 3)")
    jobs = claim(watched, watched.large)
    fetch = watched.pg.value("select fetch_sql from anton.watched where table_name = 'orders'")
    keys = [key for job in jobs for key in job[4]]
    assert watched.run(fetch, args=(keys,))
    base = fetch.removesuffix(read._ANY)
    assert fetch != base
    watched.run(base + read.BY_KEY, args=("{" + ",".join(map(str, keys)) + "}",))
    watched.run(base + read.BY_RANGE, args=(keys[0], keys[-1]))
    settle(watched)
    jobs = claim(watched, watched.images)
    select = watched.pg.value("select anton.images_sql(anton.watch('orders'), array['id', 'n'])")
    assert watched.run(select, args=tuple([job[i] for job in jobs] for i in (1, 2, 3)))
    settle(watched)


def settling_by_record(watched: Watched) -> None:
    insert(watched, 20)
    job = claim(watched, watched.large, jobs=1)[0]
    lo = job[2]
    watched.run("select anton.ack_part($1, $2, $3, 1, 0)", args=(TOKEN, job[0], [lo, lo + 1]))
    watched.run("select anton.retry($1, $2, $3, '1 day', 'x', true)", args=(TOKEN, job[0], [lo + 2, lo + 3]))
    watched.run("select anton.bury($1, $2, $3, 'failed', 'x', null)", args=(TOKEN, job[0], lo + 4))
    watched.run("select * from anton.split($1, $2, 4)", args=(TOKEN, job[0]))
    ids = [row[0] for row in watched.run("select id from anton.leased($1)", args=(TOKEN,))]
    watched.run("select anton.give_back($1, $2)", args=(TOKEN, ids[:1]))
    watched.run("select anton.world_failed($1, $2, 'x')", args=(TOKEN, ids[1:]))
    watched.pg.sql("update anton.handler set failing_since = null, probe_at = null, failures = 0")


def sql_handlers(watched: Watched) -> None:
    """Their statement is planned for each call, so that few changes may be read whole."""
    insert(watched, 20)
    insert(watched, 1)
    jobs = claim(watched, watched.sql_handler)
    few = "change" if watched.depth < 1_000_000 else ""
    watched.run("select anton.run_sql($1, $2, 1)", args=(TOKEN, [job[0] for job in jobs]), but=few)


def models(watched: Watched) -> None:
    """What a refresh of some groups reads: the queue by handler, changes by id, both tables by key."""
    insert(watched, 20)
    insert(watched, 1)
    watched.pg.sql("update orders set n = n + 1 where id in (select id from orders order by id desc limit 3)")
    handler = watched.pg.value("select id from anton.handler where model_id is not null")
    jobs = claim(watched, handler, jobs=1)
    few = "change" if watched.depth < 1_000_000 else ""
    assert watched.run("select anton.run_sql($1, $2, 1)", args=(TOKEN, [job[0] for job in jobs]), but=few) != [(None,)]
    assert watched.pg.value("select not is_full from anton.model")


def promotion(watched: Watched) -> None:
    watched.run("select anton.promote()")
    watched.pg.sql("update anton.delayed set run_at = anton.now() where id in (select id from anton.delayed limit 10)")
    watched.run("select anton.promote()")


def turns_of_tenants(watched: Watched) -> None:
    """Beside a long backlog of one; jobs without a tenant are looked for among the oldest."""
    for tenant in ("'z'", "'y'", "null"):
        watched.pg.sql("insert into anton.job (handler_id, change_id, at, lo, hi, op, ids, tenant) "
                       f"values ({watched.shared}, 1, anton.now(), 1, 1, 'n', '{{1}}', {tenant})")
    assert {"y", "z"} <= {job[0] for job in watched.run(
        "select tenant from anton.claim(1, $1, $2, $3, $4, $5, '30 s', false, $6)",
        args=(TOKEN, [watched.shared, watched.small], [20, 20], [4000, 4000], [0, 0], ["b6", None]))}
    settle(watched)


def debounce(watched: Watched) -> None:
    for ids in ("= (select max(id) from orders)", "in (select id from orders order by id desc limit 20)"):
        watched.pg.sql(f"update orders set n = n + 1 where id {ids}")
        watched.run("select anton.promote()")
    due = "update anton.debounce set due_at = anton.now() where due_at in (select due_at from anton.debounce limit 10)"
    assert watched.pg.sql(due + " returning 1")
    watched.run("select anton.promote()")
    assert claim(watched, watched.resting)
    settle(watched)


def delay(watched: Watched) -> None:
    for n in (1, 20):
        watched.run("select anton.put_due('1 h', null)", f"insert into orders (n) select generate_series(1, {n})")


def rates(watched: Watched) -> None:
    """The row of its handler, by its key, when starts are taken, come back unused, and are shown."""
    for wanted in (1, 20):
        ((slots, counts),) = watched.run("select slots, counts from anton.take_rate(1, $1, $2)",
                                         args=(watched.small, wanted))
        assert slots
        watched.run("select * from anton.take_rate(1, $1, 0, $2, $3)", args=(watched.small, slots, counts))
    watched.run("select anton.waits_for($1), anton.rate_used($1), anton.next_rate($1)", args=(watched.small,))


def rates_of_keys(watched: Watched) -> None:
    """The rows of the keys that wait, known ones and new ones, and no others."""
    h = watched.large
    watched.pg.sql(f"select anton.set_limit({h}, 1)", f"select anton.permit(1, {h}, 1, '60 s')")
    for n in (1, 500):
        keys = [f"[{k}]" for k in range(1, n + 1)]
        watched.run("select * from anton.key_starts($1, $2)", args=(h, keys))
        for _ in range(2):
            ((at,),) = watched.run("select anton.note_starts(1, $1, $2, $3, $4)",
                                   args=(h, keys, ["{9,99}"] * n, ["{1,1}"] * n))
            assert at
    watched.run("select anton.forget_starts(anton.now())")
    watched.pg.sql(f"select anton.set_limit({h}, null)")


def looking(watched: Watched) -> None:
    """Leases have no index by time, which each heartbeat would have to keep: there are as many as are being worked."""
    handlers = [watched.small, watched.large, watched.images, watched.sql_handler]
    watched.run("select * from anton.poll(1, $1)", args=(handlers,), but="lease")
    watched.pg.sql("set parallel_setup_cost = 0", "set parallel_tuple_cost = 0", "set min_parallel_table_scan_size = 0")
    watched.run("select * from anton.overdue($1, anton.now(), anton.now())", args=(handlers,), but="lease")
    looks = [plan for plan in watched.plans if "from lease l" in plan["Query Text"]]
    assert looks or not watched.explains
    assert "Gather" not in json.dumps(looks), watched.state            # a look is no reason to start parallel workers
    watched.pg.sql("reset parallel_setup_cost", "reset parallel_tuple_cost", "reset min_parallel_table_scan_size")
    watched.run("select * from anton.reclaim(1, $1, $2, '30 s', 1)", args=(TOKEN, handlers), but="lease")
    watched.run("select * from anton.reclaim_together(1, $1, $2, '30 s')", args=(TOKEN, handlers), but="lease")
    watched.run("select anton.thaw('30 s')", but="lease")


CHUNK = """
with c as (
  insert into anton.change (id, slot, at, xid, table_id, op, n, ids)
  select nextval('anton.change_seq'), anton.slot(t), t, pg_current_xact_id(), anton.watch('orders'), 'n', 20000,
         array(select k from generate_series(1, 20000) k) from anton.now() t returning id, at)
insert into anton.job (handler_id, change_id, at, trace, lo, hi, op)
  select {handler}, id, at, id, lo, lo + 99, 'n' from c, generate_series(1, 19901, 100) lo"""


def test_a_claim_reads_the_keys_of_a_change_and_all_handlers_at_most_once_and_not_for_each_job(pg: Pg) -> None:
    pg.sql("create table orders (id bigint primary key)")
    handlers = [pg.put(f"h{n}", "orders", "new") for n in range(200)]
    pg.sql("analyze anton.handler", CHUNK.format(handler=handlers[100]))
    with pg.conn.transaction():
        before = reads(pg)
        jobs = pg.sql("select lo, ids[1], cardinality(ids) from anton.claim(1, 7, %s, %s, %s, %s, '30 s')",
                      args=([handlers[100]], [200], [20000], [0]))
        found = reads(pg) - before
    assert jobs == [(lo, lo, 100) for lo in range(1, 20000, 100)]
    assert found["kept apart"] == 1                                    # they are too long for their row
    assert 0 < found["handler"] < 300                                  # all, to see which are paused; then its own


def reads(pg: Pg) -> Counter[str]:
    """What this transaction has read so far: rows of handlers, and values of changes that are kept apart."""
    return Counter(dict(pg.sql("""
        select 'handler', seq_tup_read + idx_tup_fetch from pg_stat_xact_all_tables
         where relid = 'anton.handler'::regclass
        union all
        select 'kept apart', sum(s.idx_scan)::int from pg_stat_xact_all_tables s
         where s.relid in (select c.reltoastrelid from pg_class c
                            where c.relnamespace = 'anton'::regnamespace and c.relname like 'change%%')""", args=())))


@pytest.mark.system("the embedded Postgres has no auto_explain, and so only scans are seen there")
def test_here_plans_are_looked_at_themselves(pg: Pg) -> None:
    pg.sql("load 'auto_explain'")



def turns(watched: Watched) -> None:
    """Of an ordered handler: claims, what waits behind a retry, and what comes after it."""
    h = watched.large
    watched.pg.sql(f"update anton.handler set ordered = true where id = {h}", f"select anton.set_limit({h}, 1)",
                   f"select anton.permit(1, {h}, 1, '60 s')")
    insert(watched, 20)
    jobs = watched.run("select id from anton.claim_ordered(1, $1, $2, $3, $4, $5, '30 s')",
                       args=(TOKEN, [h], [1], [1], [0]), but="lease")
    for (job,) in jobs:
        at = watched.pg.value("select lo from anton.lease where token = %s and id = %s", TOKEN, job)
        watched.run("select anton.retry_in_turn($1, $2, $3, '{[1]}', '1 s', 'no', true)", args=(TOKEN, job, [at]))
        watched.run("select anton.put_off($1, $2, $3, '{[2]}')", args=(TOKEN, job, [at + 1]))
        watched.run("select anton.bury_in_turn($1, $2, $3, '[1]', 'crashed', 'no', null)", args=(TOKEN, job, at + 2))
        watched.run("select anton.bury_in_turn($1, $2, $3, '[3]', 'failed', 'no', null)", args=(TOKEN, job, at + 3))
        first = watched.pg.value("select id from anton.turn where state = 'first' and key = '[1]' limit 1")
        assert watched.run("select anton.heads($1, $2)", args=(h, [first])) == [([first],)]
        watched.run("select anton.waiting_keys($1, $2)", args=(h, ["[1]", "[5]"]))
        watched.run("select anton.end_turn($1, $2)", args=(h, first))
        watched.run("select anton.give_back($1, $2)", args=(TOKEN, [job]))
    watched.pg.sql("delete from anton.job where settled is not null")  # nobody else wants these
    assert jobs
    watched.pg.sql(f"update anton.handler set ordered = false where id = {h}", f"select anton.set_limit({h}, null)")
    settle(watched)


CHECKS = (looking, capture, claim_leased_and_ack, fetch_of_rows_and_images, settling_by_record, sql_handlers, models,
          promotion, turns_of_tenants, debounce, delay, rates, rates_of_keys, turns)


def test_no_statement_of_the_hot_path_reads_the_queue_whole_or_sorts_it(watched: Watched) -> None:
    for state in ("fresh", "churned", "analyzed"):
        if state == "churned":  # half of it is dead rows
            watched.fill(CHURN)
        if state == "analyzed":
            watched.pg.sql("analyze")
        for mode in ("auto", "force_generic_plan"):  # planned for this call; planned for any
            watched.pg.sql(f"set plan_cache_mode = {mode}", "discard plans")
            for check in CHECKS:
                watched.state = f"{check.__name__}, {state}, {mode}"
                check(watched)
