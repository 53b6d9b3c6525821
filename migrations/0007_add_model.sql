-- A Table that is kept by a SELECT. Its refreshes are jobs of handlers on the tables it reads, and of schedules.
create table model (
  id int generated always as identity primary key,
  app text not null,
  name text not null,
  table_id int not null unique references watched (id),
  body text not null,                             -- the SELECT
  key_columns text[] not null,
  refresh text[] not null,                        -- tables, quoted with their schema, and cron expressions
  incremental jsonb not null default '[]',        -- [{"table", "column", "output"}]: this column's values name groups of rows
  distinct_keys boolean not null default false,   -- the SELECT's form tells that no key comes twice
  max_wait interval not null default '0',         -- changes wait at most so long, so that one refresh serves many
  stale boolean not null default true,            -- the next refresh is of all rows
  missing_at timestamptz,                         -- vanished from its app's code; its table is kept
  built_at timestamptz,                           -- start of the last refresh; null: never
  ms real,                                        -- of it
  is_full boolean,                                -- whether it was of all rows
  new_n bigint, updated_n bigint, deleted_n bigint, -- what it changed
  jobs bigint,                                    -- that it settled
  unique (app, name)
) with (fillfactor = 50);

alter table handler add column model_id int references model (id);  -- it refreshes this model
create index on handler (model_id) where model_id is not null;
