-- Models: Tables that are kept by a SELECT, rebuilt in place by difference, so that triggers, grants and policies stay and
-- row events are exact. A model is a SQL handler on each table it refreshes by, and on tick for its schedules; the queue is
-- the set of what has changed since: no largest id, no time. A refresh takes the model's row, swallows every pending job of
-- its handlers, and compares under a snapshot that is younger than all of them. What commits later has a job of its own.

-- find_model(name) -> model id; name or app.name, as find_handler()
create or replace function find_model(p_name text) returns int language plpgsql stable set search_path from current as $$
declare v_ids int[]; v_known text;
begin
  select array_agg(id) into v_ids from model where name = p_name or app || '.' || name = p_name;
  if cardinality(v_ids) = 1 then
    return v_ids[1];
  end if;
  select string_agg(app || '.' || name, ', ' order by app, name) into v_known from model;
  raise exception using errcode = 'NT003',
    message = format(case when v_ids is null then 'no model "%s"' else 'model "%s" is in more than one app' end, p_name),
    hint = 'known: ' || coalesce(v_known, 'none');
end $$;

-- put_model(definition) -> model id
-- Inserts or updates a model by (app, name); its table exists. Keys: app, name, table, body, key, refresh, incremental,
-- distinct_keys, max_wait. One that is new, came back or has changed is stale: see build_model().
create or replace function put_model(d jsonb) returns int language plpgsql volatile set search_path from current as $$
declare
  v_id int; v_table int;
  v_groups jsonb := (select coalesce(jsonb_agg(i || jsonb_build_object('table_id', watch(i ->> 'table'))), '[]') from jsonb_array_elements(d -> 'incremental') i);
begin
  v_table := put_table(jsonb_build_object('table', d ->> 'table', 'app', d ->> 'app', 'model', '{}'::jsonb));
  insert into model as m (app, name, table_id, body, key_columns, refresh, incremental, distinct_keys, max_wait)
  values (d ->> 'app', d ->> 'name', v_table, d ->> 'body', array(select jsonb_array_elements_text(d -> 'key')),
          array(select jsonb_array_elements_text(d -> 'refresh')), v_groups,
          coalesce((d ->> 'distinct_keys')::boolean, false), coalesce((d ->> 'max_wait')::interval, '0'))
  on conflict (app, name) do update
     set table_id = excluded.table_id, body = excluded.body, key_columns = excluded.key_columns, refresh = excluded.refresh,
         incremental = excluded.incremental, distinct_keys = excluded.distinct_keys, max_wait = excluded.max_wait, missing_at = null,
         stale = m.stale or m.missing_at is not null or (m.body, m.key_columns, m.refresh, m.incremental)
                   is distinct from (excluded.body, excluded.key_columns, excluded.refresh, excluded.incremental)
  returning id into v_id;
  return v_id;
end $$;

-- rename_model(app, was, name): a model with its table, which stays in its schema, and its handlers and schedules, with their queue
create or replace function rename_model(p_app text, p_was text, p_name text) returns void language plpgsql volatile set search_path from current as $$
declare w watched; v_id int;
begin
  update model set name = p_name where app = p_app and name = p_was returning id, table_id into strict v_id, w.id;
  select * into w from watched where id = w.id;
  execute format('alter table %I.%I rename to %I', w.schema_name, w.table_name, p_name);
  update watched set table_name = p_name where id = w.id;
  update handler set name = p_name || substr(name, length(p_was) + 1) where model_id = v_id and starts_with(name, p_was || ':');
  update schedule set name = p_name || substr(name, length(p_was) + 1) where app = p_app and starts_with(name, p_was || ':');
end $$;

-- model_state(app, name) -> all that put_model() may change, as text; null when unknown
create or replace function model_state(p_app text, p_name text) returns text language sql stable set search_path from current as $$
  select jsonb_build_array(app, name, table_id, body, key_columns, refresh, incremental, distinct_keys, max_wait, missing_at,
                           (select w.app from watched w where w.id = table_id))::text from model where app = p_app and name = p_name
$$;

