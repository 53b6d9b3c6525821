-- Capture: from any write to a watched table to thin jobs, in the writer's own commit.
--
-- sync_triggers(table) writes one trigger function per table and event from the handler catalogue. Handlers with the
-- same filter form a group: its keys (and images, where one of them asks) are stored once, and each handler gets jobs
-- that point into them. Statements of at most 16 records without images put their keys into the job itself.
-- Filter and image code runs in an exception block: when it fails, the keys alone are captured and the change is
-- marked degraded; when even the keys fail, a change of op x tells the reconciler. The user's write goes on.

-- ring(): wakes the worker that announced itself as idle, if there is one; never waits
create or replace function ring() returns void language plpgsql volatile set search_path from current as $$
declare d record := doorbell();
begin
  if d.enabled and not pg_try_advisory_xact_lock_shared(d.k1, d.k2) then
    perform pg_notify(d.channel, '');
  end if;
end $$;

-- resolve(name) -> relation
-- orders means <app_schema>.orders; shop.orders and "Order" are taken as SQL takes them. NT002 when there is none.
create or replace function resolve(p_table text) returns regclass language plpgsql stable set search_path from current as $$
declare v_parts text[] := parse_ident(p_table); v_rel regclass; v_near text;
begin
  if cardinality(v_parts) = 1 then
    v_parts := array[setting('app_schema'), v_parts[1]];
  end if;
  v_rel := to_regclass(format('%I.%I', v_parts[1], v_parts[2]));
  if v_rel is null then
    select string_agg(format('%I.%I', schemaname, tablename), ', ' order by tablename) into v_near
      from pg_tables where schemaname = v_parts[1] and left(tablename, 3) = left(v_parts[2], 3);
    raise exception using errcode = 'NT002', message = format('no table "%s" in database "%s"', p_table, current_database()),
      hint = coalesce('did you mean ' || v_near || '?', 'create it, or declare it with a model; then run: anton migrate');
  end if;
  return v_rel;
end $$;

-- table_columns(relation) -> its columns, with how each may be compared and made text
create or replace function table_columns(p_rel oid)
returns table (name text, type text, comparable boolean, fixed boolean, plain boolean)
language sql stable set search_path from current as $$
  select a.attname::text, format_type(a.atttypid, a.atttypmod),
         exists (select from pg_opclass oc join pg_am am on am.oid = oc.opcmethod
                  where am.amname in ('btree', 'hash') and oc.opcdefault
                    and (oc.opcintype = b.base or (bt.typtype = 'e' and oc.opcintype = 'anyenum'::regtype)
                         or (bt.typtype = 'r' and oc.opcintype = 'anyrange'::regtype)
                         or (b.base = 'varchar'::regtype and oc.opcintype = 'text'::regtype))),
         bt.typlen > 0,
         b.base in ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'text'::regtype, 'varchar'::regtype, 'bool'::regtype,
                    'uuid'::regtype, 'jsonb'::regtype, 'json'::regtype, 'numeric'::regtype) or bt.typtype = 'e'
    from pg_attribute a
    join pg_type t on t.oid = a.atttypid
    cross join lateral (select case when t.typtype = 'd' then t.typbasetype else t.oid end as base) b
    join pg_type bt on bt.oid = b.base
   where a.attrelid = p_rel and a.attnum > 0 and not a.attisdropped
   order by a.attnum
$$;

-- watch(table) -> table id
-- Looks at a table and notes its key: the primary key, else a unique index of NOT NULL columns, else none (then only
-- new records can be handled, by image). Call it again after the table changed.
create or replace function watch(p_table text) returns int language plpgsql volatile set search_path from current as $$
declare
  v_rel regclass := resolve(p_table);
  v_schema text; v_name text; v_keys text[]; v_types text[]; v_kind text; v_fetch text; v_id int;
begin
  select n.nspname, c.relname into v_schema, v_name from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = v_rel;
  if (select relkind from pg_class where oid = v_rel) not in ('r', 'p') then
    raise exception using errcode = 'NT002', message = format('"%s" is no table', p_table),
      hint = 'only ordinary and partitioned tables fire events';
  end if;
  select array_agg(a.attname::text order by k.pos), array_agg(format_type(a.atttypid, a.atttypmod) order by k.pos) into v_keys, v_types
    from (select i.* from pg_index i
           where i.indrelid = v_rel and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null
             and (i.indisprimary or not exists (
               select from unnest(i.indkey[0:i.indnkeyatts - 1]) c join pg_attribute a on a.attrelid = v_rel and a.attnum = c where not a.attnotnull))
           order by i.indisprimary desc, i.indnkeyatts, i.indexrelid limit 1) i
    cross join lateral unnest(i.indkey[0:i.indnkeyatts - 1]) with ordinality k (num, pos)
    join pg_attribute a on a.attrelid = v_rel and a.attnum = k.num;
  v_kind := case when v_keys is null then 'none'
                 when cardinality(v_keys) = 1 and v_types[1] in ('smallint', 'integer', 'bigint') then 'id' else 'key' end;
  if v_kind = 'id' then
    v_fetch := format('select t.xmin as _xmin, t.* from %s t where t.%I = any ($1::bigint[])', v_rel::text, v_keys[1]);
  elsif v_kind = 'key' then
    select format('select k.o as _ord, t.xmin as _xmin, t.* from jsonb_array_elements($1::jsonb) with ordinality k (v, o) join %s t on %s',
                  format('%I.%I', v_schema, v_name), string_agg(format('t.%I = (k.v ->> %s)::%s', c, o - 1, v_types[o]), ' and ' order by o))
      into v_fetch from unnest(v_keys) with ordinality x (c, o);
  end if;
  if v_kind = 'id' then
    v_fetch := format('select t.xmin as _xmin, t.* from %I.%I t where t.%I = any ($1::bigint[])', v_schema, v_name, v_keys[1]);
  end if;
  insert into watched as w (schema_name, table_name, relid, key_columns, key_types, key_kind, fetch_sql)
  values (v_schema, v_name, v_rel, coalesce(v_keys, '{}'), coalesce(v_types, '{}'), v_kind, v_fetch)
  on conflict (schema_name, table_name) do update
     set relid = excluded.relid, key_columns = excluded.key_columns, key_types = excluded.key_types,
         key_kind = excluded.key_kind, fetch_sql = excluded.fetch_sql
  returning id into v_id;
  return v_id;
