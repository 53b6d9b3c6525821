-- People, and what they are asked. Names no schema.

create table person (
  id int generated always as identity primary key,
  name text not null unique check (name ~ '^[^@\s][^\s]*$'),
  email text unique,
  slack_id text unique,
  groups text[] not null default '{}',            -- without the @
  active boolean not null default true,
  at timestamptz not null default clock_timestamp()
);

create table approval (
  id bigint generated always as identity primary key,
  action_id bigint not null references action (id),
  app text not null,
  name text not null,                             -- of the action
  args jsonb not null,                            -- what is approved: after an edit the edited ones
  args_sha256 text not null,
  preview text not null,                          -- for people
  evidence jsonb not null default '[]',           -- the records it rests on: [{"table", "key", "sha256", "record"}]
  taint text[] not null default '{}',
  reason text,                                    -- why a person is asked: the policy's words
  approvers text[] not null,                      -- names, and @groups
  via text[] not null default '{}',               -- inbox, slack:#finance, email
  quorum int not null default 1 check (quorum > 0),
  editable text[],                                -- arguments that may be changed; null: all, {}: none
  requested_by text,                              -- the person who asked for it: may not approve; null: the app itself
  trace bigint,
  state text not null default 'pending' check (state in ('pending', 'approved', 'rejected', 'expired', 'superseded')),
  before jsonb,                                   -- the arguments before an edit
  after jsonb,
  decided_by text,                                -- the last voice, whose decision it was
  decided_via text,
  decided_at timestamptz,
  why text,                                       -- of a rejection
  on_timeout text not null default 'reject',      -- reject | approve | escalate:@group
  expires_at timestamptz,                         -- null: never
  escalate jsonb not null default '[]',           -- what is still to come: [{"at", "to"}], the earliest first
  due_at timestamptz,                             -- when something is to be done about it: an escalation, the timeout
  supersedes bigint references approval (id),
  difference jsonb,                               -- to that: {"args": {name: [before, after]}, "evidence": [...]}
  at timestamptz not null default clock_timestamp()
);
create unique index on approval (action_id) where state = 'pending';
create index on approval (due_at) where state = 'pending';
create index on approval (id) where state = 'pending';
create index on approval (action_id);

create table approval_event (                     -- what happened to approvals. Rows are only ever added.
  id bigint generated always as identity primary key,
  approval_id bigint not null references approval (id),
  at timestamptz not null default clock_timestamp(),
  kind text not null check (kind in ('asked', 'voted', 'edited', 'approved', 'rejected', 'expired', 'superseded', 'escalated', 'refused')),
  person text,
  via text,
  args_sha256 text,
  detail jsonb not null default '{}'
);
create index on approval_event (approval_id);
revoke update, delete, truncate on approval_event from public;
