-- Schedules: tick() fires what is due, whoever calls it (workers, pg_cron, psql). anton/schedule.py computes due times.

-- check_cron(text): raises NT004 for a text that cannot be a cron expression, before anyone waits for it
create or replace function check_cron(p_cron text) returns void language plpgsql immutable set search_path from current as $$
begin
  if not (p_cron ~* '^@(hourly|daily|midnight|weekly|monthly|yearly|annually)$' or p_cron ~ '^@every [1-9]\d*(\.\d+)?$'
          or p_cron ~* '^\s*[\d*/,-]+\s+[\d*/,-]+\s+[\dlw*/,-]+\s+[\da-z*/,-]+\s+[\da-z*/,#-]+\s*$') then
    raise exception using errcode = 'NT004', message = format('"%s" is no cron expression', p_cron),
      hint = 'five fields "minute hour day month weekday", such as "0 3 * * *", or "@hourly", "@daily", "@every 30" (seconds)';
  end if;
end $$;

-- put_schedule(definition) -> schedule id
-- Inserts or updates a schedule and its handler by (app, name). Keys: app, name, cron, tz, title, kind, body, options
-- (put_handler's, for its handler), at_once (due for the first time when it is made). A changed time is planned anew; an
-- unchanged one keeps its plan.
create or replace function put_schedule(d jsonb) returns int language plpgsql volatile set search_path from current as $$
declare v_id int; v_tick text := quote_ident(current_schema()) || '.tick'; v_other text; v_kind text := coalesce(d ->> 'kind', 'python');
begin
  perform check_cron(d ->> 'cron');
  select format('%I.%I', w.schema_name, w.table_name) into v_other from handler h join watched w on w.id = h.table_id
   where h.app = d ->> 'app' and h.name = d ->> 'name' and (w.schema_name, w.table_name) <> (current_schema(), 'tick');
  if v_other is not null then
    raise exception using errcode = 'NT004', message = format('"%s" is a handler of %s already', d ->> 'name', v_other),
      hint = 'give the schedule another name';
  end if;
  perform put_handler(jsonb_build_object('ops', '[]'::jsonb, 'read', 'now', 'each_record', true, 'batch', 1)
    || coalesce(d -> 'options', '{}')
    || jsonb_build_object('app', d ->> 'app', 'name', d ->> 'name', 'table', v_tick, 'kind', v_kind, 'body', d ->> 'body'));
  insert into schedule as s (app, name, cron, tz, title, kind, body, next_at)
  values (d ->> 'app', d ->> 'name', d ->> 'cron', coalesce(d ->> 'tz', 'UTC'), coalesce(d ->> 'title', d ->> 'cron'), v_kind, d ->> 'body',
          case when (d ->> 'at_once')::boolean then now() end)
  on conflict (app, name) do update
     set next_at = case when (s.cron, s.tz, s.enabled) = (excluded.cron, excluded.tz, true) then s.next_at end,
         cron = excluded.cron, tz = excluded.tz, title = excluded.title, kind = excluded.kind, body = excluded.body, enabled = true
  returning id into v_id;
  perform ring();
  return v_id;
end $$;

-- schedule(name, cron, body, tz) -> schedule id
-- Runs one SQL statement by the clock, from psql: select anton.schedule('nightly', '0 3 * * *', $$delete from old$$).
-- Its writes and its ack commit together. Owned by app 'sql'.
create or replace function schedule(p_name text, p_cron text, p_body text, tz text default 'UTC') returns int
language plpgsql volatile set search_path from current as $$
begin
  if not exists (select from pg_timezone_names z where z.name = tz) then
    raise exception using errcode = 'NT004', message = format('"%s" is no time zone', tz), hint = 'an IANA name, such as Europe/Berlin';
  end if;
  return put_schedule(jsonb_build_object('app', 'sql', 'name', p_name, 'cron', p_cron, 'tz', tz, 'title', p_cron, 'kind', 'sql', 'body', p_body));
end $$;

-- retire_schedules(app, names): schedules that vanished from the app's code fire no more; their jobs are kept
create or replace function retire_schedules(p_app text, p_names text[]) returns setof text
language sql volatile set search_path from current as $$
  update schedule set enabled = false, next_at = null where app = p_app and enabled and name <> all (p_names) returning name
$$;

-- fire(schedule, planned_at) -> whether this time had not fired before
create or replace function fire(p_schedule int, p_planned_at timestamptz) returns boolean
language plpgsql volatile set search_path from current as $$
declare v_change bigint; v_now timestamptz := now();
begin
  insert into tick (schedule_id, planned_at, fired_at) values (p_schedule, p_planned_at, v_now) on conflict do nothing;
  if not found then
    return false;
  end if;
  v_change := nextval('change_seq');
  insert into job (handler_id, change_id, at, trace, lo, hi, op, keys)
  select h.id, v_change, v_now, v_change, 1, 1, 'n', jsonb_build_array(jsonb_build_array(p_schedule, p_planned_at))
    from schedule s join handler h using (app, name) where s.id = p_schedule;
  return true;
end $$;

-- close_ticks(): firings whose job is settled are done, or failed with the error of their dead letter
create or replace function close_ticks() returns void language sql volatile set search_path from current as $$
  update tick t set state = case when d.id is null then 'done' else 'failed' end, error = d.error
    from (
      select t.schedule_id, t.planned_at, h.id as handler_id, jsonb_build_array(t.schedule_id, t.planned_at) as key
        from tick t join schedule s on s.id = t.schedule_id join handler h using (app, name) where t.state = 'planned'
    ) f left join lateral (
      select id, error from dead where handler_id = f.handler_id and key = f.key order by id desc limit 1) d on true
   where (t.schedule_id, t.planned_at) = (f.schedule_id, f.planned_at)
     and not exists (select from job where handler_id = f.handler_id and keys = jsonb_build_array(f.key))
     and not exists (select from lease where handler_id = f.handler_id and keys = jsonb_build_array(f.key))
     and not exists (select from delayed where handler_id = f.handler_id and keys = jsonb_build_array(f.key))
$$;

-- tick() -> how many fired
-- Fires each schedule that is due, once per due time. Plans the next time of "@every"; cron expressions with their
-- time zones are planned by the next worker that looks (plan). A paused schedule lets its times pass.
create or replace function tick() returns int language plpgsql volatile set search_path from current as $$
declare s schedule; v_now timestamptz := now(); v_n int := 0; v_every numeric;
begin
  for s in select * from schedule where enabled and next_at <= v_now order by next_at, id for update skip locked loop
    if not s.paused and fire(s.id, s.next_at) then
      v_n := v_n + 1;
    end if;
    v_every := substring(s.cron from '^@every ([\d.]+)$')::numeric;
    update schedule set last_at = case when s.paused then last_at else s.next_at end,
           next_at = to_timestamp((floor(extract(epoch from v_now) / v_every) + 1) * v_every) where id = s.id;
  end loop;
  if v_n > 0 then
    perform ring();
  end if;
  perform close_ticks();
  return v_n;
end $$;

-- unplanned() -> schedules without a next time, locked for this transaction; what others hold is left out
create or replace function unplanned() returns table (id int, cron text, tz text, after timestamptz)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare v_now timestamptz := now();
begin
  return query select s.id, s.cron, s.tz, v_now from schedule s where s.enabled and s.next_at is null for update skip locked;
end $$;

-- plan(schedule, cron, tz, next_at): notes when it is due next, if it still means the same; null: never, it is disabled
create or replace function plan(p_schedule int, p_cron text, p_tz text, p_next_at timestamptz) returns void
language sql volatile set search_path from current as $$
  update schedule set next_at = p_next_at, enabled = p_next_at is not null
   where id = p_schedule and cron = p_cron and tz = p_tz and next_at is null
$$;

-- next_tick() -> when to call tick() again: the earliest due time, now when one has to be planned, null without schedules
create or replace function next_tick() returns timestamptz language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  return (select min(coalesce(next_at, v_now)) from schedule where enabled);
end $$;

-- pause_schedule(name), resume_schedule(name): while paused its times pass without firing
create or replace function pause_schedule(p_name text) returns void language plpgsql volatile set search_path from current as $$
begin
  update schedule set paused = true where id = find_schedule(p_name);
end $$;

create or replace function resume_schedule(p_name text) returns void language plpgsql volatile set search_path from current as $$
begin
  update schedule set paused = false, next_at = case when next_at > now() then next_at end where id = find_schedule(p_name);
  perform ring();
end $$;

-- run_schedule(name) -> when: fires it now, beside its plan; one that is failing does not wait for its next probe
create or replace function run_schedule(p_name text) returns timestamptz language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  perform fire(find_schedule(p_name), v_now);
  update handler h set probe_at = v_now from schedule s
   where s.id = find_schedule(p_name) and (h.app, h.name) = (s.app, s.name) and h.probe_at > v_now;
  perform ring();
  return v_now;
end $$;

-- find_schedule(name) -> schedule id; name or app.name, as find_handler()
create or replace function find_schedule(p_name text) returns int language plpgsql stable set search_path from current as $$
declare v_ids int[]; v_known text;
begin
  select array_agg(id) into v_ids from schedule where name = p_name or app || '.' || name = p_name;
  if cardinality(v_ids) = 1 then
    return v_ids[1];
  end if;
  select string_agg(app || '.' || name, ', ' order by app, name) into v_known from schedule;
  raise exception using errcode = 'NT003',
    message = format(case when v_ids is null then 'no schedule "%s"' else 'schedule "%s" is in more than one app' end, p_name),
    hint = 'known: ' || coalesce(v_known, 'none');
end $$;
