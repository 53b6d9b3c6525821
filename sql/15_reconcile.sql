-- What capture could not do at once, and what fired no trigger: mend() and reconcile().

-- mend() -> how many things were mended
-- Brings the trigger functions of tables that have changed (columns, keys, partitions, names) up to date and captures the
-- changes that were kept whole meanwhile. Called by workers as soon as such a change is there, by maintain(), by doctor.
create or replace function mend() returns int language plpgsql volatile set search_path from current set lock_timeout = '200ms' as $$
declare v_n int := 0; w watched; g record; v_error text;
begin
  if not pg_try_advisory_xact_lock(1634628722, (select oid::int from pg_namespace where nspname = current_schema())) then
    return 0;                                              -- someone else is at it
  end if;
  perform mark();
  for w in select x.* from watched x where exists (select from handler h where h.table_id = x.id) order by x.id loop
    begin
      v_n := v_n + mend_table(w);
    exception when others then
      get stacked diagnostics v_error = message_text;
      raise warning 'anton: triggers of %.% are not up to date: %', w.schema_name, w.table_name, v_error;
    end;
  end loop;
  for g in
    with waiting as (
      select j.id, j.change_id, j.at, c.table_id, c.keys - 'rows' as what, c.cause, c.depth, c.tenant, case when c.cause is not null then c.trace end as trace,
             sum(pg_column_size(c.keys)) over (order by j.id) as bytes
        from (select id, change_id, at from job where handler_id = 0 order by id limit 1000) j join change c on c.id = j.change_id)
    select table_id, what, cause, depth, tenant, trace, min(at) as at, array_agg(id order by id) as ids, array_agg(change_id order by id) as changes
      from waiting where bytes < 16777216 or id = (select min(id) from waiting)
     group by table_id, what, cause, depth, tenant, trace order by min(id) loop
    begin
      perform mend_changes(g.table_id, g.what, g.changes, g.at, g.cause, g.depth, g.trace, g.tenant);
      delete from job where handler_id = 0 and id = any (g.ids);
      v_n := v_n + cardinality(g.ids);
    exception when others then                             -- not now, and not at each look of a worker
      get stacked diagnostics v_error = message_text;
      with later as (delete from job where handler_id = 0 and id = any (g.ids) returning id, change_id, at)
      insert into delayed (handler_id, id, change_id, at, lo, hi, attempt, crashes, depth, op, run_at, error)
      select 0, id, change_id, at, 1, 1, 0, 0, 0, 'x', now() + interval '1 min', v_error from later;
    end;
  end loop;
  return v_n;
end $$;

-- mend_table(table) -> 1 when its triggers were not what they should be
create or replace function mend_table(w watched) returns int language plpgsql volatile set search_path from current as $$
declare v_renamed boolean := false;
begin
  if to_regclass(format('%I.%I', w.schema_name, w.table_name)) is null then   -- renamed: the record is the same
    update watched set schema_name = n.nspname, table_name = c.relname
      from pg_class c join pg_namespace n on n.oid = c.relnamespace
     where watched.id = w.id and c.oid = w.relid
       and not exists (select from watched o where o.schema_name = n.nspname and o.table_name = c.relname)
    returning watched.* into w;
    if w.id is null then
      return 0;                                            -- gone; findings() says so
    end if;
    v_renamed := true;
  end if;
  if not v_renamed and w.relid = to_regclass(format('%I.%I', w.schema_name, w.table_name)) and w.shape = shape(w) and not exists (
       select from tree(w.relid) rel join pg_proc f on f.pronamespace = current_schema()::regnamespace and f.proname ~ format('^t%s_', w.id)
        where not exists (select from pg_trigger g where g.tgrelid = rel and g.tgfoid = f.oid)) then
    return 0;
  end if;
  perform write_triggers(w.id, false);
  return 1;
end $$;

