-- dbt: its models as tables that fire events. What its hooks call (dbt_project/macros/anton.sql), in the transaction of a build.
--
-- dbt makes a `table` anew and swaps it in; its post-hooks run when the new table has its name and the old one is still there
-- as <name>__dbt_backup. dbt_after() then puts onto the new one what the old one had, compares the two, and fires events as
-- any statement would: the old versions of what differs go into a temporary table with the triggers of the real one, and one
-- DELETE, one UPDATE and one INSERT make them what they are now. All of it commits with the build, or none.
-- These run with the rights of dbt's role, as it owns the tables.

-- rebuilt(table, what, op) -> the change, null when nobody listens
-- One event for a table that was rebuilt (op r; what: as in anton/rebuilt.py) or could not be (op f). Commits with the caller.
create or replace function rebuilt(p_table int, p_what jsonb, p_op "char" default 'r') returns bigint language plpgsql volatile set search_path from current as $$
declare
  v_now timestamptz := now(); v_change bigint; v_context text := coalesce(current_setting('anton.context', true), '');
  v_cause bigint := nullif(split_part(v_context, ',', 1), '')::bigint; v_depth int := coalesce(nullif(split_part(v_context, ',', 2), ''), '0')::int;
  v_trace bigint; v_tenant text := nullif(current_setting('anton.tenant', true), '');
  v_handlers int[] := array(select id from handler where table_id = p_table and enabled and case p_op when 'r' then 'rebuilt' else 'failed' end = any (ops) order by id);
begin
  if v_handlers = '{}' then
    return null;
  end if;
  v_change := nextval('change_seq');
  v_trace := coalesce(nullif(split_part(v_context, ',', 3), '')::bigint, v_change);
  insert into change (id, slot, at, xid, table_id, op, n, keys, cause, depth, trace, tenant)
  values (v_change, slot(v_now), v_now, pg_current_xact_id(), p_table, p_op, 1,
          jsonb_build_array(p_what || jsonb_build_object('xid', pg_current_xact_id()::text)), v_cause, v_depth, v_trace, v_tenant);
  insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
  select h, v_change, v_now, v_cause, v_trace, 1, 1, v_depth, p_op, v_tenant from unnest(v_handlers) h;
  perform ring();
  return v_change;
end $$;

-- dbt_register(project, unique_id, schema, name, key, track) -> table id
-- A dbt model as a table that can be listened to; it need not be built yet. key: its columns, when they are known.
-- track: its rows are compared at each build although nobody listens.
create or replace function dbt_register(p_project text, p_unique_id text, p_schema text, p_name text, p_key text[] default '{}', p_track boolean default false)
returns int language plpgsql volatile set search_path from current as $$
declare v_id int; v_at timestamptz := now();
begin
  select table_id into v_id from dbt_model where project = p_project and unique_id = p_unique_id;
  if v_id is not null then                                 -- it may have another name now; its handlers stay
    update watched w set schema_name = p_schema, table_name = p_name
     where w.id = v_id and (w.schema_name, w.table_name) <> (p_schema, p_name)
       and not exists (select from watched o where o.schema_name = p_schema and o.table_name = p_name);
  end if;
  select id into v_id from watched where schema_name = p_schema and table_name = p_name;
  if v_id is null then
    insert into watched (schema_name, table_name, relid, key_kind)
    values (p_schema, p_name, coalesce(to_regclass(format('%I.%I', p_schema, p_name)), 0::oid), 'none') returning id into v_id;
  end if;
  insert into dbt_model as m (project, unique_id, schema_name, table_name, key, track, table_id, registered_at)
  values (p_project, p_unique_id, p_schema, p_name, coalesce(p_key, '{}'), p_track, v_id, v_at)
  on conflict (project, unique_id) do update
     set schema_name = excluded.schema_name, table_name = excluded.table_name, key = excluded.key, track = excluded.track, table_id = excluded.table_id,
         registered_at = case when (m.schema_name, m.table_name, m.table_id) = (excluded.schema_name, excluded.table_name, excluded.table_id) then m.registered_at else v_at end;
  perform watch(format('%I.%I', p_schema, p_name));
  if exists (select from handler where table_id = v_id and enabled) then
    perform write_triggers(v_id, false);
  end if;
  return v_id;
end $$;

