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

-- image_settings(relation): SET clauses that make text images independent of the writer's session, where its types need them
create or replace function image_settings(p_rel oid) returns text language sql stable set search_path from current as $$
  select case when bool_and(plain) then '' else
    $s$ set datestyle = 'ISO, YMD' set intervalstyle = 'postgres' set extra_float_digits = '1' set bytea_output = 'hex' set timezone = 'UTC' set lc_monetary = 'C'$s$ end
    from table_columns(p_rel)
$$;

-- capture_group(table, event, handlers, batches, images, where, params, columns, first) -> plpgsql that captures for one group
create or replace function capture_group(w watched, p_event text, p_ids int[], p_batches int[], p_images boolean,
  p_where text, p_params jsonb, p_columns text[], p_first boolean) returns text language plpgsql stable set search_path from current as $$
declare
  v_op text := case p_event when 'new' then 'n' when 'updated' then 'u' else 'd' end;
  v_row text := case p_event when 'deleted' then 'old' else 'new' end;   -- whose columns the filter sees
  v_idkey boolean := w.key_kind = 'id';
  v_keycol text := case when w.key_kind = 'id' then 'ids' else 'keys' end;
  v_join text; v_from text; v_key text; v_keys text; v_filter text := ''; v_keysize text; v_jobs text;
  v_cols text[]; v_texts text; v_sizes text; v_rawsize text; v_news text := 'null'; v_olds text := 'null'; v_keyrows int := 1000; v_wide text;
  v_small text; v_plain text; v_grouped text; v_bare text; v_evaluate text; v_store text; v_columns text;