end $$;

-- bind(sql, params) -> sql with every {name} that params knows as a typed literal
-- params: {name: [type, text]}. One pass, so a value can never be read as a placeholder.
create or replace function bind(p_sql text, p_params jsonb) returns text language sql immutable strict set search_path from current as $$
  select coalesce(string_agg(
           case when m[1] is not null and p_params ? m[1]
                then format('(%L::%s)', p_params -> m[1] ->> 1, (p_params -> m[1] ->> 0)::regtype) else m[2] end, '' order by o), '')
    from (select regexp_match(x[1], '^\{([A-Za-z_]\w*)\}$') as name, x[1] as raw, o
            from regexp_matches(p_sql, '\{[A-Za-z_]\w*\}|[^{]+|\{', 'g') with ordinality r (x, o)) p
    cross join lateral (select array[p.name[1], p.raw]) v (m)
$$;

-- check_where(table, where, updated): raises NT004 for what cannot be a filter: names that do not resolve, VOLATILE functions
create or replace function check_where(p_table int, p_where text, p_updated boolean) returns void
language plpgsql volatile set search_path from current as $$
declare v_rel text; v_bad text; v_error text;
begin
  select format('%I.%I', schema_name, table_name) into v_rel from watched where id = p_table;
  begin
    execute format('create temp view anton_check_where as select (select (%s)::boolean from (select n.*) as new) as ok from %s n%s',
                   p_where, v_rel, case when p_updated then format(', %s old', v_rel) else '' end);
  exception when others then
    get stacked diagnostics v_error = message_text;
    raise exception using errcode = 'NT004', message = format('where "%s" does not fit table %s: %s', p_where, v_rel, v_error),
      hint = case when not p_updated and p_where ~* '\mold\.' then 'old. is there for updated records only' else 'it is SQL on the new row; write functions and types outside pg_catalog with their schema' end;
  end;
  select string_agg(distinct p.proname, ', ') into v_bad
    from pg_rewrite r cross join lateral regexp_matches(r.ev_action::text, ':(?:funcid|opfuncid|aggfnoid|winfnoid) (\d+)', 'g') m
    join pg_proc p on p.oid = m[1]::oid
   where r.ev_class = 'pg_temp.anton_check_where'::regclass and p.provolatile = 'v';
  drop view pg_temp.anton_check_where;
  if v_bad is not null then
    raise exception using errcode = 'NT004', message = format('where "%s" uses %s, which is VOLATILE', p_where, v_bad),
      hint = 'a filter must give the same answer for the same row; use STABLE or IMMUTABLE functions';
  end if;
end $$;

-- is_plain(type) -> whether JSON holds its values exactly, whatever the session's settings
create or replace function is_plain(p_type text) returns boolean language sql stable strict set search_path from current as $$
  select t.typtype = 'e' or (case when t.typtype = 'd' then t.typbasetype else t.oid end) in (
           'int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype, 'text'::regtype, 'varchar'::regtype, 'bpchar'::regtype,
           'bool'::regtype, 'uuid'::regtype, 'date'::regtype, 'timestamp'::regtype, 'timestamptz'::regtype)
    from pg_type t where t.oid = p_type::regtype
$$;

-- key_json(table, row) -> SQL that makes the key of a row: jsonb_build_array(row.k1, row.k2::text)
create or replace function key_json(w watched, p_row text) returns text language sql stable set search_path from current as $$
  select format('jsonb_build_array(%s)', string_agg(format('%s.%I%s', p_row, c, case when not is_plain(t) then '::text' end), ', ' order by o))
    from unnest(w.key_columns, w.key_types) with ordinality x (c, t, o)
$$;

-- key_moved(table) -> SQL that tells whether old and new have different keys
create or replace function key_moved(w watched) returns text language sql stable set search_path from current as $$
  select string_agg(format('old.%1$I is distinct from new.%1$I', c), ' or ' order by o) from unnest(w.key_columns) with ordinality x (c, o)
$$;

-- text_size(column, type, fixed) -> SQL for the bytes that a value takes in an image, at least
create or replace function text_size(p_value text, p_type text, p_fixed boolean) returns text language sql immutable set search_path from current as $$
  select case when not p_fixed then format('coalesce(octet_length(%s::text), 0) + 6', p_value)
              when p_type in ('boolean', 'smallint', 'integer', 'date') then '16'
              when p_type in ('bigint', 'real', 'double precision') then '28' else '42' end
$$;

-- image_settings(table): SET clauses that make keys and text images independent of the writer's session, where their types need them
create or replace function image_settings(w watched, p_images boolean) returns text language sql stable set search_path from current as $$
  select case when not bool_or(case when t.name = any (w.key_columns) then not is_plain(t.type) or (p_images and not t.plain) else p_images and not t.plain end) then '' else
    $s$ set datestyle = 'ISO, YMD' set intervalstyle = 'postgres' set extra_float_digits = '1' set bytea_output = 'hex' set timezone = 'UTC' set lc_monetary = 'C'$s$ end
    from table_columns(w.relid) t
$$;

-- capture_pairs() -> FROM clause of an update's rows: new and old
-- Both transition tables hold the pairs in the same order, so a pair is two rows of one number: right for any change
-- of keys, and no slower than a join by key.
create or replace function capture_pairs() returns text language sql immutable set search_path from current as $$
  select '(select *, row_number() over () as anton_pair from new_records) new'
      || ' join (select *, row_number() over () as anton_pair from old_records) old on new.anton_pair = old.anton_pair'
$$;

