-- dbt: what a table has that dbt does not know of, put onto the one that takes its place. dbt_after() calls it, in the build's own
-- transaction and with the rights of dbt's role. What cannot be is said: in dbt's log, in dbt_build.note, by anton doctor.

-- dbt_grants(grants) -> the statements of a model's config, {privilege: [grantee, …]}, as dbt_belongings() has them
create or replace function dbt_grants(p_grants jsonb) returns setof text language sql immutable set search_path from current as $$
  select format('grant %s on @table@ to %s', upper(e.key), case lower(g) when 'public' then 'public' else quote_ident(g) end)
    from jsonb_each(case when jsonb_typeof(p_grants) = 'object' then p_grants else '{}' end) e
    cross join lateral jsonb_array_elements_text(case when jsonb_typeof(e.value) = 'array' then e.value else jsonb_build_array(e.value) end) g
$$;

-- dbt_identify(table, columns): its replica identity is its unique index on these columns
create or replace function dbt_identify(p_rel regclass, p_columns text[]) returns void language plpgsql volatile set search_path from current as $$
declare v_index name;
begin
  select c.relname into v_index from pg_index i join pg_class c on c.oid = i.indexrelid
   where i.indrelid = p_rel and i.indisunique and i.indisvalid and i.indimmediate and i.indpred is null
     and array(select a.attname::text from unnest(i.indkey[0:i.indnkeyatts - 1]) with ordinality k (n, o) join pg_attribute a on a.attrelid = p_rel and a.attnum = k.n order by k.o) = p_columns limit 1;
  execute format('alter table %s replica identity using index %I', p_rel, v_index);
end $$;

