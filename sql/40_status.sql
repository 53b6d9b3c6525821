-- What is going on: the view status, and why a record is what it is.

-- status: a row for each handler, and for each Webhook with deliveries in quarantine. Records, not jobs; rate over the last minute; why says what holds it up.
create or replace view status as
with clock as (select now() as at),
recent as (                                               -- the newest receipts, by primary key: cheap however many there are
  select r.handler_id, r.n, r.at from clock, lateral (
    (select handler_id, n, at from receipt where slot = slot(clock.at) order by id desc limit 5000)
    union all
    (select handler_id, n, at from receipt where slot = slot(clock.at - interval '1 minute') and slot(clock.at) <> slot(clock.at - interval '1 minute')
      order by id desc limit 5000)) r
), span as (
  select case when count(*) >= 5000 then least(60, greatest(1, extract(epoch from max(clock.at) - min(recent.at)))) else 60 end as seconds
    from recent, clock
), rate as (
  select recent.handler_id, sum(recent.n) as n from recent, clock where recent.at > clock.at - interval '1 minute' group by 1
), live as (
  select worker.app, nullif(count(*), 0)::int as workers, array_agg(distinct worker.version) as versions from worker, clock
   where worker.stopped_at is null and worker.seen_at > clock.at - greatest(interval '1 minute', 2 * setting('lease')::interval)
   group by rollup (worker.app)
)
select h.app, h.name as handler,
       case when w.schema_name = 'public' then w.table_name else w.schema_name || '.' || w.table_name end as "table",
       h.ops, h.kind,
       case when h.missing_at is not null then 'missing'
            when not h.enabled then 'disabled'
            when h.paused then 'paused'
            when h.failing_since is not null then 'failing'
            when j.n > 0 and l.workers is null then 'idle'
            when lag.is_behind then 'behind'
            when h.feeding then 'feeding'
            else 'ok' end as state,
       coalesce(j.n, 0) as ready, coalesce(d.n, 0) + coalesce(rest.keys, 0) + coalesce(t.n, 0) as delayed, coalesce(f.n, 0) as in_flight,
       (select count(*) from dead where dead.handler_id = h.id) as dead,
       lag.age as oldest,
       round(coalesce(rate.n, 0) / span.seconds, 1) as per_second,
       h.failures,
       case when h.missing_at is not null then format('not in the code of app %s since %s; its jobs are kept', h.app, date_trunc('second', h.missing_at))
            when not h.enabled then 'takes no new records'
            when h.paused then format('paused; anton handlers resume %s', h.name)
            when h.failing_since is not null then format('failing since %s: %s; probes again %s', date_trunc('second', h.failing_since), h.failing_error,
                   coalesce(date_trunc('second', h.probe_at)::text, 'now'))
            when j.n > 0 and l.workers is null then format('records wait and no worker of app %s lives; anton work', h.app)
            when lag.is_behind then format('the oldest record waits %s, max_lag is %s', date_trunc('second', lag.age), h.max_lag)
            when h.feeding then format('existing rows are being fed: %s so far', b.fed)
            when t.n > 0 then format('%s records wait for an earlier one of their key', t.n)
            when j.n > 0 then coalesce(waits_for(h.id), waits_turn(h.id))
            when rest.keys > 0 then format('%s wait to come to rest, debounce %s%s', rest.keys, h.debounce, ', the next until ' || date_trunc('second', rest.next_at))
            when d.rated_at is not null then format('records wait for the rate of their key, %s for each %s; the next until %s', (select r.said from key_rates() r where r.handler_id = h.id), h.per, date_trunc('second', d.rated_at))
            when d.next_at is not null then format('the next is due at %s', date_trunc('second', d.next_at)) end as why,
       h.max_lag, coalesce(lag.is_behind, false) as behind, coalesce(l.workers, 0) as workers, coalesce(l.versions, '{}') as versions
  from handler h join watched w on w.id = h.table_id cross join span
  left join rate on rate.handler_id = h.id
  left join live l on l.app is not distinct from case when h.kind = 'sql' and h.app = 'sql' then null else h.app end
  left join backfill b on b.handler_id = h.id
  left join lateral (select sum(hi - lo + 1) as n, min(at) as at from job where job.handler_id = h.id) j on true
  left join lateral (select sum(hi - lo + 1 - coalesce(cardinality(settled), 0)) as n, min(run_at) filter (where error is null) as next_at,
                           min(run_at) filter (where error = waits_for_rate()) as rated_at
                       from delayed where delayed.handler_id in (h.id, -h.id)) d on true
  left join lateral (select r.keys, r.next_at from resting(h.id) r) rest on true
  left join lateral (select sum(hi - lo + 1 - coalesce(cardinality(settled), 0)) as n, min(at) as at from lease where lease.handler_id = h.id) f on true
  left join lateral (select nullif(count(*), 0) as n from turn where turn.handler_id = h.id and turn.state = 'waits') t on h.ordered
  left join lateral (select c.at - least(j.at, f.at) as age, c.at - least(j.at, f.at) > h.max_lag as is_behind from clock c) lag on true