begin
  select string_agg(format('new.%1$I = old.%1$I', c), ' and ') into v_join from unnest(w.key_columns) c;
  v_from := case p_event when 'new' then 'new_records new' when 'deleted' then 'old_records old'
                 else format('new_records new join old_records old on %s', v_join) end;
  if v_idkey then
    v_key := format('%s.%I::bigint', v_row, w.key_columns[1]);
    v_keys := 'array_agg(key)';
  elsif w.key_kind = 'key' then
    select format('jsonb_build_array(%s)', string_agg(format('%s.%I', v_row, c), ', ' order by o)),
           string_agg(format('coalesce(octet_length(%s.%I::text), 0) + 6', v_row, c), ' + ')
      into v_key, v_keysize from unnest(w.key_columns) with ordinality x (c, o);
    v_keys := 'jsonb_agg(key)';
    if not exists (select from table_columns(w.relid) t where t.name = any (w.key_columns) and not t.fixed) then
      v_keysize := null;                                 -- no key is longer than any other: cut by count
      v_keyrows := 8192 / (cardinality(w.key_columns) * 40);
    end if;
  else
    v_key := 'null';
    v_keys := 'null::jsonb';
  end if;
  if p_images then
    select array_agg(name), string_agg(case when fixed then '16' else format('coalesce(octet_length(%I::text), 0)', name) end, ' + '),
           string_agg(case when p_event = 'deleted' then '' else format(', new.%I::text as n%s', name, o) end
                   || case when p_event = 'new' then '' else format(', old.%I::text as o%s', name, o) end, ''),
           string_agg(case when fixed then '16' else concat_ws(' + ',
                        case when p_event <> 'deleted' then format('coalesce(octet_length(n%s), 0)', o) end,
                        case when p_event <> 'new' then format('coalesce(octet_length(o%s), 0)', o) end) end, ' + '),
           case when p_event <> 'deleted' then format('array[%s]', string_agg(format('array_agg(n%s)', o), ', ' order by o)) else 'null::text[]' end,
           case when p_event <> 'new' then format('array[%s]', string_agg(format('array_agg(o%s)', o), ', ' order by o)) else 'null::text[]' end
      into v_cols, v_rawsize, v_texts, v_sizes, v_news, v_olds
      from (select *, row_number() over () as o from table_columns(w.relid)) c;
  end if;
  v_columns := quote_nullable(v_cols::text) || '::text[]';
  if p_event = 'updated' then                            -- an update that changed nothing watched is no event
    select format(' and (%s)', string_agg(
             case when comparable then format('new.%1$I is distinct from old.%1$I', name)
                  else format('new.%1$I::text is distinct from old.%1$I::text', name) end, ' or '))
      into v_filter from table_columns(w.relid) where p_columns is null or name = any (p_columns);
  end if;
  if p_where is not null then
    v_filter := coalesce(v_filter, '') || format(' and (select (%s)::boolean from (select %s.*) as row_)', bind(p_where, p_params), v_row);
  end if;
  v_filter := coalesce('where true' || nullif(v_filter, ''), '');
  v_jobs := format('unnest(%L::int[], %L::int[]) h (id, b)', p_ids, p_batches);

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
      insert into change (id, slot, at, xid, table_id, op, n, ids, keys, cols, news, olds, degraded, cause, depth, trace, tenant)
      select %5$s, slot(v_now), v_now, pg_current_xact_id(), %1$s, '%2$s', least(1000, v_k - s + 1), %4$s,
             v_degraded, v_cause, v_depth, v_trace, v_tenant
        from generate_series(1, v_k, 1000) s
      returning id, n, ids)
    insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant, ids)
    select h.id, c.id, v_now, v_cause, coalesce(v_trace, c.id), s, least(s + h.b - 1, c.n), v_depth, '%2$s', v_tenant, %6$s
      from c, %3$s, generate_series(1, c.n, h.b) s;$f$, w.id, v_op, v_jobs,
    case when p_images then format('v_ids, v_keys, %s, v_news, v_olds', v_columns)
         when v_idkey then 'v_ids[s:s + 999], null, null, null, null' else 'null, v_keys, null, null, null' end,
    $i$nextval('change_seq')$i$, case when p_images then 'null' else 'case when h.b <= 16 then c.ids[s:s + h.b - 1] end' end);
  -- cut by count, and by bytes where one record is larger than 1/1000 of a chunk
  v_grouped := $f$
    with r as (select %1$s as key, row_number() over () as rn%2$s from %3$s %4$s),
    sized as (select *%5$s from r),
    c as (
      insert into change (id, slot, at, xid, table_id, op, n, %6$s, cols, news, olds, degraded, cause, depth, trace, tenant)
      select nextval('change_seq'), slot($1), $1, pg_current_xact_id(), %7$s, '%8$s', count(*), %9$s, %10$s, $2, $3, $4, $5, $6
        from sized group by (rn - 1) / %11$s
      returning id, n)
    insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
    select h.id, c.id, $1, $3, coalesce($5, c.id), s, least(s + h.b - 1, c.n), $4, '%8$s', $6
      from c, %12$s, generate_series(1, c.n, h.b) s$f$;
  v_sizes := case when v_keysize is not null then ', sum(keysize) over (order by rn rows unbounded preceding) as keybytes' else '' end
    || coalesce(format(', sum(%s) over (order by rn rows unbounded preceding) as bytes', v_sizes), '');
  v_bare := format(v_grouped, v_key, coalesce(', ' || v_keysize || ' as keysize', ''), v_from, '',
    case when v_keysize is not null then ', sum(keysize) over (order by rn rows unbounded preceding) as keybytes' else '' end,
    v_keycol, w.id, v_op, v_keys, 'null, null, null', v_keyrows || case when v_keysize is not null then ', keybytes / 8192' else '' end, v_jobs);
  v_wide := format(v_grouped, v_key, coalesce(', ' || v_keysize || ' as keysize', '') || coalesce(v_texts, ''), v_from, v_filter, v_sizes,
    v_keycol, w.id, v_op, v_keys, format('%s, %s, %s', v_columns, v_news, v_olds),
    v_keyrows || case when v_keysize is not null then ', keybytes / 8192' else '' end || case when p_images then ', bytes / 262144' else '' end, v_jobs);
  v_grouped := format(v_grouped, v_key, coalesce(', ' || v_keysize || ' as keysize', '') || coalesce(v_texts, ''), v_from, v_filter,
    case when v_keysize is not null then ', sum(keysize) over (order by rn rows unbounded preceding) as keybytes' else '' end,
    v_keycol, w.id, v_op, v_keys, format('%s, %s, %s', v_columns, v_news, v_olds),
    v_keyrows || case when v_keysize is not null then ', keybytes / 8192' else '' end, v_jobs);

  -- reading runs in exception blocks and, for small statements, writes nothing there: a subtransaction that writes
  -- costs a transaction id. Large statements are planned anew, with their real row counts.
  v_evaluate := case when v_idkey and not p_images
    then format('v_ids := array(select %s from %s @filter@); v_k := cardinality(v_ids);', v_key, v_from)
    else format('select count(*), %s%s into v_k, %s%s from (select %s as key%s from %s @filter@) r;',
      case when v_idkey then 'array_agg(key)' else v_keys end, case when p_images then format(', %s, %s', v_news, v_olds) else '' end,
      case when v_idkey then 'v_ids' else 'v_keys' end, case when p_images then ', v_news, v_olds' else '' end,
      v_key, coalesce(v_texts, ''), v_from) end;
  v_store := case
    when p_images then format('if v_k > 0 then %s end if;', v_plain)
    when v_idkey then format('if v_k > 16 or (v_k > 0 and v_degraded is not null) then %s elsif v_k > 0 then %s end if;', v_plain, v_small)
    else format('if v_k > 0 and v_degraded is not null then %s elsif v_k > 0 then %s end if;', v_plain, v_small) end;
  return format($f$
  -- handlers %1$s
  v_degraded := null;
  v_k := 0;
  begin
    if %2$s then
      %3$s
    else
      v_memory := current_setting('work_mem');
      perform set_config('work_mem', '128MB', true);   -- chunks are built in memory: 3 times faster than spilled
      %4$s
      perform set_config('work_mem', v_memory, true);
    end if;
  exception when others then
    v_degraded := sqlerrm;
    v_k := 0;
  end;
  if v_degraded is null then
    %5$s
  else
    begin
      %6$s
    exception when others then
      insert into change (id, slot, at, xid, table_id, op, n, degraded, tenant)
      values (nextval('change_seq'), slot(v_now), v_now, pg_current_xact_id(), %7$s, 'x', 0, sqlerrm, v_tenant);
    end;
  end if;$f$,
    array_to_string(p_ids, ', '),
    case when v_idkey and not p_images and p_event <> 'updated' then 'true' else '(select count(*) from (select from ' || case p_event when 'deleted' then 'old_records' else 'new_records' end || ' limit 17) x) <= 16' end,
    replace(v_evaluate, '@filter@', v_filter),
    case when not p_images then format('execute %L using v_now, v_degraded, v_cause, v_depth, v_trace, v_tenant;', v_grouped)
         else format($k$
      select max(%1$s) into v_size from %2$s;
      if v_size <= 262 then
        execute %3$L using v_now, v_degraded, v_cause, v_depth, v_trace, v_tenant;
      else
        execute %4$L using v_now, v_degraded, v_cause, v_depth, v_trace, v_tenant;
      end if;$k$, v_rawsize,
           case p_event when 'updated' then '(select * from new_records union all select * from old_records) x' when 'new' then 'new_records' else 'old_records' end,
           v_grouped, v_wide) end, v_store,
    case when w.key_kind = 'none' then 'raise exception using message = v_degraded;'
         else format('execute %L using v_now, v_degraded, v_cause, v_depth, v_trace, v_tenant;', v_bare) end,
    w.id);
