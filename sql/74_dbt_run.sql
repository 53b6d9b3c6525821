-- dbt's requests: what is asked of a project waits here, and becomes one run of whoever works it. anton/dbt/requests.py builds.

-- put_dbt_project(definition) -> handler id
-- The handler that works a project's requests. Keys: app, name (of the handler), attempts, backoff.
create or replace function put_dbt_project(d jsonb) returns int language sql volatile set search_path from current as $$
  select put_handler(jsonb_build_object('ops', '[]'::jsonb, 'read', 'now', 'batch', 1000, 'concurrency', 1, 'timeout', '24 h',
    'kind', 'python', 'table', quote_ident(current_schema()) || '.dbt_request') || d)
$$;

-- dbt_ask(app, project, what) -> request id
-- Notes what is to be built, and a job for the project's handler, in the caller's transaction.
--   models, upstream, tables, gate, full_refresh, vars, timeout: as the columns of dbt_request
--   merge, debounce, max_wait: joins the request that waits under this word; due `debounce` from now, at most `max_wait` after its first
create or replace function dbt_ask(p_app text, p_project text, d jsonb) returns bigint language plpgsql volatile set search_path from current as $$
declare
  v_now timestamptz := now(); v_handler int; v_context text := current_setting('anton.context', true); v_change bigint := nextval('change_seq');
  q dbt_request; v_known text;
  v_debounce interval := coalesce((d ->> 'debounce')::interval, '0'); v_longest interval := coalesce((d ->> 'max_wait')::interval, '0');
begin
  select id into v_handler from handler where app = p_app and name = 'dbt:' || p_project;
  if v_handler is null then
    select string_agg(app || '.' || substr(name, 5), ', ' order by app, name) into v_known from handler where name like 'dbt:%';
    raise exception using errcode = 'NT003', message = format('no dbt project "%s" in app "%s"', p_project, p_app),
      hint = format('known: %s; a new one needs: anton migrate', coalesce(v_known, 'none'));
  end if;
  insert into dbt_request as r (app, project, models, upstream, tables, gate, full_refresh, vars, timeout, merge, first_at, due_at, cause, depth, trace)
  values (p_app, p_project, array(select jsonb_array_elements_text(coalesce(d -> 'models', '[]'))), coalesce((d ->> 'upstream')::boolean, false),
          array(select jsonb_array_elements_text(coalesce(d -> 'tables', '[]'))), coalesce((d ->> 'gate')::boolean, false),
          coalesce((d ->> 'full_refresh')::boolean, false), coalesce(d -> 'vars', '{}'), (d ->> 'timeout')::interval, d ->> 'merge',
          v_now, v_now + v_debounce, nullif(split_part(v_context, ',', 1), '')::bigint,
          coalesce(nullif(split_part(v_context, ',', 2), '')::smallint, 0), nullif(split_part(v_context, ',', 3), '')::bigint)
  on conflict (app, project, merge) where state = 'waiting' do update
     set tables = array(select distinct t from unnest(r.tables || excluded.tables) t order by t),
         models = array(select distinct m from unnest(r.models || excluded.models) m order by m),
         due_at = least(r.first_at + v_longest, greatest(r.due_at, v_now + v_debounce)),
         cause = coalesce(excluded.cause, r.cause), depth = greatest(r.depth, excluded.depth), trace = coalesce(excluded.trace, r.trace)
  returning * into q;
  if q.job_id is not null then                             -- it joined one; a job that runs already takes it as it is now
    update delayed set run_at = q.due_at where handler_id = v_handler and id = q.job_id;
  elsif q.due_at > v_now then
    insert into delayed (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, ids, run_at)
    values (v_handler, v_change, v_change, v_now, q.cause, coalesce(q.trace, v_change), 1, 1, 0, 0, q.depth, 'n', array[q.id], q.due_at);
    update dbt_request set job_id = v_change where id = q.id;
  else
    insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, ids)
    values (v_handler, v_change, v_now, q.cause, coalesce(q.trace, v_change), 1, 1, q.depth, 'n', array[q.id]);
  end if;
  perform ring();
  return q.id;
end $$;

