-- Suspects: leases that ran out, as their worker died or lost its way. Who died of what is found by running them apart.

-- back(lease) -> until when leases that ran out are left to their holders
-- A server that was away let every lease run out: they get one lease's time to come back. Not when the clock was set
-- back to before the server's start: that would keep the leases of the dead until it is there again.
create or replace function back(p_lease interval) returns timestamptz language sql volatile set search_path from current as $$
  select case when now() < pg_postmaster_start_time() then '-infinity' else pg_postmaster_start_time() + p_lease end
$$;

-- given_back(handlers, now, back) -> a job of an ordered handler that was given back, and is before all that its worker, which died, still held
create or replace function given_back(p_handlers int[], p_now timestamptz, p_back timestamptz) returns tid
language sql stable set search_path from current set jit = off set enable_seqscan = off set enable_sort = off as $$
  select j.row
    from handler h cross join lateral (
      select l.id, l.change_id, l.lo, l.lease_until from lease l where l.handler_id = h.id order by l.change_id, l.lo, l.id limit 1) f
   cross join lateral (
      select j.ctid as row from job j where j.handler_id = h.id and j.id < f.id and (j.change_id, j.lo) < (f.change_id, f.lo) order by j.id limit 1) j
   where h.id = any (p_handlers) and h.ordered and not h.paused and (h.probe_at is null or h.probe_at <= p_now)
     and f.lease_until < p_now and (f.lease_until = '-infinity' or p_now > p_back) limit 1
$$;

-- reclaim(worker, token, handlers, lease, jobs) -> leased jobs
-- Takes leases that ran out: their worker died or lost its way. They are suspects: run each alone, in a process
-- of its own. crashes counts the earlier runs that were alone when they died. Of an ordered handler what was given back
-- before its worker died, and is before all that it still held, comes first.
create or replace function reclaim(p_worker int, p_token bigint, p_handlers int[], p_lease interval, p_jobs int default 1)
returns table (
  handler_id int, id bigint, change_id bigint, at timestamptz, cause bigint, trace bigint, lo int, hi int,
  attempt smallint, crashes smallint, depth smallint, op "char", tenant text, origin text, settled int[],
  ids bigint[], keys jsonb, cols text[], degraded text, table_id int, ms_waiting real, probe boolean)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare v_now timestamptz := now(); v_until timestamptz := v_now + p_lease; v_back timestamptz := back(p_lease); v_rows tid[]; v_job tid;
begin
  v_job := given_back(p_handlers, v_now, v_back);
  if v_job is not null then
    with mine as (select ctid as row from job where ctid = v_job for update skip locked),
    gone as (delete from job j using mine m where j.ctid = m.row returning j.*)
    insert into lease (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys,
                       token, lease_until, worker_id, alone)
    select handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys,
           p_token, v_until, p_worker, true from gone;
    return query select * from leased(p_token);
    return;
  end if;
  select array_agg(x.row) into v_rows from (
    select l.ctid as row from lease l
     where l.lease_until < v_now and l.handler_id = any (p_handlers) and (l.lease_until = '-infinity' or v_now > v_back)
       and not exists (select from handler h where h.id = l.handler_id and h.paused)
       -- of an ordered handler only the first of all
       and not exists (select from handler h join lease f on f.handler_id = h.id where h.id = l.handler_id and h.ordered
                          and ((f.change_id, f.lo, f.id) < (l.change_id, l.lo, l.id) or h.probe_at > v_now))
     order by l.lease_until, l.id limit p_jobs for update of l skip locked) x;
  if v_rows is null then
    return;
  end if;
  update lease set token = p_token, lease_until = v_until, worker_id = p_worker, alone = true,
         crashes = crashes + case when alone then 1 else 0 end
   where ctid = any (v_rows);
  return query select * from leased(p_token);
end $$;

-- reclaim_together(worker, token, handlers, lease, beside) -> leased jobs
-- As reclaim(), but suspects whose worker died for the first time come together, as many of each handler as are its
-- batch, or 100 records: most are innocent. When that run dies as well, a tenth of that, of one handler; then each is run
-- alone. Without such, one that runs alone. lease.together counts these runs. Who calls at the same time gets others.
--   beside  only what may run beside other suspects: those that died for the first time
drop function if exists reclaim_together(int, bigint, int[], interval);
create or replace function reclaim_together(p_worker int, p_token bigint, p_handlers int[], p_lease interval, p_beside boolean default false)
returns table (
  handler_id int, id bigint, change_id bigint, at timestamptz, cause bigint, trace bigint, lo int, hi int,
  attempt smallint, crashes smallint, depth smallint, op "char", tenant text, origin text, settled int[],
  ids bigint[], keys jsonb, cols text[], degraded text, table_id int, ms_waiting real, probe boolean)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare
  v_now timestamptz := now(); v_until timestamptz := v_now + p_lease; v_back timestamptz := back(p_lease);
  v_rows tid[] := '{}'; v_found tid[]; v_seen tid[] := '{}'; v_locked tid[];
begin
  for v_look in 1..8 loop                                    -- what another caller has locked is left out at the next look
    with several as (
      select l.ctid as row, l.handler_id, l.together, l.lease_until, l.id, greatest(h.batch, 100) / 10 ^ l.together as most,
             sum(l.hi - l.lo + 1) over (partition by l.handler_id, l.together order by l.lease_until, l.id) as n
        from lease l join handler h on h.id = l.handler_id
       where l.lease_until < v_now and l.handler_id = any (p_handlers) and (l.lease_until = '-infinity' or v_now > v_back)
         and l.together < case when p_beside then 1 else 2 end and not l.alone and l.crashes = 0 and not h.paused and not h.ordered and h.failing_since is null
         and l.hi - l.lo < greatest(h.batch, 100) / 10 ^ l.together   -- a larger one is no reason to run those behind it apart
         and l.ctid <> all (v_seen)
    ), first as (
      select handler_id, together from several where n <= most order by lease_until, id limit 1
    )
    select array_agg(s.row) into v_found from several s join first f on f.together = s.together
     where s.n <= s.most and (f.together = 0 or f.handler_id = s.handler_id);
    exit when v_found is null;
    select array_agg(x.row) into v_locked from (
      select l.ctid as row from lease l
       where l.ctid = any (v_found) and l.lease_until < v_now and l.together < 2 and not l.alone   -- as it is when it is locked
         for update skip locked) x;
    if cardinality(v_locked) > 1 then
      v_rows := v_locked;
      exit;
    end if;
    v_seen := v_seen || v_found;
  end loop;
  if v_rows <> '{}' then
    update lease set token = p_token, lease_until = v_until, worker_id = p_worker, together = together + 1 where ctid = any (v_rows);
    return query select * from leased(p_token);
  elsif not p_beside then
    return query select * from reclaim(p_worker, p_token, p_handlers, p_lease, 1);
  end if;
end $$;

-- thaw(lease) -> sessions ended
-- Who freezes in the middle of a COPY of its ack is not idle to the server, and keeps its row locks. Its leases have
-- ended and its heart does not beat: a worker that is only slow has one that does.
create or replace function thaw(p_lease interval) returns bigint language sql volatile set search_path from current as $$
  select count(pg_terminate_backend(x.pid)) from (
    select distinct a.pid from lease l join worker w on w.id = l.worker_id join pg_stat_activity a on a.backend_xid = l.xmax
     where l.lease_until < now() and w.seen_at < now() - greatest(p_lease, '2 s')
       and a.state = 'active' and a.wait_event = 'ClientRead') x
$$;
