-- Flow: what was given out of the rates of keys, as far as it matters; calls of actions that are due later. Names no schema.
create table rate_key (
  handler_id int not null,
  key text not null,                              -- the value of per's column, as JSON
  ends bigint[] not null,                         -- of the slots that starts were given for, microseconds since 1970
  counts int[] not null,                          -- so many starts in each
  until timestamptz not null,                     -- when all of it is out of the window
  primary key (handler_id, key)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);

alter table action
  add column delay interval,                      -- from when it is made on: due_at says until when
  add column due_at timestamptz;                  -- not sent before; null: at once