-- dbt_lock(name) -> the server's process when this transaction may run the project now, else null; it may until it ends. What is left of
-- builds that died is ended, by the names of their sessions: name-build-…; those that only read (name-read-…) need no lock.
drop function if exists dbt_lock(text);
create or replace function dbt_lock(p_name text) returns int language plpgsql volatile set search_path from current as $$
begin
  if not pg_try_advisory_xact_lock(1634628724, hashtext(p_name)) then
    return null;
  end if;
  perform set_config('idle_in_transaction_session_timeout', '0', true);
  perform dbt_end_sessions(distinct_name) from (
    select distinct application_name as distinct_name from pg_stat_activity where starts_with(application_name, p_name || '-build-') and datname = current_database() and usename = session_user) x;   -- another's are not ours to end
  return pg_backend_pid();
end $$;

-- dbt_end_sessions(name) -> how many of dbt's sessions were ended
create or replace function dbt_end_sessions(p_name text) returns int language sql volatile set search_path from current as $$
  select count(*)::int from pg_stat_activity a cross join lateral pg_terminate_backend(a.pid, 1000)
   where a.application_name = p_name and a.datname = current_database() and a.usename = session_user and a.pid <> pg_backend_pid()
$$;

-- dbt_bury(app, project, lock): runs that had this lock, or nobody knows which, have died
create or replace function dbt_bury(p_app text, p_project text, p_lock text) returns void language sql volatile set search_path from current as $$
  update dbt_run set state = 'died', finished_at = now()
   where app = p_app and project = p_project and state = 'running' and (lock is null or p_lock is null or lock = hashtext(p_lock))
$$;

-- dbt_open(app, project, holder, lock) -> id of a new run
create or replace function dbt_open(p_app text, p_project text, p_holder int, p_lock text) returns bigint language plpgsql volatile set search_path from current as $$
declare v_id bigint;
begin
  perform dbt_bury(p_app, p_project, p_lock);
  insert into dbt_run (app, project, started_at, holder, lock) values (p_app, p_project, now(), p_holder, hashtext(p_lock)) returning id into v_id;
  return v_id;
end $$;

-- dbt_begin(app, project, requests, holder, lock) -> the requests of a new run: what is due, what a dead run left, and these
-- holder: the server's process that has dbt_lock(lock). What ran under that lock before has died; under another one, of another target
-- or schema, when its holder has that no more.
drop function if exists dbt_begin(text, text, bigint[]);
drop function if exists dbt_begin(text, text, bigint[], int);
create or replace function dbt_begin(p_app text, p_project text, p_ids bigint[], p_holder int default null, p_lock text default null) returns setof dbt_request
language plpgsql volatile set search_path from current as $$
declare v_run bigint; v_ids bigint[]; v_alive bigint[] := array(select id from dbt_run r where r.app = p_app and r.project = p_project and r.state = 'running'
    and r.lock <> hashtext(p_lock) and dbt_holds(r));
begin
  perform dbt_bury(p_app, p_project, p_lock);
  v_ids := array(select id from dbt_request where app = p_app and project = p_project
                    and (state = 'running' and (run_id = any (v_alive)) is not true or state = 'waiting' and (due_at <= now() or id = any (p_ids))) order by id for update);
  if v_ids = '{}' then
    return;
  end if;
  update dbt_run set state = 'died', finished_at = now() where state = 'running' and id in (select run_id from dbt_request where id = any (v_ids) and state = 'running');
  v_run := dbt_open(p_app, p_project, p_holder, p_lock);
  return query update dbt_request set state = 'running', run_id = v_run where id = any (v_ids) and state in ('waiting', 'running') returning *;
end $$;

-- dbt_holds(run) -> whether its holder still has its lock
create or replace function dbt_holds(r dbt_run) returns boolean language sql volatile set search_path from current as $$
  select exists (select from pg_locks l join pg_database d on d.oid = l.database and d.datname = current_database()
                  where l.pid = r.holder and l.locktype = 'advisory' and l.granted and l.classid = 1634628724 and l.objsubid = 2
                    and l.objid::bigint = r.lock::bigint & 4294967295)
$$;