union all
select split_part(q.webhook, '/', 1), substr(q.webhook, strpos(q.webhook, '/')), null, '{}', 'webhook', 'quarantine', q.n, 0, 0, 0, null, 0, 0,
       format('%s deliveries do not fit, in table quarantine; the last at %s: %s', q.n, date_trunc('second', q.last_at), q.error), null, false, 0, '{}'
  from (select webhook, count(*) as n, max(last_at) as last_at, (array_agg(error order by last_at desc))[1] as error from quarantine group by webhook) q
 order by 1, 2;

-- findings() -> what anton doctor reports: one row for each thing that is wrong, and what to do
create or replace function findings() returns table (kind text, subject text, problem text, remedy text)
language plpgsql stable set search_path from current as $$
begin
  return query
    select 'handler', s.app || '.' || s.handler, coalesce(s.why, s.state),
           case s.state when 'missing' then 'deploy its code again, or let its jobs be worked and drop it' when 'paused' then format('anton handlers resume %s', s.handler)
                        when 'quarantine' then 'mend the model or the sender; a delivery leaves when it is sent again and fits, or by DELETE'
                        when 'failing' then 'mend what it calls; it resumes by itself' when 'idle' then 'anton work' when 'behind' then 'anton work --processes N' end
      from status s where s.state not in ('ok', 'feeding');
  return query
    select 'dead', s.app || '.' || s.handler, format('%s dead letters', s.dead), format('anton dead list --handler %1$s; fix, then: anton dead replay %1$s', s.handler)
      from status s where s.dead > 0;
  return query
    select 'action', a.app || '.' || a.name, format('%s calls are unknown: nobody can tell whether they happened', count(*)),
           format('anton actions list --name %s --state unknown; then resolve or retry', a.name)
      from action a where a.state = 'unknown' group by a.app, a.name;
  return query
    select 'approval', a.app || '.' || a.name, format('what is due of approval %s cannot be done: %s', a.id, a.error), format('anton approvals show %s; it is tried again each minute', a.id)
      from approval a where a.state = 'pending' and a.error is not null order by a.id;
  return query select 'action', u.app || '.' || u.action, u.problem, u.remedy from unheard() u;
  return query select 'action', u.app || '.' || u.action, u.problem, u.remedy from unsent() u;
  return query
    select 'action', 'all', 'actions are stopped: no call leaves', 'anton actions start' where setting('actions') = 'stopped';
  return query
    select 'table', format('%I.%I', w.schema_name, w.table_name), 'is gone', 'bring it back, or take its handlers out of the code and migrate'
      from watched w where w.relid <> 0 and not exists (select from pg_class c where c.oid = w.relid);   -- 0: of dbt, not built yet
  return query
    select 'table', format('%I.%I', w.schema_name, w.table_name), format('a change at %s could not be captured: %s', date_trunc('second', x.at), x.degraded), 'anton doctor --reconcile'
      from watched w join (select distinct on (table_id) table_id, c.at, degraded from change c where op = 'x' order by table_id, id desc) x on x.table_id = w.id;
  return query
    select 'trigger', format('%I.%I', w.schema_name, w.table_name), format('trigger %s is disabled: changes are not seen', t.tgname), 'anton doctor --fix'
      from watched w join pg_trigger t on t.tgrelid = w.relid join pg_proc p on p.oid = t.tgfoid join pg_namespace n on n.oid = p.pronamespace
     where n.nspname = current_schema() and t.tgenabled = 'D';
  return query
    select 'trigger', format('%I.%I', w.schema_name, w.table_name), format('handler %s listens and no trigger does', string_agg(distinct h.name, ', ')), 'anton doctor --fix'
      from watched w join pg_class c on c.oid = w.relid join handler h on h.table_id = w.id and h.enabled and h.ops && array['new', 'updated', 'deleted', 'truncate']
      left join pg_trigger t on t.tgrelid = w.relid and t.tgfoid in (select p.oid from pg_proc p where p.pronamespace = current_schema()::regnamespace)
     group by w.id having count(t.oid) = 0;
  return query
    select 'database', a.pid::text, format('a transaction of %s is open since %s and keeps dead rows', coalesce(a.usename, '?'), date_trunc('second', a.xact_start)),
           format('end it: select pg_terminate_backend(%s)', a.pid)
      from pg_stat_activity a where a.datname = current_database() and a.backend_xmin is not null and a.pid <> pg_backend_pid()
       and a.xact_start < pg_catalog.clock_timestamp() - interval '1 hour';
  return query select * from load_findings();
  return query select * from dbt_findings();
end $$;

-- repair() -> what was done: triggers written anew where findings() misses them
create or replace function repair() returns setof text language plpgsql volatile set search_path from current as $$
declare f record; t record; v_table int; v_n int := mend();
begin
  if v_n > 0 then
    return next format('%s tables or changes that had moved away from their triggers', v_n);
  end if;
  for f in select distinct subject from findings() where kind = 'trigger' loop
    select w.id into v_table from watched w where format('%I.%I', w.schema_name, w.table_name) = f.subject;
    for t in select g.tgname from watched w join pg_trigger g on g.tgrelid = w.relid join pg_proc p on p.oid = g.tgfoid
              where w.id = v_table and p.pronamespace = current_schema()::regnamespace and g.tgenabled = 'D' loop
      execute format('alter table %s enable trigger %I', f.subject, t.tgname);
    end loop;
    perform sync_triggers(v_table);
    return next format('triggers of %s', f.subject);
  end loop;
