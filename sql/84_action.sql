-- Actions: the outbox. A call is a row of action; a sender carries it out between begin_action() and end_action(), with no transaction
-- open. guard_action() lets nobody make what only that way may make: it holds for psql, replay and retry alike.
--
--   new -> waiting -> ready -> sending -> sent | failed | unknown | retrying (-> sending)
--   new -> captured | refused;  waiting -> rejected | expired | superseded;  failed, unknown -> ready, by a person

-- args_hash(args) -> SHA-256 of arguments, hex: jsonb as Postgres writes it
create or replace function args_hash(p_args jsonb) returns text language sql immutable strict set search_path from current as $$
  select encode(sha256(convert_to(p_args::text, 'UTF8')), 'hex')
$$;

-- put_action(rule): what an app declares of an action; keys are the columns of action_rule
create or replace function put_action(d jsonb) returns void language sql volatile set search_path from current as $$
  insert into action_rule (app, name, effect, gate, policy, probe, approval, allow, caps, handler)
  values (d ->> 'app', d ->> 'name', d ->> 'effect', d ->> 'gate', (d ->> 'policy')::boolean, (d ->> 'probe')::boolean,
          coalesce(d -> 'approval', '{}'), coalesce(d -> 'allow', '{}'), coalesce(d -> 'caps', '[]'), d ->> 'handler')
  on conflict (app, name) do update set effect = excluded.effect, gate = excluded.gate, policy = excluded.policy, probe = excluded.probe,
     approval = excluded.approval, allow = excluded.allow, caps = excluded.caps, handler = excluded.handler, missing_at = null
$$;

-- action_state(app, name) -> all that put_action() may change, as text; null when unknown
create or replace function action_state(p_app text, p_name text) returns text language sql stable set search_path from current as $$
  select to_jsonb(r)::text from action_rule r where app = p_app and name = p_name
$$;

-- retire_actions(app, names) -> those that vanished from the app's code: nothing of theirs is sent any more
create or replace function retire_actions(p_app text, p_names text[]) returns setof text language sql volatile set search_path from current as $$
  update action_rule set missing_at = now() where app = p_app and missing_at is null and name <> all (p_names) returning name
$$;

-- vanished_actions(app, names) -> those that retire_actions() would retire
create or replace function vanished_actions(p_app text, p_names text[]) returns setof text language sql stable set search_path from current as $$
  select name from action_rule where app = p_app and missing_at is null and name <> all (p_names) order by 1
$$;

-- put_taint(table, what): its records come from outside; null: they do not
create or replace function put_taint(p_table text, p_what text) returns void language sql volatile set search_path from current as $$
  update watched set taint = p_what where format('%I.%I', schema_name, table_name) = p_table and taint is distinct from p_what
$$;

-- taint_of(receipt) -> where what it handled came from outside, over all handlers before it
create or replace function taint_of(p_receipt bigint) returns text[] language sql stable set search_path from current as $$
  with recursive step (id, n) as (
    select p_receipt, 0 where p_receipt is not null
    union
    select c, s.n + 1 from step s join receipt r on r.id = s.id cross join lateral unnest(r.causes) c where s.n < 64 and c is not null)
  select coalesce(array_agg(distinct w.taint order by w.taint), '{}')
    from step s join receipt r on r.id = s.id join handler h on h.id = r.handler_id join watched w on w.id = h.table_id where w.taint is not null
$$;

