-- Routes that say verify= keep what they answered, so that a delivery that comes again gets it again.

alter table delivery
  add column reply bytea,                         -- the answer's body, null: none
  add column reply_type text;                     -- its Content-Type
comment on table delivery is 'what came for Webhooks and routes with verify=, by its id';
