-- What `anton migrate` asks and tells: the tables an app declared, and what is no longer declared.

-- put_table(definition) -> table id
-- Watches a table that the app made. Keys: table, app, model (the names that Anton made in it).
create or replace function put_table(d jsonb) returns int language plpgsql volatile set search_path from current as $$
declare v_id int := watch(d ->> 'table');
begin
  update watched set app = d ->> 'app', model = d -> 'model' where id = v_id;
  return v_id;
end $$;

-- table_state(table) -> all that watch(), put_table() and sync_triggers() may change, as text; null when not watched
-- A table that nobody ever listened to has no triggers that its shape could make out of date.
create or replace function table_state(p_table text) returns text language sql stable set search_path from current as $$
  select jsonb_build_array(to_jsonb(w) - 'watched_at' - case when exists (select from handler h where h.table_id = w.id) then '{}' else '{shape,had}'::text[] end,
           (select jsonb_agg(h.id) from handler h where h.table_id = w.id and h.enabled and h.enabled_at is null),
           (select jsonb_object_agg(p.proname, p.prosrc || coalesce(p.proconfig::text, '') || p.proowner) from pg_proc p
             where p.pronamespace = quote_ident(current_schema())::regnamespace and p.proname ~ ('^t' || w.id || '_')),
           (select jsonb_agg(array[g.tgrelid::regclass::text, g.tgname] order by g.tgrelid::regclass::text, g.tgname) from pg_trigger g
              join pg_proc p on p.oid = g.tgfoid
             where p.pronamespace = quote_ident(current_schema())::regnamespace and p.proname ~ ('^t' || w.id || '_')))::text
    from watched w where format('%I.%I', w.schema_name, w.table_name) = p_table
$$;

-- handler_state(app, name) -> all that put_handler() and put_schedule() may change, as text; null when unknown
create or replace function handler_state(p_app text, p_name text) returns text language sql stable set search_path from current as $$
  select jsonb_build_array(
           to_jsonb(h) - array['paused', 'failing_since', 'failing_error', 'failures', 'probe_at', 'feeding', 'enabled_at', 'enabled_snapshot', 'enabled_key', 'created_at'],
           (select count(*) from permit where handler_id = h.id), (select said from rate where handler_id = h.id),
           (select to_jsonb(s) - array['paused', 'next_at', 'last_at', 'ahead', 'planned_to', 'error'] from schedule s where s.app = p_app and s.name = p_name))::text
    from handler h where h.app = p_app and h.name = p_name
$$;

-- vanished(app, names) -> (handler, jobs): enabled handlers of the app that are not among the names, with their open jobs
create or replace function vanished(p_app text, p_names text[]) returns table (name text, jobs bigint)
language sql stable set search_path from current as $$
  select h.name, (select count(*) from job where handler_id in (h.id, -h.id)) + (select count(*) from lease where handler_id = h.id)
                 + (select count(*) from delayed where handler_id in (h.id, -h.id)) + (select count(*) from debounce where handler_id = h.id)
                 + (select count(*) from turn where handler_id = h.id and state = 'waits')
    from handler h where h.app = p_app and h.enabled and h.name <> all (p_names) order by h.name
$$;

-- retire(app, names): handlers and schedules that vanished from the app's code get no new jobs; those they have are kept
create or replace function retire(p_app text, p_names text[]) returns void language plpgsql volatile set search_path from current as $$
begin
  perform retire_schedules(p_app, p_names);
  update handler set enabled = false, missing_at = now() where app = p_app and enabled and name <> all (p_names);
end $$;

-- watched_tables() -> every table that Anton watches
create or replace function watched_tables() returns table (id int, name text, app text, model jsonb, key_kind text, partitioned boolean)
language sql stable set search_path from current as $$
  select w.id, format('%I.%I', w.schema_name, w.table_name), w.app, w.model, w.key_kind, c.relkind = 'p'
    from watched w join pg_class c on c.oid = to_regclass(format('%I.%I', w.schema_name, w.table_name)) order by w.id
$$;