end $$;

-- inputs(receipt) -> position, change_id, ordinal, key: the records a receipt settled, in the order its outputs count
create or replace function inputs(p_receipt bigint) returns table ("position" int, change_id bigint, ordinal int, key jsonb)
language plpgsql stable set search_path from current as $$
declare
  r receipt; c change; v_offset int := 0; v_position int := 0; v_size int; v_ordinals int[]; v_inline boolean; v_key jsonb;
  v_keys jsonb;                                            -- the receipt's inline keys, one array element each
begin
  select * into r from receipt where id = p_receipt;
  v_keys := coalesce(r.keys, (select jsonb_agg(jsonb_build_array(k) order by o) from unnest(r.ids) with ordinality x (k, o)), '[]');
  for part in 1..coalesce(cardinality(r.change_ids), 0) loop
    v_ordinals := coalesce(r.ordinals, array(select generate_series(r.los[part], r.his[part])));
    select * into c from change where id = r.change_ids[part];
    v_size := least(r.his[part] - r.los[part] + 1, jsonb_array_length(v_keys) - v_offset);
    -- a part that a change row holds too is inline when the next inline keys are its own
    v_inline := v_size > 0 and (c.id is null or v_keys -> v_offset = change_key(c, v_ordinals[1]) or v_keys -> v_offset = change_key(c, r.los[part]));
    foreach ordinal in array v_ordinals loop
      v_position := v_position + 1;
      position := v_position;
      change_id := r.change_ids[part];
      key := case when not v_inline then change_key(c, ordinal)
                  when r.ordinals is not null and v_size = cardinality(r.ordinals) then v_keys -> (v_offset + v_position - 1)
                  else v_keys -> (v_offset + ordinal - r.los[part]) end;
      return next;
    end loop;
    if v_inline then
      v_offset := v_offset + v_size;
    end if;
  end loop;
end $$;

-- change_key(change, ordinal) -> [k1, k2, ...] of one record of a change
create or replace function change_key(c change, p_ordinal int) returns jsonb language sql immutable set search_path from current as $$
  select case when c.ids is not null then jsonb_build_array(c.ids[p_ordinal]) else c.keys -> (p_ordinal - 1) end
$$;

-- parse_key(table id, text) -> [k1, k2, ...]: "7", "a,b" for two key columns, or JSON: ["a", "b"]
create or replace function parse_key(p_table int, p_key text) returns jsonb language plpgsql stable set search_path from current as $$
declare w watched; v_parts text[]; v_key jsonb;
begin
  select * into w from watched where id = p_table;
  v_parts := case when p_key like '[%' then array(select jsonb_array_elements_text(p_key::jsonb))
                  when cardinality(w.key_columns) = 1 then array[p_key] else string_to_array(p_key, ',') end;
  if cardinality(v_parts) <> cardinality(w.key_columns) then
    raise exception using errcode = 'NT004', message = format('"%s" is no key of %I.%I', p_key, w.schema_name, w.table_name),
      hint = format('its key is %s; write %1$s with commas', array_to_string(w.key_columns, ', '));
  end if;
  execute format('select jsonb_build_array(%s)', (select string_agg(format('($1[%s])::%s', o, t), ', ' order by o) from unnest(w.key_types) with ordinality x (t, o)))
    into v_key using v_parts;
  return v_key;
end $$;

-- as_ids(key) -> the key as it stands in columns named ids, null when it is no single integer
create or replace function as_ids(p_key jsonb) returns bigint[] language sql immutable set search_path from current as $$
  select case when jsonb_array_length(p_key) = 1 and jsonb_typeof(p_key -> 0) = 'number' and p_key ->> 0 ~ '^-?\d{1,18}$'
              then array[(p_key ->> 0)::bigint] end
$$;

-- mentions(table id, key) -> where the runtime knows a record from: the change or job, its cause, and its place in it
create or replace function mentions(p_table int, p_key jsonb) returns table (change_id bigint, ordinal int, cause bigint)
language sql stable set search_path from current as $$
  with wanted as (select p_key as key, jsonb_build_array(p_key) as keys, as_ids(p_key) as ids)
  select c.id, x.p::int, c.cause from change c, wanted, lateral (
    select p from unnest(c.ids) with ordinality u (k, p) where array[k] = wanted.ids
    union all select p from jsonb_array_elements(c.keys) with ordinality u (k, p) where k = wanted.key) x
   where c.table_id = p_table and (c.ids @> wanted.ids or c.keys @> wanted.keys)
  union
  select q.change_id, null, q.cause from wanted, (
    select handler_id, change_id, cause, ids, keys from job union all select handler_id, change_id, cause, ids, keys from lease
    union all select handler_id, change_id, cause, ids, keys from delayed
    union all select handler_id, null, cause, null, jsonb_build_array(record) from debounce
    union all select handler_id, change_id, cause, ids, keys from turn where state = 'waits') q join handler h on h.id = abs(q.handler_id)
   where h.table_id = p_table and (q.ids @> wanted.ids or q.keys @> wanted.keys)
  union
  select i.change_id, i.ordinal, r.causes[array_position(r.change_ids, i.change_id)]
    from wanted, receipt r join handler h on h.id = r.handler_id, lateral inputs(r.id) i
   where h.table_id = p_table and (r.ids @> wanted.ids or r.keys @> wanted.keys) and i.key = wanted.key