-- dbt_belongings(relation) -> what a table has that dbt does not put onto the one that takes its place; sql names that @table@
-- dbt makes the indexes of a model's config anew itself, under names that are 32 digits: one that went from there is not kept.
create or replace function dbt_belongings(p_rel regclass) returns table (o int, kind text, name text, sql text) language sql stable set search_path from current as $$
  with found as (
    select 1 as o, 'key' as kind, conname::text as name, 'alter table @table@ add ' || pg_get_constraintdef(oid) as sql
      from pg_constraint where conrelid = p_rel and contype in ('p', 'u')
    union all
    select 2, 'key', c.relname, replace(pg_get_indexdef(i.indexrelid), 'INDEX ' || quote_ident(c.relname) || ' ON ' || p_rel, 'INDEX ON @table@')
      from pg_index i join pg_class c on c.oid = i.indexrelid
     where i.indrelid = p_rel and i.indisunique and i.indisvalid and c.relname !~ '^[0-9a-f]{32}$' and not exists (select from pg_constraint k where k.conindid = i.indexrelid and k.contype in ('p', 'u', 'x'))
    union all
    select 2, 'index', c.relname, replace(pg_get_indexdef(i.indexrelid), 'INDEX ' || quote_ident(c.relname) || ' ON ' || p_rel, 'INDEX ON @table@')
      from pg_index i join pg_class c on c.oid = i.indexrelid
     where i.indrelid = p_rel and not i.indisunique and i.indisvalid and c.relname !~ '^[0-9a-f]{32}$' and not exists (select from pg_constraint k where k.conindid = i.indexrelid)
    union all
    select 2, 'constraint', conname, 'alter table @table@ add ' || pg_get_constraintdef(oid) from pg_constraint where conrelid = p_rel and contype in ('c', 'x')
    union all
    select 2, 'constraint', 'not null of ' || quote_ident(attname), format('alter table @table@ alter %I set not null', attname)
      from pg_attribute where attrelid = p_rel and attnum > 0 and not attisdropped and attnotnull
       and not exists (select from pg_index i where i.indrelid = p_rel and i.indisprimary and attnum = any (i.indkey))
    union all                                              -- would lock the other table while this one is compared
    select 2, 'foreign key', conname, null from pg_constraint where conrelid = p_rel and contype = 'f' and conparentid = 0
    union all                                              -- a sequence may go with the old table
    select 2, 'default', 'of ' || quote_ident(a.attname), case when a.attidentity = '' and a.attgenerated = '' and pg_get_expr(d.adbin, d.adrelid) !~ 'nextval'
             then format('alter table @table@ alter %I set default %s', a.attname, pg_get_expr(d.adbin, d.adrelid)) end
      from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
     where a.attrelid = p_rel and a.attnum > 0 and not a.attisdropped and (d.oid is not null or a.attidentity <> '')
    union all
    select 2, 'comment', 'on ' || coalesce(quote_ident(a.attname), 'it'),
           format('comment on %s is %L', case when a.attname is null then 'table @table@' else format('column @table@.%I', a.attname) end, d.description)
      from pg_description d left join pg_attribute a on a.attrelid = d.objoid and a.attnum = d.objsubid and d.objsubid > 0
     where d.classoid = 'pg_class'::regclass and d.objoid = p_rel
    union all
    select 2, 'setting', o, format('alter table @table@ set (%s)', o) from pg_class c, unnest(c.reloptions) o where c.oid = p_rel
    union all
    select 3, 'grant', x.privilege_type, format('grant %s on @table@ to %s%s', x.privilege_type, coalesce(quote_ident(r.rolname), 'public'), case when x.is_grantable then ' with grant option' else '' end)
      from pg_class c cross join lateral aclexplode(c.relacl) x left join pg_roles r on r.oid = x.grantee where c.oid = p_rel and x.grantee <> c.relowner
    union all
    select 3, 'grant', x.privilege_type, format('grant %s (%I) on @table@ to %s%s', x.privilege_type, a.attname, coalesce(quote_ident(r.rolname), 'public'), case when x.is_grantable then ' with grant option' else '' end)
      from pg_attribute a cross join lateral aclexplode(a.attacl) x left join pg_roles r on r.oid = x.grantee where a.attrelid = p_rel and not a.attisdropped
    union all
    select 4, 'policy', polname, format('create policy %I on @table@ as %s for %s to %s%s%s', polname, case when polpermissive then 'permissive' else 'restrictive' end,
             case polcmd when 'r' then 'select' when 'a' then 'insert' when 'w' then 'update' when 'd' then 'delete' else 'all' end,
             (select string_agg(coalesce(quote_ident(r.rolname), 'public'), ', ') from unnest(polroles) u left join pg_roles r on r.oid = u),
             ' using (' || pg_get_expr(polqual, polrelid) || ')', ' with check (' || pg_get_expr(polwithcheck, polrelid) || ')')
      from pg_policy where polrelid = p_rel
    union all
    select 5, 'policy', 'row level security', format('alter table @table@ %s row level security', v.verb)
      from pg_class c cross join lateral (values ('enable', c.relrowsecurity), ('force', c.relforcerowsecurity)) v (verb, on_) where c.oid = p_rel and v.on_
    union all
    select 6, 'trigger', tgname, replace(pg_get_triggerdef(t.oid), ' ON ' || p_rel || ' ', ' ON @table@ ')
      from pg_trigger t join pg_proc f on f.oid = t.tgfoid where t.tgrelid = p_rel and not t.tgisinternal and f.pronamespace <> quote_ident(current_schema())::regnamespace
    union all
    select 7, 'trigger', tgname, format('alter table @table@ %s trigger %I', case tgenabled when 'D' then 'disable' when 'R' then 'enable replica' else 'enable always' end, tgname)
      from pg_trigger t join pg_proc f on f.oid = t.tgfoid where t.tgrelid = p_rel and not t.tgisinternal and f.pronamespace <> quote_ident(current_schema())::regnamespace and tgenabled <> 'O'
    union all
    select 8, 'publication', p.pubname, format('alter publication %I add table @table@%s%s', p.pubname,   -- no more than was published before
             (select ' (' || string_agg(quote_ident(a.attname), ', ' order by a.attnum) || ')' from pg_attribute a where a.attrelid = p_rel and a.attnum = any (r.prattrs)),
             ' where (' || pg_get_expr(r.prqual, r.prrelid) || ')')
      from pg_publication_rel r join pg_publication p on p.oid = r.prpubid where r.prrelid = p_rel
    union all
    select 9, 'replica identity', v.name, format('alter table @table@ replica identity %s', v.name)
      from pg_class c join (values ('f', 'full'), ('n', 'nothing')) v (letter, name) on v.letter = c.relreplident where c.oid = p_rel
    union all
    select 9, 'replica identity', 'using index ' || quote_ident(c.relname), format('select dbt_identify(''@table@'', %L)',
             array(select a.attname::text from unnest(i.indkey[0:i.indnkeyatts - 1]) with ordinality k (n, o) join pg_attribute a on a.attrelid = p_rel and a.attnum = k.n order by k.o))
      from pg_index i join pg_class c on c.oid = i.indexrelid where i.indrelid = p_rel and i.indisreplident)
  select f.o, f.kind, f.name, replace(f.sql, p_rel::text, '@table@') from found f