-- mend_changes(table, what, changes, at, cause, depth, trace, tenant): captures changes that were kept whole, as their trigger
-- would have done. All were made by one kind of statement for the same handlers; they become one.
create or replace function mend_changes(p_table int, p_what jsonb, p_changes bigint[], p_at timestamptz, p_cause bigint, p_depth int, p_trace bigint, p_tenant text)
returns void language plpgsql volatile set search_path from current set client_min_messages = warning as $$
declare w watched; v_rel text; v_code text; v_name text;
begin
  if p_what is null then
    return;                                                -- not even that could be kept; reconcile() looks for it
  end if;
  select * into w from watched where id = p_table;
  v_rel := format('%I.%I', w.schema_name, w.table_name);
  v_code := capture_groups(w, p_what ->> 'event', p_what ->> 'source', array(select abs(h::int) from jsonb_array_elements_text(p_what -> 'handlers') h), true,
    p_what ->> 'due' is not null);
  foreach v_name in array array['new_records', 'old_records'] loop
    if to_regclass('pg_temp.' || v_name) is not null then  -- the caller's own: it makes room meanwhile
      execute format('alter table pg_temp.%I rename to %I', v_name, 'anton_' || v_name);
    end if;
    execute format('create temp table %I on commit drop as select n.* from change c, jsonb_array_elements(c.keys -> ''rows'') with ordinality r (v, o),
                      jsonb_populate_record(null::%s, r.v -> %s) n where c.id = any (%L::bigint[]) and r.v -> %3$s <> ''null'' order by c.id, r.o',
                   v_name, v_rel, case v_name when 'new_records' then 0 else 1 end, p_changes);
  end loop;
  execute format('do %L', format($f$#variable_conflict use_column
declare%s
begin
  v_change := nextval('change_seq');
  v_now := %L;
  v_tenant := %L;
  v_due := %L;
  v_cause := %L;
  v_depth := %L;
  v_trace := coalesce(%L, v_change);%s
end$f$, capture_variables(), p_at, p_tenant, p_what ->> 'due', p_cause, p_depth, p_trace, v_code));
  drop table pg_temp.new_records, pg_temp.old_records;
  foreach v_name in array array['new_records', 'old_records'] loop
    if to_regclass('pg_temp.anton_' || v_name) is not null then
      execute format('alter table pg_temp.%I rename to %I', 'anton_' || v_name, v_name);
    end if;
  end loop;
  delete from change where id = any (p_changes);
  perform ring();
end $$;

-- mark(): notes once a day which transaction the clock has come to; reconcile() asks how far back traces reach
create or replace function mark() returns void language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now(); v_name text := 'xid of ' || to_char(v_now at time zone 'UTC', 'YYYY-MM-DD');
begin
  if setting(v_name) is null then
    insert into setting (name, value) values (v_name, pg_snapshot_xmax(pg_current_snapshot())::text) on conflict do nothing;
    delete from setting where name like 'xid of %' and name < 'xid of ' || to_char((v_now - interval '30 days') at time zone 'UTC', 'YYYY-MM-DD');
  end if;
end $$;

-- horizon() -> the oldest transaction whose records must all have left a trace that is still kept
create or replace function horizon() returns bigint language sql stable set search_path from current as $$
  select min(value::bigint) from setting, now() t
   where name like 'xid of %' and name > 'xid of ' || to_char((t - make_interval(days => least(7, greatest(1, setting('retention_days')::int)))) at time zone 'UTC', 'YYYY-MM-DD')
$$;