-- retire_models(app, names): models that vanished from the app's code are refreshed no more; their tables stay
create or replace function retire_models(p_app text, p_names text[]) returns void language sql volatile set search_path from current as $$
  update model set missing_at = now() where app = p_app and missing_at is null and name <> all (p_names)
$$;

-- models(name) -> every model, or one: its table, what refreshes it, how many records wait, and its last refresh
create or replace function models(p_name text default null) returns table (
  name text, app text, "table" text, key text, refresh text, incremental text, state text, pending bigint, built_at timestamptz, ms real,
  is_full boolean, new bigint, updated bigint, deleted bigint, jobs bigint, error text, sql text)
language sql stable set search_path from current as $$
  select m.name, m.app, format('%I.%I', w.schema_name, w.table_name), array_to_string(m.key_columns, ', '), array_to_string(m.refresh, ', '),
         (select string_agg((i ->> 'table') || '.' || (i ->> 'column'), ', ') from jsonb_array_elements(m.incremental) i),
         case when m.missing_at is not null then 'missing' when f.error is not null then 'failing' when m.built_at is null then 'not built'
              when m.stale then 'stale' when p.n > 0 then 'pending' else 'fresh' end,
         p.n, m.built_at, round(m.ms::numeric, 1)::real, m.is_full, m.new_n, m.updated_n, m.deleted_n, m.jobs, f.error, m.body
    from model m join watched w on w.id = m.table_id
    cross join lateral (select (select coalesce(sum(j.hi - j.lo + 1), 0) from job j join handler h on h.id = j.handler_id where h.model_id = m.id)
                             + (select coalesce(sum(j.hi - j.lo + 1), 0) from lease j join handler h on h.id = j.handler_id where h.model_id = m.id)
                             + (select coalesce(sum(j.hi - j.lo + 1), 0) from delayed j join handler h on h.id = j.handler_id where h.model_id = m.id) as n) p
    cross join lateral (select max(h.failing_error) as error from handler h where h.model_id = m.id and h.failing_since is not null) f
   where p_name is null or m.id = find_model(p_name)
   order by m.app, m.name
$$;

-- group_condition(row, values) -> SQL that tells whether a row is of a group that has changed
--   values  {output: {"type", "values": [text, …]}}
create or replace function group_condition(p_row text, p_values jsonb) returns text language sql immutable set search_path from current as $$
  select coalesce(string_agg(format('%s.%I = any (%L::%s[])', p_row, o, v.list, d ->> 'type')
                             || case when v.has_null then format(' or %s.%I is null', p_row, o) else '' end, ' or ' order by o), 'false')
    from jsonb_each(p_values) x (o, d)
    cross join lateral (select array_agg(t) filter (where t is not null) as list, coalesce(bool_or(t is null), false) as has_null
                          from jsonb_array_elements_text(d -> 'values') t) v
$$;

-- model_sql(model, values) -> the statement that brings the table to what the SELECT says; gives new, updated, deleted, twice
-- One statement and one snapshot: the SELECT, a full join with the table by key, and writes of nothing but what differs, in
-- an order that no unique index minds. twice: a key that the SELECT gives more than once, where its form allows that.
--   values  null: all rows; else those of these groups, see group_condition()
create or replace function model_sql(m model, p_values jsonb default null) returns text language plpgsql stable set search_path from current as $$
declare
  w watched; v_rel text; v_cast text; v_cols text; v_new text; v_sets text; v_diff text; v_join text; v_keys text; v_old text;
