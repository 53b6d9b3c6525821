-- What `anton graph` and the checks of migrate ask: what there is to be named, who listens, and who was seen to write.

-- relations() -> all tables and views outside of Postgres' own schemas
--   name     as Postgres quotes it, with its schema
--   kind     table | view
--   columns  their names in order
--   query    of a view
-- The runtime's own are there only as far as SQL of an app has to do with them.
create or replace function relations() returns table (name text, kind text, columns text[], query text)
language sql stable set search_path from current as $$
  select format('%I.%I', n.nspname, c.relname), case when c.relkind in ('v', 'm') then 'view' else 'table' end,
         array(select a.attname::text from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped order by a.attnum),
         case when c.relkind in ('v', 'm') then pg_get_viewdef(c.oid) end
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
   where c.relkind in ('r', 'p', 'v', 'm', 'f') and not c.relispartition and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
     and (n.nspname <> current_schema() or c.relname in ('tick', 'delivery', 'quarantine', 'status', 'dead', 'action', 'load_reject'))
   order by n.nspname, c.relname
$$;

-- listeners() -> the handlers and schedules of every app of this database
--   body  of SQL, its values as typed literals;  cron, title  of a schedule
create or replace function listeners() returns table (
  app text, name text, kind text, "table" text, ops text[], body text, into_tables text[], cron text, title text)
language sql stable set search_path from current as $$
  select h.app, h.name, h.kind, format('%I.%I', w.schema_name, w.table_name), h.ops, bind(h.body, h.params), h.into_tables, s.cron, s.title
    from handler h join watched w on w.id = h.table_id left join schedule s on s.app = h.app and s.name = h.name
   where h.enabled order by h.app, h.name
$$;

-- seen() -> what handlers wrote to, by the newest receipts of each day that is kept: 2,000, and as many notes of outputs
create or replace function seen() returns table (app text, handler text, "table" text)
language sql stable set search_path from current as $$
  with slots as (select generate_series(0, 8)::smallint as slot),
  noted as (
    select distinct o.receipt_id, o.table_id from slots, lateral (
      select receipt_id, table_id from output where slot = slots.slot order by receipt_id desc limit 2000) o
  ), recent as (
    select r.handler_id, r.causes from slots, lateral (
      select handler_id, causes from receipt where slot = slots.slot order by id desc limit 2000) r
  ), caused as (
    select distinct c.cause as receipt_id, h.table_id from recent join handler h on h.id = recent.handler_id cross join lateral unnest(recent.causes) c (cause)
     where c.cause is not null
  ), written as (
    select distinct r.handler_id, x.table_id from (select * from noted union select * from caused) x
      cross join lateral (select handler_id from receipt where id = x.receipt_id limit 1) r)
  select h.app, h.name, format('%I.%I', w.schema_name, w.table_name)
    from written join handler h on h.id = written.handler_id join watched w on w.id = written.table_id
   where w.schema_name <> current_schema() order by 1, 2, 3
$$;
