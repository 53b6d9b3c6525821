-- What dbt builds: its models as tables that fire events, the builds that were committed, and the tests that gate them.

create table dbt_model (
  project text not null,
  unique_id text not null,                        -- model.shop.daily_revenue
  schema_name text not null,
  table_name text not null,
  key text[] not null default '{}',               -- empty: not known
  track boolean not null default false,           -- rows are compared although nobody listens
  fingerprint text,                               -- of a materialized view's rows, at its last build
  table_id int not null references watched (id),
  registered_at timestamptz not null default clock_timestamp(),
  primary key (project, unique_id)
);
create index on dbt_model (schema_name, table_name);

create table dbt_build (                          -- a committed build of one model
  id bigint generated always as identity primary key,
  project text not null,
  unique_id text not null,
  relation text not null,                         -- "schema"."name", quoted where it has to be
  invocation_id text,
  materialized text not null,
  initial boolean not null,                       -- there was nothing to compare it with
  changed boolean,                                -- null: nobody asked
  new_n bigint,                                   -- null: not compared row by row
  updated_n bigint,
  deleted_n bigint,
  schema_changed boolean not null,
  columns jsonb,                                  -- {name: type}; null: dbt's hooks did not run
  note text,                                      -- what could not be done, for people
  at timestamptz not null,
  xid xid8 not null
);
create index on dbt_build (unique_id, id);

create table dbt_test (                           -- compiled tests that a build is to pass before it is served
  project text not null,
  unique_id text not null,                        -- of the model
  name text not null,
  sql text not null,                              -- a SELECT of what fails
  severity text not null default 'error' check (severity in ('error', 'warn')),
  fail_calc text not null default 'count(*)',
  error_if text not null default '!= 0',
  warn_if text not null default '!= 0',
  always boolean not null default false,          -- also in a plain `dbt run`; else only where it is asked for
  primary key (project, unique_id, name)
);
