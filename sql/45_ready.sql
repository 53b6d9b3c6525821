-- Whether code and database fit: what /ready asks.

-- missing(app, migrations, own, tables) -> what code of this release needs and the database has not, a row each
-- migrations: names of the runtime's files, own: of the app's, tables: as users write them, quoted. A database that
-- is ahead of the code lacks nothing.
create or replace function missing(p_app text, p_migrations text[], p_own text[], p_tables text[]) returns setof text
language sql stable set search_path from current as $$
  select 'a database that can be written to' where current_setting('transaction_read_only') = 'on'
  union all
  select needed.name from unnest(p_migrations) needed(name)
   where not exists (select from migration m where m.set_name = 'anton' and m.name = needed.name)
  union all
  select needed.name || ' of the app' from unnest(p_own) needed(name)
   where not exists (select from migration m where m.set_name = 'app:' || p_app and m.name = needed.name)
  union all
  select 'table ' || needed.name from unnest(p_tables) needed(name) cross join lateral parse_ident(needed.name) part
   where to_regclass(format('%I.%I', case cardinality(part) when 1 then setting('app_schema') else part[1] end,
                            part[cardinality(part)])) is null
$$;
