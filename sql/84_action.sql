-- Actions: the outbox. A call is a row of action; a sender carries it out between begin_action() and end_action(), with no transaction
-- open. guard_action() lets nobody make what only that way may make: it holds for psql, replay and retry alike.
--
--   new -> waiting -> ready -> sending -> sent | failed | unknown | retrying (-> sending);  unknown, failed -> sent, by a sender that is late
--   new -> captured | refused;  waiting -> rejected | expired | superseded;  failed, unknown, refused -> ready, by a person

-- args_hash(args) -> SHA-256 of arguments, hex: jsonb as Postgres writes it
create or replace function args_hash(p_args jsonb) returns text language sql immutable strict set search_path from current as $$
  select encode(sha256(convert_to(p_args::text, 'UTF8')), 'hex')
$$;

-- policy_checked(action, sql): raises what Postgres says of a policy that it cannot ask
create or replace function policy_checked(p_name text, p_sql text) returns void language plpgsql volatile set search_path from current as $$
begin
  if p_sql is not null then
    execute format(E'select (%s\n)::text from (select (null::action).*) call limit 0', p_sql);
  end if;
exception when others then
  raise exception using errcode = sqlstate, message = format('policy of action %s: %s', p_name, sqlerrm), hint = 'an expression over the columns of the call: args, taint, requested_by, name, subject, at';
end $$;

-- policy_says(action, rule, verdict) -> the verdict with what a policy in SQL says of it; given: what policy and when= said in Python
create or replace function policy_says(a action, r action_rule, p_given jsonb) returns jsonb language plpgsql volatile set search_path from current as $$
declare v_said text; v_word text; v_why text;
begin
  if r.policy_sql is null or p_given ->> 'verdict' = 'refuse' then
    return p_given;
  end if;
  execute format(E'select (%s\n)::text from (select ($1).*) call', r.policy_sql) into v_said using a;
  v_word := case lower(btrim(split_part(v_said, ':', 1))) when 'send' then 'pass' when 'ask' then 'ask' when 'refuse' then 'refuse' end;
  v_why := nullif(btrim(substr(v_said, length(split_part(v_said, ':', 1)) + 2)), '');
  if v_word is null then
    v_word := 'refuse'; v_why := format('the policy answered %s. Allowed: send, ask, refuse, or one of them with a reason: refuse: too much', coalesce(quote_literal(v_said), 'null'));
  elsif v_word = 'ask' and r.approval = '{}' and a.approve is null then
    v_word := 'refuse'; v_why := 'the policy asks a person, and no approve= says whom';
  end if;
  if v_word = 'pass' and p_given is not null then
    return p_given;
  end if;
  return jsonb_build_object('verdict', v_word, 'by', 'policy', 'why', v_why);
end $$;

-- guard_rule(): what is declared of actions, and what their caps have used, changes through put_action(), retire_actions() and begin_action()
create or replace function guard_rule() returns trigger language plpgsql volatile set search_path from current as $$
begin
  if current_setting('anton.rule', true) is distinct from 'on' then
    raise exception using errcode = 'NT008', message = format('%s takes no %s by hand', tg_table_name, tg_op),
      hint = case tg_table_name when 'action_rule' then 'change the action in its app''s code, then: anton migrate' else 'caps are counted where calls begin' end;
  end if;
  return null;
end $$;

create or replace trigger rule_guard before insert or update or delete or truncate on action_rule for each statement execute function guard_rule();
create or replace trigger used_guard before insert or update or delete or truncate on action_used for each statement execute function guard_rule();

-- put_action(rule): what an app declares of an action; keys are the columns of action_rule
create or replace function put_action(d jsonb) returns void language sql volatile set search_path from current as $$
  select policy_checked(d ->> 'name', d ->> 'policy_sql');
  select set_config('anton.rule', 'on', true);
  insert into action_rule (app, name, effect, gate, policy, policy_sql, probe, approval, allow, caps, handler)
  values (d ->> 'app', d ->> 'name', d ->> 'effect', d ->> 'gate', (d ->> 'policy')::boolean, d ->> 'policy_sql', (d ->> 'probe')::boolean,
          coalesce(d -> 'approval', '{}'), coalesce(d -> 'allow', '{}'), coalesce(d -> 'caps', '[]'), d ->> 'handler')
  on conflict (app, name) do update set effect = excluded.effect, gate = excluded.gate, policy = excluded.policy, policy_sql = excluded.policy_sql, probe = excluded.probe,
     approval = excluded.approval, allow = excluded.allow, caps = excluded.caps, handler = excluded.handler, missing_at = null;
  select set_config('anton.rule', '', true);
  update handler set probe_at = now() where app = d ->> 'app' and name = d ->> 'handler' and failing_since is not null;    -- perhaps it waits for that: a larger cap
  select ring()