begin
  select * into w from watched where id = m.table_id;
  v_rel := format('%I.%I', w.schema_name, w.table_name);
  select string_agg(format('(m.%1$I)::%2$s as %1$I', name, type), ', '), string_agg(quote_ident(name), ', '), string_agg(format('n.%I', name), ', '),
         string_agg(format('%1$I = d.%1$I', name), ', ') filter (where name <> all (m.key_columns)),
         string_agg(case when comparable then format('n.%1$I is distinct from o.%1$I', name)
                         else format('n.%1$I::text is distinct from o.%1$I::text', name) end, ' or ') filter (where name <> all (m.key_columns))
    into v_cast, v_cols, v_new, v_sets, v_diff from table_columns(w.relid);
  select string_agg(format('n.%1$I = o.%1$I', k), ' and ' order by p), string_agg(quote_ident(k), ', ' order by p)
    into v_join, v_keys from unnest(m.key_columns) with ordinality x (k, p);
  if p_values is not null then                             -- a row of another group may have come into one of these
    v_old := 'where ' || group_condition('t', p_values)
      || case when exists (select from jsonb_object_keys(p_values) o where o <> all (m.key_columns)) then format(' or (%s) in (select %1$s from news)', v_keys) else '' end;
  end if;
  return format($f$
with news as %1$s (select %2$s, true as anton_new from (
%3$s
) m%4$s),
olds as (select t.*, t.ctid as anton_at from %5$s t %6$s),
diff as materialized (
  select %7$s, n.anton_new, o.anton_at from news n full join olds o on %8$s
   where n.anton_new is null or o.anton_at is null%9$s),
gone as (delete from %5$s t using diff d where d.anton_new is null and t.ctid = d.anton_at returning 1),
changed as (%10$s),
added as (insert into %5$s (%11$s) select %11$s from diff where anton_at is null and (select count(*) from changed) >= 0 returning 1)
select (select count(*) from added) as new, (select count(*) from changed) as updated, (select count(*) from gone) as deleted, %12$s as twice$f$,
    case when m.distinct_keys then '' else 'materialized' end, v_cast, m.body,
    case when p_values is not null then ' where ' || group_condition('m', p_values) end,
    v_rel, v_old, v_new, v_join, ' or ' || v_diff,
    case when v_sets is null then 'select 1 where (select count(*) from gone) < 0'
         else format('update %s t set %s from diff d where d.anton_new and t.ctid = d.anton_at and (select count(*) from gone) >= 0 returning 1', v_rel, v_sets) end,
    v_cols, case when m.distinct_keys then 'null::text'
                 else format('(select concat_ws('', '', %s) from news group by %1$s having count(*) > 1 limit 1)', v_keys) end);
end $$;

-- changed_groups(model, jobs) -> {output: {"type", "values"}}: the groups that these jobs name; null when they cannot tell
-- A new record is in the group that it is in now: it left every other one by an update or a delete, which names that.
create or replace function changed_groups(m model, p_jobs job[]) returns jsonb language plpgsql stable set search_path from current
set jit = off set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  i record; w watched; v_type text; v_ids bigint[]; v_keys jsonb; v_list text[]; v_some text[]; v_lost boolean; v_found jsonb := '{}'; v_in text;
begin
  if exists (select from unnest(p_jobs) j join handler h on h.id = j.handler_id
              where j.op not in ('n', 'u', 'd') or h.table_id not in (select (x ->> 'table_id')::int from jsonb_array_elements(m.incremental) x)) then
    return null;
  end if;
  for i in select x ->> 'output' as output, x ->> 'column' as name, (x ->> 'table_id')::int as table_id from jsonb_array_elements(m.incremental) x loop
    select * into w from watched where id = i.table_id;
    select type into v_type from table_columns(w.relid) where name = i.name;
    if v_type is null then
      return null;
    end if;
    with part as materialized (
      select j.op, j.ids as own_ids, j.keys as own_keys, j.lo, j.hi, c.n, c.ids, c.keys, c.news, c.olds, c.degraded, array_position(c.cols, i.name) as at
        from unnest(p_jobs) j join handler h on h.id = j.handler_id
        left join change c on c.id = j.change_id and c.slot = slot(j.at)
       where h.table_id = i.table_id)
    select bool_or(p.degraded is not null or case p.op when 'n' then p.own_ids is null and p.own_keys is null and p.ids is null and p.keys is null
                   else p.at is null or p.olds is null or p.op = 'u' and p.news is null end),
           (select array_agg(id) from part q, unnest(coalesce(q.own_ids, q.ids[q.lo:q.hi])) id where q.op = 'n'),
           (select jsonb_agg(k) from part q, jsonb_array_elements(coalesce(q.own_keys, jsonb_path_query_array(q.keys, '$[$lo to $hi]',
                     jsonb_build_object('lo', q.lo - 1, 'hi', q.hi - 1)))) k where q.op = 'n'),
           (select array_agg(distinct v) from part q cross join lateral (select unnest(q.olds[q.at:q.at][q.lo:q.hi]) union all select unnest(q.news[q.at:q.at][q.lo:q.hi])) x (v)
             where q.op <> 'n' and q.at is not null)
      into v_lost, v_ids, v_keys, v_list from part p;
    if v_lost then
      return null;
    end if;
    v_in := case when v_ids is not null then format('t.%I = any ($1)', w.key_columns[1])
                 when v_keys is not null then (select format('(%s) in (select %s from jsonb_array_elements($2) k)', string_agg(format('t.%I', c), ', ' order by o),
                        string_agg(format('(k ->> %s)::%s', o - 1, w.key_types[o]), ', ' order by o)) from unnest(w.key_columns) with ordinality x (c, o)) end;
    if v_in is not null then
      execute format('select array_agg(distinct t.%I::text) from %I.%I t where %s', i.name, w.schema_name, w.table_name, v_in) into v_some using v_ids, v_keys;
    end if;
    v_found := v_found || jsonb_build_object(i.output, jsonb_build_object('type', v_type,
      'values', coalesce(v_found -> i.output -> 'values', '[]') || coalesce(to_jsonb(v_list), '[]') || coalesce(to_jsonb(v_some), '[]')));
    v_some := null;
  end loop;
  return v_found;
