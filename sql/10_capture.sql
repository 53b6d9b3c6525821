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

-- other_row(table, where, other) -> what joins the row that an event does not have, of nulls, where a filter names it
create or replace function other_row(w watched, p_where text, p_other text) returns text language sql stable set search_path from current as $$
  select case when p_where ~* format('\m%s\.', p_other) then format(' cross join (select (null::%I.%I).*) %s', w.schema_name, w.table_name, p_other) else '' end
$$;

-- capture_from(table, event, source, where) -> FROM clause of the rows of an event, and what names them: new, old
--   source  statement, or moved: pairs whose key changed
create or replace function capture_from(w watched, p_event text, p_source text, p_where text) returns text
language sql stable set search_path from current as $$
  select case when p_source = 'moved' then format('(select %s.* from %s where %s) %1$s', row_, capture_pairs(), key_moved(w))
              when p_event = 'updated' then format('%s and not (%s)', capture_pairs(), key_moved(w))
              else format('%s_records %1$s', row_) end
         || case when p_event <> 'updated' then other_row(w, p_where, other) else '' end
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
  return format('execute %L using v_now, v_degraded, v_cause, v_depth, v_trace, v_tenant, greatest(4096, 8192 - v_keysize), greatest(131072, 262144 - v_size), v_due;', v_sql);
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
                 jsonb_build_object('event', %L, 'source', %L, 'due', $9, 'handlers', to_jsonb(%L::int[]), 'rows', jsonb_agg(row)), $2, $3, $4, $5, $6
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

-- capture_group(table, event, source, handlers, batches, images, where, params, columns, first, mend, later) -> plpgsql that captures for one group
--   mend   the rows are those of a change that was kept whole, see mend()
--   later  the jobs are due at v_due
-- A handler with a minus is one that debounces, see fold().
drop function if exists capture_group(watched, text, text, int[], int[], boolean, text, jsonb, text[], boolean, boolean);
create or replace function capture_group(w watched, p_event text, p_source text, p_ids int[], p_batches int[], p_images boolean,
  p_where text, p_params jsonb, p_columns text[], p_first boolean, p_mend boolean, p_later boolean default false) returns text language plpgsql stable set search_path from current as $$
declare
  v_into text := case when p_later then 'delayed (run_at, ' else 'job (' end;
  v_due text := case when p_later then 'v_due, ' else '' end;
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
      insert into %6$shandler_id, id, change_id, at, cause, trace, lo, hi, depth, op, tenant, %1$s) values %5$s;
    else
    insert into %6$shandler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant, %1$s)
    select %7$sh.id, v_change, v_now, v_cause, v_trace, s, least(s + h.b - 1, v_k), v_depth, '%2$s', v_tenant, %3$s
      from %4$s, generate_series(1, v_k, h.b) s;
    end if;$f$, v_keycol, v_op,
    case when v_idkey then 'v_ids[s:s + h.b - 1]'
         else $k$case when h.b >= v_k then v_keys else jsonb_path_query_array(v_keys, '$[$a to $b]', jsonb_build_object('a', s - 1, 'b', least(s + h.b, v_k + 1) - 2)) end$k$ end,
    v_jobs,
    (select string_agg(format('(%s%s, %s, v_change, v_now, v_cause, v_trace, 1, 1, v_depth, ''%s'', v_tenant, %s)',
                              v_due, i, case when p_first and o = 1 then 'v_change' else $n$nextval('change_seq')$n$ end, v_op,
                              case when v_idkey then 'v_ids' else 'v_keys' end), ', ' order by o)
       from unnest(p_ids) with ordinality x (i, o)), v_into, v_due);
  v_plain := format($f$
    with c as (
      insert into change (id, slot, at, xid, table_id, op, n, ids, keys, cols, news, olds, cause, depth, trace, tenant)
      select nextval('change_seq'), slot(v_now), v_now, pg_current_xact_id(), %1$s, '%2$s', least(1000, v_k - s + 1), %4$s,
             v_cause, v_depth, v_trace, v_tenant
        from generate_series(1, v_k, 1000) s
      returning id, n)
    insert into %5$shandler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
    select %6$sh.id, c.id, v_now, v_cause, coalesce(v_trace, c.id), s, least(s + h.b - 1, c.n), v_depth, '%2$s', v_tenant
      from c, %3$s, generate_series(1, c.n, h.b) s;$f$, w.id, v_op, v_jobs,
    case when p_images then format('v_ids, v_keys, %s, v_news, v_olds', v_columns) else 'v_ids[s:s + 999], null, null, null, null' end, v_into, v_due);
  -- cut by count, and by bytes: a record of more than half a chunk stands alone, the others fill what the largest leaves
  v_grouped := format($f$
    with r as (select %1$s as key, row_number() over () as rn%2$s@texts@ from @from@),
    sized as (select *%3$s@sums@ from @rows@),
    c as (
      insert into change (id, slot, at, xid, table_id, op, n, %4$s, cols, news, olds, degraded, cause, depth, trace, tenant)
      select nextval('change_seq'), slot($1), $1, pg_current_xact_id(), %5$s, '%6$s', count(*), %7$s, @images@, $2, $3, $4, $5, $6
        from sized group by (rn - 1) / %8$s%9$s@cuts@
      returning id, n)
    insert into %11$shandler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
    select %12$sh.id, c.id, $1, $3, coalesce($5, c.id), s, least(s + h.b - 1, c.n), $4, '%6$s', $6
      from c, %10$s, generate_series(1, c.n, h.b) s$f$,
    v_key, ', ' || v_keysize || ' as keysize',
    case when v_keysize is not null then ', sum(case when keysize > 4096 then 0 else keysize end) over (order by rn rows unbounded preceding) as keysum' end,
    v_keycol, w.id, v_op, v_keys, v_keyrows, case when v_keysize is not null then ', case when keysize > 4096 then rn end, keysum / $7' end, v_jobs,
    v_into, case when p_later then '$9, ' end);
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

