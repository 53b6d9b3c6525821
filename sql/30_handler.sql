-- The handler catalogue: what `anton migrate` and psql put into it, and feeding existing rows to a handler.

-- put_handler(definition) -> handler id
-- Inserts or updates a handler by (app, name). Keys: app, name, table, kind, ops, and the columns of handler;
-- limit: calls or records at a time over all processes; per: the column for each of whose values concurrency is the limit, or debounce
-- counts; debounce: how long a key must be at rest, and max_wait at most after its first change, default 15 times that; rate: "100/m"; priority: see
-- set_priority(); ordered, on_dead: see sql/27_order.sql; was: the name it had before. Raises NT004 for a filter or an option that cannot work. Then run sync_triggers().
create or replace function put_handler(d jsonb) returns int language plpgsql volatile set search_path from current as $$
declare
  v_table int := watch(d ->> 'table'); v_id int; w watched; v_column text; v_bad text;
  v_debounce interval := (d ->> 'debounce')::interval;
  v_wait interval := coalesce((d ->> 'max_wait')::interval, 15 * v_debounce, '0');
  v_ordered boolean := coalesce((d ->> 'ordered')::boolean, false);
  v_ops text[] := array(select jsonb_array_elements_text(d -> 'ops'));
  v_columns text[] := case when jsonb_typeof(d -> 'columns') = 'array' then array(select jsonb_array_elements_text(d -> 'columns')) end;
