-- The runtime's tables. Names no schema: the runner sets search_path = <schema>, pg_catalog, pg_temp.

-- One sequence numbers changes, jobs, receipts and dead letters, so an id names one thing.
create sequence change_seq cache 1;

create table setting (
  name text primary key,
  value text not null
);
insert into setting (name, value) values
  ('doorbell', 'on'), ('depth_limit', '32'), ('retention_days', '7'), ('lease', '30 s'), ('app_schema', 'public');

-- A Table that Anton watches or made. relid is what the name meant at the last look.
create table watched (
  id int generated always as identity primary key,
  schema_name text not null,
  table_name text not null,
  relid oid not null,
  key_columns text[] not null default '{}',       -- empty: no key, records travel as images
  key_types text[] not null default '{}',         -- format_type() of each
  had text[] not null default '{}',               -- every column it was ever seen with
  key_kind text not null check (key_kind in ('id', 'key', 'none')),  -- one integer column | anything else | none
  app text,                                       -- the app that made it; null: adopted
  model jsonb,                                    -- the declared columns, for drift and makemigration
  fetch_sql text,                                 -- rows by key, as of now; see watch()
  shape text,                                     -- what the trigger functions were written for; see mend()
  watched_at timestamptz not null default clock_timestamp(),
  unique (schema_name, table_name)
);

-- A Handler and its Subscription: what it listens to and how it is run.
create table handler (
  id int generated always as identity primary key,
  app text not null,
  name text not null,
  table_id int not null references watched (id),
  kind text not null check (kind in ('python', 'sql')),
  ops text[] not null check (ops <@ array['new', 'updated', 'deleted', 'truncate', 'rebuilt', 'failed']),
  each_record boolean not null default false,
  read text not null default 'now' check (read in ('now', 'change')),
  where_sql text,
  columns text[],                                 -- watched columns; null: all
  body text,                                      -- kind = sql
  params jsonb not null default '{}',             -- {name: [type, text]} bound into body and where_sql
  into_tables text[] not null default '{}',
  batch int not null default 1000 check (batch between 1 and 4096),
  max_wait interval not null default '0',
  concurrency int check (concurrency > 0),
  timeout interval not null default '5 min',
  attempts int not null default 5 check (attempts > 0),
  backoff interval not null default '1 s',
  max_lag interval,
  options jsonb not null default '{}',            -- the rest of what the user typed, shown by `anton handlers show`
  enabled boolean not null default true,          -- false: no new jobs
  paused boolean not null default false,
  missing_at timestamptz,                         -- vanished from its app's code; its jobs are kept
  failing_since timestamptz,                      -- the world fails; one record probes
  failing_error text,
  failures int not null default 0,
  failed_at timestamptz,
  probe_at timestamptz,
  feeding boolean not null default false,         -- a backfill is running: keys pass through "fed"
  enabled_at timestamptz,                         -- null: not yet, see sync_triggers()
  enabled_snapshot pg_snapshot,                   -- rows visible in it are older than the handler
  enabled_key bigint,                             -- key_kind = id: the largest key then
  created_at timestamptz not null default clock_timestamp(),
  unique (app, name)
);
create index on handler (table_id);

-- Changes of more than 16 records, and all that carry images. A ring of daily slots, emptied by TRUNCATE.
create table change (
  id bigint not null,
  slot smallint not null,
  at timestamptz not null,
  xid xid8 not null,
  table_id int not null,
  op "char" not null,                             -- n new, u updated, d deleted, t truncate, r rebuilt, f failed, x not captured: reconcile, p kept image
  n int not null,
  ids bigint[],                                   -- key_kind = id
  keys jsonb,                                     -- else: [[k1, k2], ...] in key_columns order
  cols text[],                                    -- column names of the images
  news text[],                                    -- text images, one row of this array per column: news[col][record]
  olds text[],
  degraded text,                                  -- why images or filters are missing
  cause bigint,                                   -- receipt whose handler wrote it
  depth smallint not null default 0,
  trace bigint,                                   -- change id the chain began with
  tenant text,
  primary key (id, slot)
) partition by list (slot);

create index on change (table_id, id) where olds is not null;