-- capture_groups(table, event, source, handlers, mend, later) -> plpgsql for all handlers of an event, or for these; null when there are none
-- Handlers with the same filter and columns form a group: what one record leaves is stored once for all of them.
drop function if exists capture_groups(watched, text, text, int[], boolean);
create or replace function capture_groups(w watched, p_event text, p_source text, p_handlers int[] default null, p_mend boolean default false,
  p_later boolean default false) returns text language sql stable set search_path from current as $$
  select string_agg(capture_group(w, p_event, p_source, g.ids, g.batches, g.images, g.where_sql, g.params, g.columns, g.first, p_mend, p_later), '' order by g.id)
    from (select row_number() over (order by min(h.id)) = 1 and p_source = 'statement' as first, min(h.id) as id,
                 array_agg(case when h.debounce is null then h.id else -h.id end order by h.id) as ids,
                 array_agg(least(h.batch, 1000) order by h.id) as batches,
                 bool_or(w.key_kind = 'none' or p_event = 'deleted' or h.read = 'change' and not (p_event = 'new' and h.kind = 'sql')) as images, h.where_sql, h.params,
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
    v_groups := capture_groups(w, p_event, 'statement');
    if v_groups is not null and p_event <> 'deleted' then
      v_groups := format('
  if v_due is null then%s
  else%s
  end if;', v_groups, capture_groups(w, p_event, 'statement', null, false, true));
    end if;
    v_groups := nullif(concat(v_groups, case when p_event in ('updated', 'deleted') then capture_kept(w, p_event) end), '');
  end if;
  if v_groups is null then
    return coalesce('begin' || capture_collected(w, p_event) || '
  return null;
end', 'begin return null; end');
  end if;
  v_moved := concat(capture_collected(w, p_event), v_moved);
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
  v_due timestamptz := nullif(current_setting('anton.due', true), '')::timestamptz;
  v_cause bigint; v_depth smallint := 0; v_trace bigint; v_degraded text; v_broken boolean;$f$
$$;

-- capture_truncate(table) -> body of the TRUNCATE trigger: one event for the table, no keys
-- Truncating a partitioned table fires it for each partition: once a statement is enough.
create or replace function capture_truncate(p_table int) returns text language plpgsql stable set search_path from current as $$ begin
  return (select case when count(*) = 0 and not dbt_collects(p_table) then 'begin return null; end' else format($f$
declare
  v_now timestamptz := now(); v_change bigint; v_context text := current_setting('anton.context', true);
  v_statement text := '%1$s at ' || extract(epoch from statement_timestamp());
begin
  if current_setting('anton.collect', true) = '%1$s ' || pg_current_xact_id() and dbt_collecting() is not null then
    perform set_config('anton.emptied', current_setting('anton.collect'), true);
    return null;                                           -- dbt empties it to fill it again
  end if;
  if current_setting('anton.truncated', true) = v_statement or cardinality(%2$L::int[]) = 0 then
    return null;
  end if;
  v_change := nextval('change_seq');
  perform set_config('anton.truncated', v_statement, true);
  insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant)
  select h, v_change, v_now, nullif(split_part(v_context, ',', 1), '')::bigint, v_change, 1, 1,
         coalesce(nullif(split_part(v_context, ',', 2), ''), '0')::smallint, 't', nullif(current_setting('anton.tenant', true), '')
    from unnest(%2$L::int[]) h;
  perform ring();
  return null;
end$f$, p_table, coalesce(array_agg(id), '{}')) end
    from handler where table_id = p_table and enabled and 'truncate' = any (ops));
end $$;
