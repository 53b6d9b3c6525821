-- The queue: claim -> (handler) -> ack | ack_part | retry | bury | give_back, all fenced by the lease token.
-- Any language can be a worker through these functions; Python's names for them are in anton/queue.py.
-- job holds what is ready, delayed what waits for its time, lease what is being worked. A claim moves rows
-- from job to lease, so paused, delayed and leased work never lies in the claim's way.
-- enable_seqscan = off: plans are kept from when a table was small, and statistics lag behind; see tests/test_plans.py.
-- jit = off with it: what is switched off costs 1e10, which Postgres before 18 takes for worth compiling, 0.2 s each run.

-- leased(token, ids) -> leased jobs with what a worker needs; keys come from the change when the job does not hold them
create or replace function leased(p_token bigint, p_ids bigint[] default null) returns table (
  handler_id int, id bigint, change_id bigint, at timestamptz, cause bigint, trace bigint, lo int, hi int,
  attempt smallint, crashes smallint, depth smallint, op "char", tenant text, origin text, settled int[],
  ids bigint[], keys jsonb, cols text[], degraded text, table_id int, ms_waiting real, probe boolean)
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare v_now timestamptz := now();
begin
  return query
    select l.handler_id, l.id, l.change_id, l.at, l.cause, l.trace, l.lo, l.hi,
           l.attempt, l.crashes, l.depth, l.op, l.tenant, l.origin, l.settled,
           case when l.ids is not null then l.ids when l.lo = 1 and l.hi = c.n then c.ids else c.ids[l.lo:l.hi] end,
           case when l.keys is not null then l.keys when l.lo = 1 and l.hi = c.n then c.keys
                when c.keys is not null then jsonb_path_query_array(c.keys, '$[$lo to $hi]',
                       jsonb_build_object('lo', l.lo - 1, 'hi', l.hi - 1)) end,
           c.cols, c.degraded, h.table_id, (extract(epoch from v_now - l.at) * 1000)::real,
           h.failing_since is not null
      from lease l join handler h on h.id = l.handler_id
      left join change c on c.id = case when l.ids is null and l.keys is null then l.change_id end and c.slot = slot(l.at)
     where l.token = p_token and (p_ids is null or l.id = any (p_ids))
     order by l.handler_id, l.id;
end $$;

-- many(rows) -> them; the planner takes it for a thousand, where it would take the array for ten and join in nested loops
create or replace function many(p_rows tid[]) returns setof tid language sql volatile rows 1000 set search_path from current as $$
  select unnest(p_rows)
$$;

-- claim(worker, token, handlers, jobs, records, after, lease, lazy, turns) -> leased jobs
-- For each handler i leases at most jobs[i] jobs of about records[i] records with id > after[i]; never waits
-- for a row another holds. Paused handlers yield nothing, a failing one a single job when its probe is due.
-- Where ready jobs name a tenant, of each in turn, and after is not looked at; see jobs_in_turn().
--   token  64 random bits, new for each call: every later call on these jobs must show it
--   after  0, or the last id claimed, to step over rows a pinned xmin keeps dead
--   lazy   this transaction holds nothing else and its commit need not reach the disk: a claim that a crash of the
--          server takes back was never made, and no ack can outlast it
--   turns  for each handler the tenant that had the last turn; null: begin anew
drop function if exists claim(int, bigint, int[], int[], int[], bigint[], interval, boolean);
create or replace function claim(p_worker int, p_token bigint, p_handlers int[], p_jobs int[], p_records int[],
  p_after bigint[], p_lease interval, p_lazy boolean default false, p_turns text[] default null)
returns table (
  handler_id int, id bigint, change_id bigint, at timestamptz, cause bigint, trace bigint, lo int, hi int,
  attempt smallint, crashes smallint, depth smallint, op "char", tenant text, origin text, settled int[],
  ids bigint[], keys jsonb, cols text[], degraded text, table_id int, ms_waiting real, probe boolean)
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_sort = off set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  v_now timestamptz := now();
  v_until timestamptz := v_now + p_lease;
  v_rows tid[];
  v_failing boolean;
  v_probes int[];
  v_turns int[];