$$;

-- action_state(app, name) -> all that put_action() may change, as text; null when unknown
create or replace function action_state(p_app text, p_name text) returns text language sql stable set search_path from current as $$
  select to_jsonb(r)::text from action_rule r where app = p_app and name = p_name
$$;

-- retire_actions(app, names) -> those that vanished from the app's code: nothing of theirs is sent any more
create or replace function retire_actions(p_app text, p_names text[]) returns setof text language plpgsql volatile set search_path from current as $$
begin
  perform set_config('anton.rule', 'on', true);
  return query update action_rule set missing_at = now() where app = p_app and missing_at is null and name <> all (p_names) returning name;
  perform set_config('anton.rule', '', true);
end $$;

-- vanished_actions(app, names) -> those that retire_actions() would retire
create or replace function vanished_actions(p_app text, p_names text[]) returns setof text language sql stable set search_path from current as $$
  select name from action_rule where app = p_app and missing_at is null and name <> all (p_names) order by 1
$$;

-- put_taint(table, what): its records come from outside; null: they do not
create or replace function put_taint(p_table text, p_what text) returns void language sql volatile set search_path from current as $$
  update watched set taint = p_what where format('%I.%I', schema_name, table_name) = p_table and taint is distinct from p_what
$$;

-- taint_of(receipt) -> where what it handled came from outside, over all handlers before it; with "unknown" where they are more than 64 in a row, or
-- are not kept any more
create or replace function taint_of(p_receipt bigint) returns text[] language plpgsql stable set search_path from current
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set jit = off as $$ begin
  return (
    with recursive step (id, n) as (
      select p_receipt, 0 where p_receipt is not null
      union
      select c, s.n + 1 from step s join receipt r on r.id = s.id cross join lateral unnest(r.causes) c where s.n < 64 and c is not null)
    select coalesce(array_agg(distinct t order by t), '{}')
      from step s left join receipt r on r.id = s.id left join handler h on h.id = r.handler_id left join watched w on w.id = h.table_id
     cross join lateral (values (w.taint), (case when r.id is null or s.n = 64 and array_remove(r.causes, null) <> '{}' then 'unknown' end)) x (t) where t is not null);
end $$;

