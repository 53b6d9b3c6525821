-- Permits: what a worker must hold to run records, or calls, of a handler that has a limit over all processes. As many rows
-- as the limit; a worker leases some and runs as many at a time. Nothing is counted, so nothing leaks: a permit that is not
-- renewed runs out.

-- permit(worker, handler, wanted, lease, more, suspects) -> permits that this worker holds now
-- Takes free ones up to `wanted`, or gives back what it holds beyond; what it holds then lasts a lease. Never waits for another worker.
--   more      also beyond this worker's share, the limit over the live workers of the handler's app
--   suspects  to run jobs of dead workers. Who does not leaves one permit to them, else they might never get one; and
--             where one worker has all of a handler (per), it waits until they, and all that others hold, are done
create or replace function permit(p_worker int, p_handler int, p_wanted int, p_lease interval, p_more boolean default false,
  p_suspects boolean default false) returns int
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_now timestamptz := now(); v_held int; v_limit int; v_free int; v_live int; v_rows tid[];
begin
  select count(*) filter (where worker_id = p_worker and lease_until > v_now), count(*) filter (where lease_until <= v_now), count(*)
    into v_held, v_free, v_limit from permit where handler_id = p_handler;
  if p_wanted > v_held and not p_more then
    select count(*) into v_live from worker w
     where w.stopped_at is null and w.seen_at > v_now - greatest(2 * p_lease, interval '30 s')
       and w.app = (select app from worker where id = p_worker);
    p_wanted := greatest(v_held, least(p_wanted, ceil(v_limit / greatest(v_live, 1)::numeric)::int));
  end if;
  if p_wanted > v_held and v_free > 0 and not p_suspects and held_up(p_worker, p_handler, v_now) then
    v_free := v_free - 1;
  end if;
  if p_wanted > v_held then
    v_rows := array(select ctid from permit where handler_id = p_handler and lease_until <= v_now
                     order by n limit least(v_free, p_wanted - v_held) for update skip locked);
    update permit set worker_id = p_worker, lease_until = v_now + p_lease where ctid = any (v_rows);
  elsif p_wanted < v_held then
    v_rows := array(select ctid from permit where handler_id = p_handler and worker_id = p_worker and lease_until > v_now
                     order by n desc limit v_held - p_wanted for update skip locked);
    update permit set worker_id = null, lease_until = '-infinity' where ctid = any (v_rows);
  end if;
  update permit set lease_until = v_now + p_lease           -- all that it holds last as long
   where handler_id = p_handler and worker_id = p_worker and lease_until > v_now;
  get diagnostics v_held = row_count;
  return v_held;
end $$;

-- held_up(worker, handler, now, known): suspects wait for a permit; of a handler that one worker has, anything that others hold;
-- of one with an order, also what it held itself, or holds under a token that it does not know
drop function if exists held_up(int, int, timestamptz);
create or replace function held_up(p_worker int, p_handler int, p_now timestamptz, p_known bigint[] default null) returns boolean
language sql stable set search_path from current set enable_seqscan = on as $$
  select exists (select from lease l where l.handler_id = p_handler and l.worker_id <> p_worker
                    and (l.lease_until < p_now or (select per from handler where id = p_handler) is not null))
      or (select ordered from handler where id = p_handler) and exists (select from lease l where l.handler_id = p_handler and (l.worker_id <> p_worker or l.lease_until < p_now or l.token <> all (p_known)))
$$;

-- keep_permits(worker, lease) -> (handler, permits): extends what the worker holds. What ran out is not revived.
create or replace function keep_permits(p_worker int, p_lease interval) returns table (handler_id int, held int)
language plpgsql volatile set search_path from current set jit = off as $$
declare v_now timestamptz := now();
begin
  return query
    with mine as materialized (
      select p.ctid as row from permit p where p.worker_id = p_worker and p.lease_until > v_now for no key update skip locked   -- a claim has it shared
    ), kept as (
      update permit p set lease_until = v_now + p_lease from mine where p.ctid = mine.row returning p.handler_id)
    select k.handler_id, count(*)::int from kept k group by k.handler_id;
end $$;

-- limits() -> (handler, limit, per) of the handlers that have one; with per it is that of each value
create or replace function limits() returns table (handler_id int, most int, per text) language sql stable set search_path from current as $$
  select p.handler_id, case when h.per is null then count(*)::int else h.concurrency end, h.per
    from permit p join handler h on h.id = p.handler_id group by p.handler_id, h.per, h.concurrency
$$;

-- set_limit(handler, limit): null: none. Fewer than there are in use: those beyond are not renewed, and end with what runs now
create or replace function set_limit(p_handler int, p_limit int) returns void language plpgsql volatile set search_path from current as $$
begin
  delete from permit where handler_id = p_handler and n > coalesce(p_limit, 0);
  insert into permit (handler_id, n) select p_handler, g from generate_series(1, p_limit) g on conflict do nothing;
end $$;

-- permits_used(handler) -> permits that are held now
create or replace function permits_used(p_handler int) returns bigint language sql volatile set search_path from current as $$
  select count(*) from permit where handler_id = p_handler and lease_until > (select now())
$$;

-- waits_for_permit(handler) -> what may hold up its ready records, where a limit does
create or replace function waits_for_permit(p_handler int) returns text language sql volatile set search_path from current as $$
  select case when h.ordered then format('one record at a time for each %s, in order, in one process: worker %s', coalesce(h.per, 'primary key'), min(p.worker_id))
              when h.per is null then format('waits for a permit: all %s of its concurrency are in use', count(*))
              else format('at most %s records at a time for each %s%s, in one process: worker %s', h.concurrency, h.per, ', begun at ' || (select r.said from rate r where r.handler_id = p_handler), min(p.worker_id)) end
    from permit p join handler h on h.id = p.handler_id
   where p.handler_id = p_handler group by h.per, h.ordered, h.concurrency having count(*) = permits_used(p_handler)
$$;
