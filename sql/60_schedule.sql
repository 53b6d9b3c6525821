-- Schedules: tick() fires what is due, whoever calls it (workers, pg_cron, psql). anton/schedule.py computes due times.

-- cron_fault(text) -> what is wrong with a cron expression, null for none. It knows what cronsim knows, but for days that never come.
create or replace function cron_fault(p_cron text) returns text language plpgsql immutable set search_path from current as $$
declare
  v_fields text[] := regexp_split_to_array(btrim(upper(p_cron), E' \t\r\n'), '\s+');
  v_names text[] := array['minute', 'hour', 'day', 'month', 'weekday'];
  v_low int[] := array[0, 0, 1, 1, 0]; v_high int[] := array[59, 23, 31, 12, 7];
  v_words text[]; v_part text; v_found text[]; v_from int; v_to int;
begin
  if p_cron ~* '^@(hourly|daily|midnight|weekly|monthly|yearly|annually)$' or p_cron ~ '^@every [1-9]\d*(\.\d{1,3})?$' then
    return null;
  elsif p_cron is null or cardinality(v_fields) <> 5 then
    return 'not five fields';
  end if;
  for n in 1..5 loop
    v_words := case n when 4 then array['JAN','FEB','MAR','APR','MAY','JUN','JUL','AUG','SEP','OCT','NOV','DEC']
                      when 5 then array['SUN','MON','TUE','WED','THU','FRI','SAT'] else '{}' end;
    foreach v_part in array regexp_split_to_array(v_fields[n], ',') loop
      if n = 3 and v_part ~ '^LW?(/0*[1-9]\d*)?$' then continue; end if;
      v_found := case when n = 5 and v_part ~ '^[0-7]L$' then array[left(v_part, 1), null, null]
                      when n = 5 and v_part ~ '#' then regexp_match(v_part, '^(\w+)#0*[1-5]$') || array[null, null]
                      else regexp_match(v_part, '^(?:\*|([0-9A-Z]+)(?:-([0-9A-Z]+))?)(?:/0*([1-9]\d*))?$') end;
      if v_found is null or v_found = array[null, null] then
        return format('%s is "%s"', v_names[n], v_part);
      end if;
      v_from := coalesce(array_position(v_words, v_found[1]) + v_low[n] - 1, substring(v_found[1] from '^0*(\d{1,4})$')::int);
      v_to := coalesce(array_position(v_words, v_found[2]) + v_low[n] - 1, substring(v_found[2] from '^0*(\d{1,4})$')::int);
      if v_found[1] is not null and coalesce(v_from not between v_low[n] and v_high[n], true)
         or v_found[2] is not null and coalesce(v_to not between v_low[n] and v_high[n] or v_to < v_from, true) then
        return format('%s is "%s", and goes from %s to %s', v_names[n], v_part, v_low[n], v_high[n]);
      end if;
    end loop;
  end loop;
  return null;
end $$;

-- check_cron(text): raises NT004 for a text that is no cron expression, before anyone waits for it
create or replace function check_cron(p_cron text) returns void language plpgsql immutable set search_path from current as $$
declare v_fault text := cron_fault(p_cron);
begin
  if v_fault is not null then
    raise exception using errcode = 'NT004', message = format('"%s" is no cron expression: %s', p_cron, v_fault),
      hint = 'five fields "minute hour day month weekday", such as "0 3 * * *", or "@hourly", "@daily", "@every 30" (seconds)';
  end if;
end $$;

