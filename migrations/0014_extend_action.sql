-- Actions: the outbox, what is declared of each action, and what each has used of its caps. Names no schema.

create table action_rule (                        -- an action as its app declares it, written by migrate
  app text not null,
  name text not null,
  effect text not null default 'unsafe' check (effect in ('unsafe', 'idempotent')),
  gate text not null default 'open' check (gate in ('open', 'when', 'always')),  -- approve=: none, with when=, without
  policy boolean not null default false,          -- a policy decides each call
  probe boolean not null default false,
  approval jsonb not null default '{}',           -- approvers, via, timeout, on_timeout, editable, quorum, escalate
  allow jsonb not null default '{}',              -- {argument: [values, or hosts of URLs; * stands for anything]}
  caps jsonb not null default '[]',               -- [{"amount", "of": argument or null (calls), "period"}]
  handler text,                                   -- the name of its sender
  missing_at timestamptz,                         -- vanished from its app's code
  primary key (app, name)
);

create table action_used (                        -- of a cap in one of its periods
  app text not null,
  name text not null,
  "of" text not null,                             -- '': calls
  period text not null,
  since timestamptz not null,
  amount numeric not null default 0,
  primary key (app, name, "of", period, since)
);

alter table action drop constraint action_state_check;
alter table action alter column state set default 'new';
alter table action
  add constraint action_state_check check (state in ('new', 'waiting', 'ready', 'sending', 'retrying', 'sent', 'failed', 'unknown',
                                                     'captured', 'refused', 'rejected', 'expired', 'superseded')),
  add column error text,                          -- why it is failed, unknown, refused, or tried again
  add column gate text check (gate = 'always'),   -- .send(approve=): of this call alone
  add column approve jsonb,                       -- with it: what action_rule.approval is otherwise
  add column requested_by text,                   -- the person who asked for it: may not approve; null: the app itself
  add column taint text[] not null default '{}',  -- where what it is made of came from outside: webhook /github
  add column subject jsonb,                       -- [table, key] of the record it was made for
  add column verdict jsonb,                       -- what policy and when= said: {"verdict", "by", "why", "args_sha256"}
  add column approval_id bigint,                  -- the one that holds now
  add column token bigint,                        -- of the sender that has it, or had it last
  add column attempt int not null default 0,      -- times it was begun
  add column sending_at timestamptz,
  add column sent_at timestamptz,
  add column changed_at timestamptz,
  add column settled_at timestamptz,              -- what it gives into= is written
  add column resolved_by text,                    -- the person who said what became of it
  add column depth int not null default coalesce(nullif(split_part(current_setting('anton.context', true), ',', 2), '')::int, 0);
create unique index action_key on action (app, name, idempotency_key);
create index on action (state, id) where state in ('new', 'waiting', 'ready', 'sending', 'retrying', 'unknown', 'failed');
create index on action (trace);

alter table watched add column taint text;        -- where its records come from outside: "webhook /github", "files", "poll feed"