-- capture_from(table, event, source, where) -> FROM clause of the rows of an event, and what names them: new, old
--   source  statement, or moved: pairs whose key changed
create or replace function capture_from(w watched, p_event text, p_source text, p_where text) returns text
language sql stable set search_path from current as $$
  select case when p_source = 'moved' then format('(select %s.* from %s where %s) %1$s', row_, capture_pairs(), key_moved(w))
              when p_event = 'updated' then format('%s and not (%s)', capture_pairs(), key_moved(w))
              else format('%s_records %1$s', row_) end
         || case when p_event <> 'updated' and p_where ~* format('\m%s\.', other)
              then format(' cross join (select (null::%I.%I).*) %s', w.schema_name, w.table_name, other) else '' end
    from (select case p_event when 'deleted' then 'old' else 'new' end as row_, case p_event when 'deleted' then 'new' else 'old' end as other) x
$$;

-- capture_fill(sql, from, texts, images, sizes) -> plpgsql that runs one way of storing many records
--   texts   what images are read as; images: how they are put together; sizes: bytes of one, to cut by
create or replace function capture_fill(p_sql text, p_from text, p_texts text default '', p_images text default 'null, null, null',
  p_sizes text default null) returns text language plpgsql immutable set search_path from current as $$
declare v_sql text := p_sql;
begin
  v_sql := replace(v_sql, '@sums@', case when p_sizes is null then ''
             else ', sum(case when bytes > 131072 then 0 else bytes end) over (order by rn rows unbounded preceding) as bytesum' end);
  v_sql := replace(v_sql, '@rows@', coalesce('(select *, ' || p_sizes || ' as bytes from r) r', 'r'));
  v_sql := replace(v_sql, '@cuts@', case when p_sizes is null then '' else ', case when bytes > 131072 then rn end, bytesum / $8' end);
  v_sql := replace(replace(replace(v_sql, '@images@', p_images), '@texts@', coalesce(p_texts, '')), '@from@', p_from);
  return format('execute %L using v_now, v_degraded, v_cause, v_depth, v_trace, v_tenant, greatest(4096, 8192 - v_keysize), greatest(131072, 262144 - v_size);', v_sql);
end $$;

-- capture_failed(table, event, source, handlers, bare, mend) -> plpgsql for when filter or images could not be had
-- Bad data: the keys alone. A table that has changed under us: the rows whole, as JSON that names its columns; mend()
-- captures them when the function is up to date. When even that fails, the reconciler is told.
create or replace function capture_failed(w watched, p_event text, p_source text, p_ids int[], p_bare text, p_mend boolean) returns text
language plpgsql stable set search_path from current as $$
declare
  v_dirty text := format($f$
        insert into change (id, slot, at, xid, table_id, op, n, degraded, cause, depth, trace, tenant)
        values (nextval('change_seq'), slot(v_now), v_now, pg_current_xact_id(), %s, 'x', 0, v_degraded, v_cause, v_depth, v_trace, v_tenant);$f$, w.id);
  v_kept text;
begin
  if p_mend then
    return format($f$
    begin
      %s
    exception when others then%s
    end;$f$, p_bare, v_dirty);
  end if;
  v_kept := capture_fill(format($f$
        with r as (select jsonb_build_array(%s, %s) as row, row_number() over () as rn from @from@),
        c as (
          insert into change (id, slot, at, xid, table_id, op, n, keys, degraded, cause, depth, trace, tenant)
          select nextval('change_seq'), slot($1), $1, pg_current_xact_id(), %s, 'x', count(*),
                 jsonb_build_object('event', %L, 'source', %L, 'handlers', to_jsonb(%L::int[]), 'rows', jsonb_agg(row)), $2, $3, $4, $5, $6
            from r group by (rn - 1) / 100
          returning id)
        insert into job (handler_id, change_id, at, lo, hi, op) select 0, id, $1, 1, 1, 'x' from c$f$,
    case when p_event = 'deleted' and p_source = 'statement' then 'null' else 'to_jsonb(new)' end,
    case when p_event = 'new' and p_source = 'statement' then 'null' else 'to_jsonb(old)' end,
    w.id, p_event, p_source, p_ids),
    case when p_event = 'updated' or p_source = 'moved' then capture_pairs() else capture_from(w, p_event, p_source, null) end);
  return format($f$
    if not v_broken then
      begin
        %s
      exception when others then
        v_broken := true;
      end;
    end if;
    if v_broken then
      begin
        %s
      exception when others then%s
        insert into job (handler_id, change_id, at, lo, hi, op) values (0, currval('change_seq'), v_now, 1, 1, 'x');
      end;
    end if;$f$, p_bare, v_kept, v_dirty);
end $$;

-- capture_group(table, event, source, handlers, batches, images, where, params, columns, first, mend) -> plpgsql that captures for one group
--   mend  the rows are those of a change that was kept whole, see mend()
create or replace function capture_group(w watched, p_event text, p_source text, p_ids int[], p_batches int[], p_images boolean,
  p_where text, p_params jsonb, p_columns text[], p_first boolean, p_mend boolean) returns text language plpgsql stable set search_path from current as $$
declare
  v_op text := case when p_ids = '{}' then 'p' else left(p_event, 1) end;
  v_row text := case p_event when 'deleted' then 'old' else 'new' end;   -- whose columns the filter sees
  v_idkey boolean := w.key_kind = 'id';
  v_keycol text := case when w.key_kind = 'id' then 'ids' else 'keys' end;
  v_from text := capture_from(w, p_event, p_source, p_where);
  v_key text; v_keys text; v_filter text := ''; v_keysize text; v_jobs text;
  v_cols text[]; v_texts text; v_sizes text; v_rawsize text; v_news text := 'null'; v_olds text := 'null'; v_keyrows int := 1000; v_wide boolean := false;
  v_small text; v_plain text; v_grouped text; v_bare text; v_evaluate text; v_store text; v_columns text; v_shape text; v_large text; v_error text;
