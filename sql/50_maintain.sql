-- Housekeeping, by any worker that has a moment. Nothing else waits for it: a purge that stops, stops nothing.

-- maintain() -> what was done, null when there is nothing (more) to do. Call it again until it returns null.
-- One bounded step a call: at most one TRUNCATE, which waits at most 100 ms for its lock and gives up quietly.
create or replace function maintain() returns text language plpgsql volatile set search_path from current as $$
declare
  v_now timestamptz := now(); v_keep int := least(7, greatest(1, setting('retention_days')::int)); v_step text; v_n bigint;
begin
  if not pg_try_advisory_xact_lock(1634628721, (select oid::int from pg_namespace where nspname = current_schema())) then
    return null;                                           -- someone else is at it
  end if;
  delete from worker w where coalesce(stopped_at, seen_at) < v_now - make_interval(days => v_keep)
     and not exists (select from lease l where l.worker_id = w.id);
  get diagnostics v_n = row_count;
  if v_n > 0 then
    return format('%s workers forgotten', v_n);
  end if;
  delete from fed where ctid in (
    select f.ctid from fed f where not exists (select from backfill b where b.handler_id = f.handler_id and b.finished_at is null) limit 10000);
  get diagnostics v_n = row_count;
  if v_n > 0 then
    return format('%s fed keys forgotten', v_n);
  end if;
  delete from tick where ctid in (
    select ctid from tick where planned_at < v_now - make_interval(days => v_keep) and state not in ('planned', 'waiting') limit 10000);
  get diagnostics v_n = row_count;
  if v_n > 0 then
    return format('%s ticks forgotten', v_n);
  end if;
  v_n := forget_starts(v_now);
  if v_n > 0 then
    return format('%s keys with a rate forgotten', v_n);
  end if;
  v_n := forget_deliveries(v_now);
  if v_n > 0 then
    return format('%s deliveries forgotten', v_n);
  end if;
  v_n := forget_keys(v_now);
  if v_n > 0 then
    return format('%s keys of polls forgotten', v_n);
  end if;
  v_n := lapse_calls();
  if v_n > 0 then
    return format('%s calls of models were left by their process', v_n);
  end if;
  v_n := forget_answers(v_now, v_keep);
  if v_n > 0 then
    return format('%s answers forgotten', v_n);
  end if;
  v_n := dbt_watchdog();
  if v_n > 0 then
    return format('%s tables found that dbt made anew without hooks', v_n);
  end if;
  v_n := forget_dbt_runs(v_now, v_keep);
  if v_n > 0 then
    return format('%s runs of dbt forgotten', v_n);
  end if;
  v_n := forget_builds(v_now - make_interval(days => v_keep));
  if v_n > 0 then
    return format('%s builds forgotten', v_n);
  end if;
  v_n := forget_actions(v_now);
  if v_n > 0 then
    return format('%s calls of actions forgotten', v_n);
  end if;
  v_n := mend();
  if v_n > 0 then
    return format('%s tables or changes mended', v_n);
  end if;
  return rotate(v_now, v_keep);
end $$;

-- rotate(now, days kept) -> the partition that was emptied, null when none needs to be, or could be had in 100 ms
-- A slot is emptied when its newest row is older than the days kept; changes only when no job needs them any more.
create or replace function rotate(p_now timestamptz, p_keep int) returns text language plpgsql volatile set search_path from current
set lock_timeout = '100ms' as $$
declare
  v_today bigint := extract(epoch from p_now)::bigint / 86400;
  v_cutoff timestamptz := to_timestamp((v_today - p_keep) * 86400);
  v_part text; v_newest timestamptz; v_needed boolean;
begin
  for v_part in
    select format('%s_%s', t, (v_today - d) % 9) from unnest(array['output', 'receipt', 'change']) t, generate_series(8, p_keep + 1, -1) d
  loop
    if v_part like 'output%' then
      execute format('select r.at from (select receipt_id from %I order by receipt_id desc limit 1) o left join receipt r on r.id = o.receipt_id', v_part)
         into v_newest;
      execute format('select exists (select from %I)', v_part) into v_needed;
      continue when not v_needed or v_newest >= v_cutoff;
    else
      execute format('select at from %I order by id desc limit 1', v_part) into v_newest;
      continue when v_newest is null or v_newest >= v_cutoff;
    end if;
    if v_part like 'change%' then
      execute format('select exists (select from (select change_id, at from job union all select change_id, at from lease union all select change_id, at from delayed union all select change_id, at from turn) q
                                      where q.at < $1 and (exists (select from %1$I c where c.id = q.change_id)
                                         or exists (select from %1$I c where c.olds is not null and c.id > q.change_id)))', v_part)
         into v_needed using v_cutoff;
      continue when v_needed;
    end if;
    begin
      execute format('truncate only %I', v_part);
      return v_part || ' emptied';
    exception when lock_not_available then
      null;                                                -- someone reads it; next time
    end;
  end loop;
  return null;
end $$;
