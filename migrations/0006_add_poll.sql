-- How far a poll got, and the keys it has seen. Names no schema: the runner sets search_path = <schema>, pg_catalog, pg_temp.

create table poll (                               -- one for each schedule that polls, made at its first firing
  schedule_id int primary key references schedule (id),
  cursor jsonb,                                   -- what its function returned last; null: from the beginning
  version bigint not null default 0,              -- grows with each commit: two that began alike cannot both commit
  polled_at timestamptz,                          -- when the last one that was committed began
  rows bigint not null default 0,                 -- given to its table so far
  dropped bigint not null default 0               -- known by their keys
);

create table poll_key (                           -- keys that were seen; forgotten when they were not for 90 days
  schedule_id int not null references poll (schedule_id),
  key uuid not null,                              -- the first 128 bits of a hash
  seen_at timestamptz not null,
  primary key (schedule_id, key)
);
create index on poll_key (seen_at);
