-- Tables as they are found: their names, columns and keys, and the filters that can be asked of them.

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

-- table_key(relation) -> the columns of its primary key, else of a unique index of NOT NULL columns, and their types; nulls where it has neither
create or replace function table_key(p_rel oid, out keys text[], out types text[]) language sql stable set search_path from current as $$
  select array_agg(a.attname::text order by k.pos), array_agg(format_type(a.atttypid, a.atttypmod) order by k.pos)
    from (select i.* from pg_index i
           where i.indrelid = p_rel and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null and i.indexprs is null
             and (i.indisprimary or not exists (
               select from unnest(i.indkey[0:i.indnkeyatts - 1]) c join pg_attribute a on a.attrelid = p_rel and a.attnum = c where not a.attnotnull))
           order by i.indisprimary desc, i.indnkeyatts, i.indexrelid limit 1) i
    cross join lateral unnest(i.indkey[0:i.indnkeyatts - 1]) with ordinality k (num, pos)
    join pg_attribute a on a.attrelid = p_rel and a.attnum = k.num
$$;

-- dbt_model_of(table) -> the dbt model that makes it, nulls when none does; the table need not be there
create or replace function dbt_model_of(p_table text) returns dbt_model language sql stable set search_path from current as $$
  select m.* from (select parse_ident(p_table) as parts) x
    join dbt_model m on m.table_name = x.parts[cardinality(x.parts)]
     and m.schema_name = case when cardinality(x.parts) = 1 then setting('app_schema') else x.parts[1] end
   order by m.registered_at desc limit 1
$$;

-- watch(table) -> table id
-- Looks at a table and notes its key: the primary key, else a unique index of NOT NULL columns, else that of its dbt model,
-- else none (then only new records can be handled, by image). Call it again after the table changed. A dbt model may be a view,
-- or not be built yet.
create or replace function watch(p_table text) returns int language plpgsql volatile set search_path from current as $$
declare
  m dbt_model := dbt_model_of(p_table);
  v_rel regclass; v_schema text; v_name text; v_keys text[]; v_types text[]; v_kind text; v_fetch text; v_id int; v_relkind "char";
begin
  if m.unique_id is null or to_regclass(format('%I.%I', m.schema_name, m.table_name)) is not null then
    v_rel := resolve(p_table);
    select n.nspname, c.relname, c.relkind into v_schema, v_name, v_relkind from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = v_rel;
  else
    v_rel := 0;                                            -- not built yet
    v_schema := m.schema_name;
    v_name := m.table_name;
  end if;
  if v_relkind not in ('r', 'p') and m.unique_id is null then
    raise exception using errcode = 'NT002', message = format('"%s" is no table', p_table),
      hint = 'only ordinary and partitioned tables fire events';
  end if;
  select k.keys, k.types into v_keys, v_types from table_key(v_rel) k;
  if v_keys is null and m.key <> '{}' and coalesce(v_relkind, 'r') = 'r' then
    select array_agg(k order by o), array_agg(coalesce(format_type(a.atttypid, a.atttypmod), 'text') order by o) into v_keys, v_types
      from unnest(m.key) with ordinality x (k, o) left join pg_attribute a on a.attrelid = v_rel and a.attname = k and not a.attisdropped
    having count(a.attname) = count(*) or v_rel = 0;
  end if;
  v_kind := case when v_keys is null then 'none'
                 when cardinality(v_keys) = 1 and v_types[1] in ('smallint', 'integer', 'bigint') then 'id' else 'key' end;
  if v_kind = 'id' then                                    -- in a subquery, so that many keys are not planned as a scan of the table
    v_fetch := format('select t.xmin as _xmin, t.* from %I.%I t where t.%I = any ((select $1::bigint[])::bigint[])', v_schema, v_name, v_keys[1]);
  elsif v_kind = 'key' then
    select format('select k.o as _ord, t.xmin as _xmin, t.* from jsonb_array_elements($1::jsonb) with ordinality k (v, o) join %s t on %s',
                  format('%I.%I', v_schema, v_name), string_agg(format('t.%I = (k.v ->> %s)::%s', c, o - 1, v_types[o]), ' and ' order by o))
      into v_fetch from unnest(v_keys) with ordinality x (c, o);
  end if;
  insert into watched as w (schema_name, table_name, relid, key_columns, key_types, key_kind, fetch_sql, had)
  values (v_schema, v_name, v_rel, coalesce(v_keys, '{}'), coalesce(v_types, '{}'), v_kind, v_fetch,
          array(select name from table_columns(v_rel)))
  on conflict (schema_name, table_name) do update
     set relid = excluded.relid, key_columns = excluded.key_columns, key_types = excluded.key_types,
         key_kind = excluded.key_kind, fetch_sql = excluded.fetch_sql,
         had = w.had || array(select c from unnest(excluded.had) c where c <> all (w.had))
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
