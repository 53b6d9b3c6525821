-- dbt: what a build changed. Rows before and after it, by key, and their differences as events. dbt_after() calls it, in the build's own
-- transaction and with the rights of dbt's role.

-- dbt_key(build, watched, model, relation) -> the columns that name a record, {} when none are known
create or replace function dbt_key(p jsonb, w watched, m dbt_model, p_rel regclass) returns text[] language sql stable set search_path from current as $$
  select coalesce((
    select k.key from (values (1, m.key), (2, w.key_columns),
                              (3, case when jsonb_typeof(p -> 'key') = 'array' then array(select jsonb_array_elements_text(p -> 'key')) end)) k (o, key)
     where cardinality(k.key) > 0 and k.key <@ array(select name from table_columns(p_rel)) order by k.o limit 1), '{}')
$$;

-- dbt_key_index(relation, key, unique) -> what could not be done
-- The table that dbt just made gets an index on its key, so that its records can be read by it. A `table`, which nobody adds to
-- before the next one takes its place, gets a primary key.
create or replace function dbt_key_index(p_rel regclass, p_key text[], p_unique boolean) returns text[] language plpgsql volatile set search_path from current as $$
declare v_columns text := (select string_agg(quote_ident(k), ', ' order by o) from unnest(p_key) with ordinality x (k, o));
begin
  if exists (select from pg_index i where i.indrelid = p_rel and i.indisvalid and i.indpred is null and i.indexprs is null
                and p_key <@ array(select attname::text from unnest(i.indkey[0:cardinality(p_key) - 1]) c join pg_attribute a on a.attrelid = p_rel and a.attnum = c)) then
    return '{}';
  end if;
  if p_unique then
    begin
      execute format('alter table %s add primary key (%s)', p_rel, v_columns);
      return '{}';
    exception when unique_violation or not_null_violation then
      return array[format('no primary key (%s): %s', v_columns, sqlerrm)];
    when invalid_table_definition then                     -- it has another one
      null;
    end;
  end if;
  execute format('create index on %s (%s)', p_rel, v_columns);
  return '{}';
end $$;

-- dbt_hidden(relation) -> what to say of a table of which the role that builds may not read all rows, null: it reads them all
create or replace function dbt_hidden(p_rel regclass) returns text language sql stable set search_path from current as $$
  select format('row level security of %s holds for "%s", which may not see all of its records', p_rel, current_user) where row_security_active(p_rel)
$$;

-- dbt_unique(relation, key) -> whether no two records have the same key, and none a null in it
create or replace function dbt_unique(p_rel regclass, p_key text[]) returns boolean language plpgsql volatile set search_path from current as $$
declare v_columns text := (select string_agg(quote_ident(k), ', ') from unnest(p_key) k); v_ok boolean;
begin
  if not p_key <@ array(select name from table_columns(p_rel)) then
    return false;
  end if;
  if exists (select from pg_index i where i.indrelid = p_rel and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null
                and array(select attname::text from unnest(i.indkey[0:i.indnkeyatts - 1]) c join pg_attribute a on a.attrelid = p_rel and a.attnum = c) <@ p_key)
     and not exists (select from pg_attribute where attrelid = p_rel and attname = any (p_key) and not attnotnull) then
    return true;
  end if;
  execute format('select not exists (select from %1$s where %2$s) and not exists (select from %1$s group by %3$s having count(*) > 1)',
    p_rel, (select string_agg(format('%I is null', k), ' or ') from unnest(p_key) k), v_columns) into v_ok;
  return v_ok;
end $$;

-- dbt_columns(relation) -> {name: type}, to tell whether its columns changed
create or replace function dbt_columns(p_rel regclass) returns jsonb language sql stable set search_path from current as $$
  select jsonb_object_agg(name, type) from table_columns(p_rel)
$$;

-- dbt_fingerprint(relation) -> text that is the same for the same rows in any order
create or replace function dbt_fingerprint(p_rel regclass) returns text language plpgsql volatile set search_path from current as $$
declare v_hash text; v_out text;
begin
  select case when bool_and(comparable and type <> 'money' and type !~ '^bit') then 'hash_record_extended(t, 0)' else 'hashtextextended(t::text, 0)' end into v_hash
    from table_columns(p_rel);
  execute format('select count(*) || '' '' || coalesce(sum(%s), 0) from %s t', v_hash, p_rel) into v_out;
  return v_out;
end $$;