end $$;

-- capture_body(table, event) -> the plpgsql body of its trigger function for new | updated | deleted
create or replace function capture_body(p_table int, p_event text) returns text language plpgsql stable set search_path from current as $$
declare w watched; d record := doorbell(); v_groups text; v_fed text; v_key text;
begin
  select * into w from watched where id = p_table;
  select string_agg(capture_group(w, p_event, g.ids, g.batches, g.images, g.where_sql, g.params, g.columns, g.first), '' order by g.ids[1]) into v_groups
    from (select row_number() over (order by min(h.id)) = 1 as first, array_agg(h.id order by h.id) as ids, array_agg(least(h.batch, 1000) order by h.id) as batches,
                 bool_or(h.read = 'change' or w.key_kind = 'none') as images, h.where_sql, h.params, h.columns
            from handler h where h.table_id = p_table and h.enabled and p_event = any (h.ops)
           group by h.where_sql, h.params, h.columns) g;
  if v_groups is null then
    return 'begin return null; end';
  end if;
  if p_event = 'new' and w.key_kind <> 'none' then       -- a backfill is running: it must not feed these again
    select format('jsonb_build_array(%s)', string_agg(format('new.%I', c), ', ' order by o)) into v_key from unnest(w.key_columns) with ordinality x (c, o);
    select format($f$
  begin
    insert into fed (handler_id, key) select h, %s from new_records new, unnest(%L::int[]) h on conflict do nothing;
  exception when others then
    raise warning 'anton: backfill of table %% may repeat records: %%', %L, sqlerrm;
  end;$f$, v_key, array_agg(id), w.table_name) into v_fed from handler where table_id = p_table and feeding having count(*) > 0;
  end if;
  return format($f$#variable_conflict use_column
declare
  v_now timestamptz; v_change bigint; v_k int; v_size bigint; v_memory text; v_ids bigint[]; v_keys jsonb; v_news text[]; v_olds text[];
  v_context text := current_setting('anton.context', true);
  v_tenant text := nullif(current_setting('anton.tenant', true), '');
  v_cause bigint; v_depth smallint := 0; v_trace bigint; v_degraded text;
begin
  v_now := now();
  v_change := nextval('change_seq');
  v_trace := v_change;
  if v_context <> '' then
    v_cause := split_part(v_context, ',', 1)::bigint;
    v_depth := split_part(v_context, ',', 2)::smallint;
    v_trace := nullif(split_part(v_context, ',', 3), '')::bigint;
  end if;%s%s%s
  return null;
end$f$, v_groups, v_fed,
    case when d.enabled then format($f$
  if not pg_try_advisory_xact_lock_shared(%s, %s) then
    perform pg_notify(%L, '');
  end if;$f$, d.k1, d.k2, d.channel) end);
