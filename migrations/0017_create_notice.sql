-- Whom to tell of approvals, and requests of Slack's buttons, each of which counts once. Names no schema.

create table seen_request (                       -- signed requests that came in: each counts once
  sha256 text primary key check (sha256 ~ '^[0-9a-f]{64}$'),
  at timestamptz not null default clock_timestamp()
);
create index on seen_request (at);

create table notice (                             -- whom to tell of an approval, and where; an app sends them on, as it likes
  id bigint generated always as identity primary key,
  at timestamptz not null default clock_timestamp(),
  app text not null,
  approval_id bigint not null references approval (id),
  kind text not null check (kind in ('asked', 'reminder', 'escalated', 'decided')),
  via text not null,                              -- email, slack
  person text,                                    -- of an e-mail; null: a channel's
  "to" text not null,                             -- the address, or the channel
  subject text not null
);
create index on notice (approval_id);

alter table approval_event drop constraint approval_event_kind_check;
alter table approval_event add constraint approval_event_kind_check check (kind in
  ('asked', 'voted', 'edited', 'approved', 'rejected', 'expired', 'superseded', 'escalated', 'refused', 'reminded'));