begin
  select * into w from watched where id = v_table;
  if d ->> 'was' is not null then
    update handler set name = d ->> 'name' where app = d ->> 'app' and name = d ->> 'was'
       and not exists (select from handler o where o.app = d ->> 'app' and o.name = d ->> 'name');
  end if;
  if w.key_kind = 'none' and v_ops && array['new', 'updated', 'deleted'] and exists (select from dbt_model where table_id = v_table) then
    raise exception using errcode = 'NT004',
      message = format('handler "%s": dbt model %I.%I has no key, so nobody can tell which of its records are %s', d ->> 'name', w.schema_name, w.table_name, array_to_string(v_ops, ' or ')),
      hint = case when (select relkind from pg_class where oid = w.relid) in ('v', 'm') then 'it is a view: listen to on_rebuilt, or make it a table with a key'
                  else 'give one column the tests unique and not_null, or the model a primary_key constraint in its contract; on_rebuilt needs none' end;
  end if;
  if w.key_kind = 'none' and v_ops && array['updated', 'deleted'] then
    raise exception using errcode = 'NT004',
      message = format('handler "%s": table %I.%I has no primary key, so its updated and deleted records cannot be handled', d ->> 'name', w.schema_name, w.table_name),
      hint = format('alter table %I.%I add primary key (…)', w.schema_name, w.table_name);
  end if;
  foreach v_column in array coalesce(v_columns, '{}')       -- without a model, per may be a name in the data
      || array(select d ->> 'per' where d ->> 'per' is not null and not exists (select from table_columns(w.relid) where name = 'data' and type = 'jsonb')) loop
    if w.relid <> 0 and v_column not in (select name from table_columns(w.relid)) then
      raise exception using errcode = 'NT004', message = format('handler "%s": table %I.%I has no column "%s"', d ->> 'name', w.schema_name, w.table_name, v_column),
        hint = 'its columns: ' || (select string_agg(name, ', ') from table_columns(w.relid));
    end if;
  end loop;
  if v_debounce is not null then
    v_bad := case when v_debounce <= '0' then format('debounce %s: more than 0 is allowed, such as 2s', v_debounce)
                  when v_ops not in (array['new'], array['updated']) then format('debounce with the events %s: it is for new, or for updated records, as only they have a latest state', array_to_string(v_ops, ' '))
                  when d ->> 'read' = 'change' then 'debounce with read change: it gets the latest state, read now'
                  when w.key_kind = 'none' and w.relid <> 0 then format('debounce on table %I.%I, which has no primary key to tell its records apart', w.schema_name, w.table_name)
                  when v_wait < v_debounce then format('max_wait %s is less than debounce %s', v_wait, v_debounce) end;
    if v_bad is not null then
      raise exception using errcode = 'NT004', message = format('handler "%s": %s', d ->> 'name', v_bad);
    end if;
  end if;
  if d ->> 'per' is not null then
    v_bad := case when d ->> 'rate' is not null and v_debounce is not null
                    then format('rate "%s" with per "%s", which is what comes to rest', d ->> 'rate', d ->> 'per')
                  when d ->> 'rate' is not null and not coalesce((d ->> 'each_record')::boolean, false)
                    then format('rate "%s" with per "%s": a rate for each value is for functions with each=True', d ->> 'rate', d ->> 'per')
                  when d ->> 'limit' is not null and not coalesce((d ->> 'each_record')::boolean, false)
                    then format('concurrency %s with per "%s": a limit for each value is for functions with each=True', d ->> 'limit', d ->> 'per') end;
    if v_bad is not null then
      raise exception using errcode = 'NT004', message = format('handler "%s": %s', d ->> 'name', v_bad), hint = 'leave one of them out';
    end if;
  end if;
  if (d ->> 'ordered')::boolean and w.key_kind = 'none' and d ->> 'per' is null and w.relid <> 0 then
    raise exception using errcode = 'NT004',
      message = format('handler "%s": table %I.%I has no primary key, so there is nothing to keep its records in order by', d ->> 'name', w.schema_name, w.table_name),
      hint = format('alter table %I.%I add primary key (…), or per= with one of its columns', w.schema_name, w.table_name);
  end if;
  if d ->> 'where_sql' is not null and w.relid <> 0 then
    perform check_where(v_table, bind(d ->> 'where_sql', coalesce(d -> 'params', '{}')), v_ops && array['updated', 'deleted']);
  end if;
  update handler set ordered = false where app = d ->> 'app' and name = d ->> 'name' and ordered and per is distinct from d ->> 'per' returning id into v_id;
  if found then
    perform settle_turns(v_id);                             -- of another column: nothing waits in the old lines
  end if;
  insert into handler as h (app, name, table_id, kind, ops, each_record, read, where_sql, columns, body, params, into_tables, batch,
                            max_wait, concurrency, timeout, attempts, backoff, max_lag, options, per, debounce, ordered, on_dead, model_id)
  values (d ->> 'app', d ->> 'name', v_table, coalesce(d ->> 'kind', 'python'), v_ops, coalesce((d ->> 'each_record')::boolean, false),
          coalesce(d ->> 'read', case when v_debounce is not null then 'now' when v_ops = array['new'] and coalesce(d ->> 'kind', 'python') = 'python' then 'now' else 'change' end),
          d ->> 'where_sql', v_columns, d ->> 'body', coalesce(d -> 'params', '{}'),
          case when jsonb_typeof(d -> 'into_tables') = 'array' then array(select jsonb_array_elements_text(d -> 'into_tables')) else '{}' end,
          coalesce((d ->> 'batch')::int, 1000), v_wait, (d ->> 'concurrency')::int,
          coalesce((d ->> 'timeout')::interval, '5 min'), coalesce((d ->> 'attempts')::int, 5), coalesce((d ->> 'backoff')::interval, '1 s'),
          (d ->> 'max_lag')::interval, coalesce(d -> 'options', '{}'), d ->> 'per', v_debounce, v_ordered, coalesce(d ->> 'on_dead', 'skip'),
          (select m.id from model m where m.app = d ->> 'app' and m.name = d ->> 'model'))
  on conflict (app, name) do update
     set enabled_at = case when h.enabled and h.table_id = excluded.table_id and h.ops @> excluded.ops and h.where_sql is not distinct from excluded.where_sql
                                and h.params = excluded.params and h.columns is not distinct from excluded.columns then h.enabled_at end,
         table_id = excluded.table_id, kind = excluded.kind, ops = excluded.ops, each_record = excluded.each_record, read = excluded.read,
         where_sql = excluded.where_sql, columns = excluded.columns, body = excluded.body, params = excluded.params,
         into_tables = excluded.into_tables, batch = excluded.batch, max_wait = excluded.max_wait, concurrency = excluded.concurrency,
         timeout = excluded.timeout, attempts = excluded.attempts, backoff = excluded.backoff, max_lag = excluded.max_lag,
         options = excluded.options, per = excluded.per, debounce = excluded.debounce, ordered = excluded.ordered, on_dead = excluded.on_dead,
         model_id = excluded.model_id, enabled = true, missing_at = null
  returning id into v_id;
  perform settle_turns(v_id);
  perform set_priority(v_id, d ->> 'priority');
  perform set_limit(v_id, case when (d ->> 'ordered')::boolean or d ->> 'per' is not null and coalesce(d ->> 'limit', d ->> 'rate') is not null then 1 else (d ->> 'limit')::int end);
  perform set_rate(v_id, d ->> 'rate');
  return v_id;