$$;

-- made_by(table id, key) -> the receipts that wrote a record, with the record each was handling
--   owner  its position among the receipt's inputs; 0: written for the whole batch, or by SQL over several records
create or replace function made_by(p_table int, p_key jsonb) returns table (
  receipt_id bigint, handler_id int, at timestamptz, ms real, owner int, from_table int, from_key jsonb, "of" int)
language sql stable set search_path from current as $$
  with noted as (
    select o.receipt_id, x.owner from output o cross join lateral (
      select o.owners[p] as owner from unnest(o.ids) with ordinality u (k, p) where array[k] = as_ids(p_key)
      union all select o.owners[p] from jsonb_array_elements(o.keys) with ordinality u (k, p) where k = p_key) x
     where o.table_id = p_table and (o.ids @> as_ids(p_key) or o.keys @> jsonb_build_array(p_key))
  ), makers as (
    select * from noted
    union
    select m.cause, case when r.n = 1 then 1 else 0 end from mentions(p_table, p_key) m join receipt r on r.id = m.cause
     where m.cause not in (select receipt_id from noted))
  select r.id, r.handler_id, r.at, r.ms, m.owner, h.table_id, (select key from inputs(r.id) where position = m.owner), r.n
    from makers m join receipt r on r.id = m.receipt_id join handler h on h.id = r.handler_id
   order by r.id
$$;

-- caused(receipt) -> the records of watched tables that a receipt's handler wrote, where nobody noted which input they are of
create or replace function caused(p_receipt bigint) returns table (table_id int, key jsonb)
language sql stable set search_path from current as $$
  select c.table_id, k from change c, lateral (select jsonb_build_array(x) from unnest(c.ids) x union all select x from jsonb_array_elements(c.keys) x) y (k)
   where c.cause = p_receipt
  union
  select h.table_id, k from (
    select handler_id, ids, keys from job where cause = p_receipt union all select handler_id, ids, keys from lease where cause = p_receipt
    union all select handler_id, ids, keys from delayed where cause = p_receipt
    union all select handler_id, null, jsonb_build_array(record) from debounce where cause = p_receipt
    union all select handler_id, ids, keys from turn where cause = p_receipt and state = 'waits') q join handler h on h.id = abs(q.handler_id),
    lateral (select jsonb_build_array(x) from unnest(q.ids) x union all select x from jsonb_array_elements(q.keys) x) y (k)
  union
  select h.table_id, i.key from receipt r join handler h on h.id = r.handler_id, lateral inputs(r.id) i
   where p_receipt = any (r.causes) and r.causes[array_position(r.change_ids, i.change_id)] = p_receipt and i.key is not null
$$;

-- handled(table id, key) -> what became of a record: for each handler's run its receipt and each record it wrote
--   state   done | ready | in flight | delayed | dead
--   to_key  null with a to_table: written for the whole batch
create or replace function handled(p_table int, p_key jsonb) returns table (
  state text, handler_id int, at timestamptz, ms real, error text, receipt_id bigint, job_id bigint, to_table int, to_key jsonb)
language plpgsql stable set search_path from current as $$
#variable_conflict use_column
declare
  v_id bigint[] := as_ids(p_key);
  v_in jsonb := jsonb_build_array(p_key);
  v_handlers int[] := array(select id from handler where table_id = p_table);
  v_resting int[] := array(select -id from handler where table_id = p_table);   -- changes not folded yet, see fold()
  v_changes bigint[]; v_ordinals int[];