-- dbt_cannot_end(run) -> why who asks cannot end it, null when he can
create or replace function dbt_cannot_end(r dbt_run) returns text language sql volatile set search_path from current as $$
  select case when r.holder is null or r.lock is null then 'a worker of an older Anton runs it, which cannot be told: stop that worker'
              when a.usesysid is not null and not pg_has_role(a.usesysid, 'usage') and (select not pg_has_role('pg_signal_backend', 'usage') or s.rolsuper from pg_roles s where s.oid = a.usesysid)
              then format('"%s" may not end sessions of "%s": cancel as that role, or grant pg_signal_backend to it', current_user, a.usename) end
    from (select) one left join pg_stat_activity a on a.pid = r.holder and dbt_holds(r)
$$;

-- dbt_cancel(runs) -> those that were running, and why one could not be ended; the others and their requests are cancelled
-- dbt_end_holders() ends them once this is committed. No runs: all that run.
drop function if exists dbt_cancel(bigint[]);
create or replace function dbt_cancel(p_runs bigint[]) returns table (id bigint, app text, project text, problem text) language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now(); r dbt_run;
begin
  for r in select * from dbt_run x where x.state = 'running' and (p_runs = '{}' or x.id = any (p_runs)) order by x.id for update loop
    select r.id, r.app, r.project, dbt_cannot_end(r) into id, app, project, problem;
    if problem is null then
      update dbt_run x set state = 'cancelled', error = 'cancelled', finished_at = v_now where x.id = r.id;
      update dbt_request q set state = 'cancelled', error = 'cancelled' where q.run_id = r.id and q.state = 'running';
    end if;
    return next;
  end loop;
end $$;

-- dbt_cancel_waiting(app) -> the requests that waited for a run; there will be none
create or replace function dbt_cancel_waiting(p_app text) returns table (id bigint, project text) language sql volatile set search_path from current as $$
  update dbt_request q set state = 'cancelled', error = 'cancelled' where q.app = p_app and q.state = 'waiting' returning q.id, q.project
$$;

-- dbt_end_holders(runs) -> those that were ended: who ran each learns by the loss of its lock that it was cancelled, and stops dbt
drop function if exists dbt_end_holders(bigint[]);
create or replace function dbt_end_holders(p_runs bigint[]) returns setof bigint language sql volatile set search_path from current as $$
  select r.id from dbt_run r where r.id = any (p_runs) and r.state = 'cancelled'
     and case when dbt_holds(r) then pg_terminate_backend(r.holder, 1000) end   -- in this order, which AND does not promise
$$;

-- dbt_cancelled(run) -> whether it was, by who has committed that by now
create or replace function dbt_cancelled(p_run bigint) returns boolean language sql volatile set search_path from current as $$
  select state = 'cancelled' from dbt_run where id = p_run for share
$$;

-- dbt_settle(run, failed, error) -> whether requests were still this run's: those of a run that was taken over are another's
--   failed   ids of the requests that ended badly, of which error tells
-- From dbt_finish() on they are running under a run that is over. Who dies in between leaves them to the next dbt_begin().
create or replace function dbt_settle(p_run bigint, p_failed bigint[], p_error text) returns boolean
language plpgsql volatile set search_path from current as $$
begin
  update dbt_request set state = case when id = any (p_failed) then 'failed' else 'done' end, error = case when id = any (p_failed) then p_error end
   where run_id = p_run and state = 'running';
  return found;
end $$;

-- dbt_finish(run, state, error, failed, results) -> whether it was still running: a run that was taken over says nothing more
--   failed   of dbt_settle(); null: its requests are settled later, with the ack
--   results  [{"node", "status", "seconds", "message", "log"}, …]
create or replace function dbt_finish(p_run bigint, p_state text, p_error text, p_failed bigint[], p_results jsonb) returns boolean
language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  update dbt_run set state = p_state, error = p_error, finished_at = v_now where id = p_run and state = 'running';
  if not found then
    return false;
  end if;
  if p_failed is not null then
    perform dbt_settle(p_run, p_failed, p_error);
  end if;
  insert into dbt_result (run_id, unique_id, status, seconds, message, log)
  select p_run, r ->> 'node', r ->> 'status', (r ->> 'seconds')::real, r ->> 'message', r ->> 'log' from jsonb_array_elements(p_results) r
  on conflict (run_id, unique_id) do update set status = excluded.status, seconds = excluded.seconds, message = excluded.message, log = excluded.log;
  return true;