end $$;

-- capture_moved(table) -> body of the row trigger for a changed key: the old record is deleted, the new one is new
create or replace function capture_moved(p_table int) returns text language plpgsql stable set search_path from current as $$
declare w watched; v_code text := ''; h record; v_row text; v_key text; v_news text; v_cols text;
begin
  select * into w from watched where id = p_table;
  select quote_literal(array_agg(name)::text) || '::text[]' into v_cols from table_columns(w.relid);
  for h in select x.*, e.event from handler x cross join lateral unnest(x.ops) e (event)
            where x.table_id = p_table and x.enabled and e.event in ('new', 'deleted') order by x.id, e.event desc loop
    v_row := case h.event when 'new' then 'new' else 'old' end;
    select string_agg(format('%s.%I', v_row, c), ', ' order by o) into v_key from unnest(w.key_columns) with ordinality x (c, o);
    select string_agg(format('array[%s.%I::text]', v_row, name), ', ') into v_news from table_columns(w.relid);
    v_code := v_code || format($f$
  begin
    select count(*) into v_k from (select %1$s.*) as row_ where %2$s;
    v_degraded := null;
  exception when others then
    v_k := 1; v_degraded := sqlerrm;
  end;
  if v_k > 0 then
    v_change := nextval('change_seq');
    insert into change (id, slot, at, xid, table_id, op, n, ids, keys, cols, %3$s, degraded, cause, depth, trace, tenant)
    values (v_change, slot(v_now), v_now, pg_current_xact_id(), %4$s, '%5$s', 1, %6$s, %7$s, array[%8$s], v_degraded, v_cause, v_depth, v_trace, v_tenant);
    insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
    values (%9$s, v_change, v_now, v_cause, coalesce(v_trace, v_change), 1, 1, v_depth, '%5$s', v_tenant);
  end if;$f$, v_row, coalesce(bind(h.where_sql, h.params), 'true'), case h.event when 'new' then 'news' else 'olds' end, w.id, left(h.event, 1),
      case when w.key_kind = 'id' then format('array[%s::bigint], null', v_key) else format('null, jsonb_build_array(jsonb_build_array(%s))', v_key) end,
      v_cols, v_news, h.id);
  end loop;
  if v_code = '' then
    return 'begin return null; end';
  end if;
  return format($f$
declare
  v_now timestamptz := now(); v_change bigint; v_k int; v_degraded text;
  v_context text := current_setting('anton.context', true);
  v_tenant text := nullif(current_setting('anton.tenant', true), '');
  v_cause bigint; v_depth smallint := 0; v_trace bigint;
begin
  if v_context <> '' then
    v_cause := split_part(v_context, ',', 1)::bigint;
    v_depth := split_part(v_context, ',', 2)::smallint;
    v_trace := nullif(split_part(v_context, ',', 3), '')::bigint;
  end if;%s
  perform ring();
  return null;
exception when others then
  insert into change (id, slot, at, xid, table_id, op, n, degraded, tenant)
  values (nextval('change_seq'), slot(v_now), v_now, pg_current_xact_id(), %s, 'x', 0, sqlerrm, v_tenant);
  return null;
end$f$, v_code, w.id);
end $$;