end $$;

-- handler(name, table, ops, body, options) -> handler id
-- A SQL handler made from psql: ops is 'new', 'updated', 'deleted', 'changes', 'truncate', 'rebuilt', 'failed' or several with spaces.
-- options: {"where", "columns", "batch", "max_wait", "attempts", "timeout", "backoff", "read", "params", "max_lag", "concurrency", "priority", "debounce", "per", "rate"}. Owned by app 'sql'.
create or replace function handler(p_name text, p_table text, p_ops text, p_body text, options jsonb default '{}') returns int
language plpgsql volatile set search_path from current as $$
declare
  v_known text[] := array['where', 'columns', 'batch', 'attempts', 'timeout', 'backoff', 'read', 'params', 'max_lag', 'since', 'into', 'concurrency', 'priority', 'max_wait', 'debounce', 'per', 'rate'];
  v_bad text; v_id int; v_table int; v_old int;
  v_ops text[] := case when p_ops = 'changes' then array['new', 'updated', 'deleted'] else regexp_split_to_array(trim(p_ops), '[\s,]+') end;
begin
  if options ?| array['ordered', 'on_dead'] then
    raise exception using errcode = 'NT004', message = format('handler "%s": %s is for handlers of single records', p_name, case when options ? 'ordered' then 'ordered' else 'on_dead' end),
      hint = 'SQL is given batches; write it in Python with each=True, or take the option out';
  end if;
  select k into v_bad from jsonb_object_keys(options) k where k <> all (v_known) limit 1;
  if v_bad is not null then
    raise exception using errcode = 'NT004', message = format('handler "%s": unknown option "%s"', p_name, v_bad),
      hint = 'known: ' || array_to_string(v_known, ', ');
  end if;
  if not v_ops <@ array['new', 'updated', 'deleted', 'truncate', 'rebuilt', 'failed'] then
    raise exception using errcode = 'NT004', message = format('handler "%s": unknown event in "%s"', p_name, p_ops),
      hint = 'new, updated, deleted, truncate, changes, rebuilt or failed';
  end if;
  if options ? 'per' and not options ? 'debounce' then
    raise exception using errcode = 'NT004', message = format('handler "%s": per "%s" without debounce', p_name, options ->> 'per'),
      hint = 'in SQL per says of which column debounce is; a limit or a rate for each key is for functions with each=True';
  end if;
  select table_id into v_old from handler where app = 'sql' and name = p_name;
  v_id := put_handler(jsonb_strip_nulls(jsonb_build_object(
    'app', 'sql', 'name', p_name, 'table', p_table, 'kind', 'sql', 'ops', v_ops, 'body', p_body, 'where_sql', options -> 'where',
    'columns', options -> 'columns', 'batch', options -> 'batch', 'attempts', options -> 'attempts', 'timeout', options -> 'timeout',
    'backoff', options -> 'backoff', 'read', options -> 'read', 'params', options -> 'params', 'max_lag', options -> 'max_lag', 'concurrency', options -> 'concurrency', 'limit', options -> 'concurrency',
    'max_wait', options -> 'max_wait', 'priority', options -> 'priority', 'debounce', options -> 'debounce', 'per', options -> 'per', 'rate', options -> 'rate', 'options', options)));
  select table_id into v_table from handler where id = v_id;
  perform sync_triggers(v_table);
  if v_old is distinct from v_table and v_old is not null then
    perform sync_triggers(v_old);
  end if;
  if options ->> 'since' = 'beginning' then
    perform backfill(p_name);
  end if;
  return v_id;