begin
  if v_idkey then
    v_key := format('%s.%I::bigint', v_row, w.key_columns[1]);
    v_keys := 'array_agg(key)';
  elsif w.key_kind = 'key' then
    v_key := key_json(w, v_row);
    v_keys := 'jsonb_agg(key)';
    if exists (select from table_columns(w.relid) t where t.name = any (w.key_columns) and not (t.fixed and is_plain(t.type))) then
      select '12 + ' || string_agg(format('octet_length(%s.%I::text) + 4', v_row, c), ' + ' order by o)
        into v_keysize from unnest(w.key_columns) with ordinality x (c, o);
    else                                                 -- no key is longer than any other: cut by count
      v_keyrows := least(1000, 8192 / (12 + 40 * cardinality(w.key_columns)));
    end if;
  else
    v_key := 'null';
    v_keys := 'null::jsonb';
  end if;
  if p_images then
    select array_agg(name), string_agg(text_size(quote_ident(name), type, fixed), ' + '),
           string_agg(case when p_event = 'deleted' then '' else format(', new.%I::text as n%s', name, o) end
                   || case when p_event = 'new' then '' else format(', old.%I::text as o%s', name, o) end, ''),
           string_agg(concat_ws(' + ', case when p_event <> 'deleted' then text_size('n' || o, type, fixed) end,
                                       case when p_event <> 'new' then text_size('o' || o, type, fixed) end), ' + '),
           case when p_event <> 'deleted' then format('array[%s]', string_agg(format('array_agg(n%s)', o), ', ' order by o)) else 'null::text[]' end,
           case when p_event <> 'new' then format('array[%s]', string_agg(format('array_agg(o%s)', o), ', ' order by o)) else 'null::text[]' end,
           bool_or(not fixed)
      into v_cols, v_rawsize, v_texts, v_sizes, v_news, v_olds, v_wide
      from (select *, row_number() over () as o from table_columns(w.relid)) c;
  end if;
  v_columns := quote_nullable(v_cols::text) || '::text[]';
  if p_event = 'updated' then                            -- an update that changed nothing watched is no event
    select format(' and (%s)', string_agg(
             case when comparable then format('new.%1$I is distinct from old.%1$I', name)
                  else format('new.%1$I::text is distinct from old.%1$I::text', name) end, ' or '))
      into v_filter from table_columns(w.relid)
     where p_columns is null or name = any (p_columns) or not p_columns <@ (select array_agg(name) from table_columns(w.relid));   -- one is gone: watch all
  end if;
  if p_where is not null then
    begin
      execute format('select %s from %I.%I n, %2$I.%3$I old, lateral (select n.*) new limit 0', format('(select (%s)::boolean from (select n.*) as row_)', bind(p_where, p_params)),
        w.schema_name, w.table_name);
    exception when others then
      v_error := sqlerrm;
    end;
    v_filter := coalesce(v_filter, '') || format(' and (select (%s)::boolean from (select %s.*) as row_)', bind(p_where, p_params), v_row);
  end if;
  v_filter := coalesce('where true' || nullif(v_filter, ''), '');
  v_jobs := format('unnest(%L::int[], %L::int[]) h (id, b)', p_ids, p_batches);
  if (p_images or (p_event = 'updated' and p_columns is null)) and not p_mend then    -- a column added since would be left out in silence
    v_shape := format($f$
    if (select relnatts from pg_catalog.pg_class where oid = %s) <> %s then
      raise exception using errcode = '42703', message = %L;
    end if;$f$, w.relid, (select relnatts from pg_class where oid = w.relid), format('table %I.%I has new columns', w.schema_name, w.table_name));
  end if;

  -- one record is the commonest statement of all: no set functions, and one number for the change and the first job
  v_small := format($f$
    if v_k = 1 then
      insert into job (handler_id, id, change_id, at, cause, trace, lo, hi, depth, op, tenant, %1$s) values %5$s;
    else
    insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant, %1$s)
    select h.id, v_change, v_now, v_cause, v_trace, s, least(s + h.b - 1, v_k), v_depth, '%2$s', v_tenant, %3$s
      from %4$s, generate_series(1, v_k, h.b) s;
    end if;$f$, v_keycol, v_op,
    case when v_idkey then 'v_ids[s:s + h.b - 1]'
         else $k$case when h.b >= v_k then v_keys else jsonb_path_query_array(v_keys, '$[$a to $b]', jsonb_build_object('a', s - 1, 'b', least(s + h.b, v_k + 1) - 2)) end$k$ end,
    v_jobs,
    (select string_agg(format('(%s, %s, v_change, v_now, v_cause, v_trace, 1, 1, v_depth, ''%s'', v_tenant, %s)',
                              i, case when p_first and o = 1 then 'v_change' else $n$nextval('change_seq')$n$ end, v_op,
                              case when v_idkey then 'v_ids' else 'v_keys' end), ', ' order by o)
       from unnest(p_ids) with ordinality x (i, o)));
  v_plain := format($f$
    with c as (
      insert into change (id, slot, at, xid, table_id, op, n, ids, keys, cols, news, olds, cause, depth, trace, tenant)
      select nextval('change_seq'), slot(v_now), v_now, pg_current_xact_id(), %1$s, '%2$s', least(1000, v_k - s + 1), %4$s,
             v_cause, v_depth, v_trace, v_tenant
        from generate_series(1, v_k, 1000) s
      returning id, n)
    insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
    select h.id, c.id, v_now, v_cause, coalesce(v_trace, c.id), s, least(s + h.b - 1, c.n), v_depth, '%2$s', v_tenant
      from c, %3$s, generate_series(1, c.n, h.b) s;$f$, w.id, v_op, v_jobs,
    case when p_images then format('v_ids, v_keys, %s, v_news, v_olds', v_columns) else 'v_ids[s:s + 999], null, null, null, null' end);
  -- cut by count, and by bytes: a record of more than half a chunk stands alone, the others fill what the largest leaves
  v_grouped := format($f$
    with r as (select %1$s as key, row_number() over () as rn%2$s@texts@ from @from@),
    sized as (select *%3$s@sums@ from @rows@),
    c as (
      insert into change (id, slot, at, xid, table_id, op, n, %4$s, cols, news, olds, degraded, cause, depth, trace, tenant)
      select nextval('change_seq'), slot($1), $1, pg_current_xact_id(), %5$s, '%6$s', count(*), %7$s, @images@, $2, $3, $4, $5, $6
        from sized group by (rn - 1) / %8$s%9$s@cuts@
      returning id, n)
    insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
    select h.id, c.id, $1, $3, coalesce($5, c.id), s, least(s + h.b - 1, c.n), $4, '%6$s', $6
      from c, %10$s, generate_series(1, c.n, h.b) s$f$,
    v_key, ', ' || v_keysize || ' as keysize',
    case when v_keysize is not null then ', sum(case when keysize > 4096 then 0 else keysize end) over (order by rn rows unbounded preceding) as keysum' end,
    v_keycol, w.id, v_op, v_keys, v_keyrows, case when v_keysize is not null then ', case when keysize > 4096 then rn end, keysum / $7' end, v_jobs);
  v_bare := capture_fill(v_grouped, capture_from(w, p_event, p_source, null));
  v_large := capture_fill(v_grouped, v_from || ' ' || v_filter, v_texts, format('%s, %s, %s', v_columns, v_news, v_olds));
  if p_images then
    v_large := format($k$
      select max(%1$s) * %2$s into v_size from %3$s;
      if v_size <= 262 then
        %4$s
      else
        %5$s
      end if;$k$, v_rawsize, case p_event when 'updated' then 2 else 1 end,
      case when p_event = 'updated' then '(select * from new_records union all select * from old_records) x' else v_row || '_records' end,
      v_large, capture_fill(v_grouped, v_from || ' ' || v_filter, v_texts, format('%s, %s, %s', v_columns, v_news, v_olds), v_sizes));
  end if;
  if v_keysize is not null then
    v_large := format('select max(%s) into v_keysize from %s_records %2$s;', v_keysize, v_row) || v_large;
    v_bare := format('select max(%s) into v_keysize from %s;', v_keysize, capture_from(w, p_event, p_source, null)) || v_bare;
  end if;

  -- reading runs in exception blocks and, for small statements, writes nothing there: a subtransaction that writes
  -- costs a transaction id. Large statements are planned anew, with their real row counts.
  v_evaluate := case when v_idkey and not p_images
    then format('v_ids := array(select %s from %s %s); v_k := cardinality(v_ids);', v_key, v_from, v_filter)
    else format('select count(*), %s%s into v_k, %s%s from (select %s as key%s from %s %s) r;',
      case when v_idkey then 'array_agg(key)' else v_keys end, case when p_images then format(', %s, %s', v_news, v_olds) else '' end,
      case when v_idkey then 'v_ids' else 'v_keys' end, case when p_images then ', v_news, v_olds' else '' end,
      v_key, coalesce(v_texts, ''), v_from, v_filter) end;
  if not (v_idkey and not p_images and p_event <> 'updated' and p_source = 'statement') then
    v_large := format($f$
      v_memory := current_setting('work_mem');
      perform set_config('work_mem', '128MB', true);     -- chunks are built in memory: 3 times faster than spilled
      %s
      perform set_config('work_mem', v_memory, true);$f$, v_large);
    if v_keysize is not null or v_wide then              -- few, but long
      v_evaluate := v_evaluate || format($f$
      if v_k > 1 and (pg_column_size(v_keys) > 8192 or pg_column_size(v_news) > 131072 or pg_column_size(v_olds) > 131072) then
        v_k := 0;%s
      end if;$f$, v_large);
    end if;
    v_evaluate := format($f$if (select count(*) from (select from %s_records limit 17) x) <= 16 then
      %s
    else%s
    end if;$f$, v_row, v_evaluate, v_large);
  end if;
  if v_error is not null then                            -- the filter does not fit the table any more: the keys, for the worker to see
    v_evaluate := format('raise exception using message = %L;', v_error);
  end if;
  v_store := case
    when p_images then format('if v_k > 0 then %s end if;', v_plain)
    when v_idkey then format('if v_k > 16 then %s elsif v_k > 0 then %s end if;', v_plain, v_small)
    else format('if v_k > 0 then %s end if;', v_small) end;
  if w.key_kind = 'none' then
    v_bare := 'raise exception using message = v_degraded;';
  end if;
  return format($f$
  -- handlers %1$s
  v_degraded := null;
  v_broken := false;
  v_k := 0;
  begin%2$s
    %3$s
  exception when others then
    v_degraded := sqlerrm;
    v_broken := %4$s;
    v_k := 0;
  end;
  if v_degraded is null then
    %5$s
  else%6$s
  end if;$f$,
    array_to_string(p_ids, ', '), v_shape, v_evaluate,
    case when p_mend then 'false' else $k$sqlstate ~ '^(42|0A|XX)'$k$ end, v_store,
    capture_failed(w, p_event, p_source, p_ids, v_bare, p_mend));