-- traced(handler) -> keys of the records that the runtime knows it was given: waiting, leased, settled or dead
create or replace function traced(p_handler int) returns setof jsonb language sql stable set search_path from current as $$
  with part as (
    select change_id, lo, hi, ids, keys from job where handler_id in (p_handler, -p_handler)
    union all select change_id, lo, hi, ids, keys from lease where handler_id = p_handler
    union all select change_id, lo, hi, ids, keys from delayed where handler_id in (p_handler, -p_handler)
    union all select change_id, ordinal, ordinal, ids, keys from turn where handler_id = p_handler and state = 'waits'
    union all select null, null, null, ids, keys from receipt where handler_id = p_handler
    union all select p.* , null, null from receipt r, unnest(r.change_ids, r.los, r.his) p where r.handler_id = p_handler
    union all select null, null, null, null, jsonb_build_array(key) from dead where handler_id = p_handler and key is not null)
  select jsonb_build_array(k) from part, unnest(ids) k
  union all select record from debounce where handler_id = p_handler
  union all select k from part, jsonb_array_elements(keys) k
  union all select jsonb_build_array(k) from part p join change c on c.id = p.change_id, unnest(c.ids[p.lo:p.hi]) k where p.ids is null and p.keys is null
  union all select k from part p join change c on c.id = p.change_id, jsonb_array_elements(jsonb_path_query_array(c.keys, '$[$lo to $hi]', jsonb_build_object('lo', p.lo - 1, 'hi', p.hi - 1))) k
             where p.ids is null and p.keys is null
$$;

-- reconcile(table, fix) -> (table, found, can, cannot)
-- Looks for new records that no trigger saw: written with session_replication_role = replica, with triggers disabled,
-- straight into a partition that had none, by logical replication. Each handler of new records gets those that it has
-- no trace of: never one that is older than the handler, and never one twice. Reads the whole table.
--   found   records that were missing, for each handler that missed them; with fix they are queued now
--   can     what was looked at; cannot: what stays unseen in this table
create or replace function reconcile(p_table text, p_fix boolean default true)
returns table ("table" text, found bigint, can text, cannot text) language plpgsql volatile set search_path from current as $$
declare
  w watched; h handler; v_rel text; v_keys jsonb; v_since text; v_stamp text; v_can text[]; v_cannot text[]; v_disabled text; v_wait text; v_horizon bigint; v_found bigint := 0;
