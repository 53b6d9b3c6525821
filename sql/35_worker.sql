-- What a worker asks about itself and its handlers.

-- catalogue(app) -> the handlers of an app and all SQL handlers of psql's app 'sql', with the table each listens to
drop function if exists catalogue(text);
create or replace function catalogue(p_app text) returns table (
  id int, app text, name text, kind text, ops text[], each_record boolean, read text, where_sql text, into_tables text[], batch int,
  max_wait interval, concurrency int, timeout interval, attempts int, backoff interval, feeding boolean,
  table_id int, schema_name text, table_name text, key_columns text[], key_kind text, fetch_sql text, had text[])
language sql stable set search_path from current as $$
  select h.id, h.app, h.name, h.kind, h.ops, h.each_record, h.read, h.where_sql, h.into_tables, h.batch,
         case when h.debounce is null then h.max_wait else '0' end, h.concurrency, h.timeout, h.attempts, h.backoff, h.feeding,
         w.id, w.schema_name, w.table_name, w.key_columns, w.key_kind, w.fetch_sql, w.had
    from handler h join watched w on w.id = h.table_id
   where h.app = p_app or (h.app = 'sql' and h.kind = 'sql')
   order by h.id
$$;

-- refreshers() -> the handlers that refresh models
create or replace function refreshers() returns setof int language sql stable set search_path from current as $$
  select id from handler where model_id is not null
$$;

-- table_ids() -> what each watched table is called in receipts
create or replace function table_ids() returns table (id int, schema_name text, table_name text)
language sql stable set search_path from current as $$
  select id, schema_name, table_name from watched
$$;

-- worker_died(worker) -> leases freed
-- For whoever saw the process die (its parent): its leases end now instead of later. Its jobs come back as suspects.
-- What its backend is still settling is left alone: that commits, or the lease ends in its time.
create or replace function worker_died(p_worker int) returns bigint language plpgsql volatile set search_path from current as $$
declare v_n bigint; v_rows tid[];
begin
  update worker set stopped_at = now() where id = p_worker and stopped_at is null;
  perform from permit where worker_id = p_worker for update;   -- a claim of its that is not over yet
  select array_agg(x.row) into v_rows from (select ctid as row from lease where worker_id = p_worker for update skip locked) x;
  update lease set lease_until = '-infinity' where ctid = any (v_rows);
  get diagnostics v_n = row_count;
  update permit set worker_id = null, lease_until = '-infinity' where worker_id = p_worker;
  perform ring();
  return v_n;
end $$;

-- chain(receipt) -> the last handlers and tables that led to what this receipt wrote, oldest first, for errors
create or replace function chain(p_receipt bigint, p_steps int default 6) returns text language sql stable set search_path from current as $$
  with recursive step (n, receipt_id, handler_id, cause) as (
    select 1, r.id, r.handler_id, r.causes[1] from receipt r where r.id = p_receipt
    union all
    select s.n + 1, r.id, r.handler_id, r.causes[1] from step s join receipt r on r.id = s.cause where s.n < p_steps
  )
  select string_agg(w.table_name || ' -> ' || h.name, ' -> ' order by s.n desc)
    from step s join handler h on h.id = s.handler_id join watched w on w.id = h.table_id
$$;

-- bell_holder() -> (pid, since): whose idle worker keeps every writer ringing, and when its backend last did anything
create or replace function bell_holder(out pid int, out since timestamptz) returns record language sql volatile set search_path from current as $$
  select l.pid, a.state_change
    from doorbell() d join pg_locks l on l.locktype = 'advisory' and l.classid = d.k1::oid and l.objid = d.k2::oid and l.objsubid = 2
      and l.mode = 'ExclusiveLock' and l.granted and l.database = (select oid from pg_database where datname = current_database())
    left join pg_stat_activity a on a.pid = l.pid
   limit 1
$$;

-- announce(elected) -> (elected, bell)
-- An idle worker says so on its listening connection: elected, when it is the one that may; bell, when every writer
-- now rings. Only ever tries: an open writer holds the bell shared, then poll and try again. Session locks: not
-- behind a transaction pooler.
--   elected  whether this session was elected before
create or replace function announce(p_elected boolean, out elected boolean, out bell boolean) returns record
language plpgsql volatile set search_path from current as $$
declare d record := doorbell();
begin
  elected := d.enabled and (p_elected or pg_try_advisory_lock(d.k1 + 1, d.k2));
  bell := elected and pg_try_advisory_lock(d.k1, d.k2);
end $$;

-- hush(): the bell is free again; call it before claiming
create or replace function hush() returns boolean language sql volatile set search_path from current as $$
  select pg_advisory_unlock(k1, k2) from doorbell()
$$;

-- step_down(): another worker may announce itself
create or replace function step_down() returns boolean language sql volatile set search_path from current as $$
  select pg_advisory_unlock(k1 + 1, k2) from doorbell()
$$;

-- call_help(): wakes the workers that wait without the bell, off the write path
create or replace function call_help() returns void language sql volatile set search_path from current as $$
  select pg_notify(channel || '_help', '') from doorbell()
$$;

-- ring_at() -> when: rings as a writer would, whoever holds the bell
create or replace function ring_at() returns timestamptz language sql volatile set search_path from current as $$
  select pg_notify(channel, '') from doorbell();
  select pg_catalog.clock_timestamp()
$$;

-- unfreeze(pid, rung) -> whether its session was ended
-- Ends an announcer that has not moved since it was rung: until then it makes every insert pay for a NOTIFY.
create or replace function unfreeze(p_pid int, p_rung timestamptz) returns boolean language sql volatile set search_path from current as $$
  select coalesce((select pg_terminate_backend(h.pid) from bell_holder() h where h.pid = p_pid and h.since < p_rung), false)
