-- What was captured, read again: images, filters of degraded changes, and SQL handlers, which read and settle in one.

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

-- imaged(change ids, los, his) -> these parts of changes, with the arrays that hold the images; found by id, however few changes there are
create or replace function imaged(p_changes bigint[], p_los int[], p_his int[]) returns table (change_id bigint, lo int, hi int, cols text[], news text[], olds text[])
language plpgsql stable set search_path from current set jit = off set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
  return query select j.change_id, j.lo, j.hi, c.cols, c.news, c.olds
    from unnest(p_changes, p_los, p_his) j (change_id, lo, hi) join change c on c.id = j.change_id;
end $$;

-- images_sql(table, cols) -> SELECT ($1 change ids, $2 los, $3 his): change_id, ord, n_<col> ..., o_<col> ...
-- Images as committed, each column found by name and cast back to the type it has now; one dropped since stays text.
create or replace function images_sql(p_table int, p_cols text[]) returns text language plpgsql stable set search_path from current as $$
declare v_select text; v_news text; v_olds text; v_names text; v_rel oid;
begin
  select relid into v_rel from watched where id = p_table;
  select string_agg(format('(v.n%1$s)::%2$s as %3$I, (v.o%1$s)::%2$s as %4$I', c.o, coalesce(t.type, 'text'), 'n_' || c.name, 'o_' || c.name), ', ' order by c.o),
         string_agg(format('c.news[array_position(c.cols, %1$L):array_position(c.cols, %1$L)][c.lo:c.hi]', c.name), ', ' order by c.o),
         string_agg(format('c.olds[array_position(c.cols, %1$L):array_position(c.cols, %1$L)][c.lo:c.hi]', c.name), ', ' order by c.o),
         string_agg('n' || c.o, ', ' order by c.o) || ', ' || string_agg('o' || c.o, ', ' order by c.o)
    into v_select, v_news, v_olds, v_names
    from unnest(p_cols) with ordinality c (name, o) left join table_columns(v_rel) t on t.name = c.name;
  return format('select c.change_id, (v.ord + c.lo - 1)::int as ord, %s from %I.imaged($1, $2, $3) c cross join lateral unnest(%s, %s) with ordinality v (%s, ord)',
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
    'select t.* from (%s) t where %s not in (select key from kept where not exists (select from %s where k.key = kept.key and (k.change_id > kept.since or k.change_id is null))) union all select %s from kept k cross join lateral (select * from %I.change c where c.id = k.change_id limit 1) c',
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

-- beside(CTEs, body) -> the body, which may begin with a WITH of its own, with these CTEs before its own; its end stays as it is
create or replace function beside(p_with text, p_body text) returns text language sql immutable set search_path from current as $$
  select case when body ~* '^with\s+recursive\M' then 'with recursive ' || p_with || ', ' || regexp_replace(body, '^with\s+recursive', '', 'i')
              when body ~* '^with\M' then 'with ' || p_with || ', ' || regexp_replace(body, '^with', '', 'i')
              else 'with ' || p_with || ' ' || body end
    from (select regexp_replace(p_body, '^(\s|--[^\n]*\n)+|[\s;]+$', '', 'g') as body) b
$$;

-- empty_sql(table, body) -> the body as run_sql() would run it over no records: migrate has Postgres parse it, and nothing runs it
create or replace function empty_sql(p_table text, p_body text) returns text language sql stable set search_path from current as $$
  select beside(format('new_records as (select * from %1$I.%2$I limit 0), old_records as (select * from %1$I.%2$I limit 0)', n.nspname, c.relname), p_body)
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = resolve(p_table)
$$;

-- run_sql(token, ids, worker) -> receipt id
-- Runs a SQL handler over whole leased jobs, in the caller's transaction; its writes and the ack commit together.
-- That of a model refreshes it; null: not now, the jobs wait.
-- new_records and old_records are what the jobs hold: images as committed, the rows of now where read = 'now' or an
-- image is missing (a degraded change, a backfill); an old record without image is its key and nulls.
create or replace function run_sql(p_token bigint, p_ids bigint[], p_worker int) returns bigint
language plpgsql volatile set search_path from current as $$
declare
  h handler; w watched; v_app text := setting('app_schema'); v_held bigint; v_handler int; v_receipt bigint; v_body text; v_with text;
  v_cols text[]; v_names text; v_new text; v_old text; v_key text; v_images text; v_settled int[];
  v_new_changes bigint[]; v_new_los int[]; v_new_his int[]; v_old_changes bigint[]; v_old_los int[]; v_old_his int[];
  v_new_ids bigint[]; v_new_keys jsonb; v_old_keys jsonb; v_new_of bigint[]; v_new_since jsonb; v_lazy boolean; v_first bigint;
begin
  select count(*), min(handler_id) into v_held, v_handler from leased(p_token, p_ids);
  perform fence(p_token, v_held, coalesce(cardinality(p_ids), 0));
  select * into h from handler where id = v_handler;
  if h.model_id is not null then
    return refresh_jobs(h, p_token, p_ids, p_worker);
  end if;
  select * into w from watched where id = h.table_id;
  with part as (
    select l.*, l.cols is not null and l.op in ('n', 'u') and (h.read = 'change' or w.key_kind = 'none') as new_image,
           l.cols is not null and l.op in ('u', 'd') as old_image,
           case when l.degraded is not null and h.where_sql is not null then passes(h.id, l.ids, l.keys, l.op) end as passing,
           -- the row as it was then: no image came with it, and updates keep the first
           case when h.read = 'change' and w.key_kind <> 'none' and l.op = 'n' and l.cols is null and l.degraded is null then l.change_id end as since
      from leased(p_token, p_ids) l
  ), ids as (
    select u.id, p.since from part p cross join lateral unnest(p.ids) with ordinality u (id, o)
     where p.op in ('n', 'u') and not p.new_image
       and (p.settled is null or p.lo + o - 1 <> all (p.settled)) and (p.passing is null or o = any (p.passing))
  ), bare as (
    select p.op, p.since, p.new_image, p.old_image, case when p.ids is not null then jsonb_build_array(p.ids[o - p.lo + 1]) else p.keys -> (o - p.lo) end as key
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
         i.changes, (select jsonb_agg(jsonb_build_array(key, since)) from bare where op in ('n', 'u') and not new_image),
         (select min(since) from part)
    into v_new_changes, v_new_los, v_new_his, v_old_changes, v_old_los, v_old_his, v_settled, v_new_ids, v_new_keys, v_old_keys,
         v_new_of, v_new_since, v_first
    from (select array_agg(id) as ids, array_agg(since) as changes from ids) i;
  v_lazy := v_first is not null;
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
  v_body := beside(v_with, bind(h.body, h.params));
  perform set_config('search_path', quote_ident(v_app) || ', pg_catalog, pg_temp', true);
  execute v_body using v_new_changes, v_new_los, v_new_his, v_old_changes, v_old_los, v_old_his, coalesce(v_settled, '{}'),
    v_new_ids, v_new_keys, coalesce(v_old_keys, '[]'), v_new_of, v_new_since, v_first;
  return v_receipt;
end $$;