begin
  perform pg_advisory_xact_lock(1634628723, (select oid::int from pg_namespace where nspname = current_schema()));   -- two would both find the same
  perform mend();
  select * into w from watched where relid = resolve(p_table);
  if w.id is null then
    raise exception using errcode = 'NT002', message = format('table "%s" is not watched', p_table), hint = 'select anton.watch(''…''), or run: anton migrate';
  end if;
  v_rel := format('%I.%I', w.schema_name, w.table_name);
  select a.attname into v_stamp
    from pg_attribute a join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
   where a.attrelid = w.relid and a.atttypid = 'timestamptz'::regtype and a.attnotnull and not a.attisdropped
     and pg_get_expr(d.adbin, d.adrelid) ~ '^(\w+\.)?(now|clock_timestamp|statement_timestamp|transaction_timestamp)\(\)$|^CURRENT_TIMESTAMP$'
   order by a.attname <> 'created_at', a.attnum limit 1;
  v_since := case when w.key_kind = 'none' or exists (select from dbt_model where table_id = w.id) then null   -- a rebuild makes every row anew
                  when w.key_kind = 'id' then format('new.%I > h.enabled_key', w.key_columns[1])
                  when v_stamp is not null then format('new.%I >= h.enabled_at', v_stamp) end;
  select 'nothing, as a change waits to be mended: ' || error into v_wait from delayed d join change c on c.id = d.change_id
   where d.handler_id = 0 and c.table_id = w.id limit 1;
  v_horizon := horizon();
  if v_since is not null and v_wait is null then
    for h in select * from handler x where x.table_id = w.id and x.enabled and x.enabled_at is not null and 'new' = any (x.ops) order by x.id loop
      perform from backfill where handler_id = h.id and finished_at is null for update;   -- no page is fed meanwhile
      execute format($f$
        with candidate as materialized (
          select %1$s as key
            from handler h, %2$s new cross join lateral (select $1 - (($1 - new.xmin::text::bigint) & 4294967295) as xid) x%6$s   -- 32 bits to 64
           where h.id = %3$s and %4$s and x.xid between $2 and $1 and not pg_visible_in_snapshot(x.xid::text::xid8, h.enabled_snapshot)
             and (select (%5$s)::boolean from (select new.*) as row_))
        select jsonb_agg(key order by key) from candidate c where not exists (select from traced(%3$s) t where t = c.key)$f$,
        key_json(w, 'new'), v_rel, h.id, v_since, coalesce(bind(h.where_sql, h.params), 'true'), other_row(w, h.where_sql, 'old'))
        into v_keys using pg_snapshot_xmax(pg_current_snapshot())::text::bigint, greatest(v_horizon, pg_snapshot_xmin(h.enabled_snapshot)::text::bigint);
      v_found := v_found + coalesce(jsonb_array_length(v_keys), 0);
      if p_fix and v_keys is not null then
        perform queue_keys(h, w, v_keys);
        if h.feeding then
          insert into fed (handler_id, key) select h.id, k from jsonb_array_elements(v_keys) k on conflict do nothing;
        end if;
      end if;
      if h.where_sql is not null then
        v_cannot := v_cannot || format('handler %s: a record that failed its filter when it was new and passes now looks as if it had been missed', h.name);
      end if;
    end loop;
  end if;
  if p_fix and v_since is not null and v_wait is null then
    delete from change where table_id = w.id and op = 'x' and n = 0;
  end if;
  select string_agg(g.tgname, ', ') into v_disabled from pg_trigger g join pg_proc f on f.oid = g.tgfoid
   where g.tgrelid in (select tree(w.relid)) and f.pronamespace = current_schema()::regnamespace and g.tgenabled = 'D';
  if v_disabled is not null then
    v_cannot := v_cannot || format('anything that is written from now on: triggers are disabled (%s); anton doctor --fix', v_disabled);
  end if;
  v_cannot := v_cannot || case when w.key_kind = 'none' then 'new records: the table has no key'
    when exists (select from dbt_model where table_id = w.id) then 'new records: dbt makes the table anew, and its builds compare the rows'
    when v_since is null then 'new records: its keys do not tell a new one from one that was updated; give it a column: created_at timestamptz not null default now()'
    when w.key_kind = 'id' then format('new records with a %s that is not above those the handler began with', w.key_columns[1])
    else format('new records whose %s was set to before the handler', v_stamp) end
    || case when v_since is not null then array['new records of longer ago than traces are kept'] else '{}' end
    || array['updates, and deletes: nothing in a row tells that they happened'];
  return query select v_rel, v_found, coalesce(v_wait, case when v_since is null then 'nothing' else 'new records' end), array_to_string(v_cannot, '; ');
end $$;

-- queue_keys(handler, table, keys): jobs for new records that are known by their keys alone
create or replace function queue_keys(h handler, w watched, p_keys jsonb) returns void language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now(); v_size int;
begin
  select case when w.key_kind = 'id' then 1000 else least(1000, greatest(1, 8192 / (max(octet_length(k::text)) + 16))) end into v_size
    from jsonb_array_elements(p_keys) k;
  with c as (
    insert into change (id, slot, at, xid, table_id, op, n, ids, keys)
    select nextval('change_seq'), slot(v_now), v_now, pg_current_xact_id(), w.id, 'n', count(*),
           case when w.key_kind = 'id' then array_agg((k ->> 0)::bigint order by o) end,
           case when w.key_kind <> 'id' then jsonb_agg(k order by o) end
      from jsonb_array_elements(p_keys) with ordinality x (k, o) group by (o - 1) / v_size
    returning id, n)
  insert into job (handler_id, change_id, at, trace, lo, hi, op)
  select h.id, c.id, v_now, c.id, s, least(s + least(h.batch, 1000) - 1, c.n), 'n' from c, generate_series(1, c.n, least(h.batch, 1000)) s;
  perform ring();
end $$;
