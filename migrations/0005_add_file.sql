-- Files: scans of storages, and what was loaded from which file.

-- A Table of files. One scan at a time: the token fences off one that was thought dead.
create table file_scan (
  id int generated always as identity primary key,
  app text not null,
  table_name text not null,
  token bigint not null default 0,
  busy_until timestamptz not null default '-infinity',
  started_at timestamptz,
  finished_at timestamptz,                        -- of the last one that saw all
  files bigint,                                   -- files of the last one
  unique (app, table_name)
);

-- A version of a file on its way into a table. What is in is known to the byte, so that a load goes on where it was.
create table load (
  id bigint generated always as identity primary key,
  app text not null,
  storage text not null,
  path text not null,
  version text not null,                          -- the etag, or the time where there is none
  table_name text not null,
  reached bigint not null default 0,              -- bytes that are in; of Parquet rows
  n bigint not null default 0,                    -- rows that are in
  rejected bigint not null default 0,             -- rows that are in load_reject instead
  state text not null default 'loading' check (state in ('loading', 'done', 'changed', 'failed')),
  error text,
  started_at timestamptz not null,
  finished_at timestamptz,
  unique (app, storage, path, version, table_name)
);

-- Rows of files that did not fit their table.
create table load_reject (
  load_id bigint not null references load (id) on delete cascade,
  row_number bigint not null,                     -- from 1; a header is not counted
  data text not null,                             -- as it stands in the file, at most 8,000 characters
  error text not null,
  primary key (load_id, row_number)
);