-- glob(pattern) -> it as LIKE takes it: * stands for anything
create or replace function glob(p_pattern text) returns text language sql immutable set search_path from current as $$
  select replace(replace(replace(replace(p_pattern, '\', '\\'), '%', '\%'), '_', '\_'), '*', '%')
$$;

-- url_parts(url) -> [scheme, host, port, path, query] of one that all clients read alike, else null: no backslash, blank or control character, one @ at
-- most, and a host of letters, digits, - _ and dots
create or replace function url_parts(p_url text) returns text[] language sql immutable set search_path from current as $$
  select array[lower(m[1]), lower(m[2]), coalesce(m[3], case lower(m[1]) when 'https' then '443' when 'http' then '80' end), coalesce(m[4], '/'), m[5]]
    from regexp_match(p_url, '^([a-zA-Z][a-zA-Z0-9+.-]*)://(?:[^/?#@]*@)?([a-zA-Z0-9._-]+)(?::([0-9]{1,5}))?(/[^?#]*)?(\?[^#]*)?(?:#.*)?$') m
   where p_url !~ '[\\[:space:][:cntrl:]]'
$$;

-- url_allowed(parts, pattern) -> whether a URL's url_parts() fit: "*.example.com" is every host below it, on any port; "https://*.example.com/api/*" says
-- scheme, host, port (none: the scheme's own, *: any), path (none: any) and, with a ?, what is asked, each apart
create or replace function url_allowed(u text[], p_pattern text) returns boolean language sql immutable set search_path from current as $$
  select case when p_pattern !~ '://' then u[2] like glob(lower(p_pattern)) else exists (
    select from regexp_match(p_pattern, '^([^:/?#]+)://([^/?#@:]+)(?::([0-9]+|\*))?(/[^?#]*)?(\?[^#]*)?$') m
     where u[1] like glob(lower(m[1])) and u[2] like glob(lower(m[2])) and (m[2] = '*' or m[2] !~ '\*$')  -- whose end is open is anybody's
       and case when m[3] = '*' then true when m[3] is null then u[3] = case u[1] when 'https' then '443' when 'http' then '80' else u[3] end else u[3] = m[3] end
       and (m[4] is null or u[4] !~* '(/|%2f)(\.|%2e){1,2}(/|%2f|$)|%5c')                       -- what climbs is not where it seems to be
       and case when m[5] is not null then u[4] || coalesce(u[5], '') like glob(coalesce(m[4], '/') || m[5]) else u[4] like glob(coalesce(m[4], '*')) end) end
$$;

-- mail_addresses(list) -> the addresses of "Ann <a@x.com>, b@y.com"; null where one of them could be read as another
create or replace function mail_addresses(p_list text) returns text[] language sql immutable set search_path from current as $$
  select case when bool_and(m is not null) then array_agg(lower(coalesce(m[1], m[2]))) end
    from regexp_split_to_table(case when p_list !~ '[[:cntrl:]]' then regexp_replace(p_list, '"([^"\\]|\\.)*"', '', 'g') end, '[,;]') one
    cross join lateral (select regexp_match(btrim(one), '^(?:[^][<>@"\\():]*<([^][\s<>@"\\():]+@[A-Za-z0-9.-]+)>|([^][\s<>@"\\():]+@[A-Za-z0-9.-]+))$')) x (m)
$$;

-- allowed(value, patterns) -> whether a value is among them. Of a URL its parts are looked at, of a list of addresses each of them; of all else the text,
-- where * stands for anything. What some clients mend into a URL, such as https:/host, //host or " https://host", is none of them.
create or replace function allowed(p_value text, p_patterns text[]) returns boolean language sql immutable set search_path from current as $$
  select case when p_value ~ '^[a-zA-Z][a-zA-Z0-9+.-]*://' then coalesce((select bool_or(url_allowed(url_parts(p_value), p)) from unnest(p_patterns) p), false)
              when regexp_replace(p_value, '[[:cntrl:][:space:]]', '', 'g') ~* '^([a-z][a-z0-9+.-]*:[/\\]|[/\\]{2}|(https?|wss?|ftp):)' then false
              when p_value ~ '@' and list is not null then not exists (select from unnest(list) one where not exists (select from unnest(p_patterns) p where one like glob(lower(p))))
              else exists (select from unnest(p_patterns) p where case when p ~ '@' and p_value ~ '@' then p_value = p else p_value like glob(p) end) end
    from mail_addresses(p_value) list
$$;

drop function if exists forbidden(action);
-- forbidden(action, rule) -> why its arguments are not allowed by what is declared, null when they are
create or replace function forbidden(a action, r action_rule) returns text language sql stable set search_path from current as $$
  select format('%s %s is not among what is allowed: %s', k, coalesce(v, 'null'), array_to_string(p, ', '))
    from jsonb_each(r.allow) x (k, list) cross join lateral (
      select array(select jsonb_array_elements_text(list))) y (p) cross join lateral (    -- of a list each element counts
      select jsonb_array_elements_text(case when jsonb_typeof(a.args -> k) = 'array' then a.args -> k else jsonb_build_array(a.args -> k) end)) z (v)
   where not coalesce(allowed(v, p), false) limit 1
$$;

-- caps_of(action, rule) -> its caps, in the order in which they are locked, and what the call needs of each
create or replace function caps_of(a action, r action_rule) returns table (amount numeric, "of" text, period text, needs numeric)
language sql stable set search_path from current as $$
  select x.amount, coalesce(x."of", ''), x.period,
         case when x."of" is null then 1 when a.args ->> x."of" ~ '^-?\d+(\.\d+)?([eE][+-]?\d{1,2})?$' then (a.args ->> x."of")::numeric end
    from jsonb_to_recordset(r.caps) x (amount numeric, "of" text, period text) order by coalesce(x."of", ''), x.period
$$;

-- cap_said(amount, of, period) -> a cap as people read it: "500 amount a day"
create or replace function cap_said(p_amount numeric, p_of text, p_period text) returns text language sql immutable set search_path from current as $$
  select concat_ws(' ', trim_scale(p_amount), coalesce(nullif(p_of, ''), 'calls'), case when p_period = 'total' then 'in all' else 'a ' || p_period end)
$$;

-- beyond(action, rule) -> why no period of a cap can ever take the call, null when one can
create or replace function beyond(a action, r action_rule) returns text language sql stable set search_path from current as $$
  select format('the cap of %s takes no call %s. Nothing is sent: make it less, or raise cap=, anton migrate, and then: anton actions retry %s', cap_said(c.amount, c."of", c.period),
                case when c.needs is null then format('whose %s is %s: that is no number', c."of", coalesce(a.args ->> c."of", 'null')) else format('that needs %s', trim_scale(c.needs)) end, a.id)
    from caps_of(a, r) c where (c.needs between 0 and c.amount) is not true limit 1
$$;

-- unapproved(action) -> whether a person has still to approve it, as it is now
-- A verdict that nobody needs to be asked counts for the arguments it was given for.
create or replace function unapproved(a action, r action_rule) returns boolean language sql stable set search_path from current as $$
  select not exists (select from approval p where p.id = a.approval_id and p.action_id = a.id and p.state = 'approved' and p.args_sha256 = args_hash(a.args))
     and (a.gate is not null or r.gate = 'always' or coalesce(a.verdict ->> 'verdict', '') = 'ask'
          or ((r.gate = 'when' or r.policy) and (a.verdict ->> 'verdict' = 'pass' and a.verdict ->> 'args_sha256' = args_hash(a.args)) is not true))
$$;

-- mark_action(action): its next change is one of the runtime's; guard_action() takes no other
create or replace function mark_action(p_action bigint) returns void language sql volatile set search_path from current as $$
  select set_config('anton.call', p_action::text, true)
$$;

-- guard_action(): what may become of a call, whoever writes
create or replace function guard_action() returns trigger language plpgsql volatile security definer set search_path from current as $$
declare v_rule action_rule; v_why text; v_taint text[];
begin
  if tg_op = 'INSERT' then
    if new.state not in ('new', 'captured') then
      v_why := format('a call begins as new, not as %s', new.state);
    elsif jsonb_typeof(new.args) <> 'object' then
      v_why := 'its args are no object';
    elsif new.token is not null or new.attempt <> 0 or new.approval_id is not null or new.verdict is not null or new.resolved_by is not null
          or new.counted <> '[]' or new.in_doubt then
      v_why := 'token, attempt, approval_id, verdict, resolved_by, counted and in_doubt are set by the runtime';
    elsif coalesce(new.due_at, now() + new.delay) >= '10000-01-01 00:00:00+00' then
      v_why := 'it would be due after the year 9999';
    end if;
    new.idempotency_key := coalesce(new.idempotency_key, gen_random_uuid()::text);
    new.due_at := coalesce(new.due_at, now() + new.delay);
    if new.requested_by is not null then
      new.requested_by := coalesce(person_of(new.requested_by), new.requested_by);
    end if;
    if new.cause is not null then                            -- what it rests on is not kept as long as it may wait
      v_taint := taint_of(new.cause);
      new.taint := case when new.taint = '{}' then v_taint else array(select distinct t from unnest(new.taint || v_taint) t order by t) end;
    end if;
    new.taint_known := true;
  elsif (new.id, new.app, new.name, new.idempotency_key, new.at, new.requested_by, new.subject, new.cause, new.trace, new.depth)
        is distinct from (old.id, old.app, old.name, old.idempotency_key, old.at, old.requested_by, old.subject, old.cause, old.trace, old.depth)
        or new.gate is distinct from old.gate or new.approve is distinct from old.approve or new.due_at is distinct from old.due_at or new.delay is distinct from old.delay or not new.taint @> old.taint or new.taint_known is distinct from old.taint_known then
    v_why := 'app, name, idempotency_key, gate, approve, taint, due_at, delay, requested_by, subject, cause, trace and depth of a call stay as they are';
  elsif new.args is distinct from old.args and not (old.state = 'waiting' and new.state = 'ready') then
    v_why := 'its arguments change by an edit in its approval only';
  elsif new.state = old.state and new.token is not distinct from old.token then
    null;
  elsif not (case old.state
      when 'new' then new.state in ('waiting', 'sending', 'captured', 'refused', 'failed')
      when 'waiting' then new.state in ('ready', 'rejected', 'expired', 'superseded')
      when 'ready' then new.state in ('waiting', 'sending', 'captured', 'refused', 'failed')
      when 'retrying' then new.state in ('waiting', 'sending', 'captured', 'refused', 'failed', 'unknown')
      when 'sending' then new.state in ('sending', 'sent', 'failed', 'unknown', 'retrying')
      when 'failed' then new.state in ('ready', 'waiting', 'sending', 'captured', 'refused', 'sent')
      when 'unknown' then new.state in ('ready', 'sent', 'failed')
      when 'refused' then new.state = 'ready'
      else false end) then
    v_why := format('it is %s, which does not become %s', old.state, new.state);
  elsif old.state = 'waiting' and not exists (select from approval p where p.id = new.approval_id and p.action_id = new.id
            and p.state = case new.state when 'ready' then 'approved' else new.state end and (new.state <> 'ready' or p.args_sha256 = args_hash(new.args))) then
    v_why := format('no approval of it is %s with these arguments', case new.state when 'ready' then 'approved' else new.state end);
  elsif new.state = 'sending' then
    select * into v_rule from action_rule where app = new.app and name = new.name and missing_at is null;
    v_why := case when v_rule.name is null then 'its app does not declare it (any more)'
                  when setting('actions') = 'stopped' then 'actions are stopped'
                  when new.token is null or new.token = old.token then 'begin_action() makes it'
                  when new.verdict ->> 'verdict' = 'refuse' then 'a policy refuses it'
                  when unapproved(new, v_rule) then 'nobody has approved it with these arguments'
                  else forbidden(new, v_rule) end;
  elsif old.state = 'sending' and new.token is distinct from old.token then
    v_why := 'another sender has it';
  end if;
  if tg_op = 'UPDATE' and v_why is null then
    v_why := case when new.approval_id is distinct from old.approval_id
                       and not exists (select from approval p where p.id = new.approval_id and p.action_id = new.id and p.state = 'pending') then 'that approval asks nobody about it'
                  when current_setting('anton.call', true) is distinct from new.id::text then 'it changes by what becomes of it, not by an update' end;
    perform set_config('anton.call', '', true);
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

-- guard_kept(): calls are kept, with their keys, until forget_actions() forgets them
create or replace function guard_kept() returns trigger language plpgsql volatile set search_path from current as $$
begin
  if current_setting('anton.forget', true) is distinct from 'on' then
    raise exception using errcode = 'NT008', message = format('%s takes no %s by hand: a key whose call is gone would be sent again', tg_table_name, tg_op),
      hint = 'calls that are done are forgotten after the setting action_days';
  end if;
  return null;
end $$;

create or replace trigger action_kept before delete or truncate on action for each statement execute function guard_kept();

-- own_rule(rule, declared) -> the rule as the code of its sender declares it, which nobody changes by SQL; null: a sender of a release before
create or replace function own_rule(r action_rule, d jsonb) returns action_rule language sql stable set search_path from current as $$
  select case when r.name is null or d is null then r else jsonb_populate_record(r, d) end
$$;

-- due_in(action) -> how long a call is not to be sent yet, null when it may be
create or replace function due_in(p_action bigint) returns interval language sql volatile set search_path from current as $$
  select due_at - t from action cross join (select now() as t) x where id = p_action and due_at > t
$$;

drop function if exists begin_action(bigint, bigint, jsonb, bigint);
-- begin_action(action, token, verdict, again, declared) -> what its sender has to do; the intent is committed with it
--   send       state is sending, under this token
--   uncertain  another sender began it and did not come back, and it may have happened: probe, then again = that sender's token, or end_action(unknown)
--   ask        a person has to approve it, or to again, as a record that it rests on has changed: ask_approval()
--   stopped    by anton actions stop;  capped: a cap is used up, for `after`; or, where state is due, its time is to come
--   over       nothing to do: `state` says what became of it
-- verdict: what policy and when= said of these arguments: {"verdict": pass | ask | refuse, "by", "why"}
-- declared: what put_action() gets of the sender's own code. It has to let the call through as well as action_rule, whatever became of that
create or replace function begin_action(p_action bigint, p_token bigint, p_verdict jsonb default null, p_again bigint default null, p_declared jsonb default null)
returns table (verdict text, state text, args jsonb, idempotency_key text, attempt int, held bigint, result jsonb, reason text, after interval)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare a action; r action_rule; o action_rule; c record; v_now timestamptz := now(); v_since timestamptz; v_used numeric; v_had numeric; v_needs numeric; v_counted jsonb := '[]'; v_ask boolean; v_old boolean;
begin
  select * into a from action where id = p_action for update;
  select * into r from action_rule x where x.app = a.app and x.name = a.name and x.missing_at is null;
  o := own_rule(r, p_declared);
  verdict := 'over'; state := a.state; args := a.args; idempotency_key := a.idempotency_key; attempt := a.attempt; held := a.token; result := a.result; reason := a.error;
  if a.id is null or a.state not in ('new', 'ready', 'retrying', 'failed', 'sending') then
    return next; return;
  elsif a.state = 'sending' and (r.effect, o.effect) is distinct from ('idempotent', 'idempotent') and p_again is distinct from a.token then
    verdict := 'uncertain';
    return next; return;
  elsif setting('actions') = 'stopped' then
    verdict := 'stopped';
    return next; return;
  end if;
  if a.cause is not null and a.taint = '{}' and not a.taint_known then
    a.taint := taint_of(a.cause);
  end if;
  p_verdict := policy_says(a, r, p_verdict);
  if o.policy_sql is distinct from r.policy_sql then
    p_verdict := policy_says(a, o, p_verdict);
  end if;
  if p_verdict is not null then
    a.verdict := p_verdict || jsonb_build_object('args_sha256', args_hash(a.args));
  end if;
  reason := case when r.name is null then 'its app does not declare it (any more)'
                 when a.verdict ->> 'verdict' = 'refuse' then coalesce(a.verdict ->> 'why', 'a policy refuses it')
                 else coalesce(forbidden(a, r), case when o.allow <> r.allow then forbidden(a, o) end, beyond(a, r), case when o.caps <> r.caps then beyond(a, o) end) end;
  v_old := outdated(a);
  v_ask := unapproved(a, r) or unapproved(a, o) or asked_less(a, o);
  if a.state = 'sending' and (reason is not null or v_ask or v_old) then  -- begun, and held back since: it may have happened
    verdict := 'uncertain'; reason := coalesce(reason, a.verdict ->> 'why', case when v_old then 'a record it rests on has changed since it was approved' else 'nobody has approved it' end);
    return next; return;
  end if;
  if reason is not null then
    perform mark_action(a.id);
    update action set state = case when a.state in ('new', 'ready', 'retrying') then 'refused' else 'failed' end, error = reason, verdict = a.verdict, taint = a.taint where id = a.id;
    state := case when a.state in ('new', 'ready', 'retrying') then 'refused' else 'failed' end;
    return next; return;
  elsif v_ask or v_old then
    perform mark_action(a.id);
    update action set verdict = a.verdict, taint = a.taint where id = a.id;
    verdict := 'ask'; reason := a.verdict ->> 'why';
    return next; return;
  elsif a.state <> 'sending' and due_in(a.id) is not null then  -- senders of the release before wait a little, too
    verdict := 'capped'; state := 'due'; reason := format('due at %s', date_trunc('second', a.due_at)); after := least(due_in(a.id), interval '10 s');
    return next; return;
  end if;
  a.in_doubt := p_again is distinct from a.token and (a.in_doubt or a.state = 'sending');
  perform set_config('anton.rule', 'on', true);
  for c in select min(x.amount) as amount, x."of", x.period, x.needs from (select * from caps_of(a, r) union all select * from caps_of(a, o)) x
            group by 2, 3, 4 order by 2, 3 loop  -- counted once in a period, however often it is tried; an edit makes it more or less
    v_since := period_start(c.period, v_now);
    insert into action_used (app, name, "of", period, since) values (a.app, a.name, c."of", c.period, v_since) on conflict do nothing;
    select amount into v_used from action_used u
     where (u.app, u.name, u."of", u.period, u.since) = (a.app, a.name, c."of", c.period, v_since) for update;
    v_had := coalesce((select max((x ->> 'amount')::numeric) from jsonb_array_elements(a.counted) x
                        where x ->> 'of' = c."of" and x ->> 'period' = c.period and (x ->> 'since')::timestamptz = v_since), 0);
    v_needs := case when a.in_doubt then greatest(c.needs, v_had) else c.needs end;  -- what may have left counts
    if v_used - v_had + v_needs > c.amount then
      perform set_config('anton.rule', '', true);
      verdict := 'capped'; after := period_end(c.period, v_now) - v_now;
      reason := format('the cap of %s is used up: %s of it are, and this call needs %s', cap_said(c.amount, c."of", c.period), trim_scale(v_used - v_had), trim_scale(c.needs));
      if a.state <> 'sending' then
        perform mark_action(a.id);
        update action set error = reason where id = a.id;
      end if;
      return next; return;
    end if;
    v_counted := v_counted || jsonb_build_object('of', c."of", 'period', c.period, 'since', v_since, 'amount', v_needs, 'more', v_needs - v_had);
  end loop;
  update action_used u set amount = u.amount + n.more from jsonb_to_recordset(v_counted) n ("of" text, period text, since timestamptz, more numeric)
   where (u.app, u.name, u."of", u.period, u.since) = (a.app, a.name, n."of", n.period, n.since);
  perform set_config('anton.rule', '', true);
  perform mark_action(a.id);
  update action set state = 'sending', token = p_token, attempt = a.attempt + 1, sending_at = v_now, verdict = a.verdict, taint = a.taint, error = null,
         counted = v_counted, in_doubt = a.in_doubt where id = a.id;
  verdict := 'send'; state := 'sending'; attempt := a.attempt + 1; held := p_token; reason := null;
  return next;
end $$;

-- end_action(action, token, state, result, error) -> whether it is this sender's: what became of it
--   sent | failed | unknown | retrying (it did not happen, and is tried again)
--   doubt  true: this attempt may have happened; false: none of them did; null: this one did not. What failed in doubt is unknown
-- A sender that is late, and was given up as unknown, or as failed as its probe did not find it yet, may still say that it was sent.
drop function if exists end_action(bigint, bigint, text, jsonb, text);
create or replace function end_action(p_action bigint, p_token bigint, p_state text, p_result jsonb default null, p_error text default null,
  p_doubt boolean default null) returns boolean
language plpgsql volatile set search_path from current as $$
declare a action; v_doubt boolean; v_handler int;
begin
  select * into a from action where id = p_action for update;
  if a.token is distinct from p_token or not (a.state = 'sending' or a.state in ('unknown', 'failed') and p_state = 'sent') then
    return false;
  end if;
  if a.cause is not null then                              -- what listens to calls goes on with the chain
    perform enter(a.cause, a.depth, a.trace, null);
  end if;
  v_doubt := p_state <> 'sent' and coalesce(p_doubt, a.in_doubt);
  perform mark_action(p_action);
  update action set state = case when p_state = 'failed' and v_doubt then 'unknown' else p_state end, in_doubt = v_doubt,
         result = p_result, error = p_error, sent_at = case when p_state = 'sent' then now() end where id = p_action;
  if a.state <> 'sending' then                             -- it is late: its own job is gone, and what it gives into= is written by another
    select h.id into v_handler from action_rule r join handler h on h.app = r.app and h.name = r.handler where r.app = a.app and r.name = a.name;
    if v_handler is not null then
      perform put_again(v_handler, jsonb_build_array(p_action), 'u', a.cause, a.depth::smallint, a.trace, nullif(current_setting('anton.tenant', true), ''));
    end if;
  end if;
  return true;
end $$;

-- note_death(handler, key, error): a call has no job any more: it is a dead letter, or was cancelled. What was begun, or is in doubt, is unknown; what
-- was not, failed. Where the action has a probe, its sender gets one more job to ask it first: sending with an error is what begins nothing any more. Of
-- a handler that is no sender nothing
create or replace function note_death(p_handler int, p_key jsonb, p_error text) returns void language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare
  r action_rule; a action; v_doubt boolean; v_look boolean;
  v_context text := coalesce(current_setting('anton.context', true), ''); v_tenant text := coalesce(current_setting('anton.tenant', true), '');
begin
  select x.* into r from handler h join action_rule x on x.app = h.app and x.handler = h.name where h.id = p_handler;
  if r.name is null then
    return;
  end if;
  select * into a from action where id = (p_key ->> 0)::bigint and app = r.app and name = r.name and state in ('new', 'ready', 'retrying', 'sending') for update;
  if a.id is null then
    return;
  end if;
  v_doubt := a.state = 'sending' or a.in_doubt;
  v_look := a.state = 'sending' and a.error is null and r.probe and r.missing_at is null;
  if a.cause is not null then                              -- what listens to calls goes on with the chain
    perform enter(a.cause, a.depth, a.trace, null);
  end if;
  perform mark_action(a.id);
  update action set state = case when v_look then 'sending' when v_doubt then 'unknown' else 'failed' end, in_doubt = v_doubt,
         error = case when v_doubt and not v_look then 'an attempt did not end, and whether it happened is not known: ' else '' end || p_error
   where id = a.id;
  if v_look then
    perform put_again(p_handler, p_key, 'u', a.cause, a.depth::smallint, a.trace, nullif(v_tenant, ''));
  end if;
  perform set_config('anton.context', v_context, true), set_config('anton.tenant', v_tenant, true);
end $$;

-- capture_action(action) -> whether it is captured now: it counts as done, and nothing leaves
create or replace function capture_action(p_action bigint) returns boolean language plpgsql volatile set search_path from current as $$
begin
  perform mark_action(p_action);
  update action a set state = 'captured' from action_rule r
   where a.id = p_action and a.state in ('new', 'ready', 'retrying', 'failed') and r.app = a.app and r.name = a.name and not unapproved(a, r) and not outdated(a);
  return found;
end $$;

-- note_verdict(action, verdict) -> what is to be done with a call that is captured: capture | ask | due (later) | refused | over
create or replace function note_verdict(p_action bigint, p_verdict jsonb) returns text language plpgsql volatile set search_path from current as $$
declare a action; r action_rule; v_why text;
begin
  select * into a from action where id = p_action for update;
  select * into r from action_rule x where x.app = a.app and x.name = a.name and x.missing_at is null;
  if a.id is null or a.state not in ('new', 'ready', 'retrying', 'failed') then
    return 'over';
  end if;
  a.taint := case when a.cause is not null and a.taint = '{}' and not a.taint_known then taint_of(a.cause) else a.taint end;
  p_verdict := policy_says(a, r, p_verdict);
  a.verdict := coalesce(p_verdict || jsonb_build_object('args_sha256', args_hash(a.args)), a.verdict);
  v_why := case when r.name is null then 'its app does not declare it (any more)'
                when a.verdict ->> 'verdict' = 'refuse' then coalesce(a.verdict ->> 'why', 'a policy refuses it') else coalesce(forbidden(a, r), beyond(a, r)) end;
  perform mark_action(a.id);
  update action set state = case when v_why is null then a.state else 'refused' end, error = coalesce(v_why, error), verdict = a.verdict, taint = a.taint where id = a.id;
  return case when v_why is not null then 'refused' when unapproved(a, r) or outdated(a) then 'ask' when due_in(a.id) is not null then 'due' else 'capture' end;
end $$;

-- retry_action(action, person) -> its state: a call that failed, was refused, or that is unknown and did not happen, is sent again; what guards it holds as
-- before, and judges it anew
create or replace function retry_action(p_action bigint, p_person text default null) returns text language plpgsql volatile set search_path from current as $$
begin
  perform mark_action(p_action);
  update action set state = 'ready', resolved_by = coalesce(person_of(p_person), p_person), error = null, in_doubt = false,
         verdict = case when verdict ->> 'verdict' is distinct from 'refuse' then verdict end where id = p_action and state in ('failed', 'unknown', 'refused');
  if not found then
    raise exception using errcode = 'NT008', message = coalesce((select format('call %s of action %s is %s', id, name, state) from action where id = p_action), format('no call %s', p_action)),
      hint = 'what failed, was refused or is unknown can be sent again: anton actions list --state unknown';
  end if;
  perform ring();
  return 'ready';
end $$;

-- resolve_action(action, state, person, result) -> its state: a person says what became of a call that is unknown
create or replace function resolve_action(p_action bigint, p_state text, p_person text default null, p_result jsonb default null) returns text
language plpgsql volatile set search_path from current as $$
begin
  perform mark_action(p_action);
  update action set state = p_state, in_doubt = false, resolved_by = coalesce(person_of(p_person), p_person), result = coalesce(p_result, result), sent_at = case when p_state = 'sent' then coalesce(sending_at, now()) end
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
  perform mark_action(p_action);
  update action set settled_at = now() where id = p_action and settled_at is null;
  return found;
end $$;

-- forget_actions(now) -> calls forgotten: done action_days ago (setting; 90), and nobody was ever asked about them. What failed, is unknown or
-- waits stays, and so does what an approval is about; a key of your own is remembered for as long as its call is.
create or replace function forget_actions(p_now timestamptz) returns bigint language plpgsql volatile set search_path from current
set enable_seqscan = off set jit = off as $$
declare v_n bigint;
begin
  perform set_config('anton.forget', 'on', true);
  delete from action where id in (
    select a.id from action a where a.state in ('sent', 'captured', 'refused') and a.changed_at < p_now - make_interval(days => greatest(1, coalesce(setting('action_days'), '90')::int))
       and not exists (select from approval p where p.action_id = a.id) order by a.changed_at limit 1000);
  get diagnostics v_n = row_count;
  perform set_config('anton.forget', '', true);
  return v_n;
end $$;
