-- Permits: a handler with a limit over all processes has as many rows, one with a limit for each key a single one. Names no schema.
create table permit (
  handler_id int not null references handler (id) on delete cascade,
  n int not null check (n > 0),
  worker_id int,                                  -- who holds it, while lease_until is to come
  lease_until timestamptz not null default '-infinity',
  primary key (handler_id, n)
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

alter table handler add column per text;          -- the column whose values have a limit each: concurrency