end $$;

-- dbt_put_back(run, error, project, models): nothing could be built, as the project cannot be read or dbt cannot start; its requests
-- wait again. The first time these models (unique_ids) hear of it by on_failed.
create or replace function dbt_put_back(p_run bigint, p_error text, p_project text, p_models text[]) returns void
language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now(); v_id bigint;
begin
  if exists (select from dbt_request where run_id = p_run and state = 'running' and error is null) then
    perform dbt_failed(p_project, m, p_error) from unnest(p_models) m;
  end if;
  update dbt_run set state = 'failed', error = p_error, finished_at = v_now where id = p_run and state = 'running';
  for v_id in select id from dbt_request where run_id = p_run and state = 'running' order by id loop
    begin
      update dbt_request set state = 'waiting', error = p_error, job_id = null where id = v_id;
    exception when unique_violation then                   -- a newer one waits under its word: that builds it, too
      update dbt_request r set tables = array(select distinct t from unnest(r.tables || o.tables) t order by t),
                               models = array(select distinct m from unnest(r.models || o.models) m order by m)
        from dbt_request o where o.id = v_id and (r.app, r.project, r.merge) = (o.app, o.project, o.merge) and r.state = 'waiting';
      update dbt_request set state = 'failed', error = p_error where id = v_id;
    end;
  end loop;
end $$;

-- dbt_state(project, unique_id, schema, name) -> all that dbt_register() may change, as text; null when unknown
create or replace function dbt_state(p_project text, p_unique_id text, p_schema text, p_name text) returns text
language sql stable set search_path from current as $$
  select jsonb_build_array(to_jsonb(m), table_state(format('%I.%I', p_schema, p_name)))::text from dbt_model m
   where m.project = p_project and m.unique_id = p_unique_id
$$;

-- dbt_unchanged(project, invocation) -> the models whose build by this invocation left every record as it was
create or replace function dbt_unchanged(p_project text, p_invocation text) returns table (unique_id text)
language sql stable set search_path from current as $$
  select b.unique_id from dbt_build b where b.project = p_project and b.invocation_id = p_invocation and not b.changed
$$;

-- dbt_behind(project, parents) -> the models that have not seen a build, which changed something, of what they read
--   parents  {unique_id: [unique_id of what it reads, …], …}
-- Seen is what had committed when the model's last build began to read: one that began before may have committed later. Where that is
-- not known, as its hook before the build did not run, it is what the same invocation had built by then, and nothing else.
create or replace function dbt_behind(p_project text, p_parents jsonb) returns table (unique_id text)
language sql stable set search_path from current as $$
  select e.key from jsonb_each(p_parents) e
    left join lateral (select b.id, b.snapshot, b.invocation_id from dbt_build b where b.project = p_project and b.unique_id = e.key order by b.id desc limit 1) l on true
   where exists (
     select from jsonb_array_elements_text(e.value) p join dbt_build b on b.project = p_project and b.unique_id = p
      where b.changed is distinct from false and b.xid >= coalesce(pg_snapshot_xmin(l.snapshot), '0')
        and case when l.snapshot is null then (b.id < l.id and b.invocation_id = l.invocation_id) is not true else not pg_visible_in_snapshot(b.xid, l.snapshot) end)
$$;

-- dbt_put_tests(project, models, tests): the compiled tests of these models (unique_ids), instead of those that there were
--   tests  [{"unique_id", "name", "sql", "severity", "fail_calc", "error_if", "warn_if"}, …]
create or replace function dbt_put_tests(p_project text, p_models text[], p_tests jsonb) returns void
language plpgsql volatile set search_path from current as $$
begin
  delete from dbt_test where project = p_project and unique_id = any (p_models) and not always;
  insert into dbt_test (project, unique_id, name, sql, severity, fail_calc, error_if, warn_if)
  select p_project, t ->> 'unique_id', t ->> 'name', t ->> 'sql', coalesce(t ->> 'severity', 'error'), coalesce(t ->> 'fail_calc', 'count(*)'),
         coalesce(t ->> 'error_if', '!= 0'), coalesce(t ->> 'warn_if', '!= 0') from jsonb_array_elements(p_tests) t
  on conflict (project, unique_id, name) do update set sql = excluded.sql, severity = excluded.severity, fail_calc = excluded.fail_calc,
     error_if = excluded.error_if, warn_if = excluded.warn_if;