-- dbt_collects(table) -> whether anybody wants to know what a build changes in it
create or replace function dbt_collects(p_table int) returns boolean language sql stable set search_path from current as $$
  select exists (select from dbt_model where table_id = p_table)
     and (exists (select from handler where table_id = p_table and enabled and ops && array['new', 'updated', 'deleted', 'rebuilt'])
          or exists (select from dbt_model where table_id = p_table and track))
$$;

-- What follows up to dbt_close() runs with the runtime's rights, for a dbt whose role has none in it but USAGE of the schema.

-- dbt_known(build) -> what the runtime knows of it: model, watched, ops, collects, tests; built: whether it was before; columns, grants: of then
create or replace function dbt_known(p jsonb) returns jsonb language sql stable security definer set search_path from current as $$
  select jsonb_build_object(
    'model', (select to_jsonb(m) from dbt_model m where m.project = p ->> 'project' and m.unique_id = p ->> 'unique_id'),
    'watched', to_jsonb(w), 'collects', dbt_collects(w.id),
    'ops', (select coalesce(jsonb_agg(distinct o), '[]') from handler h, unnest(h.ops) o where h.table_id = w.id and h.enabled),
    'tests', (select coalesce(jsonb_agg(to_jsonb(t) order by t.name), '[]') from dbt_test t where t.project = p ->> 'project' and t.unique_id = p ->> 'unique_id'),
    'built', b.id is not null, 'columns', b.columns, 'grants', b.grants)
    from (select) one
    left join watched w on w.schema_name = p ->> 'schema' and w.table_name = p ->> 'name'
    left join lateral (select * from dbt_build x where x.project = p ->> 'project' and x.unique_id = p ->> 'unique_id' order by x.id desc limit 1) b on true
$$;

-- dbt_may(relation): raises 42501 unless who is logged in owns it
create or replace function dbt_may(p_rel regclass) returns void language plpgsql stable set search_path from current as $$
begin
  if not exists (select from pg_class where oid = p_rel and pg_has_role(session_user, relowner, 'member')) then
    raise exception using errcode = 'insufficient_privilege', message = format('%s is not the table of "%s"', p_rel, session_user);
  end if;
end $$;

-- dbt_follow(table): its triggers are what they should be, on the relation that has its name now
create or replace function dbt_follow(p_table int) returns void language plpgsql volatile security definer set search_path from current as $$
declare w watched;
begin
  select * into w from watched where id = p_table;
  perform dbt_may(to_regclass(format('%I.%I', w.schema_name, w.table_name)));
  perform mend_table(w);
  if exists (select from handler where table_id = p_table and enabled and enabled_at is null) then
    perform write_triggers(p_table, false);
  end if;
end $$;

-- dbt_attach(table): puts its triggers onto pg_temp.anton_carrier
create or replace function dbt_attach(p_table int) returns void language plpgsql volatile security definer set search_path from current as $$
declare e record;
begin
  perform dbt_may('pg_temp.anton_carrier');
  perform dbt_may(to_regclass(format('%I.%I', w.schema_name, w.table_name))) from watched w where w.id = p_table;
  for e in select x.event, x.verb, x.tables, f.proname
             from (values ('new', 'insert', 'new table as new_records'), ('updated', 'update', 'old table as old_records new table as new_records'),
                          ('deleted', 'delete', 'old table as old_records')) x (event, verb, tables)
             join pg_proc f on f.pronamespace = quote_ident(current_schema())::regnamespace and f.proname = format('t%s_%s', p_table, x.event) loop
    execute format('create trigger %I after %s on pg_temp.anton_carrier referencing %s for each statement execute function %I()',
                   'anton_' || e.event, e.verb, e.tables, e.proname);
  end loop;
end $$;

-- dbt_built(relation) -> whether dbt has built it, by its quoted path
create or replace function dbt_built(p_path text) returns boolean language sql stable security definer set search_path from current as $$
  select exists (select from dbt_build b where b.relation = p_path) or exists (select from dbt_model m where format('%I.%I', m.schema_name, m.table_name) = p_path)
$$;

-- dbt_close(build, what, note, columns, print, blind): notes the build, and tells who listens
--   blind  handlers of its records got none, although some may differ
create or replace function dbt_close(p jsonb, p_what jsonb, p_note text, p_columns jsonb, p_print text, p_blind boolean) returns void
language plpgsql volatile security definer set search_path from current as $$
declare
  v_path text := format('%I.%I', p ->> 'schema', p ->> 'name'); v_id int; v_kind text; v_made text := dbt_collecting(); v_elsewhere text;