-- put_schedule(definition) -> schedule id
-- Inserts or updates a schedule and its handler by (app, name). Keys: app, name, cron, tz, title, kind, body, misfire, overlap,
-- jitter, starts_at, ends_at, options (put_handler's, for its handler), at_once (due for the first time when it is made).
-- A changed time is planned anew; an unchanged one keeps its plan.
create or replace function put_schedule(d jsonb) returns int language plpgsql volatile set search_path from current as $$
declare
  v_id int; v_tick text := quote_ident(current_schema()) || '.tick'; v_other text; v_kind text := coalesce(d ->> 'kind', 'python');
  v_old schedule; v_new schedule; v_now timestamptz := now();
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
  select * into v_old from schedule where app = d ->> 'app' and name = d ->> 'name' for update;
  insert into schedule as s (app, name, cron, tz, title, kind, body, misfire, overlap, jitter, starts_at, ends_at)
  values (d ->> 'app', d ->> 'name', d ->> 'cron', coalesce(d ->> 'tz', 'UTC'), coalesce(d ->> 'title', d ->> 'cron'), v_kind, d ->> 'body',
          coalesce(d ->> 'misfire', 'once'), coalesce(d ->> 'overlap', 'queue'), coalesce((d ->> 'jitter')::interval, '0'),
          (d ->> 'starts_at')::timestamptz, (d ->> 'ends_at')::timestamptz)
  on conflict (app, name) do update
     set cron = excluded.cron, tz = excluded.tz, title = excluded.title, kind = excluded.kind, body = excluded.body, enabled = true,
         misfire = excluded.misfire, overlap = excluded.overlap, jitter = excluded.jitter, starts_at = excluded.starts_at,
         ends_at = excluded.ends_at
  returning * into v_new;
  v_id := v_new.id;
  if (v_new.cron, v_new.tz, v_new.jitter, v_new.starts_at, v_new.ends_at, true)
     is distinct from (v_old.cron, v_old.tz, v_old.jitter, v_old.starts_at, v_old.ends_at, v_old.enabled) then
    perform plan_anew(v_id);
  end if;
  if v_old.id is null and (d ->> 'at_once')::boolean then
    update schedule set next_at = v_now where id = v_id;
  end if;
  perform ring();
  return v_id;
end $$;

-- schedule(name, cron, body, tz, options) -> schedule id
-- Runs one SQL statement by the clock, from psql: select anton.schedule('nightly', '0 3 * * *', $$delete from old$$).
-- options: {"misfire", "overlap", "jitter", "start", "end", "timeout", "attempts", "backoff"}. Its writes and its ack
-- commit together. Owned by app 'sql'.
drop function if exists schedule(text, text, text, text);
create or replace function schedule(p_name text, p_cron text, p_body text, tz text default 'UTC', options jsonb default '{}') returns int
language plpgsql volatile set search_path from current as $$
declare
  v_known text[] := array['misfire', 'overlap', 'jitter', 'start', 'end', 'timeout', 'attempts', 'backoff'];
  v_bad text; v_jitter interval; v_start timestamptz; v_end timestamptz; v_every numeric := every_seconds(p_cron);
begin
  if not exists (select from pg_timezone_names z where z.name = tz) then
    raise exception using errcode = 'NT004', message = format('"%s" is no time zone', tz), hint = 'an IANA name, such as Europe/Berlin';
  end if;
  select k into v_bad from jsonb_object_keys(options) k where k <> all (v_known) limit 1;
  if v_bad is not null then
    raise exception using errcode = 'NT004', message = format('schedule "%s": unknown option "%s"', p_name, v_bad),
      hint = 'known: ' || array_to_string(v_known, ', ');
  end if;
  perform check_rule(p_name, 'misfire', options ->> 'misfire', array['once', 'all', 'skip']);
  perform check_rule(p_name, 'overlap', options ->> 'overlap', array['queue', 'skip', 'parallel']);
  begin
    v_bad := 'jitter';
    v_jitter := coalesce((options ->> 'jitter')::interval, '0');
    v_bad := 'start';
    v_start := (options ->> 'start')::timestamp at time zone tz;
    v_bad := 'end';
    v_end := (options ->> 'end')::timestamp at time zone tz;
  exception when data_exception then
    raise exception using errcode = 'NT004', message = format('schedule "%s": %s is "%s"', p_name, v_bad, options ->> v_bad),
      hint = case v_bad when 'jitter' then 'a length of time, such as "5 min"' else 'a time as the clocks in tz show it, such as "2026-12-24 18:00"' end;
  end;
  if v_jitter < interval '0' or v_every is not null and v_jitter >= make_interval(secs => v_every) then
    raise exception using errcode = 'NT004', message = format('schedule "%s": jitter is "%s"', p_name, options ->> 'jitter'),
      hint = 'not negative, and less than what lies between two times';
  end if;
  if v_end < v_start then
    raise exception using errcode = 'NT004', message = format('schedule "%s": it ends before it starts', p_name), hint = 'end is not before start';
  end if;
  return put_schedule(jsonb_build_object('app', 'sql', 'name', p_name, 'cron', p_cron, 'tz', tz, 'title', p_cron, 'kind', 'sql', 'body', p_body,
    'misfire', options ->> 'misfire', 'overlap', options ->> 'overlap', 'jitter', v_jitter, 'starts_at', v_start, 'ends_at', v_end,
    'options', options - array['misfire', 'overlap', 'jitter', 'start', 'end']));
end $$;

-- check_rule(schedule, option, value, allowed): raises NT004 for a value that is not allowed; null is
create or replace function check_rule(p_schedule text, p_option text, p_value text, p_allowed text[]) returns void
language plpgsql immutable set search_path from current as $$
begin
  if p_value <> all (p_allowed) then
    raise exception using errcode = 'NT004', message = format('schedule "%s": %s is "%s"', p_schedule, p_option, p_value),
      hint = 'allowed: ' || array_to_string(p_allowed, ', ');
  end if;
end $$;

-- retire_schedules(app, names): schedules that vanished from the app's code fire no more; their jobs are kept
create or replace function retire_schedules(p_app text, p_names text[]) returns setof text
language sql volatile set search_path from current as $$
  update schedule set enabled = false, next_at = null, ahead = '{}' where app = p_app and enabled and name <> all (p_names) returning name
$$;

-- every_seconds(cron) -> the seconds of "@every 30", null for all others
create or replace function every_seconds(p_cron text) returns numeric language sql immutable set search_path from current as $$
  select substring(p_cron from '^@every ([\d.]+)$')::numeric
$$;

-- multiple(seconds, at, n) -> the n-th multiple of the seconds since 1970 after the last one that is not later than `at`
create or replace function multiple(p_seconds numeric, p_at timestamptz, p_n int) returns timestamptz
language sql immutable set search_path from current as $$
  select to_timestamp((floor(extract(epoch from p_at) / p_seconds) + p_n) * p_seconds)
$$;

-- jittered(schedule, planned_at, jitter) -> when that time is due: planned_at, and always the same part of the jitter
create or replace function jittered(p_schedule int, p_planned_at timestamptz, p_jitter interval) returns timestamptz
language sql immutable set search_path from current as $$
  select case when p_jitter = interval '0' then p_planned_at else p_planned_at + p_jitter
         * ((hashtextextended(p_schedule || ' ' || extract(epoch from p_planned_at), 0) & 1048575) / 1048576.0::float8) end
$$;

-- plan_anew(schedule): forgets what was planned. "@every" has its next time at once, for others a worker computes it.
create or replace function plan_anew(p_schedule int) returns void language plpgsql volatile set search_path from current as $$
declare s schedule; v_now timestamptz := now(); v_next timestamptz;
begin
  select * into s from schedule where id = p_schedule;
  if every_seconds(s.cron) is not null then
    v_next := multiple(every_seconds(s.cron), v_now, 1);
    if v_next < s.starts_at then
      v_next := multiple(every_seconds(s.cron), s.starts_at - interval '1 microsecond', 1);
    end if;
    v_next := case when v_next > s.ends_at then null else v_next end;
  end if;
  update schedule set next_at = v_next, ahead = '{}', error = null,
         planned_to = case when every_seconds(s.cron) is null then v_now when v_next is null then 'infinity' else v_next end
   where id = p_schedule;
end $$;

-- start_tick(schedule, planned_at): its job. The tick is there.
create or replace function start_tick(p_schedule int, p_planned_at timestamptz) returns void
language plpgsql volatile set search_path from current as $$
declare v_change bigint := nextval('change_seq'); v_now timestamptz := now();
begin
  update tick set state = 'planned', fired_at = v_now, change_id = v_change where schedule_id = p_schedule and planned_at = p_planned_at;
  insert into job (handler_id, change_id, at, trace, lo, hi, op, keys)
  select h.id, v_change, v_now, v_change, 1, 1, 'n', jsonb_build_array(jsonb_build_array(p_schedule, p_planned_at))
    from schedule s join handler h using (app, name) where s.id = p_schedule;
end $$;

-- fire(schedule, planned_at, overlap) -> whether this time had not fired before. Its schedule's row is locked.
-- While a firing before it is not settled, "queue" lets it wait, "skip" leaves it out, "parallel" starts it all the same.
create or replace function fire(p_schedule int, p_planned_at timestamptz, p_overlap text) returns boolean
language plpgsql volatile set search_path from current as $$
declare v_busy boolean := p_overlap <> 'parallel' and exists (
  select from tick where schedule_id = p_schedule and state in ('planned', 'waiting'));
begin
  insert into tick (schedule_id, planned_at, state, error) values (p_schedule, p_planned_at,
    case when not v_busy then 'planned' when p_overlap = 'queue' then 'waiting' else 'skipped' end,
    case when v_busy and p_overlap = 'skip' then 'the firing before it was not done' end)
  on conflict do nothing;
  if not found then
    return false;
  end if;
  if not v_busy then
    perform start_tick(p_schedule, p_planned_at);
  end if;
  return true;
end $$;

-- fire_due(schedule, due) -> how many fired: what its misfire says of these times, which all have come, the oldest first
-- A time is missed when the next one comes before any worker began with it, whoever or whatever was away.
create or replace function fire_due(s schedule, p_due timestamptz[]) returns int language plpgsql volatile set search_path from current as $$
declare
  v_now timestamptz := now(); v_last timestamptz := p_due[cardinality(p_due)]; v_n int := 0; v_at timestamptz; t record; v_job bigint;
begin
  if s.misfire = 'all' then
    foreach v_at in array p_due loop                       -- "skip" is for what still runs, not for each other
      v_n := v_n + fire(s.id, v_at, case when s.overlap = 'skip' and cardinality(p_due) > 1 then 'queue' else s.overlap end)::int;
    end loop;
    return v_n;
  end if;
  insert into tick (schedule_id, planned_at, state, error)
  select s.id, at, 'skipped', 'missed' from unnest(p_due) at
   where at < v_last or s.misfire = 'skip' and jittered(s.id, at, s.jitter) < v_now - interval '2 min'
  on conflict do nothing;
  if exists (select from tick where schedule_id = s.id and planned_at = v_last) then
    return 0;
  end if;
  for t in select x.planned_at, x.state, x.change_id, h.id as handler_id from tick x, handler h
            where x.schedule_id = s.id and x.state in ('planned', 'waiting') and (h.app, h.name) = (s.app, s.name) loop
    select id into v_job from job where handler_id = t.handler_id and change_id = t.change_id and attempt = 0 and crashes = 0;
    if t.state = 'waiting' or cancel(v_job) then
      update tick set state = 'skipped', error = 'missed' where schedule_id = s.id and planned_at = t.planned_at;
    end if;
  end loop;
  return fire(s.id, v_last, s.overlap)::int;
end $$;

-- close_ticks(): firings whose job is settled are done, or failed with the error of their dead letter; what waited for them starts
-- Waits a second at most for who does the same: whom it skipped would wait for the next look, which may be an hour away. Who holds them longer
-- (an open transaction in psql) keeps no schedule from firing.
create or replace function close_ticks() returns void language plpgsql volatile set search_path from current
set enable_seqscan = off set jit = off set lock_timeout = '1s' as $$
declare v_id int;
begin
  with mine as materialized (
    select t.schedule_id, t.planned_at, t.change_id, h.id as handler_id
      from tick t join schedule s on s.id = t.schedule_id join handler h using (app, name)
     where t.state = 'planned' order by t.schedule_id, t.planned_at for update of t
  ), busy as materialized (
    select change_id from job where handler_id in (select handler_id from mine) union all
    select change_id from lease where handler_id in (select handler_id from mine) union all
    select change_id from delayed where handler_id in (select handler_id from mine)
  ), settled as (
    select m.*, (select d.error from dead d where d.handler_id = m.handler_id and d.change_id = m.change_id order by d.id desc limit 1) as error
      from mine m where not exists (select from busy b where b.change_id = m.change_id)
  )
  update tick t set state = case when x.error is null then 'done' else 'failed' end, error = x.error
    from settled x where (t.schedule_id, t.planned_at) = (x.schedule_id, x.planned_at);
  for v_id in select id from schedule c where exists (select from tick where schedule_id = c.id and state = 'waiting')
               and not exists (select from tick where schedule_id = c.id and state = 'planned')
            order by id for update loop
    if not exists (select from tick where schedule_id = v_id and state = 'planned') then
      perform start_tick(v_id, min(planned_at)) from tick where schedule_id = v_id and state = 'waiting' having count(*) > 0;
      perform ring();
    end if;
  end loop;
exception when lock_not_available or deadlock_detected then
  null;                                                    -- the next look closes them
end $$;

-- tick() -> how many fired
-- Fires each schedule that is due, once per due time. "@every" is planned here; the times of cron expressions are
-- computed ahead by workers (plan). A paused schedule lets its times pass.
create or replace function tick() returns int language plpgsql volatile set search_path from current as $$
declare s schedule; v_now timestamptz := now(); v_n int := 0; v_every numeric; v_times timestamptz[]; v_due timestamptz[]; v_last timestamptz;
begin
  perform close_ticks();
  v_n := work_approvals();
  for s in select * from schedule where enabled and next_at <= v_now order by next_at, id for update skip locked loop
    v_every := every_seconds(s.cron);
    v_times := s.next_at || s.ahead;
    if v_every is not null then                            -- missed: a thousand at a time, or the first and the last
      v_last := multiple(v_every, least(v_now - s.jitter, s.ends_at), 0);
      v_times := s.next_at || case when v_last <= s.next_at then '{}' when s.misfire <> 'all' then array[v_last]
        else array(select at from generate_series(1, 1000) n, multiple(v_every, s.next_at, n) at where at <= v_last) end;
    end if;
    v_due := array(select at from unnest(v_times) at where jittered(s.id, at, s.jitter) <= v_now order by at);
    continue when v_due = '{}';
    v_last := v_due[cardinality(v_due)];
    v_times := array(select at from unnest(case when v_every is null then v_times else array[multiple(v_every, v_last, 1)] end) at
                      where at > v_last and (at <= s.ends_at) is not false order by at);
    if not s.paused then
      v_n := v_n + fire_due(s, v_due);
    end if;
    update schedule set last_at = case when s.paused then last_at else v_last end, next_at = v_times[1], ahead = v_times[2:],
           planned_to = case when v_every is null then planned_to when v_times = '{}' then 'infinity' else v_times[1] end
     where id = s.id;
  end loop;
  if v_n > 0 then
    perform ring();
  end if;
  return v_n;
end $$;

-- unplanned() -> schedules whose times have to be computed from `after` on, as less than fifty or twenty days of them are known
drop function if exists plan(int, text, text, timestamptz);
create or replace function unplanned() returns table (
  id int, cron text, tz text, after timestamptz, at timestamptz, misfire text, starts_at timestamptz, ends_at timestamptz)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare v_now timestamptz := now();
begin
  return query select s.id, s.cron, s.tz, s.planned_to, v_now, s.misfire, s.starts_at, s.ends_at from schedule s
   where s.enabled and s.planned_to < 'infinity' and every_seconds(s.cron) is null
     and (s.next_at is null or cardinality(s.ahead) < 50 and s.planned_to < v_now + interval '20 days');
end $$;

-- plan(schedule, after, times, planned_to, error): notes times computed from what unplanned() said, if it still holds
--   planned_to  the times up to here are known; null: there are no more. error: none can be computed; it is disabled.
create or replace function plan(p_schedule int, p_after timestamptz, p_times timestamptz[], p_planned_to timestamptz, p_error text default null)
returns void language sql volatile set search_path from current as $$
  update schedule set next_at = coalesce(next_at, p_times[1]), ahead = case when next_at is null then p_times[2:] else ahead || p_times end,
         planned_to = coalesce(p_planned_to, 'infinity'), error = p_error, enabled = p_error is null
   where id = p_schedule and planned_to = p_after and enabled
$$;

-- next_tick() -> when to call tick() again: the earliest due time, now when one has to be planned, null without schedules
create or replace function next_tick() returns timestamptz language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  return least(next_approval(), (select min(coalesce(jittered(id, next_at, jitter), v_now)) from schedule
                                  where enabled and (next_at is not null or planned_to < 'infinity')));
end $$;

-- pause_schedule(name), resume_schedule(name): while paused its times pass without firing
create or replace function pause_schedule(p_name text) returns void language plpgsql volatile set search_path from current as $$
begin
  update schedule set paused = true where id = find_schedule(p_name);
end $$;

create or replace function resume_schedule(p_name text) returns void language plpgsql volatile set search_path from current as $$
declare v_id int := find_schedule(p_name); v_now timestamptz := now();
begin
  update schedule set paused = false where id = v_id;
  perform plan_anew(id) from schedule where id = v_id and next_at <= v_now;   -- those that passed stay passed
  perform ring();
end $$;

-- run_schedule(name) -> when: fires it now, beside its plan. While a firing before it is not done it waits, unless they may overlap;
-- one that waits for the world to come back does so no longer.
create or replace function run_schedule(p_name text) returns timestamptz language plpgsql volatile set search_path from current as $$
declare v_now timestamptz; s schedule;
begin
  select * into s from schedule where id = find_schedule(p_name) for update;
  perform close_ticks();
  v_now := now();
  perform fire(s.id, v_now, case s.overlap when 'skip' then 'queue' else s.overlap end);
  update handler h set probe_at = v_now where (h.app, h.name) = (s.app, s.name) and h.probe_at > v_now;
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