begin
  select array_agg(change_id), array_agg(ordinal) into v_changes, v_ordinals from mentions(p_table, p_key) where ordinal is not null;
  return query
    select 'done', r.handler_id, r.at, r.ms, null::text, r.id, null::bigint, o.table_id, o.key
      from receipt r join lateral (select position from inputs(r.id) where key = p_key) i on true
      left join lateral (
        select table_id, jsonb_build_array(k) as key from output, unnest(ids) with ordinality u (k, p) where receipt_id = r.id and owners[p] in (0, i.position)
        union all
        select table_id, k from output, jsonb_array_elements(keys) with ordinality u (k, p) where receipt_id = r.id and owners[p] in (0, i.position)
        union
        select table_id, case when r.n = 1 then key end from caused(r.id) where not exists (select from output where receipt_id = r.id)) o on true
     where r.handler_id = any (v_handlers) and (r.ids @> v_id or r.keys @> v_in or r.change_ids && v_changes)
     order by r.id;
  return query
    with waiting as (
      select 'ready' as state, handler_id, id, at, null::text as error, ids, keys, change_id, lo, hi, settled from job where handler_id = any (v_handlers)
      union all
      select 'delayed', abs(handler_id), id, run_at, coalesce(error, 'due at ' || date_trunc('second', run_at)), ids, keys, change_id, lo, hi, settled
        from delayed where handler_id = any (v_handlers || v_resting)
      union all
      select 'delayed', -handler_id, id, at, 'waits for its debounce', ids, keys, change_id, lo, hi, settled from job where handler_id = any (v_resting)
      union all
      select 'delayed', d.handler_id, null, d.due_at, format('waits for its debounce of %s, due at %s', h.debounce, date_trunc('second', d.due_at)),
             null, jsonb_build_array(d.record), null, 1, 1, null
        from debounce d join handler h on h.id = d.handler_id where d.handler_id = any (v_handlers)
      union all
      select 'in flight', handler_id, id, at, null, ids, keys, change_id, lo, hi, settled from lease where handler_id = any (v_handlers)
      union all
      select 'waits', handler_id, id, at, turn_waits_for(handler_id, key), ids, keys, change_id, ordinal, ordinal, null from turn where handler_id = any (v_handlers) and state = 'waits')
    select q.state, q.handler_id, q.at, null::real, case when q.state = 'ready' then coalesce((select case when h.paused then format('paused; anton handlers resume %s', h.name)
                                                                                                                     when h.failing_since is not null then format('its handler waits: %s', h.failing_error) end
                                                                                                          from handler h where h.id = q.handler_id), waits_for(q.handler_id), waits_turn(q.handler_id))
                                                                       when q.state = 'in flight' then (select waits_for(h.id) from handler h where h.id = q.handler_id and (h.per is not null or h.ordered or exists (select from rate where handler_id = h.id)))
                                                                       else q.error end, null::bigint, q.id, null::int, null::jsonb
      from waiting q
     where (q.ids @> v_id and (settled is null or q.lo + array_position(q.ids, v_id[1]) - 1 <> all (settled)))
        or exists (select from jsonb_array_elements(q.keys) with ordinality u (k, p) where k = p_key and (settled is null or q.lo + p::int - 1 <> all (settled)))
        or (q.ids is null and q.keys is null and exists (
              select from unnest(v_changes, v_ordinals) u (c, p) where c = q.change_id and p between q.lo and q.hi and (settled is null or p <> all (settled))));
  return query
    select 'dead', d.handler_id, d.died_at, null::real, d.error, null::bigint, d.id, null::int, null::jsonb
      from dead d where d.handler_id = any (v_handlers) and d.key = p_key;
end $$;

-- why(table, key) -> the chain a record is part of, oldest first
--   level    below 0: what led to it; 0: the record itself; above 0: what came of it
--   handler  who wrote the record (level <= 0; state origin: no handler did), or handled the one above (level > 0)
--   record   null: that run wrote nothing
-- Reads the days that are kept; a record older than that stands alone.
create or replace function why(p_table text, p_key text) returns table (
  level int, record text, handler text, state text, at timestamptz, ms real, error text, receipt_id bigint, job_id bigint)
language plpgsql stable set search_path from current as $$
#variable_conflict use_column
declare
  v_table int := (select id from watched where relid = resolve(p_table)); v_key jsonb; m record; v_seen bigint[] := '{}';
  v_names text[] := '{}'; v_handlers text[] := '{}'; v_receipts bigint[] := '{}'; v_ats timestamptz[] := '{}'; v_mss real[] := '{}';
  v_at_table int; v_at_key jsonb; v_n int := 0;
begin
  if v_table is null then
    raise exception using errcode = 'NT002', message = format('table "%s" is not watched', p_table),
      hint = 'watched: ' || coalesce((select string_agg(table_name, ', ' order by table_name) from watched), 'none');
  end if;
  v_key := parse_key(v_table, p_key);
  v_at_table := v_table;
  v_at_key := v_key;
  while v_n < 32 loop                                      -- up to the origin: each record has one first maker
    select * into m from made_by(v_at_table, v_at_key) x where x.receipt_id <> all (v_seen) order by x.receipt_id limit 1;
    v_names := v_names || record_name(v_at_table, v_at_key);
    v_handlers := v_handlers || (select name from handler where id = m.handler_id);
    v_receipts := v_receipts || m.receipt_id;
    v_ats := v_ats || m.at;
    v_mss := v_mss || m.ms;
    exit when m.receipt_id is null or (m.from_key is null and m.owner is distinct from 0);
    v_seen := v_seen || m.receipt_id;
    v_n := v_n + 1;
    if m.owner = 0 then                                    -- written for a whole batch: its inputs have no one name
      v_names := v_names || format('%s (a batch of %s)', record_name(m.from_table, null), m.of);
      v_handlers := v_handlers || null::text;
      v_receipts := v_receipts || null::bigint;
      v_ats := v_ats || null::timestamptz;
      v_mss := v_mss || null::real;
      exit;
    end if;
    v_at_table := m.from_table;
    v_at_key := m.from_key;
  end loop;
  for i in reverse cardinality(v_names)..1 loop
    return query select 1 - i, v_names[i], v_handlers[i], case when v_handlers[i] is null then 'origin' else 'written' end,
                        v_ats[i], v_mss[i], null::text, v_receipts[i], null::bigint;
  end loop;
  return query select * from why_down(v_table, v_key, 1);