$$;

-- keep_alive(): this session ends within 10 s of its peer's vanishing, and its locks with it; where the server can
create or replace function keep_alive() returns void language plpgsql volatile set search_path from current as $$
begin
  perform set_config('tcp_keepalives_idle', '5', false), set_config('tcp_keepalives_interval', '2', false),
          set_config('tcp_keepalives_count', '2', false), set_config('tcp_user_timeout', '10000', false);
exception when others then
  null;                                                    -- a platform without one of them
end $$;

-- limit_statement(milliseconds): for the rest of this transaction
create or replace function limit_statement(p_ms int) returns void language sql volatile set search_path from current as $$
  select set_config('statement_timeout', p_ms::text, true)
$$;

-- origin(table id, key, cause) -> the record that a chain of handlers began with, and how to read it; itself without a cause
create or replace function origin(p_table int, p_key jsonb, p_cause bigint)
returns table (schema_name text, table_name text, key_kind text, fetch_sql text, key jsonb)
language plpgsql stable set search_path from current as $$
#variable_conflict use_column
declare v_table int := p_table; v_key jsonb := p_key; v_cause bigint := p_cause; v_owner int; v_id bigint; r record;
begin
  for v_step in 1..64 loop
    exit when v_cause is null;
    select x.n, x.causes, x.change_ids, h.table_id into r from receipt x join handler h on h.id = x.handler_id where x.id = v_cause;
    exit when not found;
    v_id := null;
    if v_key ->> 0 ~ '^-?\d{1,18}$' then                  -- no cast in the statement: the planner would make it for every key
      v_id := (v_key ->> 0)::bigint;
    end if;
    select o.owners[coalesce(array_position(o.ids, v_id),
             (select k.p::int from jsonb_array_elements(o.keys) with ordinality k (v, p) where k.v = v_key))]
      into v_owner from output o where o.receipt_id = v_cause and o.table_id = v_table;
    v_owner := case when r.n = 1 then 1 else v_owner end;
    exit when coalesce(v_owner, 0) = 0;                    -- written for a whole batch
    v_table := r.table_id;
    select i.key, r.causes[array_position(r.change_ids, i.change_id)] into v_key, v_cause from inputs(v_cause) i where i.position = v_owner;
    exit when v_key is null;
  end loop;
  return query select w.schema_name, w.table_name, w.key_kind, w.fetch_sql, v_key from watched w where w.id = v_table;
end $$;

-- worker_settings() -> what a worker reads when it starts
create or replace function worker_settings() returns table (name text, value text) language sql stable set search_path from current as $$
  select name, value from setting
$$;

-- put_output_text(receipt, table, ids, keys, owners): put_output() with its arrays as text, {1,2}, for drivers that are slow at arrays
create or replace function put_output_text(p_receipt bigint, p_table int, p_ids text, p_keys jsonb, p_owners text)
returns void language sql volatile set search_path from current as $$
  select put_output(p_receipt, p_table, p_ids::bigint[], p_keys, p_owners::int[])
$$;

-- wide(table) -> whether it holds values that are stored out of line, so that a batch of its rows may be large
create or replace function wide(p_table int) returns boolean language sql stable set search_path from current as $$
  select coalesce(pg_relation_size(c.reltoastrelid) > 0, false) from watched w join pg_class c on c.oid = w.relid where w.id = p_table
$$;

-- missing_rights(kind, name, rights, statement) -> (may_not, allow): what "permission denied for <kind> <name>" was about, and its GRANT
-- Of several objects of this name, the one that the statement names with its schema, else the app's. rights: those that
-- the statement seems to need; when this role has them all, every one that it lacks.
create or replace function missing_rights(p_kind text, p_name text, p_rights text[], p_statement text)
returns table (may_not text, allow text) language plpgsql stable set search_path from current as $$
declare v_role text := quote_ident(current_user); v_rel oid; v_path text; v_lacking text[]; v_asked text[];
begin
  if p_kind = 'schema' then
    return query select format('use schema %I', p_name), format('grant usage on schema %I to %s;', p_name, v_role)
      from pg_namespace n where n.nspname = p_name;
  elsif p_kind = 'function' then
    return query select format('execute %s', p.oid::regprocedure), format('grant execute on function %s to %s;', p.oid::regprocedure, v_role)
      from pg_proc p where p.proname = p_name and not has_function_privilege(p.oid, 'execute');
  else
    select c.oid, format('%I.%I', n.nspname, c.relname) into v_rel, v_path from pg_class c join pg_namespace n on n.oid = c.relnamespace
     where c.relname = p_name and (c.relkind = 'S') = (p_kind = 'sequence') and c.relkind in ('r', 'p', 'v', 'm', 'f', 'S')
       and n.nspname !~ '^pg_(toast|temp)'
     order by p_statement ~* format('\m%s"?\."?%s', n.nspname, c.relname) desc, n.nspname = setting('app_schema') desc, n.nspname limit 1;
    if v_rel is null then
      return;
    elsif p_kind = 'sequence' then
      return query select format('use sequence %s', v_path), format('grant usage on sequence %s to %s;', v_path, v_role);
    else
      v_lacking := array(select r from unnest(array['delete', 'insert', 'select', 'truncate', 'update']) r
                          where not has_table_privilege(v_rel, r) and (r <> 'truncate' or r = any (p_rights)));
      v_asked := array(select r from unnest(v_lacking) r where r = any (p_rights));
      v_asked := case when v_asked <> '{}' then v_asked else v_lacking end;
      if v_asked <> '{}' then
        return query select format('%s on table %s', array_to_string(v_asked, ', '), v_path),
                            format('grant %s on table %s to %s;', array_to_string(v_asked, ', '), v_path, v_role);
      end if;
    end if;
  end if;
end $$;
