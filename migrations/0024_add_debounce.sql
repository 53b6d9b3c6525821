-- Debounce: keys of handlers that wait for their records to come to rest. Names no schema.
create table debounce (
  handler_id int not null,
  key jsonb not null,                             -- what comes to rest: [k1, k2, ...] of a record, or [value] of the column per
  record jsonb not null,                          -- key of the record that changed last
  first_at timestamptz not null,                  -- its first change, from which max_wait counts
  last_at timestamptz not null,
  due_at timestamptz not null,
  cause bigint, depth smallint not null default 0, trace bigint, tenant text,   -- of the last change
  primary key (handler_id, key)
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0);
create index on debounce (due_at);

alter table handler add column debounce interval;   -- how long a key must be at rest; max_wait: how long at most after its first change

-- Triggers write into delayed, too: the jobs of rows that want to be handled later.
alter table delayed alter id set default nextval('change_seq'), alter attempt set default 0, alter crashes set default 0, alter depth set default 0;
