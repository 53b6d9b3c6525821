-- The triggers of a table: written, put onto it and all its partitions, and brought up to date.

-- owner_role() -> the role that owns what runs with its rights: the schema's owner, <schema>_owner where migrate could make it
create or replace function owner_role() returns text language sql stable set search_path from current as $$
  select pg_get_userbyid(nspowner)::text from pg_namespace where nspname = current_schema()
$$;

-- write_triggers(table, lock): as sync_triggers; lock: however little is new
create or replace function write_triggers(p_table int, p_lock boolean) returns void language plpgsql volatile set search_path from current as $$
declare
  w watched; v_event text; v_name text; v_body text; v_old text; v_enable boolean; v_settings text;
  v_tries int := case when current_setting('lock_timeout') = '0' then 10 else 1 end;
begin
  select * into w from watched where id = p_table;
  perform watch(format('%I.%I', w.schema_name, w.table_name));
  update watched set shape = shape(watched) where id = p_table returning * into w;
  if w.relid = 0 then
    return;                                                -- of dbt, and not built yet
  elsif (select relkind from pg_class where oid = w.relid) not in ('r', 'p') then
    update handler set enabled_at = pg_catalog.clock_timestamp(), enabled_snapshot = pg_current_snapshot(), enabled_key = 0
     where table_id = w.id and enabled and enabled_at is null;
    return;                                                -- a view has no triggers: it is rebuilt, that is all
  end if;
  if w.key_kind = 'none' and exists (select from handler where table_id = p_table and enabled and ops && array['updated', 'deleted']) then
    raise exception using errcode = 'NT005', message = format('table %I.%I has no primary key: its updated and deleted records cannot be handled', w.schema_name, w.table_name),
      hint = format('alter table %I.%I add primary key (…)', w.schema_name, w.table_name);
  end if;
  v_settings := image_settings(w, w.key_kind = 'none' or exists (select from handler where table_id = p_table and enabled and (read = 'change' or 'deleted' = any (ops))));
  foreach v_event in array array['new', 'updated', 'deleted', 'moved', 'truncate'] loop
    v_name := format('t%s_%s', p_table, v_event);
    v_body := case when v_event = 'truncate' then capture_truncate(p_table) else capture_body(p_table, v_event) end;
    select prosrc into v_old from pg_proc where pronamespace = current_schema()::regnamespace and proname = v_name;
    if v_body = 'begin return null; end' and v_old is null then
      continue;                                            -- nobody asked, nothing to pay
    end if;
    execute format('create or replace function %I() returns trigger language plpgsql security definer set search_path = %I, pg_catalog, pg_temp%s as %L',
                   v_name, current_schema(), case when v_event <> 'truncate' then v_settings else '' end, v_body);
    execute format('alter function %I() owner to %I', v_name, owner_role());
    execute format('revoke all on function %I() from public', v_name);
  end loop;
  v_enable := exists (select from handler where table_id = p_table and enabled and enabled_at is null);
  for attempt in 1..v_tries loop
    begin
      if v_tries > 1 then
        perform set_config('lock_timeout', '200ms', true);
      end if;
      perform put_triggers(w, v_enable or p_lock);
      exit;
    exception when lock_not_available then                 -- what was locked is free again
      if attempt = v_tries then
        raise exception using errcode = 'lock_not_available', message = format('table %I.%I is being written to%s', w.schema_name, w.table_name,
            (select ' by ' || string_agg(format('pid %s (%s, since %s)', a.pid, coalesce(nullif(a.application_name, ''), a.usename), date_trunc('second', a.xact_start)), ', ')
               from (select distinct l.pid from pg_locks l where l.relation = any (array(select tree(w.relid))) and l.granted and l.pid <> pg_backend_pid()
                        and l.mode not in ('AccessShareLock', 'RowShareLock')) l join pg_stat_activity a on a.pid = l.pid)),
          hint = 'its handlers are as they were; run it again when that transaction has ended';
      end if;
      perform pg_sleep(0.1);
    end;
  end loop;
  if v_tries > 1 then
    perform set_config('lock_timeout', '0', true);
  end if;
  if v_enable then
    perform enable_handlers(w);
  end if;