end $$;

-- capture_groups(table, event, source, handlers, mend) -> plpgsql for all handlers of an event, or for these; null when there are none
-- Handlers with the same filter and columns form a group: what one record leaves is stored once for all of them.
create or replace function capture_groups(w watched, p_event text, p_source text, p_handlers int[] default null, p_mend boolean default false)
returns text language sql stable set search_path from current as $$
  select string_agg(capture_group(w, p_event, p_source, g.ids, g.batches, g.images, g.where_sql, g.params, g.columns, g.first, p_mend), '' order by g.ids[1])
    from (select row_number() over (order by min(h.id)) = 1 and p_source = 'statement' as first, array_agg(h.id order by h.id) as ids,
                 array_agg(least(h.batch, 1000) order by h.id) as batches,
                 bool_or(w.key_kind = 'none' or h.read = 'change' and not (p_event = 'new' and h.kind = 'sql')) as images, h.where_sql, h.params,
                 case when p_event = 'updated' then h.columns end as columns
            from handler h
           where h.table_id = w.id and case when p_handlers is null then h.enabled and p_event = any (h.ops) else h.id = any (p_handlers) end
           group by h.where_sql, h.params, case when p_event = 'updated' then h.columns end) g
$$;

-- capture_kept(table, event) -> plpgsql that keeps the old images of updated and deleted records
-- SQL handlers of new records get them as committed. Most are never changed while they wait, so no image is stored
-- with an insert: run_sql() takes the row as it is, or the first image kept here since.
create or replace function capture_kept(w watched, p_event text) returns text language sql stable set search_path from current as $$
  select case when w.key_kind <> 'none' and exists (
                select from handler h where h.table_id = w.id and h.enabled and h.kind = 'sql' and h.read = 'change' and 'new' = any (h.ops))
               and not exists (                            -- a handler of this event has them kept already
                select from handler h where h.table_id = w.id and h.enabled and p_event = any (h.ops) and h.read = 'change'
                   and h.where_sql is null and (p_event = 'deleted' or h.columns is null and exists (
                     -- those whose key changed are kept as deleted, or not at all
                     select from handler d where d.table_id = w.id and d.enabled and 'deleted' = any (d.ops) and d.read = 'change' and d.where_sql is null)))
              then capture_group(w, 'deleted', 'statement', '{}', '{}', true, null, '{}', null, false, false) end