-- A unit of work: records lo..hi of a change, or the keys themselves when there are at most 16.
create table job (
  handler_id int not null,
  id bigint not null default nextval('change_seq'),
  change_id bigint not null,
  at timestamptz not null,
  cause bigint,
  trace bigint,
  lo int not null,
  hi int not null,
  attempt smallint not null default 0,            -- runs that failed
  crashes smallint not null default 0,            -- runs alone that killed their process
  depth smallint not null default 0,
  op "char" not null,
  tenant text,
  origin text,                                    -- idempotency key kept by a replay
  settled int[],                                  -- ordinals already done
  ids bigint[],
  keys jsonb,
  primary key (handler_id, id)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- Claimed jobs. token is new for each claim and leads the key, so the fence is the index.
create table lease (
  like job,
  token bigint not null,
  lease_until timestamptz not null,
  worker_id int not null,
  alone boolean not null default false,           -- run as a suspect with nothing beside it
  together boolean not null default false,        -- run as a suspect with others, or a part of one that died: alone next
  primary key (token, id)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

-- Jobs that wait for their time.
create table delayed (
  like job,
  run_at timestamptz not null,
  error text,                                     -- of the last run
  primary key (handler_id, id)
);
create index on delayed (run_at);

-- What an ack settled: parts of changes, with the keys only where no change row holds them.
create table receipt (
  id bigint not null,
  slot smallint not null,
  at timestamptz not null,
  handler_id int not null,
  worker_id int,
  ms real,
  n int not null,
  gone int not null default 0,
  change_ids bigint[] not null,                   -- one entry per part
  los int[] not null,
  his int[] not null,
  causes bigint[] not null,
  ordinals int[],                                 -- a part settled by record: these of change_ids[1]
  ids bigint[],                                   -- inline keys, part by part
  keys jsonb,
  depth smallint not null default 0,
  trace bigint,
  tenant text,
  primary key (id, slot)
) partition by list (slot);

-- What a receipt's handler wrote: output keys and the input record each belongs to.
create table output (
  receipt_id bigint not null,
  slot smallint not null,
  table_id int not null,
  ids bigint[],
  keys jsonb,
  owners int[] not null,                          -- position among the receipt's inputs from 1; 0: the whole batch
  primary key (receipt_id, table_id, slot)
) partition by list (slot);

do $$
declare s int; t text;
begin
  for s in 0..8 loop
    foreach t in array array['change', 'receipt', 'output'] loop
      execute format('create table %I partition of %I for values in (%s)', t || '_' || s, t, s);
    end loop;
    execute format('alter table %I alter ids set storage external, alter news set storage external, alter olds set storage external', 'change_' || s);
    execute format('alter table %I alter ids set storage external, alter owners set storage external', 'output_' || s);
  end loop;
end $$;

create table dead (
  id bigint primary key default nextval('change_seq'),
  handler_id int not null references handler (id),
  change_id bigint not null,
  ordinal int not null,
  op "char" not null,
  key jsonb,
  cols text[], news text[], olds text[],          -- the image, as in change, one record
  attempt smallint not null,
  reason text not null check (reason in ('failed', 'discarded', 'crashed', 'depth')),
  error text not null,
  traceback text,
  cause bigint, depth smallint not null default 0, trace bigint, tenant text, origin text,
  died_at timestamptz not null
);
create index on dead (handler_id, id);

-- Keys a running backfill or its handler's trigger has already fed.
create table fed (
  handler_id int not null references handler (id),
  key jsonb not null,
  primary key (handler_id, key)
);

create table backfill (
  handler_id int primary key references handler (id),
  after_key jsonb,                                -- last key fed
  fed bigint not null default 0,
  started_at timestamptz not null,
  finished_at timestamptz
);

create table worker (
  id int generated always as identity primary key,
  app text not null,
  host text not null,
  pid int not null,
  version text not null,
  started_at timestamptz not null,
  seen_at timestamptz not null,
  stopped_at timestamptz
);

create table schedule (
  id int generated always as identity primary key,
  app text not null,
  name text not null,
  cron text not null,                             -- five fields, or @every <seconds>
  tz text not null default 'UTC',
  title text not null,                            -- how people say it: Daily
  kind text not null default 'python' check (kind in ('python', 'sql')),
  body text,
  enabled boolean not null default true,
  paused boolean not null default false,
  next_at timestamptz,
  last_at timestamptz,
  unique (app, name)
);

create table tick (                               -- a firing; the key makes it happen once
  schedule_id int not null references schedule (id),
  planned_at timestamptz not null,
  state text not null default 'planned' check (state in ('planned', 'done', 'failed')),
  error text,
  fired_at timestamptz,
  primary key (schedule_id, planned_at)
);
create index on tick (planned_at) where state = 'planned';

create table action (                             -- effects in outside systems
  id bigint generated always as identity primary key,
  app text not null,
  name text not null,
  args jsonb not null,
  state text not null check (state in ('captured', 'ready', 'sent', 'failed', 'unknown')),
  result jsonb,
  idempotency_key text,
  -- the receipt and the trace of the handler that asked for it, as its ack set them
  cause bigint default nullif(split_part(current_setting('anton.context', true), ',', 1), '')::bigint,
  trace bigint default nullif(split_part(current_setting('anton.context', true), ',', 3), '')::bigint,
  at timestamptz not null default clock_timestamp()
);
create index on action (cause);