-- allowed(value, patterns) -> whether a value is among them; of a URL its host is. * stands for anything, but for a dot's side of a host
-- "*.example.com" is every host below it. A URL with a backslash, a blank or a control character is none: clients read those differently.
create or replace function allowed(p_value text, p_patterns text[]) returns boolean language sql immutable set search_path from current as $$
  select exists (
    select from unnest(p_patterns) p, lateral (select case
        when p_value !~ '^[a-zA-Z][a-zA-Z0-9+.-]*://' or p ~ '://' then p_value
        when p_value ~ '[\\[:space:][:cntrl:]]' then null
        else lower(substring(p_value from '^[a-zA-Z][a-zA-Z0-9+.-]*://(?:[^/?#]*@)?([^/?#:]*)')) end as value) x
     where x.value like replace(replace(replace(replace(p, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%'))
$$;

-- forbidden(action) -> why its arguments are not allowed by what its app declares, null when they are
create or replace function forbidden(a action) returns text language sql stable set search_path from current as $$
  select format('%s %s is not among what is allowed: %s', k, coalesce(v, 'null'), array_to_string(p, ', '))
    from action_rule r cross join lateral jsonb_each(r.allow) x (k, list) cross join lateral (
      select a.args ->> k, array(select jsonb_array_elements_text(list))) y (v, p)
   where r.app = a.app and r.name = a.name and not coalesce(allowed(v, p), false) limit 1
$$;

-- unapproved(action) -> whether a person has still to approve it, as it is now
-- A verdict that nobody needs to be asked counts for the arguments it was given for.
create or replace function unapproved(a action, r action_rule) returns boolean language sql stable set search_path from current as $$
  select not exists (select from approval p where p.id = a.approval_id and p.action_id = a.id and p.state = 'approved' and p.args_sha256 = args_hash(a.args))
     and (a.gate is not null or r.gate = 'always' or coalesce(a.verdict ->> 'verdict', '') = 'ask'
          or ((r.gate = 'when' or r.policy) and (a.verdict ->> 'verdict' = 'pass' and a.verdict ->> 'args_sha256' = args_hash(a.args)) is not true))
$$;

-- guard_action(): what may become of a call, whoever writes
create or replace function guard_action() returns trigger language plpgsql volatile security definer set search_path from current as $$
declare v_rule action_rule; v_why text;
begin
  if tg_op = 'INSERT' then
    if new.state not in ('new', 'captured') then
      v_why := format('a call begins as new, not as %s', new.state);
    elsif jsonb_typeof(new.args) <> 'object' then
      v_why := 'its args are no object';
    elsif new.token is not null or new.attempt <> 0 or new.approval_id is not null or new.verdict is not null or new.resolved_by is not null then
      v_why := 'token, attempt, approval_id, verdict and resolved_by are set by the runtime';
    end if;
    new.idempotency_key := coalesce(new.idempotency_key, gen_random_uuid()::text);
  elsif (new.id, new.app, new.name, new.idempotency_key, new.at) is distinct from (old.id, old.app, old.name, old.idempotency_key, old.at)
        or new.gate is distinct from old.gate or new.approve is distinct from old.approve or not new.taint @> old.taint then
    v_why := 'app, name, idempotency_key, gate, approve and taint of a call stay as they are';
  elsif new.args is distinct from old.args and not (old.state = 'waiting' and new.state = 'ready') then
    v_why := 'its arguments change by an edit in its approval only';
  elsif new.state = old.state and new.state <> 'sending' and new.token is not distinct from old.token then
    null;
  elsif not (case old.state
      when 'new' then new.state in ('waiting', 'sending', 'captured', 'refused', 'failed')
      when 'waiting' then new.state in ('ready', 'rejected', 'expired', 'superseded')
      when 'ready' then new.state in ('waiting', 'sending', 'captured', 'refused', 'failed')
      when 'retrying' then new.state in ('waiting', 'sending', 'captured', 'refused', 'failed')
      when 'sending' then new.state in ('sending', 'sent', 'failed', 'unknown', 'retrying')
      when 'failed' then new.state in ('ready', 'waiting', 'sending')
      when 'unknown' then new.state in ('ready', 'sent', 'failed')
      else false end) then
    v_why := format('it is %s, which does not become %s', old.state, new.state);
  elsif new.state = 'sending' then
    select * into v_rule from action_rule where app = new.app and name = new.name and missing_at is null;
    v_why := case when v_rule.name is null then 'its app does not declare it (any more)'
                  when setting('actions') = 'stopped' then 'actions are stopped'
                  when new.token is null or new.token = old.token then 'begin_action() makes it'
                  when new.verdict ->> 'verdict' = 'refuse' then 'a policy refuses it'
                  when unapproved(new, v_rule) then 'nobody has approved it with these arguments'
                  else forbidden(new) end;
  elsif old.state = 'sending' and new.token is distinct from old.token then
    v_why := 'another sender has it';
  end if;
  if v_why is not null then
    raise exception using errcode = 'NT008', message = format('call %s of action %s: %s', new.id, new.name, v_why),
      hint = 'calls are made by .send(), or by an insert of app, name and args; people decide through decide(), and: anton actions retry | resolve';
  end if;
  if tg_op = 'INSERT' or new.state is distinct from old.state then
    new.changed_at := now();
  end if;
  return new;
end $$;

create or replace trigger action_guard before insert or update on action for each row execute function guard_action();
revoke all on function guard_action() from public;               -- a trigger needs none of it

-- caps_of(action, rule) -> its caps, in the order in which they are locked, and what the call needs of each
create or replace function caps_of(a action, r action_rule) returns table (amount numeric, "of" text, period text, needs numeric)
language sql stable set search_path from current as $$
  select x.amount, coalesce(x."of", ''), x.period,
         case when x."of" is null then 1 when a.args ->> x."of" ~ '^-?\d+(\.\d+)?$' then (a.args ->> x."of")::numeric end
    from jsonb_to_recordset(r.caps) x (amount numeric, "of" text, period text) order by coalesce(x."of", ''), x.period
$$;

-- begin_action(action, token, verdict, again) -> what its sender has to do; the intent is committed with it
--   send       state is sending, under this token
--   uncertain  another sender began it and did not come back, and it may have happened: probe, then again = that sender's token, or end_action(unknown)
--   ask        a person has to approve it: ask_approval()
--   stopped    by anton actions stop;  capped: a cap is used up, for `after`
--   over       nothing to do: `state` says what became of it
-- verdict: what policy and when= said of these arguments: {"verdict": pass | ask | refuse, "by", "why"}
create or replace function begin_action(p_action bigint, p_token bigint, p_verdict jsonb default null, p_again bigint default null)
returns table (verdict text, state text, args jsonb, idempotency_key text, attempt int, held bigint, result jsonb, reason text, after interval)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare a action; r action_rule; c record; v_now timestamptz := now(); v_since timestamptz; v_used numeric;
begin
  select * into a from action where id = p_action for update;
  select * into r from action_rule x where x.app = a.app and x.name = a.name and x.missing_at is null;
  verdict := 'over'; state := a.state; args := a.args; idempotency_key := a.idempotency_key; attempt := a.attempt; held := a.token; result := a.result; reason := a.error;
  if a.id is null or a.state not in ('new', 'ready', 'retrying', 'failed', 'sending') then
    return next; return;
  elsif a.state = 'sending' and r.effect is distinct from 'idempotent' and p_again is distinct from a.token then
    verdict := 'uncertain';
    return next; return;
  elsif setting('actions') = 'stopped' then
    verdict := 'stopped';
    return next; return;
  end if;
  if p_verdict is not null then
    a.verdict := p_verdict || jsonb_build_object('args_sha256', args_hash(a.args));
  end if;
  if a.cause is not null and a.taint = '{}' then
    a.taint := taint_of(a.cause);
  end if;
  reason := case when r.name is null then 'its app does not declare it (any more)'
                 when a.verdict ->> 'verdict' = 'refuse' then coalesce(a.verdict ->> 'why', 'a policy refuses it') else forbidden(a) end;
  if reason is not null then
    update action set state = case when a.state in ('new', 'ready', 'retrying') then 'refused' else 'failed' end, error = reason, verdict = a.verdict, taint = a.taint where id = a.id;
    state := case when a.state in ('new', 'ready', 'retrying') then 'refused' else 'failed' end;
    return next; return;
  elsif unapproved(a, r) then
    update action set verdict = a.verdict, taint = a.taint where id = a.id;
    verdict := 'ask'; reason := a.verdict ->> 'why';
    return next; return;
  end if;
  if a.attempt = 0 then                                    -- counted once, however often it is tried
    for c in select * from caps_of(a, r) loop
      v_since := period_start(c.period, v_now);
      insert into action_used (app, name, "of", period, since) values (a.app, a.name, c."of", c.period, v_since) on conflict do nothing;
      select amount into v_used from action_used u
       where (u.app, u.name, u."of", u.period, u.since) = (a.app, a.name, c."of", c.period, v_since) for update;
      if (v_used + c.needs <= c.amount and c.needs >= 0) is not true then
        verdict := 'capped'; after := period_end(c.period, v_now) - v_now;
        reason := format('the cap of %s %s is used up: %s of it are, and this call needs %s', trim_scale(c.amount),
                         concat_ws(' ', coalesce(nullif(c."of", ''), 'calls'), case when c.period = 'total' then 'in all' else 'a ' || c.period end),
                         trim_scale(v_used), coalesce(trim_scale(c.needs)::text, 'what nobody knows'));
        return next; return;
      end if;
    end loop;
    update action_used u set amount = u.amount + c.needs from caps_of(a, r) c
     where (u.app, u.name, u."of", u.period, u.since) = (a.app, a.name, c."of", c.period, period_start(c.period, v_now));
  end if;
  update action set state = 'sending', token = p_token, attempt = a.attempt + 1, sending_at = v_now, verdict = a.verdict, taint = a.taint, error = null where id = a.id;
  verdict := 'send'; state := 'sending'; attempt := a.attempt + 1; held := p_token; reason := null;
  return next;
end $$;

-- end_action(action, token, state, result, error) -> whether it is this sender's: what became of it
--   sent | failed | unknown | retrying (it did not happen, and is tried again)
-- A sender that is late, and was given up as unknown, may still say that it was sent.
create or replace function end_action(p_action bigint, p_token bigint, p_state text, p_result jsonb default null, p_error text default null) returns boolean
language plpgsql volatile set search_path from current as $$
declare a action;
begin
  select * into a from action where id = p_action for update;
  if a.token is distinct from p_token or not (a.state = 'sending' or a.state = 'unknown' and p_state = 'sent') then
    return false;
  end if;
  if a.cause is not null then                              -- what listens to calls goes on with the chain
    perform enter(a.cause, a.depth, a.trace, null);
  end if;
  update action set state = p_state, result = p_result, error = p_error, sent_at = case when p_state = 'sent' then now() end where id = p_action;
  return true;
end $$;

-- capture_action(action) -> whether it is captured now: it counts as done, and nothing leaves
create or replace function capture_action(p_action bigint) returns boolean language plpgsql volatile set search_path from current as $$
begin
  update action a set state = 'captured' from action_rule r
   where a.id = p_action and a.state in ('new', 'ready', 'retrying') and r.app = a.app and r.name = a.name and not unapproved(a, r);
  return found;
end $$;

-- note_verdict(action, verdict) -> what is to be done with a call that is captured: capture | ask | refused | over
create or replace function note_verdict(p_action bigint, p_verdict jsonb) returns text language plpgsql volatile set search_path from current as $$
declare a action; r action_rule; v_why text;
begin
  select * into a from action where id = p_action for update;
  select * into r from action_rule x where x.app = a.app and x.name = a.name and x.missing_at is null;
  if a.id is null or a.state not in ('new', 'ready', 'retrying') then
    return 'over';
  end if;
  a.verdict := coalesce(p_verdict || jsonb_build_object('args_sha256', args_hash(a.args)), a.verdict);
  a.taint := case when a.cause is not null and a.taint = '{}' then taint_of(a.cause) else a.taint end;
  v_why := case when r.name is null then 'its app does not declare it (any more)'
                when a.verdict ->> 'verdict' = 'refuse' then coalesce(a.verdict ->> 'why', 'a policy refuses it') else forbidden(a) end;
  update action set state = case when v_why is null then a.state else 'refused' end, error = coalesce(v_why, error), verdict = a.verdict, taint = a.taint where id = a.id;
  return case when v_why is not null then 'refused' when unapproved(a, r) then 'ask' else 'capture' end;
end $$;

-- retry_action(action, person) -> its state: a call that failed, or that is unknown and did not happen, is sent again; what guards it holds as before
create or replace function retry_action(p_action bigint, p_person text default null) returns text language plpgsql volatile set search_path from current as $$
begin
  update action set state = 'ready', resolved_by = p_person, error = null where id = p_action and state in ('failed', 'unknown');
  if not found then
    raise exception using errcode = 'NT008', message = coalesce((select format('call %s of action %s is %s', id, name, state) from action where id = p_action), format('no call %s', p_action)),
      hint = 'what failed, or is unknown, can be sent again: anton actions list --state unknown';
  end if;
  perform ring();
  return 'ready';
end $$;

-- resolve_action(action, state, person, result) -> its state: a person says what became of a call that is unknown
create or replace function resolve_action(p_action bigint, p_state text, p_person text default null, p_result jsonb default null) returns text
language plpgsql volatile set search_path from current as $$
begin
  update action set state = p_state, resolved_by = p_person, result = coalesce(p_result, result), sent_at = case when p_state = 'sent' then coalesce(sending_at, now()) end
   where id = p_action and state = 'unknown' and p_state in ('sent', 'failed');
  if not found then
    raise exception using errcode = 'NT008', message = coalesce((select format('call %s of action %s is %s', id, name, state) from action where id = p_action), format('no call %s', p_action)),
      hint = 'only what is unknown can be resolved, as sent or failed: anton actions list --state unknown';
  end if;
  return p_state;
end $$;

-- stop_actions(), start_actions(): while they are stopped no call is begun, of any app; calls wait
create or replace function stop_actions() returns void language sql volatile set search_path from current as $$
  insert into setting (name, value) values ('actions', 'stopped') on conflict (name) do update set value = excluded.value
$$;
create or replace function start_actions() returns void language plpgsql volatile set search_path from current as $$
begin
  delete from setting where name = 'actions';
  update handler h set probe_at = now() from action_rule r where r.app = h.app and r.handler = h.name and h.failing_since is not null;
  perform ring();
end $$;

-- settle_action(action) -> whether it is the first to: what a call gives into= is written once, whichever job comes to it
create or replace function settle_action(p_action bigint) returns boolean language plpgsql volatile set search_path from current as $$
begin
  update action set settled_at = now() where id = p_action and settled_at is null;
  return found;
end $$;