begin
  perform dbt_may(to_regclass(v_path));
  if v_made is not null then
    execute format('drop table pg_temp.%I', v_made);
  end if;
  -- a model that is another role's table, or is not there, cannot be said to be built by who builds one of that name for himself
  select format('%I.%I', m.schema_name, m.table_name) into v_elsewhere from dbt_model m left join pg_class c on c.oid = to_regclass(format('%I.%I', m.schema_name, m.table_name))
   where m.project = p ->> 'project' and m.unique_id = p ->> 'unique_id' and (m.schema_name, m.table_name) <> (p ->> 'schema', p ->> 'name')
     and (c.oid is null or not pg_has_role(session_user, c.relowner, 'member'));
  if v_elsewhere is not null then
    raise warning 'anton: this build of % as % is not noted as one of the model, which is %', p ->> 'unique_id', v_path, v_elsewhere
      using hint = 'anton migrate notes where the project builds it now';
  else
    -- what it saw is known from its hook before, in this transaction; when it is not: see dbt_behind()
    insert into dbt_build (project, unique_id, relation, invocation_id, materialized, initial, changed, new_n, updated_n, deleted_n, schema_changed, columns, note, at, xid, snapshot, grants)
    values (p ->> 'project', p ->> 'unique_id', v_path, p ->> 'invocation_id', p ->> 'materialized', (p_what ->> 'initial')::boolean, (p_what ->> 'changed')::boolean,
            (p_what ->> 'new')::bigint, (p_what ->> 'updated')::bigint, (p_what ->> 'deleted')::bigint, (p_what ->> 'schema_changed')::boolean, p_columns, p_note, now(),
            pg_current_xact_id(), nullif(current_setting('anton.began', true), '')::pg_snapshot,
            p -> 'grants');
  end if;
  if p_print is not null and v_elsewhere is null then
    update dbt_model set fingerprint = p_print where project = p ->> 'project' and unique_id = p ->> 'unique_id' and fingerprint is distinct from p_print;
  end if;
  select id, key_kind into v_id, v_kind from watched where schema_name = p ->> 'schema' and table_name = p ->> 'name';
  if v_id is null then
    return;
  end if;
  if (p_what ->> 'initial')::boolean and v_kind <> 'none' then
    perform backfill(format('%s.%s', h.app, h.name)) from handler h
      where h.table_id = v_id and h.enabled and 'new' = any (h.ops) and h.options ->> 'since' = 'beginning';
  end if;
  perform rebuilt(v_id, p_what);
  if p_blind then
    perform rebuilt(v_id, jsonb_build_object('error', p_note, 'status', 'not compared', 'run', p -> 'invocation_id', 'unique_id', p -> 'unique_id'), 'f');
  end if;
end $$;

-- dbt_before(build): for what dbt writes into, rather than makes anew
-- An incremental model or a snapshot is written to by any statements: their triggers note each record's first version, and
-- dbt_after() fires the difference. A seed, and whatever else may empty its table, is copied first.
create or replace function dbt_before(p jsonb) returns void language plpgsql volatile set search_path from current as $$
declare
  v_rel regclass := to_regclass(format('%I.%I', p ->> 'schema', p ->> 'name')); v_known jsonb; w watched; m dbt_model; v_how text := p ->> 'materialized';
begin
  perform set_config('anton.collect', '', true);
  if v_rel is null or (select relkind from pg_class where oid = v_rel) <> 'r' or v_how in ('table', 'view', 'materialized_view', 'anton_table') then
    return;
  end if;
  v_known := dbt_known(p);
  m := jsonb_populate_record(null::dbt_model, nullif(v_known -> 'model', 'null'));
  w := jsonb_populate_record(null::watched, nullif(v_known -> 'watched', 'null'));
  if v_how = 'incremental' and not coalesce((p ->> 'incremental')::boolean, false) then
    return;                                                -- made anew
  end if;
  if v_how not in ('incremental', 'snapshot') then         -- a seed may be dropped
    create temp table anton_belongings on commit drop as select * from dbt_belongings(v_rel);
  end if;
  if not (v_known ->> 'collects')::boolean or dbt_key(p, w, m, v_rel) = '{}' then
    return;
  end if;
  if v_how in ('incremental', 'snapshot') and dbt_hidden(v_rel) is not null then
    return;                                                -- what is hidden afterwards would look deleted: its events are its writes as they are
  end if;
  perform dbt_lend(v_rel);
  perform dbt_follow(w.id);
  if dbt_known(p) -> 'watched' -> 'key_columns' = '[]' then
    return;
  end if;
  perform dbt_collect(w.id, v_how in ('incremental', 'snapshot'));