$$;

-- dbt_carry(belongings, new) -> what could not be carried over
-- belongings: rows of dbt_belongings() as JSON. Policies must be: a table that more people can read than before is not published.
create or replace function dbt_carry(p_belongings jsonb, p_new regclass) returns text[] language plpgsql volatile set search_path from current as $$
declare b record; v_notes text[] := '{}'; v_has text[] := array(select coalesce(lower(sql), concat(kind, ' ', name)) from dbt_belongings(p_new)); v_pk boolean;
begin
  for b in select x.* from jsonb_to_recordset(coalesce(p_belongings, '[]')) x (o int, kind text, name text, sql text) order by x.o, x.name loop
    continue when coalesce(lower(b.sql), concat(b.kind, ' ', b.name)) = any (v_has);
    if b.sql is null then
      v_notes := v_notes || format('%s %s was lost: it is not put onto another table', b.kind, b.name);
      continue;
    end if;
    if b.sql like 'alter table @table@ add PRIMARY KEY%' then
      select exists (select from pg_index where indrelid = p_new and indisprimary) into v_pk;
      continue when v_pk;
    end if;
    begin
      execute replace(b.sql, '@table@', p_new::text);
    exception when others then
      if b.kind = 'policy' then
        raise exception using errcode = sqlstate, message = format('%s of %s cannot be put onto the new table: %s', b.name, p_new, sqlerrm),
          hint = $h$the table is as it was before. Change the policy, or the model; to build without Anton: --vars 'anton_enabled: false'$h$;
      end if;
      v_notes := v_notes || format('%s %s was lost: %s', b.kind, b.name, sqlerrm);
    end;
  end loop;
  return v_notes;
end $$;

-- dbt_repoint(old, new, views) -> what goes with the old table
-- Views on a table would be dropped with the old one: they read the new one from here on. Those that the same command builds (views:
-- "schema.name") are left to dbt, as it believes them dropped and makes them anew.
create or replace function dbt_repoint(p_old regclass, p_new regclass, p_views jsonb) returns text[] language plpgsql volatile set search_path from current as $$
declare
  v record; v_notes text[] := '{}'; v_from text := (select quote_ident(relname) from pg_class where oid = p_old); v_to text := (select quote_ident(relname) from pg_class where oid = p_new);
begin
  for v in select distinct c.oid::regclass as view, c.relkind, array_to_string(c.reloptions, ', ') as options
             from pg_depend d join pg_rewrite r on r.oid = d.objid join pg_class c on c.oid = r.ev_class join pg_namespace n on n.oid = c.relnamespace
            where d.classid = 'pg_rewrite'::regclass and d.refclassid = 'pg_class'::regclass and d.refobjid = p_old and c.oid <> p_old and c.relkind in ('v', 'm')
              and not coalesce(p_views, '[]') ? (n.nspname || '.' || c.relname) loop
    begin
      if v.relkind = 'm' then
        raise exception 'dbt drops it with the old table';
      end if;
      execute format('create or replace view %s%s as %s', v.view, ' with (' || v.options || ')', replace(pg_get_viewdef(v.view), v_from, v_to));
    exception when others then
      v_notes := v_notes || format('view %s is lost: %s', v.view, sqlerrm);
    end;
  end loop;
  return v_notes || array(select format('foreign key %s of %s is lost: dbt drops it with the old table', quote_ident(conname), conrelid::regclass)
                            from pg_constraint where contype = 'f' and confrelid = p_old and conrelid <> p_old order by 1);
end $$;