begin
  if p_lazy then
    perform set_config('synchronous_commit', 'off', true);
  end if;
  with wanted as materialized (
    select w.handler_id, case when t.turns then 0 when h.failing_since is null then w.jobs else least(w.jobs, 1) end as jobs, w.records,
           w.after, h.failing_since is not null as failing, t.turns
      from unnest(p_handlers, p_jobs, p_records, p_after) as w (handler_id, jobs, records, after)
      join handler h on h.id = w.handler_id
      cross join lateral (                                  -- the order leaves only the index of jobs with a tenant
        select h.failing_since is null and not h.ordered and (select j.tenant from job j where j.handler_id = w.handler_id and j.tenant is not null
                                             order by j.tenant collate "C" limit 1) is not null as turns) t
     where not h.paused and (h.probe_at is null or h.probe_at <= v_now)
  ), locked as materialized (
    select j.row, j.n, j.id, w.handler_id, w.records, w.failing
      from wanted w cross join lateral (
        select job.ctid as row, job.id, job.hi - job.lo + 1 as n from job
         where job.handler_id = w.handler_id and job.id > w.after
         order by job.id limit w.jobs for update skip locked) j
  )
  select array_agg(x.row), bool_or(x.failing), (select array_agg(handler_id) from wanted where turns) into v_rows, v_failing, v_turns
    from (select row, records, failing, sum(n) over (partition by handler_id order by id) - n as before from locked) x
   where x.before < x.records;
  if v_turns is not null then
    v_rows := v_rows || array(
      select unnest(jobs_in_turn(w.handler_id, w.jobs, w.records, w.turn))
        from unnest(p_handlers, p_jobs, p_records, p_turns) as w (handler_id, jobs, records, turn) where w.handler_id = any (v_turns));
  end if;
  if v_failing then                                        -- only the worker that got the probe probes
    with probe as (
      update handler h set probe_at = v_until
       where h.id = any (p_handlers) and h.failing_since is not null and h.probe_at <= v_now
         and exists (select from job j where j.ctid = any (v_rows) and j.handler_id = h.id)
      returning h.id)
    select array_agg(id) into v_probes from probe;
    v_rows := array(select j.ctid from job j join handler h on h.id = j.handler_id
                     where j.ctid = any (v_rows) and (h.failing_since is null or h.id = any (v_probes)));
  end if;
  if v_rows is null then
    return;
  end if;
  return query
    with taken as (
      delete from job using many(v_rows) r (row) where job.ctid = r.row returning job.*
    ), held as (
      insert into lease as l (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin,
                              settled, ids, keys, token, lease_until, worker_id)
      select t.handler_id, t.id, t.change_id, t.at, t.cause, t.trace, t.lo, t.hi, t.attempt, t.crashes, t.depth, t.op, t.tenant,
             t.origin, t.settled, t.ids, t.keys, p_token, v_until, p_worker from taken t
      returning l.*
    ), missing as materialized (                            -- small jobs hold their keys, the others' are in their change
      select distinct change_id, at from held where ids is null and keys is null
    ), found as materialized (
      select m.change_id, x.* from missing m cross join lateral (
        select c.n, case when c.ids is not null then c.ids || '{}' end as ids, c.keys, c.cols, c.degraded   -- || reads them once, not for each job
          from change c where c.id = m.change_id and c.slot = slot(m.at) limit 1) x
    ), whose as materialized (                              -- else all handlers are gone through for each job, in their order
      select id, table_id, failing_since is not null as probe from handler where id = any (p_handlers)
    )
    select l.handler_id, l.id, l.change_id, l.at, l.cause, l.trace, l.lo, l.hi,
           l.attempt, l.crashes, l.depth, l.op, l.tenant, l.origin, l.settled,
           case when l.ids is not null then l.ids when l.lo = 1 and l.hi = c.n then c.ids else c.ids[l.lo:l.hi] end,
           case when l.keys is not null then l.keys when l.lo = 1 and l.hi = c.n then c.keys
                when c.keys is not null then jsonb_path_query_array(c.keys, '$[$lo to $hi]',
                       jsonb_build_object('lo', l.lo - 1, 'hi', l.hi - 1)) end,
           c.cols, c.degraded, h.table_id, (extract(epoch from v_now - l.at) * 1000)::real, h.probe
      from held l join whose h on h.id = l.handler_id left join found c on c.change_id = l.change_id and l.ids is null
     order by l.handler_id, l.id;
end $$;

