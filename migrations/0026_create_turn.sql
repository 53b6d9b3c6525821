-- Turns: records of handlers with ordered that wait for an earlier one of their key. Names no schema.
alter table handler add column ordered boolean not null default false,
  add column on_dead text not null default 'skip' check (on_dead in ('skip', 'block'));

create table turn (
  handler_id int not null references handler (id) on delete cascade,
  key text not null,                              -- of the order: the primary key as JSON, or the value of per's column
  n bigint not null default nextval('change_seq'),   -- the order itself
  state text not null check (state in ('first', 'dead', 'waits')),   -- first: is queued or delayed; one of a key is not waits
  id bigint not null,                             -- of its job, which it has or will have; dead: of its dead letter
  change_id bigint not null,
  at timestamptz not null,
  cause bigint,
  trace bigint,
  ordinal int not null,
  attempt smallint not null,
  crashes smallint not null,
  depth smallint not null,
  op "char" not null,
  tenant text,
  origin text,
  ids bigint[],
  keys jsonb,
  primary key (handler_id, key, n)
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
create unique index on turn (handler_id, id);