-- dbt_ordered(relation, key) -> whether an index has this key, and the rows lie in its order, by a hundred pages of them
create or replace function dbt_ordered(p_rel regclass, p_key text[]) returns boolean language plpgsql volatile set search_path from current as $$
declare v_pages bigint := pg_relation_size(p_rel) / current_setting('block_size')::int; v_ok boolean;
begin
  if not exists (select from pg_index i join pg_class c on c.oid = i.indexrelid join pg_am a on a.oid = c.relam
                  where i.indrelid = p_rel and i.indisvalid and i.indpred is null and i.indexprs is null and a.amname = 'btree'
                    and (select array_agg(t.attname::text order by t.attname::text) from unnest(i.indkey[0:cardinality(p_key) - 1]) k join pg_attribute t on t.attrelid = p_rel and t.attnum = k)
                      = (select array_agg(k order by k) from unnest(p_key) k)) then
    return false;
  end if;
  execute format('select coalesce(avg((k >= before)::int) > 0.95, true) from (select %1$I as k, lag(%1$I) over (order by ctid) as before from %2$s tablesample system (%3$s)) x',
                 p_key[1], p_rel, least(100, 10000.0 / greatest(v_pages, 1))) into v_ok;
  return v_ok;
end $$;

-- dbt_parts(relation, column) -> conditions that cut a large table, which lies in the order of this column, into four
create or replace function dbt_parts(p_rel regclass, p_column text) returns text[] language plpgsql volatile set search_path from current as $$
declare v_pages bigint := pg_relation_size(p_rel) / current_setting('block_size')::int; v_cuts text[];
begin
  if v_pages < 1000 then
    return '{true}';
  end if;
  execute format('select array_agg(distinct k order by k)::text[] from (select %I as k from %s where ctid = any (%L)) x',
                 p_column, p_rel, array(select format('(%s,1)', v_pages * part / 4)::tid from generate_series(1, 3) part)) into v_cuts;
  return array(select concat_ws(' and ', 'true', quote_ident(p_column) || ' >= ' || quote_literal(v_cuts[part - 1]), quote_ident(p_column) || ' < ' || quote_literal(v_cuts[part]))
                 from generate_series(1, coalesce(cardinality(v_cuts), 0) + 1) part);
end $$;

-- dbt_diff(old, new, key, touched) -> counts, and pg_temp.anton_diff (o, n): the rows that differ, as they were and as they are
--   touched  old holds, for each key that was touched, the row before (anton_was), or that there was none; else it is all rows
create or replace function dbt_diff(p_old regclass, p_new regclass, p_key text[], p_touched boolean, out new_n bigint, out updated_n bigint, out deleted_n bigint)
language plpgsql volatile set search_path from current as $$
declare
  v_on text; v_differ text; v_parts text[] := '{true}'; v_first text := quote_ident(p_key[1]);
  v_names text[] := array['parallel_setup_cost', 'parallel_tuple_cost', 'jit', 'enable_hashjoin', 'enable_sort']; v_before text[];