end $$;

-- rebuild(model, jobs, full) -> what it changed
-- The model's row is locked, and these jobs are those that it takes with it. NT007 when its keys are no keys: the old rows stay.
create or replace function rebuild(m model, p_jobs job[], p_full boolean) returns model language plpgsql volatile set search_path from current as $$
declare v_values jsonb; v_app text := setting('app_schema'); v_path text := current_setting('search_path'); v_memory text := current_setting('work_mem');
  v_sql text; v_of text := format('model "%s": ', m.name); v_began timestamptz := clock_timestamp(); v_now timestamptz := now(); v_twice text; v_detail text; v_n bigint; v_initial boolean := m.built_at is null;
begin
  p_full := p_full or m.stale or m.built_at is null or m.incremental = '[]';
  v_values := case when not p_full then changed_groups(m, p_jobs) end;
  if v_values is not null then                             -- so many groups that it is cheaper to look at all
    select sum(jsonb_array_length(d -> 'values')) into v_n from jsonb_each(v_values) x (o, d);
    if v_n > 1000 and v_n > (select c.reltuples / 4 from watched w join pg_class c on c.oid = w.relid where w.id = m.table_id) then
      v_values := null;
    end if;
  end if;
  m.is_full := v_values is null;
  v_sql := model_sql(m, v_values);
  begin
    perform set_config('search_path', quote_ident(v_app) || ', pg_catalog, pg_temp', true);
    if m.is_full and pg_size_bytes(v_memory) < 64 << 20 then   -- a join of all rows; spilled it takes half as long again
      perform set_config('work_mem', '64MB', true);
    end if;
    execute v_sql into m.new_n, m.updated_n, m.deleted_n, v_twice;
    perform set_config('search_path', v_path, true), set_config('work_mem', v_memory, true);
  exception when unique_violation or not_null_violation then
    get stacked diagnostics v_twice = message_text, v_detail = pg_exception_detail;
    raise exception using errcode = 'NT007', message = v_of || v_twice || coalesce('. ' || nullif(v_detail, ''), ''),
      hint = format('"-- key: %s" has to name columns that are never null and tell the rows of the SELECT apart', array_to_string(m.key_columns, ', '));
  end;
  if v_twice is not null then
    raise exception using errcode = 'NT007', message = format('%sits SELECT gives the key (%s) more than once', v_of, v_twice),
      hint = format('"-- key: %s" has to name columns that tell its rows apart', array_to_string(m.key_columns, ', '));
  end if;
  update model set stale = false, built_at = v_now, ms = extract(epoch from clock_timestamp() - v_began) * 1000, is_full = m.is_full,
         new_n = m.new_n, updated_n = m.updated_n, deleted_n = m.deleted_n, jobs = coalesce(cardinality(p_jobs), 0)
   where id = m.id returning * into m;
  perform recover(h.id) from handler h where h.model_id = m.id and h.failing_since is not null;
  perform rebuilt(m.table_id, jsonb_build_object('new', m.new_n, 'updated', m.updated_n, 'deleted', m.deleted_n, 'initial', v_initial, 'full', m.is_full,
                                                 'changed', m.new_n + m.updated_n + m.deleted_n > 0), 'r'::"char");
  return m;
