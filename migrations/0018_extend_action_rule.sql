-- Policies in SQL, and calls that are kept no longer. Names no schema.

alter table action_rule add column policy_sql text;                -- a policy that the database asks itself; null: none, or a function
create index on action (changed_at) where state in ('sent', 'captured', 'refused');
