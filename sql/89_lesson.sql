-- Lessons: what people made of calls, for models to learn from: what was wanted, and what became of it. Only reads.

-- lessons(app, action) -> a row for each call of the action that a person decided about, the oldest decision first
--   decision     approved, edited, rejected                     person, why  who decided; the words of a rejection
--   before       the arguments that were asked for              after        those that were approved; null where it was rejected
--   record       the record that the call was made for, as they saw it; null: none
--   prompt       all of that as text: {"action", "args", "record"}
--   completion   what they made of it: {"decision": "approve", "args"} or {"decision": "reject", "why"}
create or replace function lessons(p_app text, p_action text) returns table (
  approval_id bigint, at timestamptz, decision text, person text, before jsonb, after jsonb, why text, record jsonb, prompt text, completion text)
language sql stable set search_path from current as $$
  select a.id, a.decided_at, d.decision, a.decided_by, d.before, d.after, a.why, r.record,
         jsonb_build_object('action', a.name, 'args', d.before, 'record', r.record)::text,
         case when d.after is null then jsonb_build_object('decision', 'reject', 'why', a.why) else jsonb_build_object('decision', 'approve', 'args', d.after) end::text
    from approval a
   cross join lateral (select nullif(a.evidence -> 0 -> 'record', 'null') as record) r
   cross join lateral (select coalesce(a.before, a.args) as before, case when a.state = 'approved' then a.args end as after,
                              case when a.state = 'rejected' then 'rejected' when coalesce(a.before, a.args) <> a.args then 'edited' else 'approved' end as decision) d
   where a.app = p_app and a.name = p_action and a.state in ('approved', 'rejected') and a.decided_by is not null order by a.decided_at, a.id
$$;
