-- What a call has used of its caps, whether an attempt is in doubt, and in which transaction an event was noted. Names no schema.

alter table action
  add column counted jsonb not null default '[]',  -- of its caps, when it was begun last: [{"of", "period", "since", "amount"}]
  add column in_doubt boolean not null default false;  -- an attempt may have happened, and it is tried again with the same key
alter table approval_event add column xid xid8;   -- the transaction that noted it; null: of a release before
alter table approval
  add column error text,                          -- why what was due could not be done
  add column retry_at timestamptz;                -- when that is tried again