end $$;

-- forget_dbt_runs(now, days) -> how many runs were forgotten, with their requests and results
create or replace function forget_dbt_runs(p_now timestamptz, p_keep int) returns bigint language plpgsql volatile set search_path from current as $$
declare v_ids bigint[] := array(select id from dbt_run where state <> 'running' and finished_at < p_now - make_interval(days => p_keep)
   and not exists (select from dbt_request q where q.run_id = dbt_run.id and q.state in ('waiting', 'running')) order by id limit 1000);
begin
  delete from dbt_result where run_id = any (v_ids);
  delete from dbt_request where run_id = any (v_ids);
  delete from dbt_run where id = any (v_ids);
  return cardinality(v_ids);
end $$;

-- list_builds(model, limit) -> the last builds of a model, by dbt's name of it or its unique_id, the newest first
create or replace function list_builds(p_model text, p_limit int default 20)
returns table (at timestamptz, project text, model text, materialized text, initial boolean, changed boolean, new bigint, updated bigint, deleted bigint,
               schema_changed boolean, run text, note text)
language sql stable set search_path from current as $$
  select b.at, b.project, substring(b.unique_id from '[^.]+$'), b.materialized, b.initial, b.changed, b.new_n, b.updated_n, b.deleted_n, b.schema_changed,
         b.invocation_id, b.note
    from dbt_build b where b.unique_id = p_model or substring(b.unique_id from '[^.]+$') = p_model order by b.id desc limit p_limit
$$;

-- dbt_watchdog() -> how many tables that dbt made anew were found without Anton's hooks having run
-- Their handlers get on_rebuilt, and triggers for what others write; the records of that build were not compared.
create or replace function dbt_watchdog() returns int language plpgsql volatile set search_path from current set lock_timeout = '100ms' as $$
declare r record; v_n int := 0; v_now timestamptz := now(); v_initial boolean;
begin
  if not pg_try_advisory_xact_lock(1634628725, (select oid::int from pg_namespace where nspname = current_schema())) then
    return 0;                                              -- someone else is at it
  end if;
  for r in select m.project, m.unique_id, w.id, w.relid, c.oid, format('%I.%I', m.schema_name, m.table_name) as path
             from dbt_model m join watched w on w.id = m.table_id
             join pg_class c on c.oid = to_regclass(format('%I.%I', m.schema_name, m.table_name)) and c.relkind in ('r', 'p')
            where c.oid <> w.relid loop
    v_initial := r.relid = 0;
    begin
      perform sync_triggers(r.id);
      insert into dbt_build (project, unique_id, relation, materialized, initial, schema_changed, note, at, xid)
      values (r.project, r.unique_id, r.path, 'table', v_initial, false, 'built without Anton''s hooks: records were not compared', v_now, pg_current_xact_id());
      perform rebuilt(r.id, jsonb_build_object('initial', v_initial, 'full', true, 'unique_id', r.unique_id, 'materialized', 'table'));
      v_n := v_n + 1;
    exception when lock_not_available or deadlock_detected then
      null;                                                -- someone is at it; next time
    end;
  end loop;
  return v_n;
end $$;