end $$;

-- dbt_collect(table, by triggers): from now on, in this transaction, its triggers note instead of capturing; null: not even that
-- What they note into is made and owned by the runtime: they run with its rights, so a table of the writer's own making,
-- with triggers of his, must never be it; and nobody but who builds the table can keep its changes from being captured.
create or replace function dbt_collect(p_table int, p_triggers boolean) returns void
language plpgsql volatile security definer set search_path from current as $$
declare v_rel regclass;
begin
  select to_regclass(format('%I.%I', schema_name, table_name)) into v_rel from watched where id = p_table;
  perform dbt_may(v_rel);
  perform set_config('anton.collect', p_table || ' ' || pg_current_xact_id(), true);
  if p_triggers then
    execute format('create temp table anton_seen on commit drop as select *, true as anton_was, 0::bigint as anton_seq from %s limit 0', v_rel);
    alter table pg_temp.anton_seen alter anton_seq set not null, alter anton_seq add generated always as identity;
    execute format('grant select on pg_temp.anton_seen to %I', session_user);
  else
    execute format('create temp table anton_before on commit drop as select * from %s%s', v_rel, case when p_triggers is null then ' limit 0' end);
    execute format('grant select on pg_temp.anton_before to %I', session_user);
  end if;
end $$;

-- dbt_came(build): the setting anton.came of this transaction becomes the columns that the model's last build did not have, as JSON
create or replace function dbt_came(p jsonb) returns void language plpgsql volatile set search_path from current as $$
declare v_had jsonb := nullif(dbt_known(p) -> 'columns', 'null');
begin
  perform set_config('anton.came', (select coalesce(jsonb_agg(name), '[]')::text from table_columns(to_regclass(format('%I.%I', p ->> 'schema', p ->> 'name')))
    where not v_had ? name), true);
end $$;

-- dbt_hush(build): what this transaction writes into the model's table from now on is no event, up to dbt_speak(). Its triggers know
-- the columns that it has by now.
create or replace function dbt_hush(p jsonb) returns void language plpgsql volatile set search_path from current as $$
declare v_rel regclass := to_regclass(format('%I.%I', p ->> 'schema', p ->> 'name')); v_known jsonb := dbt_known(p);
begin
  if (v_known ->> 'collects')::boolean then
    perform dbt_lend(v_rel);
    perform dbt_follow((v_known -> 'watched' ->> 'id')::int);
    perform dbt_collect((v_known -> 'watched' ->> 'id')::int, null);
  end if;
end $$;

-- dbt_speak(build): see dbt_hush()
create or replace function dbt_speak(p jsonb) returns void language plpgsql volatile security definer set search_path from current as $$
begin
  perform set_config('anton.collect', '', true);
  if dbt_collecting() = 'anton_before' then
    drop table pg_temp.anton_before;
  end if;
end $$;

-- dbt_collecting() -> what dbt_collect() made in this transaction: anton_seen, anton_before; null: nothing
create or replace function dbt_collecting() returns text language sql stable set search_path from current as $$
  select relname::text from pg_class where relnamespace = pg_my_temp_schema() and relname in ('anton_seen', 'anton_before')
     and relowner = (select oid from pg_roles where rolname = owner_role())
$$;

-- capture_collected(table, event) -> plpgsql that notes, while dbt builds the table, what its records were; nothing is captured then
create or replace function capture_collected(w watched, p_event text) returns text language sql stable set search_path from current as $$
  select format($f$
  if current_setting('anton.collect', true) = %L || pg_current_xact_id() and dbt_collecting() is not null then%s
    return null;
  end if;$f$, w.id || ' ', case when p_event in ('moved', 'truncate') or w.key_columns = '{}' then '' else format($f$
    if dbt_collecting() = 'anton_seen' then%s
    end if;$f$, concat(
      case when p_event <> 'new' then $f$
      execute (select format('insert into pg_temp.anton_seen (%1$s, anton_was) select %1$s, true from old_records', string_agg(quote_ident(a.attname), ', '))
                 from pg_catalog.pg_attribute a join pg_catalog.pg_attribute b using (attname)
                where a.attrelid = tg_relid and a.attnum > 0 and not a.attisdropped and b.attrelid = 'pg_temp.anton_seen'::regclass and not b.attisdropped);$f$ end,
      case when p_event <> 'deleted' then format($f$
      execute %L;$f$, format('insert into pg_temp.anton_seen (%1$s, anton_was) select %1$s, false from new_records', k.keys)) end)) end)
    from (select string_agg(quote_ident(c), ', ' order by o) as keys from unnest(w.key_columns) with ordinality x (c, o)) k
   where dbt_collects(w.id)
