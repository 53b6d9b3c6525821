-- What people do to the queue: pause and resume a handler, cancel a job, replay or drop a dead letter.

-- pause(handler), resume(handler): its jobs wait, and cost the claim nothing; one that waits for the world tries at once
create or replace function pause(p_handler text) returns void language plpgsql volatile set search_path from current as $$
declare v_id int := find_handler(p_handler);
begin
  update handler set paused = true where id = v_id;
end $$;

create or replace function resume(p_handler text) returns void language plpgsql volatile set search_path from current as $$
declare v_id int := find_handler(p_handler);
begin
  update handler set paused = false, probe_at = case when failing_since is not null then now() end where id = v_id;
  perform ring();
end $$;

-- cancel(job) -> whether it was still waiting. A job that is being worked or done is not touched.
create or replace function cancel(p_job bigint) returns boolean language plpgsql volatile set search_path from current as $$
declare v job; v_now timestamptz := now(); v_key jsonb;
begin
  delete from job where id = p_job and handler_id <> 0 returning * into v;
  if v.id is null then
    delete from delayed where id = p_job and handler_id <> 0
    returning handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys into v;
  end if;
  if v.id is null then
    return cancel_turn(p_job);
  end if;
  insert into receipt (id, slot, at, handler_id, n, change_ids, los, his, causes, ids, keys, depth, trace, tenant)   -- of nothing done
  values (nextval('change_seq'), slot(v_now), v_now, abs(v.handler_id), 0, array[v.change_id], array[v.lo], array[v.hi], array[v.cause], v.ids, v.keys, v.depth, v.trace, v.tenant);
  perform end_turn(v.handler_id, p_job) where is_ordered(v.handler_id);
  if not exists (select from handler h join action_rule r on r.app = h.app and r.handler = h.name where h.id = abs(v.handler_id)) then
    return true;
  end if;
  for v_key in select coalesce(case when v.ids is not null then to_jsonb(array[v.ids[o - v.lo + 1]]) end, v.keys -> (o - v.lo), change_key(c, o))
                 from generate_series(v.lo, v.hi) o left join change c on c.id = v.change_id where o <> all (coalesce(v.settled, '{}')) loop
    perform note_death(abs(v.handler_id), v_key, 'its job was cancelled');
  end loop;
  return true;
end $$;

-- put_again(handler, key, op, cause, depth, trace, tenant) -> a job for a record, which nobody has written
create or replace function put_again(p_handler int, p_key jsonb, p_op "char", p_cause bigint, p_depth smallint, p_trace bigint, p_tenant text) returns bigint
language plpgsql volatile set search_path from current as $$
declare v_job bigint := nextval('change_seq'); v_change bigint := nextval('change_seq'); v_now timestamptz := now(); v_id boolean;
begin
  select w.key_kind = 'id' into v_id from handler h join watched w on w.id = h.table_id where h.id = p_handler;
  insert into change (id, slot, at, xid, table_id, op, n, ids, keys, cause, depth, trace, tenant)
  select v_change, slot(v_now), v_now, pg_current_xact_id(), h.table_id, p_op, 1, case when v_id then array[(p_key ->> 0)::bigint] end,
         case when not v_id then jsonb_build_array(p_key) end, p_cause, p_depth, p_trace, p_tenant from handler h where h.id = p_handler;
  insert into job (handler_id, id, change_id, at, cause, trace, lo, hi, depth, op, tenant) values (p_handler, v_job, v_change, v_now, p_cause, p_trace, 1, 1, p_depth, p_op, p_tenant);
  perform ring();
  return v_job;
end $$;

-- replay(dead letter) -> its new job. The idempotency key stays what it was.
create or replace function replay(p_dead bigint) returns bigint language plpgsql volatile set search_path from current as $$
declare v dead; v_job bigint := nextval('change_seq'); v_change bigint; v_now timestamptz := now(); v_kind text;
begin
  delete from dead where id = p_dead returning * into v;
  if v.id is null then
    raise exception using errcode = 'NT000', message = format('no dead letter %s', p_dead), hint = 'anton dead list';
  end if;
  v_change := nextval('change_seq');
  select case when v.op in ('r', 'f') then 'build' else w.key_kind end into v_kind from handler h join watched w on w.id = h.table_id where h.id = v.handler_id;
  insert into change (id, slot, at, xid, table_id, op, n, ids, keys, cols, news, olds, cause, depth, trace, tenant)
  select v_change, slot(v_now), v_now, pg_current_xact_id(), h.table_id, v.op, 1,
         case when v_kind = 'id' and v.key is not null then array[(v.key ->> 0)::bigint] end, case when v_kind <> 'id' and v.key is not null then jsonb_build_array(v.key) end,
         v.cols, v.news, v.olds, v.cause, v.depth, v.trace, v.tenant
    from handler h where h.id = v.handler_id;
  insert into job (handler_id, id, change_id, at, cause, trace, lo, hi, depth, op, tenant, origin)
  values (v.handler_id, v_job, v_change, v_now, v.cause, v.trace, 1, 1, v.depth, v.op, v.tenant,
          coalesce(v.origin, v.handler_id || ':' || v.change_id || ':' || v.ordinal));
  perform replayed(v.handler_id, p_dead, v_job);
  perform ring();
  return v_job;
end $$;

-- replay(handler) -> how many dead letters became jobs again
create or replace function replay(p_handler text) returns bigint language plpgsql volatile set search_path from current as $$
declare v_id int := find_handler(p_handler); v_n bigint;
begin
  select count(replay(d.id)) into v_n from (select id from dead where handler_id = v_id order by id) d;
  return v_n;
end $$;

-- drop_dead(id) -> whether there was one
create or replace function drop_dead(p_dead bigint) returns boolean language plpgsql volatile set search_path from current as $$
declare v dead; v_now timestamptz := now(); v_id boolean;
begin
  delete from dead where id = p_dead returning * into v;
  if v.id is null then
    return false;
  end if;
  select w.key_kind = 'id' and v.op not in ('r', 'f') into v_id from handler h join watched w on w.id = h.table_id where h.id = v.handler_id;
  insert into receipt (id, slot, at, handler_id, n, change_ids, los, his, causes, ids, keys, depth, trace, tenant)   -- of nothing done
  values (nextval('change_seq'), slot(v_now), v_now, v.handler_id, 0, array[v.change_id], array[v.ordinal], array[v.ordinal], array[v.cause],
          case when v_id and v.key is not null then array[(v.key ->> 0)::bigint] end, case when not v_id and v.key is not null then jsonb_build_array(v.key) end,
          v.depth, v.trace, v.tenant);
  perform end_turn(v.handler_id, p_dead) where is_ordered(v.handler_id);
  return true;
end $$;