-- heartbeat(worker, tokens, lease, without) -> the tokens still held
-- Extends every lease of these tokens; rows that are being settled right now are skipped and count as held.
--   without  ids of jobs under these tokens whose leases are left to end
drop function if exists heartbeat(int, bigint[], interval);
create or replace function heartbeat(p_worker int, p_tokens bigint[], p_lease interval, p_without bigint[] default '{}') returns setof bigint
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_now timestamptz := now(); v_until timestamptz := v_now + p_lease; v_rows tid[];
begin
  update worker set seen_at = v_now where id = p_worker;
  select array_agg(x.row) into v_rows from (
    select ctid as row from lease where token = any (p_tokens) and id <> all (p_without) for update skip locked) x;
  update lease set lease_until = v_until where ctid = any (v_rows);
  return query select distinct l.token from lease l where l.token = any (p_tokens);
end $$;

-- fence(token, held, wanted): raises NT001 unless every job that was asked for was still ours
create or replace function fence(p_token bigint, p_held bigint, p_wanted bigint) returns void
language plpgsql immutable set search_path from current as $$
begin
  if p_held is distinct from p_wanted or p_wanted = 0 then
    raise exception using errcode = 'NT001',
      message = format('lease lost: %s of %s jobs are still held under token %s', coalesce(p_held, 0), p_wanted, p_token),
      hint = 'another worker has these jobs now; what this one computed must be dropped';
  end if;
end $$;

-- let_go(until): who freezes between two statements of this transaction keeps its row locks for what is left of its lease,
-- and two seconds at least; a shorter idle_in_transaction_session_timeout of the session or role stays as it is
create or replace function let_go(p_until timestamptz) returns void language plpgsql volatile set search_path from current as $$
declare
  v_ms int := 1000 * case when isfinite(p_until) then least(86400, greatest(2, extract(epoch from p_until - now()))) else 2 end;
  v_set numeric := 1000 * extract(epoch from current_setting('idle_in_transaction_session_timeout')::interval);
begin
  if v_set = 0 or v_set > v_ms then
    perform set_config('idle_in_transaction_session_timeout', v_ms::text, true);
  end if;
end $$;

-- enter(receipt, depth, trace, tenant): what the triggers of this transaction's writes will note as their cause
create or replace function enter(p_receipt bigint, p_depth int, p_trace bigint, p_tenant text) returns void
language sql volatile set search_path from current as $$
  select set_config('anton.context', p_receipt || ',' || p_depth || ',' || coalesce(p_trace::text, ''), true),
         set_config('anton.tenant', coalesce(p_tenant, ''), true)
$$;

-- recover(handler): its work succeeded, so the world is back
create or replace function recover(p_handler int) returns void language plpgsql volatile set search_path from current as $$
begin
  if exists (select from handler where id = p_handler and failing_since is not null) then
    update handler set failing_since = null, failing_error = null, failures = 0, probe_at = null where id = p_handler;
  end if;
end $$;

-- ack(token, ids, worker, ms, gone) -> receipt id
-- Settles whole jobs of one handler: deletes them under the fence (NT001 and nothing changed when one is lost),
-- writes the receipt, and sets the context for the outputs that follow in the same transaction.
--   gone  records that had vanished from the table when they were read
create or replace function ack(p_token bigint, p_ids bigint[], p_worker int, p_ms real, p_gone int default 0)
returns bigint language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare
  v_now timestamptz := now();
  v_receipt bigint := nextval('change_seq');
  v_held bigint; v_handler int; v_mixed boolean; v_depth int; v_trace bigint; v_traces bigint; v_tenant text; v_settled int[]; v_rest int[];
  v_ids bigint[]; v_keys jsonb; v_changes bigint[]; v_los int[]; v_his int[]; v_causes bigint[]; v_n bigint; v_until timestamptz;