end $$;

-- swallow(model, worker, jobs) -> receipt of the first
-- Notes these jobs, which are taken already, as settled, and their deepest chain as the cause of what is written next.
create or replace function swallow(m model, p_worker int, p_jobs job[]) returns bigint language plpgsql volatile set search_path from current
set jit = off as $$
declare v_now timestamptz := now(); v_receipt bigint; v_depth int; v_trace bigint; v_traces bigint;
begin
  with part as materialized (select j.*, row_number() over (order by j.handler_id, j.id) as part from unnest(p_jobs) j),
  done as (
    insert into receipt (id, slot, at, handler_id, worker_id, ms, n, gone, change_ids, los, his, causes, ids, keys, depth, trace, tenant)
    select nextval('change_seq'), slot(v_now), v_now, p.handler_id, p_worker, 0, sum(p.hi - p.lo + 1), 0, array_agg(p.change_id order by p.part),
           array_agg(p.lo order by p.part), array_agg(p.hi order by p.part), array_agg(p.cause order by p.part),
           (select array_agg(k order by q.part, o) from part q, unnest(q.ids) with ordinality x (k, o)
             where q.handler_id = p.handler_id and q.tenant is not distinct from p.tenant),
           (select jsonb_agg(k order by q.part, o) from part q, jsonb_array_elements(q.keys) with ordinality x (k, o)
             where q.handler_id = p.handler_id and q.tenant is not distinct from p.tenant),
           max(p.depth), case when min(p.trace) = max(p.trace) and count(p.trace) = count(*) then min(p.trace) end, p.tenant
      from part p group by p.handler_id, p.tenant
    returning id, depth)
  select (array_agg(id order by depth desc, id))[1], max(depth) into v_receipt, v_depth from done;
  select min(trace), case when min(trace) = max(trace) and count(trace) = count(*) then 1 else 2 end into v_trace, v_traces from unnest(p_jobs);
  perform enter(v_receipt, v_depth + 1, case when v_traces = 1 then v_trace end, null);
  return v_receipt;
end $$;

-- pending(model) -> its jobs that nobody holds, taken out of the queue
create or replace function pending(p_model int) returns job[] language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_ready job[]; v_later job[]; v_ids int[] := array(select id from handler where model_id = p_model);
begin
  with found as materialized (
    select ctid as row from job where handler_id = any (v_ids) limit 50000 for update skip locked),
  taken as (delete from job where ctid in (select row from found) returning job.*)
  select array_agg(t::job) into v_ready from taken t;
  with found as materialized (
    select ctid as row from delayed where handler_id = any (v_ids) limit 50000 for update skip locked),
  taken as (delete from delayed where ctid in (select row from found) returning *)
  select array_agg((handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys)::job)
    into v_later from taken;
  return coalesce(v_ready, '{}') || coalesce(v_later, '{}');
end $$;

-- held(token, ids) -> these leased jobs, taken out of their leases under the fence
create or replace function held(p_token bigint, p_ids bigint[]) returns job[] language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_held bigint; v_until timestamptz; v_jobs job[];
begin
  with mine as (delete from lease where token = p_token and id = any (p_ids) returning *)
  select count(*), min(lease_until), array_agg((handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys)::job)
    into v_held, v_until, v_jobs from mine;
  perform fence(p_token, v_held, cardinality(p_ids));
  perform let_go(v_until);
  return v_jobs;