end $$;

-- record_name(table id, key) -> orders/7, shop.orders/a,b
create or replace function record_name(p_table int, p_key jsonb) returns text language sql stable set search_path from current as $$
  select case when w.schema_name = 'public' then '' else w.schema_name || '.' end || w.table_name
         || coalesce('/' || (select string_agg(k, ',' order by o) from jsonb_array_elements_text(p_key) with ordinality x (k, o)), '')
    from watched w where w.id = p_table
$$;

-- why_down(table id, key, level): what came of a record, each line followed by what came of what it wrote
create or replace function why_down(p_table int, p_key jsonb, p_level int) returns table (
  level int, record text, handler text, state text, at timestamptz, ms real, error text, receipt_id bigint, job_id bigint)
language plpgsql stable set search_path from current as $$
#variable_conflict use_column
declare m record;
begin
  for m in select x.*, h.name from handled(p_table, p_key) x join handler h on h.id = x.handler_id order by coalesce(x.receipt_id, x.job_id), x.to_table, x.to_key limit 100 loop
    return query select p_level, record_name(m.to_table, m.to_key) || case when m.to_key is null then ' (for the batch)' else '' end, m.name, m.state, m.at, m.ms, m.error, m.receipt_id, m.job_id;
    if m.to_key is not null and p_level < 32 and (m.to_table, m.to_key) is distinct from (p_table, p_key) then
      return query select * from why_down(m.to_table, m.to_key, p_level + 1);
    end if;
  end loop;
end $$;

-- workers() -> who works: live when it was seen within a minute
create or replace function workers() returns table (id int, app text, host text, pid int, version text, state text, started_at timestamptz, seen_at timestamptz, leases bigint)
language sql stable set search_path from current as $$
  select w.id, w.app, w.host, w.pid, w.version,
         case when w.stopped_at is not null then 'stopped' when w.seen_at > t.at - greatest(interval '1 minute', 2 * setting('lease')::interval) then 'live' else 'lost' end,
         w.started_at, w.seen_at, (select count(*) from lease l where l.worker_id = w.id)
    from worker w, (select now() as at) t order by w.id
$$;

-- list_jobs(handler or null, limit) -> jobs that are not done, oldest first
--   state  ready | delayed | waits (for an earlier record of its key) | in flight | suspect (its worker died)
--   id     null: a key that waits to come to rest; it has a job when it has
create or replace function list_jobs(p_handler text default null, p_limit int default 50) returns table (
  id bigint, handler text, state text, records int, op text, attempt int, waiting_since timestamptz, run_at timestamptz, worker int, error text, trace bigint)
language plpgsql stable set search_path from current as $$
#variable_conflict use_column
declare v_handler int := case when p_handler is not null then find_handler(p_handler) end; v_now timestamptz := now();
begin
  return query
    select q.id, h.name, q.state, q.hi - q.lo + 1 - coalesce(cardinality(q.settled), 0), op_name(q.op), q.attempt::int, q.at, q.run_at, q.worker_id, q.error, q.trace
      from handler x cross join lateral (
           (select job.id, handler_id, 'ready' as state, lo, hi, settled, op, job.attempt, at, null::timestamptz as run_at, null::int as worker_id, null::text as error, trace
              from job where handler_id = x.id order by job.id limit p_limit)
           union all
           (select delayed.id, x.id, 'delayed', lo, hi, settled, op, delayed.attempt, at, delayed.run_at, null, delayed.error, trace
              from delayed where handler_id = x.id order by delayed.id limit p_limit)
           union all
           (select delayed.id, x.id, 'delayed', lo, hi, settled, op, delayed.attempt, at, delayed.run_at, null, delayed.error, trace
              from delayed where handler_id = -x.id order by delayed.id limit p_limit)
           union all
           (select job.id, x.id, 'delayed', lo, hi, settled, op, job.attempt, at, null, null, 'waits for its debounce', trace
              from job where handler_id = -x.id order by job.id limit p_limit)
           union all
           (select null, x.id, 'delayed', 1, 1, null, left(x.ops[1], 1)::"char", 0::smallint, first_at, due_at, null,
                   'waits for its debounce of ' || x.debounce, trace
              from debounce where handler_id = x.id order by due_at limit p_limit)
           union all
           (select turn.id, handler_id, 'waits', ordinal, ordinal, null, op, turn.attempt, at, null, null, turn_waits_for(handler_id, key), trace
              from turn where handler_id = x.id and turn.state = 'waits' order by turn.n limit p_limit)
           union all
           (select lease.id, handler_id, case when lease_until < v_now then 'suspect' else 'in flight' end, lo, hi, settled, op, lease.attempt, at, lease_until, worker_id, null, trace
              from lease where handler_id = x.id limit p_limit)) q
      join handler h on h.id = q.handler_id
     where v_handler is null or x.id = v_handler
     order by q.at, q.id limit p_limit;