begin
  with done as materialized (
    delete from lease where token = p_token and id = any (p_ids) returning id, handler_id, change_id, lo, hi, cause, depth, trace, tenant, settled, ids, keys, lease_until
  )
  select count(*), min(handler_id), min(handler_id) <> max(handler_id) or min(coalesce(tenant, '')) <> max(coalesce(tenant, '')),
         max(depth), min(trace),
         -- no DISTINCT: Postgres 16 sorts for it, and the arrays below would come in that order
         case when min(trace) = max(trace) and count(trace) = count(*) then 1 else 2 end, min(tenant), min(settled),
         array_agg(change_id), array_agg(lo), array_agg(hi), array_agg(cause), sum(hi - lo + 1), min(lease_until),
         (select array_agg(k order by d.id, o) from done d, unnest(d.ids) with ordinality x (k, o)),
         (select jsonb_agg(k order by d.id, o) from done d, jsonb_array_elements(d.keys) with ordinality x (k, o))
    into v_held, v_handler, v_mixed, v_depth, v_trace, v_traces, v_tenant, v_settled, v_changes, v_los, v_his, v_causes, v_n, v_until, v_ids, v_keys
    from (select * from done order by id) d;
  perform fence(p_token, v_held, cardinality(p_ids));
  if v_mixed then
    raise exception using errcode = 'NT004', message = 'ack: jobs of more than one handler or tenant must be acked apart',
      hint = 'call it once for each, in the same transaction';
  end if;
  if v_settled is not null then
    if v_held > 1 then
      raise exception using errcode = 'NT004', message = 'ack: a job settled in part must be acked alone';
    end if;
    select array_agg(o) into v_rest from generate_series(v_los[1], v_his[1]) o where o <> all (v_settled);
    v_n := coalesce(cardinality(v_rest), 0);
  end if;
  perform let_go(v_until);
  insert into receipt (id, slot, at, handler_id, worker_id, ms, n, gone, change_ids, los, his, causes, ordinals, ids, keys,
                       depth, trace, tenant)
  values (v_receipt, slot(v_now), v_now, v_handler, p_worker, p_ms, v_n, p_gone, v_changes, v_los, v_his, v_causes, v_rest,
          v_ids, v_keys, v_depth, case when v_traces = 1 then v_trace end, v_tenant);
  perform enter(v_receipt, v_depth + 1, case when v_traces = 1 then v_trace end, v_tenant);
  perform recover(v_handler);
  return v_receipt;
end $$;

-- settle(token, id, ordinals) -> the lease row as it was
-- Marks records of one job as settled and drops the lease with the last one. NT001 when the lease is lost.
create or replace function settle(p_token bigint, p_id bigint, p_ordinals int[]) returns lease
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v lease;
begin
  select * into v from lease where token = p_token and id = p_id for update;
  perform fence(p_token, case when v.id is null then 0 else 1 end, 1);
  perform let_go(v.lease_until);
  if v.settled && p_ordinals or exists (select from unnest(p_ordinals) o where o not between v.lo and v.hi)
     or (select count(distinct o) from unnest(p_ordinals) o) <> coalesce(cardinality(p_ordinals), 0) or cardinality(p_ordinals) = 0 then
    raise exception using errcode = 'NT004', message = format('job %s: records %s are settled already, named twice or not its own (%s..%s)',
      p_id, p_ordinals, v.lo, v.hi);
  end if;
  if coalesce(cardinality(v.settled), 0) + cardinality(p_ordinals) = v.hi - v.lo + 1 then
    delete from lease where token = p_token and id = p_id;
  else
    update lease set settled = settled || p_ordinals where token = p_token and id = p_id;
  end if;
  return v;
end $$;

-- ack_part(token, id, ordinals, worker, ms, gone) -> receipt id
-- As ack, for some records of one job.
create or replace function ack_part(p_token bigint, p_id bigint, p_ordinals int[], p_worker int, p_ms real, p_gone int default 0)
returns bigint language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now(); v_receipt bigint := nextval('change_seq'); v lease;
begin
  v := settle(p_token, p_id, p_ordinals);
  insert into receipt (id, slot, at, handler_id, worker_id, ms, n, gone, change_ids, los, his, causes, ordinals, ids, keys,
                       depth, trace, tenant)
  values (v_receipt, slot(v_now), v_now, v.handler_id, p_worker, p_ms, cardinality(p_ordinals), p_gone,
          array[v.change_id], array[v.lo], array[v.hi], array[v.cause], p_ordinals,
          (select array_agg(v.ids[o - v.lo + 1] order by i) from unnest(p_ordinals) with ordinality x (o, i) where v.ids is not null),
          (select jsonb_agg(v.keys -> (o - v.lo) order by i) from unnest(p_ordinals) with ordinality x (o, i) where v.keys is not null),
          v.depth, v.trace, v.tenant);
  perform enter(v_receipt, v.depth + 1, v.trace, v.tenant);
  perform recover(v.handler_id);
  return v_receipt;
end $$;