end $$;

-- backfill(handler): feeds the rows that exist to a handler of new records, each once, lazily, beside concurrent writes
-- Each means: those it has not been given. From here on its trigger notes in "fed" what it captures; what it captured
-- before is found by its traces, which are kept for the retention time, and by integer keys above those of its enabling.
create or replace function backfill(p_handler text) returns void language plpgsql volatile set search_path from current as $$
declare v_id int := find_handler(p_handler); h handler; w watched;
begin
  perform pg_advisory_xact_lock(1634628723, (select oid::int from pg_namespace where nspname = current_schema()));   -- beside a reconcile() both would take a missed record
  select * into h from handler where id = v_id for update;
  select * into w from watched where id = h.table_id;
  if not 'new' = any (h.ops) or w.key_kind = 'none' then
    raise exception using errcode = 'NT004', message = format('handler "%s" cannot be backfilled', p_handler),
      hint = case when w.key_kind = 'none' then 'its table has no key' else 'it does not handle new records' end;
  end if;
  if h.feeding or w.relid = 0 then                         -- a dbt model that is not built yet: its first build calls this again
    return;
  end if;
  delete from fed where handler_id = v_id;
  insert into backfill (handler_id, started_at) values (v_id, now())
  on conflict (handler_id) do update set after_key = null, fed = 0, started_at = excluded.started_at, finished_at = null;
  update handler set feeding = true where id = v_id;
  perform write_triggers(h.table_id, true);
  if h.enabled_at is not null then
    insert into fed (handler_id, key) select v_id, key from traced(v_id) key on conflict do nothing;
  end if;
end $$;

-- feed(handler, records) -> records fed of the next so many rows; null when it is done
create or replace function feed(p_handler int, p_limit int default 10000) returns bigint language plpgsql volatile set search_path from current as $$
declare
  b backfill; h handler; w watched; v_now timestamptz := now(); v_row text; v_after text; v_bounds text; v_last jsonb; v_keys jsonb; v_n bigint;
begin
  select * into b from backfill where handler_id = p_handler and finished_at is null for update skip locked;
  if b.handler_id is null then
    return null;
  end if;
  select * into h from handler where id = p_handler;
  select * into w from watched where id = h.table_id;
  select string_agg(format('n.%I', c), ', ' order by o), string_agg(format('($1 ->> %s)::%s', o - 1, w.key_types[o]), ', ' order by o)
    into v_row, v_after from unnest(w.key_columns) with ordinality x (c, o);
  v_bounds := concat_ws(' and ', case when b.after_key is not null then format('(%s) > (%s)', v_row, v_after) end,
                        case when w.key_kind = 'id' then format('%s <= %s', v_row, h.enabled_key) end);
  -- one statement, so that a row and the note of its trigger are seen together or not at all
  execute format($f$
    with page as materialized (select new.*, row_number() over () as anton_row from (select n.* from %1$I.%2$I n %3$s order by %4$s limit %5$s) new)
    select (select %6$s from page new order by anton_row desc limit 1),
           (select jsonb_agg(k.key order by new.anton_row) from page new cross join lateral (select %6$s) k (key)%9$s
             where (select (%7$s)::boolean from (select new.*) as row_) and not exists (select from fed where handler_id = %8$s and fed.key = k.key))$f$,
    w.schema_name, w.table_name, 'where ' || nullif(v_bounds, ''), v_row, p_limit, key_json(w, 'new'), coalesce(bind(h.where_sql, h.params), 'true'), p_handler, other_row(w, h.where_sql, 'old'))
    into v_last, v_keys using b.after_key;
  if v_last is null then
    update backfill set finished_at = v_now where handler_id = p_handler;
    update handler set feeding = false where id = p_handler;
    perform write_triggers(h.table_id, false);
    delete from fed where handler_id = p_handler;
    return null;
  end if;
  v_n := coalesce(jsonb_array_length(v_keys), 0);
  if v_n > 0 then
    perform queue_keys(h, w, v_keys);
  end if;
  update backfill set after_key = v_last, fed = fed + v_n where handler_id = p_handler;
  return v_n;
end $$;
