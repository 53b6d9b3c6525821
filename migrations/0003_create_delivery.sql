-- What Webhooks and routes with verify= received: raw, so that it can be read and verified again; by its id, so that it
-- is kept once.

create table delivery (
  webhook text collate "C" not null,              -- app/path, and the method of a route where it is not POST
  id text collate "C" not null,                   -- the sender's; "~…" is Anton's own, where the sender gives none
  at timestamptz not null,
  status smallint not null default 200,           -- the answer; who sends it again gets it again
  headers json not null,                          -- without credentials
  body bytea not null,
  reply bytea,                                    -- the answer's body, where a route gave one
  reply_type text,                                -- its Content-Type
  primary key (webhook, id)
);
alter table delivery alter body set storage external;  -- compressing would cost more than all the rest
create index on delivery using brin (at) with (autosummarize = on);

-- Verified deliveries that do not fit their table. They stay until they fit when they are sent again, or are deleted.
create table quarantine (
  webhook text collate "C" not null,
  id text collate "C" not null,
  at timestamptz not null,                        -- the first time
  last_at timestamptz not null,
  times int not null default 1,
  status smallint not null,                       -- the answer
  error text not null,
  headers json not null,
  body bytea not null,
  primary key (webhook, id)
);