-- put_output(receipt, table, ids, keys, owners)
-- Notes what a receipt's handler wrote: output keys and the input position (from 1; 0 the whole batch) of each.
create or replace function put_output(p_receipt bigint, p_table int, p_ids bigint[], p_keys jsonb, p_owners int[])
returns void language sql volatile set search_path from current as $$
  insert into output (receipt_id, slot, table_id, ids, keys, owners)
  values (p_receipt, slot(now()), p_table, p_ids, p_keys, p_owners)
$$;

-- retry(token, id, ordinals, after, error, burn)
-- Settles these records here and queues each anew, alone, after a wait. burn counts the attempt.
create or replace function retry(p_token bigint, p_id bigint, p_ordinals int[], p_after interval, p_error text, p_burn boolean)
returns void language plpgsql volatile set search_path from current as $$
declare v_due timestamptz := now() + p_after; v lease;
begin
  v := settle(p_token, p_id, p_ordinals);
  insert into delayed (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin,
                       ids, keys, run_at, error)
  select v.handler_id, nextval('change_seq'), v.change_id, v.at, v.cause, v.trace, o, o,
         v.attempt + case when p_burn then 1 else 0 end, v.crashes, v.depth, v.op, v.tenant, v.origin,
         case when v.ids is not null then array[v.ids[o - v.lo + 1]] end,
         case when v.keys is not null then jsonb_build_array(v.keys -> (o - v.lo)) end, v_due, p_error
    from unnest(p_ordinals) o;
end $$;

-- defer(token, id, ordinals, afters, rated)
-- Settles records here that were not begun, and queues them anew, each after its wait; those that lie side by side and wait as long in one job.
-- rated: until there is a start for their key; at once, where the handler has no rate any more. Else their time is to come
drop function if exists defer(bigint, bigint, int[], interval[], text);
create or replace function defer(p_token bigint, p_id bigint, p_ordinals int[], p_afters interval[], p_rated boolean)
returns void language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now(); v lease; v_waits boolean;
begin
  v := settle(p_token, p_id, p_ordinals);
  v_waits := p_rated is not true or exists (select from rate where handler_id = v.handler_id);
  insert into delayed (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin,
                       ids, keys, run_at, error)
  select v.handler_id, nextval('change_seq'), v.change_id, v.at, v.cause, v.trace, p.lo, p.hi, v.attempt, v.crashes, v.depth, v.op, v.tenant, v.origin,
         v.ids[p.lo - v.lo + 1:p.hi - v.lo + 1],
         case when v.keys is not null then jsonb_path_query_array(v.keys, '$[$a to $b]', jsonb_build_object('a', p.lo - v.lo, 'b', p.hi - v.lo)) end,
         case when v_waits then v_now + p.wait else v_now end, case when p_rated then waits_for_rate() end
    from (select wait, min(o) as lo, max(o) as hi
            from (select o, wait, o - row_number() over (partition by wait order by o) as island from unnest(p_ordinals, p_afters) u (o, wait)) x group by wait, island) p;
end $$;

-- bury(token, id, ordinal, reason, error, traceback) -> dead letter id
-- Settles one record as a dead letter: its key, its image where one was kept, and why.
create or replace function bury(p_token bigint, p_id bigint, p_ordinal int, p_reason text, p_error text, p_traceback text)
returns bigint language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v lease; v_dead bigint := nextval('change_seq'); v_key jsonb;
begin
  v := settle(p_token, p_id, array[p_ordinal]);
  insert into dead (id, handler_id, change_id, ordinal, op, key, cols, news, olds, attempt, reason, error, traceback,
                    cause, depth, trace, tenant, origin, died_at)
  select v_dead, v.handler_id, v.change_id, p_ordinal, v.op,
         case when v.ids is not null then jsonb_build_array(v.ids[p_ordinal - v.lo + 1])
              when v.keys is not null then v.keys -> (p_ordinal - v.lo)
              when c.ids is not null then jsonb_build_array(c.ids[p_ordinal])
              else c.keys -> (p_ordinal - 1) end,
         c.cols, c.news[:][p_ordinal:p_ordinal], c.olds[:][p_ordinal:p_ordinal],
         v.attempt + 1, p_reason, p_error, p_traceback, v.cause, v.depth, v.trace, v.tenant, v.origin, now()
    from (select 1) one left join change c on c.id = v.change_id
  returning key into v_key;
  perform note_death(v.handler_id, v_key, p_error);
  return v_dead;
end $$;