-- dbt_findings() -> for anton doctor: what dbt's rebuilds take from tables that are listened to
create or replace function dbt_findings() returns table (kind text, subject text, problem text, remedy text)
language plpgsql stable set search_path from current as $$
begin
  return query
    select 'dbt', format('%I.%I', m.schema_name, m.table_name), b.note, 'anton dbt init, which adds Anton''s two hooks; or build it by anton dbt'
      from dbt_model m cross join lateral (select * from dbt_build x where (x.project, x.unique_id) = (m.project, m.unique_id) order by x.id desc limit 1) b
     where b.invocation_id is null;
  return query
    select 'dbt', format('%I.%I', m.schema_name, m.table_name), format('is a `table` with handlers of its records: dbt makes it anew at each build, and readers wait for the swap'),
           'materialized="anton_table" changes it in place'
      from dbt_model m cross join lateral (select * from dbt_build x where (x.project, x.unique_id) = (m.project, m.unique_id) order by x.id desc limit 1) b
     where b.materialized = 'table' and (select c.reltuples from pg_class c where c.oid = to_regclass(format('%I.%I', m.schema_name, m.table_name))) > 100000
       and exists (select from handler h where h.table_id = m.table_id and h.enabled and h.ops && array['new', 'updated', 'deleted']);
  return query
    select 'dbt', format('%I.%I', m.schema_name, m.table_name), format('%s %s depends on this `table`: a rebuild by dbt drops it', v.what, v.name),
           'materialized="anton_table" keeps it; or make the view a model of the project'
      from dbt_model m cross join lateral (select * from dbt_build x where (x.project, x.unique_id) = (m.project, m.unique_id) order by x.id desc limit 1) b
     cross join lateral (
       select distinct format('%I.%I', n.nspname, c.relname) as name, case c.relkind when 'm' then 'materialized view' else 'view' end as what from pg_depend d join pg_rewrite r on r.oid = d.objid join pg_class c on c.oid = r.ev_class
         join pg_namespace n on n.oid = c.relnamespace
        where d.refobjid = to_regclass(format('%I.%I', m.schema_name, m.table_name)) and d.classid = 'pg_rewrite'::regclass and c.oid <> d.refobjid
          and (b.invocation_id is null or c.relkind = 'm')                 -- Anton's hooks point other views to the new table
          and not dbt_built(format('%I.%I', n.nspname, c.relname))) v
     where b.materialized = 'table';
  return query
    select 'dbt', format('%I.%I', m.schema_name, m.table_name), format('its last build, of %s: %s', to_char(b.at, 'YYYY-MM-DD HH24:MI'), b.note),
           'put back what was lost; materialized="anton_table" changes the table in place, and loses nothing'
      from dbt_model m cross join lateral (select * from dbt_build x where (x.project, x.unique_id) = (m.project, m.unique_id) order by x.id desc limit 1) b
     where b.invocation_id is not null and b.note ~ ' (is|was) lost: ';
  return query
    select 'dbt', format('%I.%I', m.schema_name, m.table_name), format('its last build, of %s: %s', to_char(b.at, 'YYYY-MM-DD HH24:MI'), b.note),
           format('alter table %I.%I no force row level security; or alter role %I bypassrls', m.schema_name, m.table_name, pg_get_userbyid(c.relowner))
      from dbt_model m cross join lateral (select * from dbt_build x where (x.project, x.unique_id) = (m.project, m.unique_id) order by x.id desc limit 1) b
      join pg_class c on c.oid = to_regclass(format('%I.%I', m.schema_name, m.table_name)) join pg_roles r on r.oid = c.relowner
     where b.note ~ 'row level security of ' and c.relrowsecurity and c.relforcerowsecurity and not r.rolbypassrls and not r.rolsuper;
end $$;

-- list_dbt_runs(project, limit) -> the last runs, the newest first
create or replace function list_dbt_runs(p_project text default null, p_limit int default 20)
returns table (id bigint, app text, project text, state text, requests bigint, models bigint, seconds numeric, started_at timestamptz, error text)
language sql stable set search_path from current as $$
  select r.id, r.app, r.project, r.state, (select count(*) from dbt_request q where q.run_id = r.id), (select count(*) from dbt_result x where x.run_id = r.id),
         round(extract(epoch from r.finished_at - r.started_at)::numeric, 3), r.started_at, r.error
    from dbt_run r where p_project is null or r.project = p_project order by r.id desc limit p_limit
$$;

-- list_dbt_log(model, limit) -> what dbt said of a model, or a test, in its last runs, by dbt's name of it or its unique_id; the newest last
create or replace function list_dbt_log(p_model text, p_limit int default 1)
returns table (run bigint, at timestamptz, status text, seconds real, message text, log text) language sql stable set search_path from current as $$
  select * from (
    select r.id, r.started_at, x.status, x.seconds, x.message, x.log from dbt_result x join dbt_run r on r.id = x.run_id
     where x.unique_id = p_model or split_part(x.unique_id, '.', 3) = p_model order by r.id desc, x.unique_id limit p_limit) l
   order by l.id
$$;