-- capture_truncate(table) -> body of the TRUNCATE trigger: one event for the table, no keys
create or replace function capture_truncate(p_table int) returns text language sql stable set search_path from current as $$
  select case when count(*) = 0 then 'begin return null; end' else format($f$
declare v_now timestamptz := now(); v_change bigint := nextval('change_seq'); v_context text := current_setting('anton.context', true);
begin
  insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
  select h, v_change, v_now, nullif(split_part(v_context, ',', 1), '')::bigint, v_change, 1, 1,
         coalesce(nullif(split_part(v_context, ',', 2), ''), '0')::smallint, 't', nullif(current_setting('anton.tenant', true), '')
    from unnest(%L::int[]) h;
  perform ring();
  return null;
end$f$, array_agg(id)) end
    from handler where table_id = p_table and enabled and 'truncate' = any (ops)
$$;

-- owner_role() -> the role that owns what runs with its rights: <schema>_owner when migrate could create it, else the current user
create or replace function owner_role() returns text language sql stable set search_path from current as $$
  select coalesce((select rolname::text from pg_roles where rolname = current_schema() || '_owner'), current_user::text)
$$;

-- sync_triggers(table): writes the trigger functions of a table anew and adds the triggers it lacks, on its partitions too
create or replace function sync_triggers(p_table int) returns void language plpgsql volatile set search_path from current as $$
declare
  w watched; v_schema text := current_schema(); v_settings text; v_event text; v_name text; v_rel oid; v_body text; v_moved text; v_old text;
begin
  select * into w from watched where id = p_table;
  perform watch(format('%I.%I', w.schema_name, w.table_name));
  select * into w from watched where id = p_table;
  if w.key_kind = 'none' and exists (select from handler where table_id = p_table and enabled and ops && array['updated', 'deleted']) then
    raise exception using errcode = 'NT004', message = format('table %I.%I has no primary key: its updated and deleted records cannot be handled', w.schema_name, w.table_name),
      hint = format('alter table %I.%I add primary key (…)', w.schema_name, w.table_name);
  end if;
  v_settings := case when w.key_kind = 'none' or exists (select from handler where table_id = p_table and enabled and read = 'change')
    then image_settings(w.relid) else '' end;
  foreach v_event in array array['new', 'updated', 'deleted', 'moved', 'truncate'] loop
    v_name := format('t%s_%s', p_table, v_event);
    v_body := case when v_event = 'moved' then capture_moved(p_table) when v_event = 'truncate' then capture_truncate(p_table)
                   else capture_body(p_table, v_event) end;
    select prosrc into v_old from pg_proc where pronamespace = v_schema::regnamespace and proname = v_name;
    if v_body = 'begin return null; end' and v_old is null then
      continue;                                            -- nobody asked, nothing to pay
    end if;
    execute format('create or replace function %I() returns trigger language plpgsql security definer set search_path = %I, pg_catalog, pg_temp%s as %L',
                   v_name, v_schema, case when v_event in ('new', 'updated', 'deleted', 'moved') then v_settings else '' end, v_body);
    execute format('alter function %I() owner to %I', v_name, owner_role());
    execute format('revoke all on function %I() from public', v_name);
    for v_rel in select case when v_event = 'moved' then w.relid else relid end from pg_partition_tree(w.relid)
                 union select w.relid loop
      if not exists (select from pg_trigger where tgrelid = v_rel and tgname = v_schema || '_' || v_event) then
        execute format('create trigger %I after %s on %s %s for each %s %s execute function %I()',
          v_schema || '_' || v_event,
          case v_event when 'new' then 'insert' when 'deleted' then 'delete' when 'truncate' then 'truncate' else 'update' end,
          v_rel::regclass,
          case v_event when 'new' then 'referencing new table as new_records'
                       when 'updated' then 'referencing old table as old_records new table as new_records'
                       when 'deleted' then 'referencing old table as old_records' else '' end,
          case when v_event = 'moved' then 'row' else 'statement' end,
          case when v_event = 'moved' then format('when (%s)', (select string_agg(format('old.%1$I is distinct from new.%1$I', c), ' or ') from unnest(w.key_columns) c)) else '' end,
          v_name);
      end if;
    end loop;
  end loop;
end $$;