-- give_back(token, ids): leased jobs are ready again at once; nothing is counted against them
create or replace function give_back(p_token bigint, p_ids bigint[]) returns void
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_held bigint; v_until timestamptz; v_parts bigint;
begin
  -- suspects of an ordered handler stay such, as those behind them are worked next; parts, whose ids are greater, as well
  update lease l set lease_until = '-infinity', alone = false from handler h
   where l.token = p_token and l.id = any (p_ids) and (l.alone or l.together = 2 or l.lease_until = '-infinity')
     and h.id = l.handler_id and h.ordered;
  get diagnostics v_parts = row_count;
  with gone as (
    delete from lease l where l.token = p_token and l.id = any (p_ids)
       and not (l.lease_until = '-infinity' and (select h.ordered from handler h where h.id = l.handler_id)) returning *),
  back as (
    insert into job (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys)
    select handler_id, case when (select h.ordered from handler h where h.id = handler_id) then id else nextval('change_seq') end, change_id, at, cause, trace, lo, hi,
           attempt, crashes, depth, op, tenant, origin, settled, ids, keys
      from gone order by id returning 1)
  select (select count(*) from back), (select min(lease_until) from gone) into v_held, v_until;
  perform fence(p_token, v_held + v_parts, cardinality(p_ids));
  perform let_go(coalesce(v_until, 'infinity'));
end $$;

-- patience(since, now) -> how long a handler waits that has been failing since then: a twentieth of that time, 1 s to
-- 60 s. So an outage is at most a twentieth longer for whoever waits, however long it was; over an hour it costs 150 probes.
create or replace function patience(p_since timestamptz, p_now timestamptz) returns interval
language sql immutable set search_path from current as $$
  select greatest(interval '1 s', least(interval '60 s', (p_now - p_since) / 20))
$$;

-- world_failed(token, ids, error, after) -> when to probe again
-- The outside world fails, not these records: gives the jobs back and makes their handler wait, see patience(); at least `after`.
drop function if exists world_failed(bigint, bigint[], text);
create or replace function world_failed(p_token bigint, p_ids bigint[], p_error text, p_after interval default null) returns timestamptz
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_now timestamptz := now(); v_handler int; v_probe timestamptz;
begin
  select handler_id into v_handler from lease where token = p_token and id = any (p_ids) limit 1;
  perform give_back(p_token, p_ids);
  perform refresh_failed(v_handler, p_error);
  -- jobs in flight fail together: they are one failure
  update handler set failing_since = coalesce(failing_since, v_now), failing_error = p_error, failed_at = v_now,
         failures = failures + case when failing_since is null or failed_at is null
                                      or v_now >= failed_at + 0.5 * patience(failing_since, failed_at) then 1 else 0 end,
         -- jitter only shortens it: handlers that one service failed do not come back to it together
         probe_at = v_now + greatest(p_after, patience(coalesce(failing_since, v_now), v_now) * (0.8 + 0.2 * random()))
   where id = v_handler returning probe_at into v_probe;
  return v_probe;
end $$;

-- split(token, id, parts, until) -> the ids and ranges of the parts
-- Cuts what is left of a leased job into up to `parts` leases under the same token, each of at least one record.
create or replace function split(p_token bigint, p_id bigint, p_parts int, p_until timestamptz default null)
returns table (id bigint, lo int, hi int)
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
#variable_conflict use_column
declare v lease; v_size int;
begin
  delete from lease l where l.token = p_token and l.id = p_id returning * into v;
  perform fence(p_token, case when v.id is null then 0 else 1 end, 1);
  perform let_go(v.lease_until);
  v_size := greatest(1, ceil((v.hi - v.lo + 1) / p_parts::numeric)::int);
  return query
  insert into lease as l (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin,
                          settled, ids, keys, token, lease_until, worker_id, together)
  select v.handler_id, nextval('change_seq'), v.change_id, v.at, v.cause, v.trace, p.lo, p.hi, v.attempt, 0, v.depth, v.op,
         v.tenant, v.origin, p.settled, v.ids[p.lo - v.lo + 1:p.hi - v.lo + 1],
         case when v.keys is not null then jsonb_path_query_array(v.keys, '$[$a to $b]',
           jsonb_build_object('a', p.lo - v.lo, 'b', p.hi - v.lo)) end, p_token, coalesce(p_until, v.lease_until), v.worker_id, 2
    from (select s as lo, least(s + v_size - 1, v.hi) as hi,
                 (select array_agg(o) from unnest(v.settled) o where o between s and s + v_size - 1) as settled
            from generate_series(v.lo, v.hi, v_size) s) p
   where coalesce(cardinality(p.settled), 0) < p.hi - p.lo + 1
  returning l.id, l.lo, l.hi;
