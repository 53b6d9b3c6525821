-- Rates: a handler with a rate over all processes has one row, whatever it is worked with. Names no schema.
create table rate (
  handler_id int primary key references handler (id) on delete cascade,
  said text not null,                             -- "100/m"
  most int not null check (most > 0),             -- starts in any window
  length_us bigint not null,                      -- of the window
  since bigint not null default 0,                -- the slot of the first in given; slots are numbered from 1970 on
  given int[] not null default '{}'               -- starts given out for each slot
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
