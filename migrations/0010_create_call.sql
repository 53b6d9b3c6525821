-- Calls of models: what they cost, what was agreed, what was answered before. Names no schema: the runner sets search_path.

create table call (                               -- one for each request to a model, committed before it is sent
  id bigint generated always as identity primary key,
  at timestamptz not null,
  app text not null,
  handler text not null,
  key jsonb,                                      -- of the record it was made for, and the change that brought it
  change_id bigint,
  trace bigint,
  tenant text,
  provider text not null,
  model text not null,
  answered_by text,                               -- the model's full name as the service gave it
  input_hash text not null,
  prompt_version text,
  params jsonb not null default '{}',
  state text not null default 'asking' check (state in ('asking', 'done', 'failed', 'unknown')),
  tokens_in bigint,
  tokens_cached bigint,                           -- part of tokens_in
  tokens_out bigint,
  cost numeric(18,9),                             -- US dollars; null: its price is not known
  reserved numeric(18,9),                         -- what it can cost at most; null: not known
  reserved_tokens bigint,
  price_version text,
  budgets int[] not null default '{}',            -- where it is reserved, and in which period of each
  periods timestamptz[] not null default '{}',
  ms real,
  error text,
  worker text,
  lease_until timestamptz                         -- null once it is settled
);
create index on call (lease_until) where state = 'asking';
create index on call (id) where state = 'unknown';
create index on call (at);

create table memo (                               -- answers by the hash of what was asked
  hash text primary key,
  call_id bigint not null,                        -- who asks, or has asked
  answer jsonb,                                   -- null: being asked
  at timestamptz not null,
  expires_at timestamptz
);
create index on memo (expires_at);

create table answer (                             -- which call answered which record; written with what the handler writes
  id bigint generated always as identity primary key,
  call_id bigint not null,
  key jsonb,                                      -- of the record that was handled
  memo boolean not null,                          -- it had been asked before
  prompt_version text,
  context jsonb,                                  -- {name: [[table, key, version], ...]} of the rows in the prompt
  cause bigint default nullif(split_part(current_setting('anton.context', true), ',', 1), '')::bigint,
  trace bigint default nullif(split_part(current_setting('anton.context', true), ',', 3), '')::bigint,
  at timestamptz not null default clock_timestamp()
);
create index on answer (cause);
create index on answer (at);

create table budget (
  id int generated always as identity primary key,
  app text not null,
  scope text not null check (scope in ('handler', 'table', 'app')),
  name text not null,                             -- of the handler or table; of an app ''
  period text not null check (period in ('minute', 'hour', 'day', 'week', 'month', 'total')),
  unit text not null check (unit in ('usd', 'tokens')),
  amount numeric not null check (amount >= 0),
  unique (app, scope, name, period, unit)
);

create table spent (                              -- a budget in one of its periods; reserved before a call, settled after it
  budget_id int not null references budget (id),
  period timestamptz not null,                    -- when it began, UTC
  reserved numeric not null default 0,
  settled numeric not null default 0,
  primary key (budget_id, period)
);

create table quota (                              -- what a service lets through, and how much of it is given out
  name text not null,                             -- service, host, model
  unit text not null check (unit in ('requests', 'tokens')),
  amount numeric check (amount > 0),              -- in each window; null: not known
  window_seconds double precision not null default 60,
  stated boolean not null default false,          -- by the app; else learnt from what the service answers
  next_at timestamptz not null default '-infinity',  -- when the next one is due, if all are spaced evenly
  blocked_until timestamptz,                      -- Retry-After
  primary key (name, unit)
);