end $$;

-- split_crashed(token, id) -> parts
-- A suspect of many records killed its process: cuts what is left of it into 8 leases that have run out already,
-- so that each part is run alone next.
create or replace function split_crashed(p_token bigint, p_id bigint) returns int
language sql volatile set search_path from current as $$
  select count(*)::int from split(p_token, p_id, 8, '-infinity')
$$;

-- promote() -> jobs moved
-- Delayed jobs whose time has come are ready, and keys that have come to rest have a job.
create or replace function promote() returns int language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_sort = off as $$
declare v_now timestamptz := now(); v_n int;
begin
  if not exists (select from delayed where run_at <= v_now) then
    return debounced();
  end if;
  with due as materialized (
    select handler_id, id from delayed where run_at <= v_now order by run_at limit 1000 for update skip locked
  ), moved as (
    delete from delayed d using due where d.handler_id = due.handler_id and d.id = due.id returning d.*)
  insert into job (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys)
  select handler_id, case when (select h.ordered from handler h where h.id = handler_id) then id else nextval('change_seq') end, change_id, at, cause, trace, lo, hi,
         attempt, crashes, depth, op, tenant, origin, settled, ids, keys
    from moved order by run_at;
  get diagnostics v_n = row_count;
  return v_n + debounced();
end $$;

-- overdue(handlers, now, back) -> (suspects, wake_at): leases that reclaim() would take, and when it will have more
-- Reads all leases: an index by time would be one more write for each claim, heartbeat and ack.
create or replace function overdue(p_handlers int[], p_now timestamptz, p_back timestamptz, out suspects int, out wake_at timestamptz)
language sql stable set search_path from current set enable_seqscan = on set max_parallel_workers_per_gather = 0 as $$
  select count(*) filter (where lease_until < p_now and (lease_until = '-infinity' or p_now > p_back)),
         min(greatest(lease_until, p_back)) filter (where lease_until <> '-infinity' and greatest(lease_until, p_back) >= p_now)
    from lease l
   where l.handler_id = any (p_handlers) and not exists (select from handler h where h.id = l.handler_id and h.paused)
$$;

-- ready(handlers) -> which of them have jobs to claim; promotes what is due first
create or replace function ready(p_handlers int[]) returns int[] language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_now timestamptz := now();
begin
  perform promote();
  return (select array_agg(h.id) from handler h
           where h.id = any (p_handlers) and not h.paused and (h.probe_at is null or h.probe_at <= v_now)
             and exists (select from job j where j.handler_id = h.id));
end $$;

-- poll(worker, handlers, lease) -> (ready, suspects, wake_at, at)
-- The look of an idle worker: promotes what is due; which handlers have ready jobs; how many of their leases reclaim()
-- would take with this lease; and when there will be something to do if nobody writes.
create or replace function poll(p_worker int, p_handlers int[], p_lease interval default null,
  out ready int[], out suspects int, out wake_at timestamptz, out at timestamptz)
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare
  v_now timestamptz := now(); v_again boolean := false;
  v_back timestamptz := back(coalesce(p_lease, setting('lease')::interval));
begin
  at := v_now;
  if exists (select from job where handler_id = 0) then     -- a table has changed under its triggers
    v_again := mend() > 0 and exists (select from job where handler_id = 0);
  end if;
  ready := ready(p_handlers);
  select o.suspects, o.wake_at into suspects, wake_at from overdue(p_handlers, v_now, v_back) o;
  wake_at := least(wake_at, case when v_again then v_now end, (select min(run_at) from delayed), (select min(due_at) from debounce),
                   case when exists (select from job where handler_id < 0) then v_now end,
                   (select min(h.probe_at) from handler h where h.id = any (p_handlers) and h.probe_at > v_now and not h.paused));
end $$;

-- register_worker(app, host, pid, version) -> worker id
create or replace function register_worker(p_app text, p_host text, p_pid int, p_version text) returns int
language sql volatile set search_path from current as $$
  insert into worker (app, host, pid, version, started_at, seen_at) values (p_app, p_host, p_pid, p_version, now(), now()) returning id
$$;

create or replace function stop_worker(p_worker int) returns void language sql volatile set search_path from current as $$
  update worker set stopped_at = t from now() t where id = p_worker
$$;
