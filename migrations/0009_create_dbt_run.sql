-- What dbt is asked to build, and what came of it. Names no schema: the runner sets search_path = <schema>, pg_catalog, pg_temp.

create table dbt_run (                            -- one go of a worker at all that was asked of a project by then
  id bigint generated always as identity primary key,
  app text not null,
  project text not null,
  state text not null default 'running' check (state in ('running', 'done', 'failed', 'died')),
  error text,
  started_at timestamptz not null,
  finished_at timestamptz
);
create index on dbt_run (app, project, id);

create table dbt_request (                        -- model.run(), project.run_when(): many become one run
  id bigint generated always as identity primary key,
  app text not null,
  project text not null,
  models text[] not null default '{}',            -- names of models
  upstream boolean not null default false,        -- and what they are made of
  tables text[] not null default '{}',            -- or: what is downstream of these tables, "schema.name"
  gate boolean not null default false,            -- a failing test rolls its model's rebuild back
  full_refresh boolean not null default false,
  vars jsonb not null default '{}',
  timeout interval,
  state text not null default 'waiting' check (state in ('waiting', 'running', 'done', 'failed')),
  merge text,                                     -- while it waits, what is asked under the same word joins it
  first_at timestamptz not null,
  due_at timestamptz not null,
  job_id bigint,                                  -- the delayed job that works it, to put it off
  run_id bigint references dbt_run (id),
  error text,
  cause bigint,                                   -- receipt of the handler that asked
  depth smallint not null default 0,
  trace bigint
);
create unique index on dbt_request (app, project, merge) where state = 'waiting';
create index on dbt_request (app, project, id) where state in ('waiting', 'running');
create index on dbt_request (run_id);

create table dbt_result (                         -- of each node of a run, as dbt told it
  run_id bigint not null references dbt_run (id),
  unique_id text not null,
  status text not null,
  seconds real,
  message text,
  log text,
  primary key (run_id, unique_id)
);