$$;

-- dbt_after(build) -> what was found
-- build: project, unique_id, schema, name, backup, materialized, invocation_id, incremental, full_refresh, key, gate. What was
-- written in place, by triggers as they are, has its counts in the setting anton.counts. Raises NT006 when a test that gates the model fails: then nothing of the build stays.
create or replace function dbt_after(p jsonb) returns jsonb language plpgsql volatile set search_path from current as $$
declare
  v_path text := format('%I.%I', p ->> 'schema', p ->> 'name');
  v_rel regclass := to_regclass(v_path); v_kind "char"; v_old regclass; v_notes text[] := '{}';
  v_incremental boolean := coalesce((p ->> 'incremental')::boolean, false);
  w watched; m dbt_model; v_ops text[]; v_key text[]; v_asked boolean; v_initial boolean; v_schema_changed boolean;
  v_changed boolean; v_new bigint; v_updated bigint; v_deleted bigint; v_known jsonb; v_rows boolean; v_blind boolean := false; v_touched boolean; v_was regclass; v_counts jsonb; v_print text; v_columns jsonb; v_what jsonb; v_revoked text[]; v_hidden text;
begin
  if v_rel is null then
    return null;
  end if;
  select relkind into v_kind from pg_class where oid = v_rel;
  v_known := dbt_known(p);
  perform dbt_gate(p, v_known -> 'tests');
  perform set_config('anton.collect', '', true);           -- what comes now is no part of the build
  m := jsonb_populate_record(null::dbt_model, nullif(v_known -> 'model', 'null'));
  w := jsonb_populate_record(null::watched, nullif(v_known -> 'watched', 'null'));
  v_ops := array(select jsonb_array_elements_text(v_known -> 'ops'));
  v_rows := v_ops && array['new', 'updated', 'deleted'];
  v_asked := v_ops && array['new', 'updated', 'deleted', 'rebuilt'] or coalesce(m.track, false);
  if not v_incremental and v_kind = 'r' and p ->> 'materialized' not in ('seed', 'snapshot') then
    v_old := to_regclass(format('%I.%I', p ->> 'schema', p ->> 'backup'));
    if (select relkind from pg_class where oid = v_old) <> 'r' then
      v_old := null;                                       -- it was a view
    end if;
  end if;
  if v_old is not null then
    v_revoked := array(select dbt_grants(v_known -> 'grants') except select dbt_grants(p -> 'grants'));   -- the project's, until now
    v_notes := v_notes || dbt_carry((select jsonb_agg(to_jsonb(b)) from dbt_belongings(v_old) b
      where (b.kind not in ('constraint', 'foreign key') or not coalesce((p ->> 'contract')::boolean, false)) and (b.sql is null or b.sql <> all (v_revoked))), v_rel) || dbt_repoint(v_old, v_rel, p -> 'views');
  end if;
  if to_regclass('pg_temp.anton_belongings') is not null then
    v_notes := v_notes || dbt_carry((select jsonb_agg(to_jsonb(b)) from pg_temp.anton_belongings b), v_rel);
    drop table pg_temp.anton_belongings;
  end if;
  v_counts := nullif(current_setting('anton.counts', true), '')::jsonb;
  v_initial := case when v_kind = 'r' then v_old is null and not v_incremental and v_counts is null
                    else not (v_known ->> 'built')::boolean end;
  v_columns := dbt_columns(v_rel);
  v_schema_changed := coalesce(v_columns <> case when v_old is not null then dbt_columns(v_old) else nullif(v_known -> 'columns', 'null') end, false);
  v_key := dbt_key(p, w, m, v_rel);
  if w.id is not null and v_kind = 'r' then
    if not v_incremental and v_key <> '{}' and v_rows then
      v_notes := v_notes || dbt_key_index(v_rel, v_key, p ->> 'materialized' = 'table');
    end if;
    begin
      perform dbt_unhook(v_old);
      perform dbt_lend(v_rel);
      perform dbt_follow(w.id);
      w := jsonb_populate_record(null::watched, dbt_known(p) -> 'watched');
    exception when sqlstate 'NT005' then                   -- its key is gone
      v_notes := v_notes || sqlerrm;
      v_key := '{}';
    end;
  end if;
  v_hidden := case when v_kind = 'r' and v_asked then coalesce(dbt_hidden(v_old), dbt_hidden(v_rel)) end;
  if v_hidden is not null and (v_old is not null or dbt_collecting() is not null) then
    v_blind := v_rows;                                     -- whether it changed nobody knows, either
    v_notes := v_notes || (v_hidden || ': they were not compared');
  elsif v_hidden is not null and v_counts is null and (v_incremental or p ->> 'materialized' = 'snapshot') then
    v_notes := v_notes || (v_hidden || ': its events are those of its writes, as they are');
  elsif v_old is not null then
    if v_asked and v_key <> '{}' and dbt_unique(v_rel, v_key) and dbt_unique(v_old, v_key) then
      select d.new_n, d.updated_n, d.deleted_n into v_new, v_updated, v_deleted from dbt_diff(v_old, v_rel, v_key, false) d;
      v_changed := v_schema_changed or v_new + v_updated + v_deleted > 0;
      if v_new + v_updated + v_deleted > 0 and v_rows then
        perform dbt_replay(w, v_old, v_rel, v_key);
      end if;
      drop table pg_temp.anton_diff;
    elsif v_asked then
      v_changed := v_schema_changed or dbt_fingerprint(v_old) <> dbt_fingerprint(v_rel);
      v_blind := v_rows;
      if v_rows then
        v_notes := v_notes || case when v_key = '{}' then 'no key: records were not compared' else format('key (%s) is not unique: records were not compared', array_to_string(v_key, ', ')) end;
      end if;
    end if;
  elsif v_kind = 'm' and v_asked and m.unique_id is not null then
    v_print := dbt_fingerprint(v_rel);
    v_changed := v_print is distinct from m.fingerprint or v_schema_changed;
  elsif v_counts is not null then
    v_new := v_counts -> 'new';
    v_updated := v_counts -> 'updated';
    v_deleted := v_counts -> 'deleted';
    v_changed := v_schema_changed or v_new + v_updated + v_deleted > 0;
    perform set_config('anton.counts', '', true);
  elsif dbt_collecting() is not null then
    v_initial := false;
    v_touched := dbt_collecting() = 'anton_seen';
    if v_touched then
      v_key := w.key_columns;                              -- by which the triggers went
      execute format('create temp table anton_was on commit drop as select distinct on (%1$s) * from pg_temp.anton_seen order by %1$s, anton_seq',
                     (select string_agg(quote_ident(k), ', ') from unnest(v_key) k));
    end if;
    v_was := case when v_touched then 'pg_temp.anton_was' else 'pg_temp.anton_before' end;
    if v_touched and current_setting('anton.emptied', true) = w.id || ' ' || pg_current_xact_id() then
      v_changed := true;                                   -- what was in it nobody knows any more
      v_blind := v_rows;
      v_notes := v_notes || format('%s was emptied by TRUNCATE in its build: records were not compared. A DELETE is, as is --full-refresh', v_path);
    elsif v_touched or dbt_unique(v_rel, v_key) and dbt_unique(v_was, v_key) then
      select d.new_n, d.updated_n, d.deleted_n into v_new, v_updated, v_deleted from dbt_diff(v_was, v_rel, v_key, v_touched) d;
      v_changed := v_schema_changed or v_new + v_updated + v_deleted > 0;
      if v_new + v_updated + v_deleted > 0 and v_rows then
        perform dbt_replay(w, v_was, v_rel, v_key);
      end if;
      drop table pg_temp.anton_diff;
    else
      v_changed := v_schema_changed or dbt_fingerprint(v_was) <> dbt_fingerprint(v_rel);
      v_blind := v_rows;
      v_notes := v_notes || format('key (%s) is not unique: records were not compared', array_to_string(v_key, ', '));
    end if;
    if v_touched then
      drop table pg_temp.anton_was;
    end if;
  elsif v_initial and v_kind = 'r' then
    v_changed := true;
    if v_asked and v_hidden is null then
      execute format('select count(*) from %s', v_rel) into v_new;
    end if;
  end if;
  v_what := jsonb_build_object('new', v_new, 'updated', v_updated, 'deleted', v_deleted, 'changed', v_changed, 'initial', v_initial, 'full', not v_incremental,
    'schema_changed', v_schema_changed, 'run', p -> 'invocation_id', 'unique_id', p -> 'unique_id', 'materialized', p -> 'materialized');
  perform dbt_close(p, v_what, nullif(array_to_string(v_notes, '; '), ''), v_columns, v_print, v_blind);
  if v_notes <> '{}' then
    raise warning 'anton: %: %', v_path, array_to_string(v_notes, '; ');
  end if;
  return v_what;
