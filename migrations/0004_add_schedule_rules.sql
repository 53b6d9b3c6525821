-- What happens with times that passed, with a firing that is not done when the next time comes, and times planned ahead.
alter table schedule
  add column misfire text not null default 'once' check (misfire in ('once', 'all', 'skip')),
  add column overlap text not null default 'queue' check (overlap in ('queue', 'skip', 'parallel')),
  add column jitter interval not null default '0' check (jitter >= interval '0'),
  add column starts_at timestamptz,
  add column ends_at timestamptz,
  add column ahead timestamptz[] not null default '{}',       -- the times after next_at that are known
  add column planned_to timestamptz not null default 'infinity', -- times are known up to here; infinity: there are no more
  add column error text;                                       -- why no time can be computed

alter table tick
  drop constraint tick_state_check,
  add constraint tick_state_check check (state in ('planned', 'waiting', 'done', 'failed', 'skipped')),
  add column change_id bigint;                                 -- of its job

create index on tick (schedule_id) where state in ('planned', 'waiting');

update schedule set planned_to = coalesce(next_at, clock_timestamp()), next_at = case when cron like '@every%' then coalesce(next_at, clock_timestamp()) else next_at end;
update tick t set change_id = q.change_id
  from schedule s join handler h using (app, name),
       lateral (select change_id, keys from job where handler_id = h.id union all select change_id, keys from lease where handler_id = h.id
                union all select change_id, keys from delayed where handler_id = h.id) q
 where s.id = t.schedule_id and t.state = 'planned' and q.keys = jsonb_build_array(jsonb_build_array(t.schedule_id, t.planned_at));
