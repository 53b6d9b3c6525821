-- Polls: how far each got. The worker asks the outside between begin_poll() and finish_poll(), with no transaction open.

-- begin_poll(app, name, planned_at) -> where to go on, made at the first call
-- due: false when a poll that was committed began after this firing was planned. failing: for how long it has been, null
-- when it is not. now: what finish_poll() takes as `began`.
create or replace function begin_poll(p_app text, p_name text, p_planned_at timestamptz)
returns table (schedule_id int, cursor jsonb, version bigint, due boolean, failing interval, now timestamptz)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare v_now timestamptz := now(); v_id int; v_since timestamptz;
begin
  select s.id, h.failing_since into v_id, v_since from schedule s join handler h using (app, name) where s.app = p_app and s.name = p_name;
  if v_id is null then
    raise exception using errcode = 'NT003', message = format('no poll "%s" in app "%s"', p_name, p_app), hint = 'anton migrate';
  end if;
  insert into poll (schedule_id) values (v_id) on conflict do nothing;
  return query select p.schedule_id, p.cursor, p.version, p_planned_at > coalesce(p.polled_at, '-infinity'), v_now - v_since, v_now
                 from poll p where p.schedule_id = v_id;
end $$;

-- new_keys(schedule, keys) -> those of the keys that this poll has not seen
create or replace function new_keys(p_schedule int, p_keys uuid[]) returns uuid[] language sql stable set search_path from current
set jit = off set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
  select coalesce(array_agg(k), '{}') from unnest(p_keys) k where not exists (select from poll_key where schedule_id = p_schedule and key = k)
$$;

-- finish_poll(schedule, version, cursor, began, keys, rows, dropped) -> whether nothing was committed since that version was read
-- Notes the cursor and all keys of a poll, in the transaction that settles it and writes its rows; rows: how many it writes.
-- false: another firing was quicker, this one has to be run again.
create or replace function finish_poll(p_schedule int, p_version bigint, p_cursor jsonb, p_began timestamptz, p_keys uuid[], p_rows int,
                                       p_dropped int) returns boolean
language plpgsql volatile set search_path from current as $$
begin
  update poll set cursor = p_cursor, version = version + 1, polled_at = p_began, rows = rows + p_rows, dropped = dropped + p_dropped
   where schedule_id = p_schedule and version = p_version;
  if not found then
    return false;
  end if;
  update poll_key set seen_at = p_began where schedule_id = p_schedule and key = any (p_keys) and seen_at < p_began - interval '1 day';
  insert into poll_key (schedule_id, key, seen_at) select p_schedule, key, p_began from unnest(p_keys) key on conflict do nothing;
  return true;
end $$;

-- rewind_poll(name, cursor, forget_keys): where it goes on from the next time; with forget_keys what was dropped may come again
create or replace function rewind_poll(p_name text, p_cursor jsonb default null, forget_keys boolean default false) returns void
language plpgsql volatile set search_path from current as $$
declare v_id int := find_schedule(p_name);
begin
  update poll set cursor = p_cursor, version = version + 1 where schedule_id = v_id;
  if not found then
    raise exception using errcode = 'NT003', message = format('"%s" has not polled yet, or is no poll', p_name), hint = 'known: '
      || coalesce((select string_agg(s.app || '.' || s.name, ', ' order by s.app, s.name) from poll p join schedule s on s.id = p.schedule_id), 'none');
  end if;
  if forget_keys then
    delete from poll_key where schedule_id = v_id;
  end if;
end $$;

-- forget_keys(now) -> how many keys were forgotten that no poll has seen for 90 days; at most 10,000 at a time
create or replace function forget_keys(p_now timestamptz) returns bigint language plpgsql volatile set search_path from current
set enable_seqscan = off set jit = off as $$
declare v_n bigint;
begin
  delete from poll_key where ctid in (
    select ctid from poll_key where seen_at < p_now - interval '90 days' order by seen_at limit 10000);
  get diagnostics v_n = row_count;
  return v_n;
end $$;