end $$;

-- dbt_failed(project, unique_id, error, status, invocation_id): a build of this model failed; its handlers of failed hear of it
create or replace function dbt_failed(p_project text, p_unique_id text, p_error text, p_status text default 'error', p_run text default null) returns bigint
language sql volatile set search_path from current as $$
  select rebuilt(m.table_id, jsonb_build_object('error', p_error, 'status', p_status, 'run', p_run, 'unique_id', p_unique_id), 'f')
    from dbt_model m where m.project = p_project and m.unique_id = p_unique_id
$$;

-- dbt_lend(relation): the runtime's role may put its triggers onto a table of dbt's
create or replace function dbt_lend(p_rel regclass) returns void language plpgsql volatile set search_path from current as $$
begin
  if not (has_table_privilege(owner_role(), p_rel, 'trigger') and has_table_privilege(owner_role(), p_rel, 'select')) then
    execute format('grant select, trigger on %s to %I', p_rel, owner_role());
  end if;
end $$;

-- dbt_unhook(relation): takes the runtime's triggers off a table that another has taken the place of; null is none
create or replace function dbt_unhook(p_rel regclass) returns void language plpgsql volatile set search_path from current as $$
declare v_name text;
begin
  for v_name in select t.tgname from pg_trigger t join pg_proc f on f.oid = t.tgfoid
                 where t.tgrelid = p_rel and not t.tgisinternal and f.pronamespace = quote_ident(current_schema())::regnamespace loop
    execute format('drop trigger %I on %s', v_name, p_rel);
  end loop;