-- passes(handler, ids, keys) -> positions from 1 of the records that exist now and pass its filter (for degraded changes)
create or replace function passes(p_handler int, p_ids bigint[], p_keys jsonb) returns int[] language plpgsql stable set search_path from current as $$
declare h handler; w watched; v_out int[]; v_join text;
begin
  select * into h from handler where id = p_handler;
  select * into w from watched where id = h.table_id;
  if w.key_kind = 'id' then
    v_join := format('unnest($1) with ordinality k (v, o) join %I.%I n on n.%I = k.v', w.schema_name, w.table_name, w.key_columns[1]);
  else
    select format('jsonb_array_elements($2) with ordinality k (v, o) join %I.%I n on %s', w.schema_name, w.table_name,
                  string_agg(format('n.%I = (k.v ->> %s)::%s', c, o - 1, w.key_types[o]), ' and ')) into v_join
      from unnest(w.key_columns) with ordinality x (c, o);
  end if;
  execute format('select array_agg(k.o::int order by k.o) from %s where (select (%s)::boolean from (select n.*) as new)',
                 v_join, case when h.where_sql ~* '\mold\.' then 'true' else coalesce(bind(h.where_sql, h.params), 'true') end)
    into v_out using p_ids, p_keys;
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

-- run_sql(token, ids, worker) -> receipt id
-- Runs a SQL handler over whole leased jobs, in the caller's transaction: new_records and old_records are what the
-- jobs hold (images as committed; the rows of now for read = 'now'), its writes and the ack commit together.
create or replace function run_sql(p_token bigint, p_ids bigint[], p_worker int) returns bigint
language plpgsql volatile set search_path from current as $$
declare
  h handler; w watched; v_schema text := current_schema(); v_app text := setting('app_schema');
  v_receipt bigint; v_cols text[]; v_body text; v_with text; v_new text; v_old text; v_images text; v_started timestamptz := now();
  v_changes bigint[]; v_los int[]; v_his int[]; v_ids bigint[]; v_keys jsonb; v_columns text; v_nulls text;
begin
  select x.* into h from lease l join handler x on x.id = l.handler_id where l.token = p_token and l.id = any (p_ids) limit 1;
  perform fence(p_token, (select count(*) from lease l where l.token = p_token and l.id = any (p_ids)), coalesce(cardinality(p_ids), 0));
  select * into w from watched where id = h.table_id;
  select array_agg(l.change_id order by l.id), array_agg(l.lo order by l.id), array_agg(l.hi order by l.id), min(c.cols)
    into v_changes, v_los, v_his, v_cols
    from lease l left join change c on c.id = l.change_id where l.token = p_token and l.id = any (p_ids);
  select string_agg(quote_ident(name), ', '), string_agg(format('null::%s as %I', type, name), ', ') into v_columns, v_nulls from table_columns(w.relid);
  if v_cols is null then
    select array_agg(k) into v_ids from leased(p_token, p_ids) x, unnest(x.ids) k;
    select jsonb_agg(k) into v_keys from leased(p_token, p_ids) x, jsonb_array_elements(x.keys) k;
  end if;
  v_receipt := ack(p_token, p_ids, p_worker, 0, 0);
  v_body := bind(h.body, h.params);
  if v_cols is not null then
    select array_agg(name), string_agg(format('%I as %I', 'n_' || name, name), ', '), string_agg(format('%I as %I', 'o_' || name, name), ', ')
      into v_cols, v_new, v_old from table_columns(w.relid);
    v_images := images_sql(w.id, v_cols);
    v_with := format('images as (%s), new_records as (select %s from images), old_records as (select %s from images)', v_images, v_new, v_old);
  else
    v_with := format('new_records as (select %s from %I.%I t where %s), old_records as (select %s where false)', v_columns, w.schema_name, w.table_name,
      case when w.key_kind = 'id' then format('t.%I = any ($4)', w.key_columns[1])
           else format('(%s) in (select %s from jsonb_array_elements($5) k)',
             (select string_agg(format('t.%I', c), ', ' order by o) from unnest(w.key_columns) with ordinality x (c, o)),
             (select string_agg(format('(k ->> %s)::%s', o - 1, w.key_types[o]), ', ' order by o) from unnest(w.key_columns) with ordinality x (c, o))) end, v_nulls);
  end if;
  v_body := regexp_replace(v_body, '^(\s|--[^\n]*\n)+|[\s;]+$', '', 'g');
  v_body := case when v_body ~* '^with\s+recursive\M' then 'with recursive ' || v_with || ', ' || regexp_replace(v_body, '^with\s+recursive', '', 'i')
                 when v_body ~* '^with\M' then 'with ' || v_with || ', ' || regexp_replace(v_body, '^with', '', 'i')
                 else 'with ' || v_with || ' ' || v_body end;
  perform set_config('search_path', quote_ident(v_app) || ', pg_catalog, pg_temp', true);
  execute v_body using v_changes, v_los, v_his, v_ids, v_keys;
  return v_receipt;
end $$;