end $$;

-- sync_triggers(table): writes the trigger functions of a table anew and adds the triggers it lacks, on its partitions too
-- A handler that is new, or listens to more than before, is enabled under a lock that no writer holds: each record is
-- then either older than it or captured. The lock is tried for 200 ms at a time; a writer that stays raises 55P03.
create or replace function sync_triggers(p_table int) returns void language sql volatile set search_path from current as $$
  select write_triggers(p_table, false)
$$;

-- tree(relation) -> it and all its partitions
create or replace function tree(p_rel oid) returns setof oid language sql stable set search_path from current as $$
  select p_rel union select relid::oid from pg_partition_tree(p_rel)
$$;

-- shape(table) -> all that its trigger functions depend on beside the handlers: columns, key, partitions, doorbell
create or replace function shape(w watched) returns text language sql stable set search_path from current as $$
  select md5(concat(
    (select string_agg(concat_ws(' ', attnum, attname, atttypid, atttypmod, attnotnull), ',' order by attnum)
       from pg_attribute where attrelid = w.relid and attnum > 0 and not attisdropped),
    (select string_agg(concat_ws(' ', indexrelid, indisprimary, indkey), ',' order by indexrelid) from pg_index where indrelid = w.relid and indisunique and indisvalid),
    (select string_agg(t::text, ',' order by t) from tree(w.relid) t), w.relid, (select enabled from doorbell())))
$$;

-- put_triggers(table, all): the triggers that are missing, or all of them anew, which locks every writer out until the
-- end of the transaction; takes ours off relations that are no part of the table any more
create or replace function put_triggers(w watched, p_all boolean) returns void language plpgsql volatile set search_path from current as $$
declare v_schema text := current_schema(); t record; v_event text;
begin
  for t in select r.rel, e.event, f.proname, g.oid is not null as there
             from tree(w.relid) r (rel) cross join unnest(array['new', 'updated', 'deleted', 'moved', 'truncate']) with ordinality e (event, o)
             join pg_proc f on f.pronamespace = v_schema::regnamespace and f.proname = format('t%s_%s', w.id, e.event)
             left join pg_trigger g on g.tgrelid = r.rel and g.tgname = v_schema || '_' || e.event
            order by r.rel <> w.relid, r.rel, e.o loop
    continue when t.there and not p_all;
    v_event := case t.event when 'moved' then 'updated' else t.event end;
    execute format('create or replace trigger %I after %s on %s %s for each statement execute function %I()',
      v_schema || '_' || t.event,
      case v_event when 'new' then 'insert' when 'deleted' then 'delete' when 'truncate' then 'truncate' else 'update' end,
      t.rel::regclass,
      case v_event when 'new' then 'referencing new table as new_records'
                   when 'updated' then 'referencing old table as old_records new table as new_records'
                   when 'deleted' then 'referencing old table as old_records' else '' end,
      t.proname);
  end loop;
  for t in select g.tgrelid::regclass as rel, g.tgname from pg_trigger g join pg_proc f on f.oid = g.tgfoid
            where f.pronamespace = v_schema::regnamespace and f.proname ~ format('^t%s_', w.id) and g.tgrelid not in (select tree(w.relid)) loop
    execute format('drop trigger %I on %s', t.tgname, t.rel);
  end loop;
end $$;

-- enable_handlers(table): notes which rows are older than the handlers that are being enabled; no writer is about
create or replace function enable_handlers(w watched) returns void language plpgsql volatile set search_path from current as $$
declare v_max bigint;
begin
  if w.key_kind = 'id' then
    execute format('select max(%I) from %I.%I', w.key_columns[1], w.schema_name, w.table_name) into v_max;
  end if;
  perform mark();
  update handler set enabled_at = pg_catalog.clock_timestamp(), enabled_snapshot = pg_current_snapshot(), enabled_key = coalesce(v_max, 0)
   where table_id = w.id and enabled and enabled_at is null;
end $$;