end $$;

-- postpone(token, ids, due): these leased jobs are ready then; nothing counts against them
create or replace function postpone(p_token bigint, p_ids bigint[], p_due timestamptz) returns void language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_held bigint;
begin
  with held as (delete from lease where token = p_token and id = any (p_ids) returning *),
  back as (
    insert into delayed (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys, run_at)
    select handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, settled, ids, keys, p_due from held
    returning 1)
  select count(*) into v_held from back;
  perform fence(p_token, v_held, cardinality(p_ids));
end $$;

-- refresh_jobs(handler, token, ids, worker) -> receipt id; null when they have to wait
-- What run_sql() does for a handler of a model: one refresh for these jobs and all that wait beside them, in the caller's
-- transaction. While another refresh of the model runs they wait, after a second of it in the queue; with max_wait for others to come.
create or replace function refresh_jobs(h handler, p_token bigint, p_ids bigint[], p_worker int) returns bigint
language plpgsql volatile set search_path from current as $$
declare m model; v_jobs job[]; v_receipt bigint; v_now timestamptz := now(); v_patience text := current_setting('lock_timeout');
begin
  begin
    perform set_config('lock_timeout', '1s', true);
    select * into m from model where id = h.model_id for no key update;
    perform set_config('lock_timeout', v_patience, true);
  exception when lock_not_available then
    perform postpone(p_token, p_ids, v_now + interval '0.2 s');
    return null;
  end;
  if m.built_at + m.max_wait > v_now and m.max_wait > interval '0' and h.table_id is distinct from (select id from watched where relid = 'tick'::regclass) then
    perform postpone(p_token, p_ids, m.built_at + m.max_wait);
    return null;
  end if;
  v_jobs := held(p_token, p_ids) || pending(m.id);
  v_receipt := swallow(m, p_worker, v_jobs);
  perform rebuild(m, v_jobs, false);
  return v_receipt;
end $$;

-- refresh(name, full) -> what it changed
-- From psql, and `anton models run`: takes all that waits with it. Without `incremental`, or with full, of all rows.
create or replace function refresh(p_name text, full_ boolean default false)
returns table (name text, is_full boolean, new bigint, updated bigint, deleted bigint, jobs bigint, ms real)
language plpgsql volatile set search_path from current as $$
declare m model; v_id int := find_model(p_name); v_jobs job[]; v_context text := current_setting('anton.context', true); v_tenant text := current_setting('anton.tenant', true);
begin
  select x.* into m from model x where x.id = v_id for no key update;
  if m.missing_at is not null then
    raise exception using errcode = 'NT004', message = format('model "%s" is not in its app''s sql/ any more', m.name), hint = 'its table is an ordinary one';
  end if;
  v_jobs := pending(m.id);
  if v_jobs <> '{}' then
    perform swallow(m, null, v_jobs);
  end if;
  m := rebuild(m, v_jobs, full_);
  perform set_config('anton.context', coalesce(v_context, ''), true), set_config('anton.tenant', coalesce(v_tenant, ''), true);   -- what follows is the caller's
  return query select m.name, m.is_full, m.new_n, m.updated_n, m.deleted_n, m.jobs, m.ms;
end $$;

-- refresh_failed(handler, error): who listens to failures of the table that it refreshes hears of it, once for each reason until one succeeds
create or replace function refresh_failed(p_handler int, p_error text) returns void language plpgsql volatile set search_path from current as $$
begin
  perform rebuilt(m.table_id, jsonb_build_object('error', p_error, 'status', 'error'), 'f') from handler h join model m on m.id = h.model_id
    where h.id = p_handler and not exists (select from handler o where o.model_id = h.model_id and o.failing_since is not null and o.failing_error = p_error);
end $$;

-- build_model(app, name): all rows, if it is stale; what `anton migrate` ends with
create or replace function build_model(p_app text, p_name text) returns void language plpgsql volatile set search_path from current as $$
begin
  if exists (select from model x where x.app = p_app and x.name = p_name and x.stale) then
    perform refresh(p_app || '.' || p_name, true);
  end if;
end $$;