end $$;

-- dbt_gate(build, tests): raises NT006 when a test that gates the model fails on what was built. Tests see names as dbt's session does.
create or replace function dbt_gate(p jsonb, p_tests jsonb) returns void language plpgsql volatile set search_path from current as $$
declare t dbt_test; v_n text; v_error boolean; v_warn boolean; v_path text := current_setting('search_path'); v_asked text := coalesce(p ->> 'gate', nullif(current_setting('anton.gate', true), ''));
begin
  if v_asked in ('false', 'off') then
    return;
  end if;
  for t in select * from jsonb_populate_recordset(null::dbt_test, p_tests) x where x.always or v_asked in ('true', 'on') order by x.name loop
    perform set_config('search_path', coalesce(p ->> 'search_path', v_path), true);
    begin
      execute format(E'select (%1$s)::text, coalesce(%1$s %2$s, false), coalesce(%1$s %3$s, false) from (%4$s\n) dbt_internal_test', t.fail_calc, t.error_if, t.warn_if,
                     regexp_replace(t.sql, '[\s;]+$', '')) into v_n, v_error, v_warn;
    exception when others then
      raise exception using errcode = sqlstate, message = format('test %s of %s cannot be run: %s', t.name, p ->> 'unique_id', sqlerrm);
    end;
    perform set_config('search_path', v_path, true);
    if v_error and t.severity = 'error' then
      raise exception using errcode = 'NT006', message = format('test %s of %s failed: %s', t.name, p ->> 'unique_id', v_n),
        hint = 'nothing was published: the table is as it was before';
    elsif v_error or v_warn then
      raise warning 'anton: test % of %: %', t.name, p ->> 'unique_id', v_n;
    end if;
  end loop;
end $$;

-- forget_builds(before) -> how many builds were forgotten; the last of each model is kept
create or replace function forget_builds(p_before timestamptz) returns bigint language plpgsql volatile set search_path from current as $$
declare v_n bigint;
begin
  delete from dbt_build where id in (
    select b.id from dbt_build b where b.at < p_before and exists (select from dbt_build l where l.project = b.project and l.unique_id = b.unique_id and l.id > b.id) limit 10000);
  get diagnostics v_n = row_count;
  return v_n;
end $$;