begin
  select array_agg(current_setting(name) order by o) into v_before from unnest(v_names) with ordinality x (name, o);
  select string_agg(case when o.type = n.type then format('anton_o.%1$I = anton_n.%1$I', n.name) else format('anton_o.%1$I::text = anton_n.%1$I::text', n.name) end, ' and ')
    into v_on from unnest(p_key) k join table_columns(p_old) o on o.name = k join table_columns(p_new) n on n.name = k;
  select concat_ws(' or ', format('anton_o.%1$s is null or anton_n.%1$s is null', v_first),
           string_agg(case when o.type = n.type and n.comparable then format('anton_o.%1$I is distinct from anton_n.%1$I', n.name)
                           else format('anton_o.%1$I::text is distinct from anton_n.%1$I::text', n.name) end, ' or '))
    into v_differ from table_columns(p_old) o join table_columns(p_new) n using (name) where n.name <> all (p_key);
  if p_touched then
    v_differ := format('(anton_o.anton_was or anton_n.%s is not null) and (not anton_o.anton_was or %s)', v_first, v_differ);
  end if;
  if (select reltuples from pg_class where oid = p_new) < 0 then
    execute format('analyze %s', p_new);
  end if;
  -- nearly no row differs, which the planner cannot know: it would not read in parallel. Compiling does not pay.
  perform set_config('parallel_setup_cost', '0', true), set_config('parallel_tuple_cost', '0', true), set_config('jit', 'off', true);
  -- both lie in the order of the key, as a rebuild leaves them: along their indexes it takes half the work of a hash join. Parts of them
  -- are joined in parallel, as a whole merge join is not.
  if not p_touched and dbt_ordered(p_old, p_key) and dbt_ordered(p_new, p_key)
     and (select count(*) = cardinality(p_key) from pg_attribute o join pg_attribute n using (attname, atttypid, atttypmod, attcollation)
           where o.attrelid = p_old and n.attrelid = p_new and attname = any (p_key)) then
    perform set_config('enable_hashjoin', 'off', true), set_config('enable_sort', 'off', true);
    v_parts := dbt_parts(p_new, p_key[1]);
  end if;
  -- whole rows are fetched of those that differ alone: in the join, each row would be made one, which takes as long as the join does
  execute (select format('create temp table anton_diff on commit drop as select (select anton_x from %s anton_x where anton_x.ctid = d.o%s) as o,
                            (select anton_x from %s anton_x where anton_x.ctid = d.n) as n from (%s) d', p_old, case when p_touched then ' and anton_x.anton_was' end, p_new,
      string_agg(format('select anton_o.anton_ctid as o, anton_n.anton_ctid as n from (select ctid as anton_ctid, * from %1$s where %2$s) anton_o
                         %3$s join (select ctid as anton_ctid, * from %4$s where %2$s) anton_n on %5$s where %6$s', p_old, part, case when p_touched then 'left' else 'full' end, p_new, v_on, v_differ), ' union all '))
    from unnest(v_parts) part);
  perform set_config(name, before, true) from unnest(v_names, v_before) x (name, before);
  execute format('select count(*) filter (where (o).%1$s is null), count(*) filter (where (o).%1$s is not null and (n).%1$s is not null), count(*) filter (where (n).%1$s is null)
                    from pg_temp.anton_diff', v_first) into new_n, updated_n, deleted_n;
end $$;

-- dbt_replay(table, old, new, key): fires what pg_temp.anton_diff holds, as statements on the table would have
create or replace function dbt_replay(w watched, p_old regclass, p_new regclass, p_key text[]) returns void language plpgsql volatile set search_path from current as $$
declare v_names text; v_olds text; v_news text; v_sets text; v_match text; v_first text := quote_ident(p_key[1]); v_bare text; v_any boolean;
begin
  select string_agg(quote_ident(n.name), ', ' order by n.o), string_agg(format('(d.n).%I', n.name), ', ' order by n.o), string_agg(format('%1$I = (d.n).%1$I', n.name), ', ' order by n.o),
         string_agg(case when o.name is null then format('null::%s', n.type) when o.type = n.type then format('(d.o).%I', n.name) else format('(d.o).%I::text::%s', n.name, n.type) end, ', ' order by n.o),
         string_agg(case when o.type = n.type or n.name = any (p_key) and o.name is not null then format('(d.o).%I::%s', n.name, n.type) else format('null::%s', n.type) end, ', ' order by n.o)
    into v_names, v_news, v_sets, v_olds, v_bare
    from (select *, row_number() over () as o from table_columns(p_new)) n (name, type, comparable, fixed, plain, o) left join table_columns(p_old) o (name, type) on o.name = n.name;
  select string_agg(format('c.%1$I = (d.n).%1$I', k), ' and ') into v_match from unnest(p_key) k;
  execute format('create temp table anton_carrier on commit drop as select *, null::"char" as anton_op from %s limit 0', p_new);
  begin
    execute format('insert into pg_temp.anton_carrier (%s, anton_op) select %s, case when (d.n).%s is null then ''d'' else ''u'' end from pg_temp.anton_diff d where (d.o).%3$s is not null',
                   v_names, v_olds, v_first);
  exception when data_exception or cannot_coerce then      -- a column has another type, and an old value does not fit it
    execute format('insert into pg_temp.anton_carrier (%s, anton_op) select %s, case when (d.n).%s is null then ''d'' else ''u'' end from pg_temp.anton_diff d where (d.o).%3$s is not null',
                   v_names, v_bare, v_first);
  end;
  if not pg_has_role(owner_role(), current_user, 'usage') then
    execute format('grant trigger on pg_temp.anton_carrier to %I', owner_role());
  end if;
  perform dbt_attach(w.id);
  if exists (select from pg_temp.anton_carrier where anton_op = 'd') then
    delete from pg_temp.anton_carrier where anton_op = 'd';
  end if;
  if exists (select from pg_temp.anton_carrier) then
    execute format('update pg_temp.anton_carrier c set %s from pg_temp.anton_diff d where (d.o).%s is not null and %s', v_sets, v_first, v_match);
  end if;
  execute format('select exists (select from pg_temp.anton_diff d where (d.o).%s is null)', v_first) into v_any;
  if v_any then
    execute format('insert into pg_temp.anton_carrier (%s) select %s from pg_temp.anton_diff d where (d.o).%s is null', v_names, v_news, v_first);
  end if;
  drop table pg_temp.anton_carrier;
end $$;