end $$;

-- op_name(op) -> the event as handlers name it
create or replace function op_name(p_op "char") returns text language sql immutable set search_path from current as $$
  select case p_op when 'n' then 'new' when 'u' then 'updated' when 'd' then 'deleted' when 't' then 'truncate' when 'r' then 'rebuilt' when 'f' then 'failed' else p_op::text end
$$;

-- show_job(id) -> the job as JSON, with its records' keys; null when it is done or never was
create or replace function show_job(p_job bigint) returns jsonb language sql stable set search_path from current as $$
  select jsonb_build_object('id', q.id, 'handler', h.name, 'app', h.app, 'state', q.state, 'table', record_name(h.table_id, null), 'op', op_name(q.op),
                            'records', q.hi - q.lo + 1, 'settled', coalesce(cardinality(q.settled), 0), 'attempt', q.attempt, 'crashes', q.crashes,
                            'waiting_since', q.at, 'run_at', q.run_at, 'worker', q.worker_id, 'error', q.error, 'trace', q.trace, 'cause', q.cause,
                            'depth', q.depth, 'tenant', q.tenant, 'change', q.change_id, 'degraded', c.degraded,
                            'keys', coalesce(q.keys, (select jsonb_agg(jsonb_build_array(k) order by o) from unnest(q.ids) with ordinality x (k, o)),
                                             (select jsonb_agg(change_key(c, o) order by o) from generate_series(q.lo, q.hi) o)))
    from (select handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys,
                 'ready' as state, null::timestamptz as run_at, null::int as worker_id, null::text as error from job where id = p_job
          union all
          select handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys,
                 'delayed', run_at, null, error from delayed where id = p_job
          union all
          select handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys,
                 'in flight', lease_until, worker_id, null from lease where id = p_job
          union all
          select handler_id, id, change_id, at, cause, trace, ordinal, ordinal, attempt, crashes, depth, op, tenant, origin, null, ids, keys,
                 'waits', null, null, turn_waits_for(handler_id, key) from turn where id = p_job and state = 'waits') q
    join handler h on h.id = abs(q.handler_id) left join change c on c.id = q.change_id and c.slot = slot(q.at)
   limit 1
$$;

-- list_dead(handler or null, limit) -> dead letters, newest first
create or replace function list_dead(p_handler text default null, p_limit int default 50) returns table (
  id bigint, handler text, record text, op text, reason text, error text, attempt int, died_at timestamptz)
language plpgsql stable set search_path from current as $$
declare v_handler int := case when p_handler is not null then find_handler(p_handler) end;
begin
  return query
    select d.id, h.name, record_name(h.table_id, d.key), op_name(d.op), d.reason, d.error, d.attempt::int, d.died_at
      from dead d join handler h on h.id = d.handler_id
     where v_handler is null or d.handler_id = v_handler order by d.id desc limit p_limit;
end $$;

-- image(names, values) -> {name: value} of one record, whichever way its values are nested; null without an image
create or replace function image(p_cols text[], p_values text[]) returns jsonb language sql immutable set search_path from current as $$
  select jsonb_object_agg(p_cols[o], v) from unnest(p_values) with ordinality x (v, o) where p_cols is not null
$$;

-- show_dead(id) -> the dead letter as JSON, with its image and traceback; null when there is none
create or replace function show_dead(p_dead bigint) returns jsonb language sql stable set search_path from current as $$
  select jsonb_build_object('id', d.id, 'handler', h.name, 'app', h.app, 'record', record_name(h.table_id, d.key), 'op', op_name(d.op), 'reason', d.reason,
                            'error', d.error, 'traceback', d.traceback, 'attempt', d.attempt, 'died_at', d.died_at, 'trace', d.trace, 'cause', d.cause,
                            'depth', d.depth, 'tenant', d.tenant, 'idempotency_key', coalesce(d.origin, d.handler_id || ':' || d.change_id || ':' || d.ordinal),
                            'new', image(d.cols, d.news), 'old', image(d.cols, d.olds))
    from dead d join handler h on h.id = d.handler_id where d.id = p_dead
$$;

-- show_handler(name) -> all that is known of a handler, as JSON
create or replace function show_handler(p_handler text) returns jsonb language sql stable set search_path from current as $$
  select (to_jsonb(h) - array['table_id', 'enabled_snapshot', 'enabled_key']) || jsonb_build_object('table', record_name(h.table_id, null), 'state', s.state, 'why', s.why, 'ready', s.ready,
         'delayed', s.delayed, 'in_flight', s.in_flight, 'dead', s.dead, 'oldest', s.oldest, 'per_second', s.per_second, 'workers', s.workers)
         || coalesce((select case when l.per is null and not h.ordered then jsonb_build_object('limit', l.most, 'permits_used', permits_used(h.id))
                                  else jsonb_build_object('limit', case when h.ordered then h.concurrency else l.most end, 'held_by', (select worker_id from permit where handler_id = h.id and lease_until > now())) end
                        from limits() l where l.handler_id = h.id), '{}')
         || coalesce((select jsonb_build_object('tenants', t) from tenants_waiting(h.id) t where t <> '{}'), '{}')
         || coalesce((select jsonb_build_object('rate', r.said, 'rate_used', rate_used(h.id), 'rate_next', next_rate(h.id)) from rates() r where r.handler_id = h.id), '{}')
         || coalesce((select jsonb_build_object('rate', r.said, 'rate_keys', (select count(*) from rate_key k where k.handler_id = h.id and k.until > now())) from key_rates() r where r.handler_id = h.id), '{}')
    from handler h join status s on s.app = h.app and s.handler = h.name where h.id = find_handler(p_handler)