$$;

-- capture_fed(table, event, source) -> plpgsql that keeps a running backfill from feeding these records again
create or replace function capture_fed(w watched, p_source text) returns text language sql stable set search_path from current as $$
  select format($f$
  begin
    insert into fed (handler_id, key) select h, %s from %s, unnest(%L::int[]) h on conflict do nothing;
  exception when others then
    raise warning 'anton: backfill of table %% may repeat records: %%', %L, sqlerrm;
  end;$f$, key_json(w, 'new'), capture_from(w, 'new', p_source, null), array_agg(id), w.table_name)
    from handler where table_id = w.id and feeding having count(*) > 0 and w.key_kind <> 'none'
$$;

-- capture_body(table, event) -> the plpgsql body of its trigger function for new | updated | deleted | moved
-- moved: the key of a record changed, so the old one is deleted and the new one is new. A condition on the trigger, or a
-- list of columns, would cost less, but with either Postgres refuses to alter the type of the key.
create or replace function capture_body(p_table int, p_event text) returns text language plpgsql stable set search_path from current as $$
declare w watched; d record := doorbell(); v_groups text; v_moved text := '';
begin
  select * into w from watched where id = p_table;
  if p_event = 'moved' and w.key_kind <> 'none' then
    v_groups := nullif(concat(capture_groups(w, 'deleted', 'moved'), '
  v_change := nextval(''change_seq'');' || capture_groups(w, 'new', 'moved')), '');
    select format($f$
  begin
    if not (%s) then
      return null;
    end if;
  exception when others then
    null;
  end;$f$, string_agg(format('array(select %1$I from new_records) is distinct from array(select %1$I from old_records)', c), ' or ' order by o))
      into v_moved from unnest(w.key_columns) with ordinality x (c, o);
  elsif p_event <> 'moved' then
    v_groups := nullif(concat(capture_groups(w, p_event, 'statement'), case when p_event in ('updated', 'deleted') then capture_kept(w, p_event) end), '');
  end if;
  if v_groups is null then
    return 'begin return null; end';
  end if;
  return format($f$#variable_conflict use_column
declare%s
begin%s
  v_now := now();
  v_change := nextval('change_seq');
  v_trace := v_change;
  if v_context <> '' then
    v_cause := split_part(v_context, ',', 1)::bigint;
    v_depth := split_part(v_context, ',', 2)::smallint;
    v_trace := nullif(split_part(v_context, ',', 3), '')::bigint;
  end if;%s%s%s
  return null;
end$f$, capture_variables(), v_moved, v_groups, case p_event when 'new' then capture_fed(w, 'statement') when 'moved' then capture_fed(w, 'moved') end,
    case when d.enabled then format($f$
  if not pg_try_advisory_xact_lock_shared(%s, %s) then
    perform pg_notify(%L, '');
  end if;$f$, d.k1, d.k2, d.channel) end);
end $$;

-- capture_variables() -> what the code of groups works with
create or replace function capture_variables() returns text language sql immutable set search_path from current as $$
  select $f$
  v_now timestamptz; v_change bigint; v_k int; v_size bigint; v_keysize bigint; v_memory text; v_ids bigint[]; v_keys jsonb; v_news text[]; v_olds text[];
  v_context text := current_setting('anton.context', true);
  v_tenant text := nullif(current_setting('anton.tenant', true), '');
  v_cause bigint; v_depth smallint := 0; v_trace bigint; v_degraded text; v_broken boolean;$f$
$$;

-- capture_truncate(table) -> body of the TRUNCATE trigger: one event for the table, no keys
-- Truncating a partitioned table fires it for each partition: once a statement is enough.
create or replace function capture_truncate(p_table int) returns text language sql stable set search_path from current as $$
  select case when count(*) = 0 then 'begin return null; end' else format($f$
declare
  v_now timestamptz := now(); v_change bigint := nextval('change_seq'); v_context text := current_setting('anton.context', true);
  v_statement text := '%1$s at ' || extract(epoch from statement_timestamp());
begin
  if current_setting('anton.truncated', true) = v_statement then
    return null;
  end if;
  perform set_config('anton.truncated', v_statement, true);
  insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
  select h, v_change, v_now, nullif(split_part(v_context, ',', 1), '')::bigint, v_change, 1, 1,
         coalesce(nullif(split_part(v_context, ',', 2), ''), '0')::smallint, 't', nullif(current_setting('anton.tenant', true), '')
    from unnest(%2$L::int[]) h;
  perform ring();
  return null;
end$f$, p_table, array_agg(id)) end
    from handler where table_id = p_table and enabled and 'truncate' = any (ops)
$$;

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
  if w.key_kind = 'none' and exists (select from handler where table_id = p_table and enabled and ops && array['updated', 'deleted']) then
    raise exception using errcode = 'NT004', message = format('table %I.%I has no primary key: its updated and deleted records cannot be handled', w.schema_name, w.table_name),
      hint = format('alter table %I.%I add primary key (…)', w.schema_name, w.table_name);
  end if;
  v_settings := image_settings(w, w.key_kind = 'none' or exists (select from handler where table_id = p_table and enabled and read = 'change'));
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

-- passes(handler, ids, keys, op) -> positions from 1 of the records of a degraded change that may pass its filter
-- The filter sees the row of now. A record passes where there is no saying: deleted, old. asked for, bad data again.
create or replace function passes(p_handler int, p_ids bigint[], p_keys jsonb, p_op "char" default 'n') returns int[] language plpgsql stable set search_path from current as $$
declare h handler; w watched; v_out int[]; v_one int[]; v_join text; v_sql text; v_n int := coalesce(cardinality(p_ids), jsonb_array_length(p_keys));
begin
  select * into h from handler where id = p_handler;
  select * into w from watched where id = h.table_id;
  if p_op = 'd' or h.where_sql is null or h.where_sql ~* '\mold\.' then
    return array(select generate_series(1, v_n));
  end if;
  if w.key_kind = 'id' then
    v_join := format('unnest($1) with ordinality k (v, o) join %I.%I n on n.%I = k.v', w.schema_name, w.table_name, w.key_columns[1]);
  else
    select format('jsonb_array_elements($2) with ordinality k (v, o) join %I.%I n on %s', w.schema_name, w.table_name,
                  string_agg(format('n.%I = (k.v ->> %s)::%s', c, o - 1, w.key_types[o]), ' and ')) into v_join
      from unnest(w.key_columns) with ordinality x (c, o);
  end if;
  v_sql := format('select array_agg(k.o::int order by k.o) from %s where (select (%s)::boolean from (select n.*) as new)', v_join, bind(h.where_sql, h.params));
  begin
    execute v_sql into v_out using p_ids, p_keys;
  exception when others then                               -- one record's data, or more
    for i in 1..v_n loop
      begin
        execute v_sql into v_one using p_ids[i:i], jsonb_build_array(p_keys -> (i - 1));
        v_out := v_out || case when v_one is not null then array[i] end;
      exception when others then
        v_out := v_out || i;
      end;
    end loop;
  end;
  return coalesce(v_out, '{}');
end $$;

-- images_sql(table, cols) -> SELECT ($1 change ids, $2 los, $3 his): change_id, ord, n_<col> ..., o_<col> ...
-- Images as committed, each column found by name and cast back to the type it has now; one dropped since stays text.
create or replace function images_sql(p_table int, p_cols text[]) returns text language plpgsql stable set search_path from current as $$
declare v_select text; v_news text; v_olds text; v_names text; v_rel oid;
begin
  select relid into v_rel from watched where id = p_table;
  select string_agg(format('(v.n%1$s)::%2$s as %3$I, (v.o%1$s)::%2$s as %4$I', c.o, coalesce(t.type, 'text'), 'n_' || c.name, 'o_' || c.name), ', ' order by c.o),
         string_agg(format('c.news[array_position(c.cols, %1$L):array_position(c.cols, %1$L)][j.lo:j.hi]', c.name), ', ' order by c.o),
         string_agg(format('c.olds[array_position(c.cols, %1$L):array_position(c.cols, %1$L)][j.lo:j.hi]', c.name), ', ' order by c.o),
         string_agg('n' || c.o, ', ' order by c.o) || ', ' || string_agg('o' || c.o, ', ' order by c.o)
    into v_select, v_news, v_olds, v_names
    from unnest(p_cols) with ordinality c (name, o) left join table_columns(v_rel) t on t.name = c.name;
  return format('select j.change_id, (v.ord + j.lo - 1)::int as ord, %s from unnest($1::bigint[], $2::int[], $3::int[]) j (change_id, lo, hi) join %I.change c on c.id = j.change_id cross join lateral unnest(%s, %s) with ordinality v (%s, ord)',
                v_select, current_schema(), v_news, v_olds, v_names);
end $$;

-- asked_sql(table) -> FROM item k (key, change_id) of $8 and $11, or of $12
create or replace function asked_sql(w watched) returns text language sql stable set search_path from current as $$
  select case when w.key_kind = 'id' then 'unnest($8, $11) k (key, change_id)'
              else '(select e -> 0 as key, (e ->> 1)::bigint as change_id from jsonb_array_elements($12) e) k' end
$$;

-- new_records_sql(table, lazy) -> SELECT of the rows of the keys in $8 (ids) or $9 (jsonb)
-- lazy: as they were committed by the changes in $11 (ids) or $12 ([[key, change], …]): the first image kept since a
-- change, else the row as it is. One statement, one snapshot: an update is seen with its kept image or not at all.
create or replace function new_records_sql(w watched, p_lazy boolean) returns text language sql stable set search_path from current as $$
  select case when not p_lazy then now_sql else format(
    'select t.* from (%s) t where %s not in (select key from kept where not exists (select from %s where k.key = kept.key and k.change_id > kept.since)) union all select %s from kept k join %I.change c on c.id = k.change_id',
    now_sql, case when w.key_kind = 'id' then format('t.%I::bigint', w.key_columns[1]) else key_json(w, 't') end, asked_sql(w),
    (select string_agg(format('c.olds[array_position(c.cols, %L)][k.ord]::%s', name, type), ', ') from table_columns(w.relid)), current_schema()) end
    from (select format('select %s from %I.%I t where %s', (select string_agg(format('t.%I', name), ', ') from table_columns(w.relid)), w.schema_name, w.table_name,
      case when w.key_kind = 'id' then format('t.%I = any ($8)', w.key_columns[1])
           else (select format('(%s) in (select %s from jsonb_array_elements($9) k)', string_agg(format('t.%I', c), ', ' order by o),
                               string_agg(format('(k ->> %s)::%s', o - 1, w.key_types[o]), ', ' order by o))
                   from unnest(w.key_columns) with ordinality x (c, o)) end) as now_sql) n
$$;

-- kept_sql(table) -> CTE: for each key of $11 or $12 and each of its changes the first image kept since
create or replace function kept_sql(w watched) returns text language sql stable set search_path from current as $$
  select format('kept (key, since, ord, change_id) as materialized (select distinct on (k.key, k.change_id) k.key, k.change_id, u.ord::int, c.id from %I.change c cross join lateral %s with ordinality u (key, ord) join %s on k.key = u.key and c.id > k.change_id where c.olds is not null and c.table_id = %s and c.id > $13 order by k.key, k.change_id, c.id), ',
    current_schema(), case when w.key_kind = 'id' then 'unnest(c.ids)' else 'jsonb_array_elements(c.keys)' end, asked_sql(w), w.id)
$$;

-- run_sql(token, ids, worker) -> receipt id
-- Runs a SQL handler over whole leased jobs, in the caller's transaction; its writes and the ack commit together.
-- new_records and old_records are what the jobs hold: images as committed, the rows of now where read = 'now' or an
-- image is missing (a degraded change, a backfill); an old record without image is its key and nulls.
create or replace function run_sql(p_token bigint, p_ids bigint[], p_worker int) returns bigint
language plpgsql volatile set search_path from current as $$
declare
  h handler; w watched; v_app text := setting('app_schema'); v_receipt bigint; v_body text; v_with text;
  v_cols text[]; v_names text; v_new text; v_old text; v_key text; v_images text; v_settled int[];
  v_new_changes bigint[]; v_new_los int[]; v_new_his int[]; v_old_changes bigint[]; v_old_los int[]; v_old_his int[];
  v_new_ids bigint[]; v_new_keys jsonb; v_old_keys jsonb; v_new_of bigint[]; v_new_since jsonb; v_lazy boolean; v_first bigint;
begin
  select x.* into h from lease l join handler x on x.id = l.handler_id where l.token = p_token and l.id = any (p_ids) limit 1;
  perform fence(p_token, (select count(*) from lease l where l.token = p_token and l.id = any (p_ids)), coalesce(cardinality(p_ids), 0));
  select * into w from watched where id = h.table_id;
  with part as (
    select l.*, l.cols is not null and l.op in ('n', 'u') and (h.read = 'change' or w.key_kind = 'none') as new_image,
           l.cols is not null and l.op in ('u', 'd') as old_image,
           case when l.degraded is not null and h.where_sql is not null then passes(h.id, l.ids, l.keys, l.op) end as passing
      from leased(p_token, p_ids) l
  ), ids as (
    select u.id, p.change_id from part p cross join lateral unnest(p.ids) with ordinality u (id, o)
     where p.op in ('n', 'u') and not p.new_image
       and (p.settled is null or p.lo + o - 1 <> all (p.settled)) and (p.passing is null or o = any (p.passing))
  ), bare as (
    select p.op, p.change_id, p.new_image, p.old_image, case when p.ids is not null then jsonb_build_array(p.ids[o - p.lo + 1]) else p.keys -> (o - p.lo) end as key
      from part p, generate_series(p.lo, p.hi) o
     where not (p.op = 't' or p.op = 'n' and (p.new_image or w.key_kind = 'id') or p.op = 'd' and p.old_image or p.new_image and p.old_image)
       and o <> all (coalesce(p.settled, '{}')) and (p.passing is null or o - p.lo + 1 = any (p.passing))
  )
  select (select array_agg(change_id order by id) from part where new_image), (select array_agg(lo order by id) from part where new_image),
         (select array_agg(hi order by id) from part where new_image),
         (select array_agg(change_id order by id) from part where old_image), (select array_agg(lo order by id) from part where old_image),
         (select array_agg(hi order by id) from part where old_image), (select settled from part where settled is not null limit 1),
         i.ids, (select jsonb_agg(key) from bare where op in ('n', 'u') and not new_image),
         (select jsonb_agg(key) from bare where op in ('u', 'd') and not old_image),
         i.changes, (select jsonb_agg(jsonb_build_array(key, change_id)) from bare where op in ('n', 'u') and not new_image),
         (select min(change_id) from part),
         (select h.read = 'change' and w.key_kind <> 'none' and bool_and(op = 'n' and cols is null and degraded is null) from part)
    into v_new_changes, v_new_los, v_new_his, v_old_changes, v_old_los, v_old_his, v_settled, v_new_ids, v_new_keys, v_old_keys,
         v_new_of, v_new_since, v_first, v_lazy
    from (select array_agg(id) as ids, array_agg(change_id) as changes from ids) i;
  v_receipt := ack(p_token, p_ids, p_worker, 0, 0);
  select array_agg(name), string_agg(quote_ident(name), ', '), string_agg(quote_ident('n_' || name), ', '), string_agg(quote_ident('o_' || name), ', '),
         string_agg(format('%s::%s', case when name = any (w.key_columns) then format('(k ->> %s)', array_position(w.key_columns, name) - 1) else 'null' end, type), ', ')
    into v_cols, v_names, v_new, v_old, v_key from table_columns(w.relid);
  v_images := format('select %%s from (%s) i where i.ord <> all ($7)', images_sql(w.id, v_cols));
  v_with := format('%4$snew_records (%1$s) as (%2$s), old_records (%1$s) as (%3$s)', v_names,
    coalesce(nullif(concat_ws(' union all ',
      case when v_new_changes is not null then format(v_images, v_new) end,
      case when v_new_ids is not null or (v_new_keys is not null and w.key_kind <> 'id') then new_records_sql(w, v_lazy) end), ''),
      format('select (null::%I.%I).*', w.schema_name, w.table_name) || ' limit 0'),
    coalesce(nullif(concat_ws(' union all ',
      case when v_old_changes is not null then replace(replace(replace(format(v_images, v_old), '$1', '$4'), '$2', '$5'), '$3', '$6') end,
      case when v_old_keys is not null then format('select %s from jsonb_array_elements($10) k', v_key) end), ''),
      format('select (null::%I.%I).*', w.schema_name, w.table_name) || ' limit 0'),
    case when v_lazy then kept_sql(w) end);
  v_body := regexp_replace(bind(h.body, h.params), '^(\s|--[^\n]*\n)+|[\s;]+$', '', 'g');
  v_body := case when v_body ~* '^with\s+recursive\M' then 'with recursive ' || v_with || ', ' || regexp_replace(v_body, '^with\s+recursive', '', 'i')
                 when v_body ~* '^with\M' then 'with ' || v_with || ', ' || regexp_replace(v_body, '^with', '', 'i')
                 else 'with ' || v_with || ' ' || v_body end;
  perform set_config('search_path', quote_ident(v_app) || ', pg_catalog, pg_temp', true);
  execute v_body using v_new_changes, v_new_los, v_new_his, v_old_changes, v_old_los, v_old_his, coalesce(v_settled, '{}'),
    v_new_ids, v_new_keys, coalesce(v_old_keys, '[]'), v_new_of, v_new_since, v_first;
  return v_receipt;
end $$;