$$;

-- list_schedules() -> by what is due next; firings that failed lately are told with their error
create or replace function list_schedules() returns table (
  name text, app text, title text, cron text, tz text, state text, next_at timestamptz, last_at timestamptz, last_state text, error text)
language sql stable set search_path from current as $$
  select s.name, s.app, s.title, s.cron, s.tz, case when not s.enabled then 'disabled' when s.paused then 'paused' when s.next_at is null and s.planned_to = 'infinity' then 'ended'
              else 'live' end, s.next_at, coalesce(t.planned_at, s.last_at), t.state, coalesce(s.error, t.error)
    from schedule s left join lateral (select * from tick where schedule_id = s.id order by planned_at desc limit 1) t on true
   order by s.next_at nulls last, s.app, s.name
$$;

-- show_schedule(name) -> the schedule, its last ten firings and how far it has polled, as JSON
create or replace function show_schedule(p_name text) returns jsonb language plpgsql stable set search_path from current as $$
begin
  return (select to_jsonb(s) - array['ahead', 'planned_to'] || jsonb_build_object('ticks', (
            select coalesce(jsonb_agg(jsonb_build_object('planned_at', t.planned_at, 'state', t.state, 'error', t.error, 'fired_at', t.fired_at) order by t.planned_at desc), '[]')
              from (select * from tick where schedule_id = s.id order by planned_at desc limit 10) t))
           || coalesce((select jsonb_build_object('poll', to_jsonb(p) - 'schedule_id') from poll p where p.schedule_id = s.id), '{}')
     from schedule s where s.id = find_schedule(p_name));
end $$;

-- list_actions(name or null, limit, state or null) -> calls of actions, newest first
drop function if exists list_actions(text, int);
drop function if exists list_actions(text, int, text);
create or replace function list_actions(p_name text default null, p_limit int default 50, p_state text default null) returns table (
  id bigint, name text, app text, state text, args jsonb, at timestamptz, due_at timestamptz)
language sql stable set search_path from current as $$
  select id, name, app, state, args, at, due_at from action
   where (p_name is null or name = p_name) and (p_state is null or state = p_state) order by id desc limit p_limit
$$;

-- show_action(id) -> the call, what came back, and its approvals, as JSON
create or replace function show_action(p_action bigint) returns jsonb language sql stable set search_path from current as $$
  select to_jsonb(a) || jsonb_build_object('approvals', (select coalesce(jsonb_agg(to_jsonb(p) order by p.id), '[]') from approval p where p.action_id = a.id))
    from action a where id = p_action
$$;

-- flow_from() -> the numbers to begin flow() with, to see only what happens from now on
create or replace function flow_from(out after bigint, out after_action bigint) returns record
language sql stable set search_path from current as $$
  select last_value, (select coalesce(max(id), 0) from action) from change_seq
$$;

-- flow(after, after action, limit) -> what happened since an id, for people who watch: receipts, dead letters, effects, by id
--   kind  done | dead | act. name: the handler or the action. input, outputs: records, the first three of them
create or replace function flow(p_after bigint, p_after_action bigint, p_limit int default 50) returns table (
  id bigint, kind text, at timestamptz, name text, input text, n int, outputs text[], written bigint, ms real, detail text)
language sql stable set search_path from current as $$
  (select r.id, 'done', r.at, h.name, record_name(h.table_id, (select i.key from inputs(r.id) i limit 1)), r.n,
          array(select record_name(o.table_id, coalesce(jsonb_build_array(o.ids[k]), o.keys -> (k - 1)))
                  from output o, generate_series(1, 3) k
                 where o.receipt_id = r.id and k <= greatest(cardinality(o.ids), jsonb_array_length(o.keys)) limit 3),
          (select sum(cardinality(o.owners)) from output o where o.receipt_id = r.id), r.ms, case when r.gone > 0 then r.gone || ' gone' end
     from receipt r join handler h on h.id = r.handler_id
    where r.id > p_after and not exists (select from action_rule x where x.app = h.app and x.handler = h.name) order by r.id limit p_limit)
  union all
  (select d.id, 'dead', d.died_at, h.name, record_name(h.table_id, d.key), 1, '{}', 0, null, d.error
     from dead d join handler h on h.id = d.handler_id where d.id > p_after order by d.id limit p_limit)
  union all
  (select a.id, 'act', coalesce(a.changed_at, a.at), a.name, null, 1, array[a.state], 0, null, a.args::text from action a
    where a.id > p_after_action and a.state not in ('new', 'ready', 'sending', 'retrying') order by a.id limit p_limit)
$$;
