-- Approvals: what a person is asked before a call is sent. decide() is the one way, whichever channel the voice came by.
-- Locks are taken in one order: approval, action.

-- put_person(name, email, slack_id, groups) -> its id; null leaves what there is
create or replace function put_person(p_name text, p_email text default null, p_slack text default null, p_groups text[] default null) returns int
language sql volatile set search_path from current as $$
  insert into person as p (name, email, slack_id, groups) values (p_name, p_email, p_slack, coalesce(p_groups, '{}'))
  on conflict (name) do update set email = coalesce(excluded.email, p.email), slack_id = coalesce(excluded.slack_id, p.slack_id),
     groups = coalesce(p_groups, p.groups), active = true
  returning id
$$;

-- may_decide(person, approvers) -> whether they are among them: by name, or by a group; the group * is in all groups
create or replace function may_decide(p person, p_approvers text[]) returns boolean language sql stable set search_path from current as $$
  select p.active and (p.name = any (p_approvers) or '*' = any (p.groups) and cardinality(p_approvers) > 0
                       or exists (select from unnest(p.groups) g where '@' || g = any (p_approvers)))
$$;

-- approvers_of(approval) -> the people who may decide it
create or replace function approvers_of(p_approval bigint) returns setof person language sql stable set search_path from current as $$
  select p.* from approval a join person p on may_decide(p, a.approvers) and p.name is distinct from a.requested_by where a.id = p_approval order by p.name
$$;

-- record_of(table, key) -> the record as it is now, null when it is gone. table: schema.name, quoted or not; key: [k1, k2, ...]
create or replace function record_of(p_table text, p_key jsonb) returns jsonb language plpgsql stable set search_path from current as $$
declare w watched; v_record jsonb;
begin
  select * into w from watched where p_table in (format('%I.%I', schema_name, table_name), schema_name || '.' || table_name);
  if w.id is null or w.key_kind = 'none' or to_regclass(format('%I.%I', w.schema_name, w.table_name)) is null then
    return null;
  end if;
  execute format('select to_jsonb(t) from %I.%I t where %s', w.schema_name, w.table_name,
                 (select string_agg(format('t.%I = ($1 ->> %s)::%s', c, o - 1, t), ' and ' order by o) from unnest(w.key_columns, w.key_types) with ordinality x (c, t, o)))
    into v_record using p_key;
  return v_record;
end $$;

-- evidence_of(subjects) -> the records an approval rests on, as they are now: subjects: [[table, key], ...]
create or replace function evidence_of(p_subjects jsonb) returns jsonb language sql stable set search_path from current as $$
  select coalesce(jsonb_agg(jsonb_build_object('table', s ->> 0, 'key', s -> 1, 'record', r, 'sha256', args_hash(r)) order by o), '[]')
    from jsonb_array_elements(p_subjects) with ordinality x (s, o) cross join lateral record_of(s ->> 0, s -> 1) r
$$;

-- changed_args(before, after) -> {name: [before, after]} of those that differ
create or replace function changed_args(p_before jsonb, p_after jsonb) returns jsonb language sql immutable set search_path from current as $$
  select coalesce(jsonb_object_agg(k, jsonb_build_array(p_before -> k, p_after -> k)), '{}')
    from (select jsonb_object_keys(p_before) union select jsonb_object_keys(p_after)) x (k) where p_before -> k is distinct from p_after -> k
$$;

-- ask_approval(action, definition, preview) -> approval id
-- A call waits for a person: approvers, via, quorum, editable, timeout, on_timeout, escalate ({"1h": "@cfo"}), subjects, reason.
-- null when it is not to be asked for any more.
create or replace function ask_approval(p_action bigint, d jsonb, p_preview text) returns bigint language plpgsql volatile set search_path from current as $$
declare a action; v_last approval; v_id bigint; v_now timestamptz := now(); v_escalate jsonb; v_expires timestamptz; v_evidence jsonb;
begin
  select * into a from action where id = p_action for update;
  if a.id is null or a.state not in ('new', 'ready', 'retrying', 'failed') then
    return null;
  end if;
  select * into v_last from approval where action_id = a.id order by id desc limit 1;
  v_evidence := evidence_of(coalesce(d -> 'subjects', case when a.subject is null then '[]' else jsonb_build_array(a.subject) end));
  v_expires := v_now + (d ->> 'timeout')::interval;
  select coalesce(jsonb_agg(jsonb_build_object('at', v_now + k::interval, 'to', v) order by k::interval), '[]') into v_escalate
    from jsonb_each_text(coalesce(d -> 'escalate', '{}')) x (k, v);
  insert into approval (action_id, app, name, args, args_sha256, preview, evidence, taint, reason, approvers, via, quorum, editable, requested_by, trace,
                        on_timeout, expires_at, escalate, due_at, supersedes, difference, at)
  values (a.id, a.app, a.name, a.args, args_hash(a.args), p_preview, v_evidence, a.taint, d ->> 'reason',
          array(select jsonb_array_elements_text(d -> 'approvers')), array(select jsonb_array_elements_text(coalesce(d -> 'via', '["inbox"]'))),
          coalesce((d ->> 'quorum')::int, 1), case when jsonb_typeof(d -> 'editable') = 'array' then array(select jsonb_array_elements_text(d -> 'editable')) end,
          a.requested_by, a.trace, coalesce(d ->> 'on_timeout', 'reject'), v_expires, v_escalate, least(v_expires, (v_escalate -> 0 ->> 'at')::timestamptz),
          case when v_last.state = 'superseded' then v_last.id end,
          case when v_last.state = 'superseded' then jsonb_build_object('args', changed_args(v_last.args, a.args), 'evidence', changed_evidence(v_last.evidence, v_evidence)) end, v_now)
  returning id into v_id;
  insert into approval_event (approval_id, at, kind, args_sha256) values (v_id, v_now, 'asked', args_hash(a.args));
  update action set state = 'waiting', approval_id = v_id where id = a.id;
  return v_id;
end $$;

-- changed_evidence(before, after) -> [{"table", "key", "changed": {name: [before, after]}}] of the records that differ
create or replace function changed_evidence(p_before jsonb, p_after jsonb) returns jsonb language sql immutable set search_path from current as $$
  select coalesce(jsonb_agg(jsonb_build_object('table', b -> 'table', 'key', b -> 'key',
           'changed', changed_args(coalesce(nullif(b -> 'record', 'null'), '{}'), coalesce(nullif(n -> 'record', 'null'), '{}')))), '[]')
    from jsonb_array_elements(p_before) b left join jsonb_array_elements(p_after) n on n -> 'table' = b -> 'table' and n -> 'key' = b -> 'key'
   where n ->> 'sha256' is distinct from b ->> 'sha256'
$$;

-- refresh_approval(approval) -> the approval that is asked now: itself, or the one that took its place as a record it rests on had changed
create or replace function refresh_approval(p_approval bigint) returns bigint language plpgsql volatile set search_path from current as $$
declare v approval; v_now jsonb; v_at timestamptz := now(); v_new bigint;
begin
  select * into v from approval where id = p_approval for update;
  if v.state <> 'pending' then
    return v.id;
  end if;
  v_now := evidence_of((select coalesce(jsonb_agg(jsonb_build_array(e -> 'table', e -> 'key')), '[]') from jsonb_array_elements(v.evidence) e));
  if changed_evidence(v.evidence, v_now) = '[]' then
    return v.id;
  end if;
  update approval set state = 'superseded', decided_at = v_at, due_at = null where id = v.id;
  insert into approval_event (approval_id, at, kind, args_sha256, detail)
  values (v.id, v_at, 'superseded', v.args_sha256, jsonb_build_object('evidence', changed_evidence(v.evidence, v_now)));
  insert into approval (action_id, app, name, args, args_sha256, preview, evidence, taint, reason, approvers, via, quorum, editable, requested_by, trace,
                        on_timeout, expires_at, escalate, due_at, supersedes, difference, at)
  values (v.action_id, v.app, v.name, v.args, v.args_sha256, v.preview, v_now, v.taint, v.reason, v.approvers, v.via, v.quorum, v.editable, v.requested_by, v.trace,
          v.on_timeout, v.expires_at, v.escalate, v.due_at, v.id, jsonb_build_object('args', '{}'::jsonb, 'evidence', changed_evidence(v.evidence, v_now)), v_at)
  returning id into v_new;
  insert into approval_event (approval_id, at, kind, args_sha256) values (v_new, v_at, 'asked', v.args_sha256);
  update action set approval_id = v_new where id = v.action_id;
  return v_new;
end $$;

-- decide(approval, person, decision, via, args_sha256, edit, why) -> (won, state, decided_by, decided_via, decided_at, next)
-- The decision of a person, approve or reject. One wins: whoever comes later gets won = false and what was decided before.
--   args_sha256  of the arguments they were shown: other ones are not decided
--   edit         the whole arguments as they are to be, checked by the action's model before
--   next         the approval to be asked instead, when a record that it rests on has changed
-- Raises NT009 for who may not decide it. Approved, the call is ready, and its sender's job is there with it.
create or replace function decide(p_approval bigint, p_person text, p_decision text, p_via text, p_args_sha256 text, p_edit jsonb default null, p_why text default null,
  out won boolean, out state text, out decided_by text, out decided_via text, out decided_at timestamptz, out next bigint)
language plpgsql volatile set search_path from current as $$
declare v approval; p person; v_now timestamptz := now(); v_why text; v_args jsonb; v_bad text; v_voices int;
begin
  select * into v from approval where id = p_approval for update;
  select * into p from person where name = p_person;
  v_why := case when v.id is null then format('no approval %s', p_approval)
                when p_decision is null or p_decision not in ('approve', 'reject') then format('the decision "%s" is none: approve or reject', p_decision)
                when p.id is null then format('nobody is called "%s"', p_person)
                when v.requested_by = p.name then format('%s asked for it, and nobody approves their own', p.name)
                when not may_decide(p, v.approvers) then format('%s is not among those who may: %s', p.name, array_to_string(v.approvers, ', ')) end;
  if v_why is null and v.state = 'pending' and v.expires_at <= v_now then
    perform expire_approval(v.id);
    select * into v from approval where id = p_approval;
  elsif v_why is null and v.state = 'pending' then
    next := refresh_approval(v.id);
    if next <> v.id then
      select * into v from approval where id = p_approval;
    else
      next := null;
    end if;
  end if;
  if v_why is null and v.state <> 'pending' then
    won := false; state := v.state; decided_by := v.decided_by; decided_via := v.decided_via; decided_at := v.decided_at;
    return;
  end if;
  v_args := coalesce(p_edit, v.args);
  if v_why is null and p_args_sha256 is distinct from v.args_sha256 then
    v_why := 'its arguments are not those that were shown; look again';
  elsif v_why is null and p_decision = 'approve' and v_args <> v.args then
    select string_agg(k, ', ' order by k) into v_bad from jsonb_object_keys(changed_args(v.args, v_args)) k where v.editable is not null and k <> all (v.editable);
    v_why := case when v_bad is not null then format('%s may not be changed; %s may', v_bad, coalesce(nullif(array_to_string(v.editable, ', '), ''), 'nothing'))
                  when jsonb_typeof(v_args) <> 'object' then 'the edited arguments are no object' end;
  end if;
  if v_why is not null then
    raise exception using errcode = 'NT009', message = format('approval %s: %s', p_approval, v_why), hint = 'anton approvals list, anton people list';
  end if;
  if p_decision = 'reject' then
    insert into approval_event (approval_id, at, kind, person, via, args_sha256, detail) values (v.id, v_now, 'rejected', p.name, p_via, v.args_sha256, jsonb_strip_nulls(jsonb_build_object('why', p_why)));
    update approval set state = 'rejected', decided_by = p.name, decided_via = p_via, decided_at = v_now, why = p_why, due_at = null where id = v.id;
    update action set state = 'rejected', error = p_why where id = v.action_id;
  else
    if v_args <> v.args then
      insert into approval_event (approval_id, at, kind, person, via, args_sha256, detail) values (v.id, v_now, 'edited', p.name, p_via, args_hash(v_args), changed_args(v.args, v_args));
      update approval set before = coalesce(before, args), after = v_args, args = v_args, args_sha256 = args_hash(v_args) where id = v.id returning * into v;
    end if;
    insert into approval_event (approval_id, at, kind, person, via, args_sha256) values (v.id, v_now, 'voted', p.name, p_via, v.args_sha256);
    select count(distinct person) into v_voices from approval_event where approval_id = v.id and kind = 'voted' and args_sha256 = v.args_sha256;
    if v_voices < v.quorum then
      won := true; state := 'pending';
      return;
    end if;
    insert into approval_event (approval_id, at, kind, person, via, args_sha256) values (v.id, v_now, 'approved', p.name, p_via, v.args_sha256);
    update approval set state = 'approved', decided_by = p.name, decided_via = p_via, decided_at = v_now, due_at = null where id = v.id;
    update action set state = 'ready', args = v.args where id = v.action_id;
  end if;
  select true, a.state, a.decided_by, a.decided_via, a.decided_at into won, state, decided_by, decided_via, decided_at from approval a where a.id = v.id;
end $$;

-- expire_approval(approval): its time is over: on_timeout says what that means
create or replace function expire_approval(p_approval bigint) returns void language plpgsql volatile set search_path from current as $$
declare v approval; v_now timestamptz := now();
begin
  select * into v from approval where id = p_approval and state = 'pending' for update;
  if v.id is null then
    return;
  elsif v.on_timeout = 'approve' then
    insert into approval_event (approval_id, at, kind, via, args_sha256) values (v.id, v_now, 'approved', 'timeout', v.args_sha256);
    update approval set state = 'approved', decided_via = 'timeout', decided_at = v_now, due_at = null where id = v.id;
    update action set state = 'ready', args = v.args where id = v.action_id;
  else
    insert into approval_event (approval_id, at, kind, via, args_sha256) values (v.id, v_now, 'expired', 'timeout', v.args_sha256);
    update approval set state = 'expired', decided_via = 'timeout', decided_at = v_now, due_at = null where id = v.id;
    update action set state = 'expired', error = format('nobody decided approval %s in time', v.id) where id = v.action_id;
  end if;
end $$;

-- work_approvals() -> how many had something due: an escalation, or the timeout
create or replace function work_approvals() returns int language plpgsql volatile set search_path from current as $$
declare v approval; v_now timestamptz := now(); v_to text; v_n int := 0;
begin
  for v in select * from approval where state = 'pending' and due_at <= v_now order by due_at limit 100 for update skip locked loop
    v_n := v_n + 1;
    if v.expires_at <= v_now then
      perform expire_approval(v.id);
      continue;
    end if;
    v_to := v.escalate -> 0 ->> 'to';
    insert into approval_event (approval_id, at, kind, args_sha256, detail) values (v.id, v_now, 'escalated', v.args_sha256, jsonb_build_object('to', v_to));
    update approval set approvers = case when v_to = any (approvers) then approvers else approvers || v_to end, escalate = escalate - 0,
           due_at = least(expires_at, (escalate -> 1 ->> 'at')::timestamptz) where id = v.id;
  end loop;
  return v_n;
end $$;

-- next_approval() -> when work_approvals() has something to do next
create or replace function next_approval() returns timestamptz language sql stable set search_path from current as $$
  select min(due_at) from approval where state = 'pending'
$$;

-- guard_approval(): what may become of an approval, whoever writes
create or replace function guard_approval() returns trigger language plpgsql volatile security definer set search_path from current as $$
declare v_why text; v_voices int;
begin
  if tg_op = 'DELETE' then
    v_why := 'approvals are kept';
  elsif tg_op = 'INSERT' then
    v_why := case when new.state <> 'pending' then 'an approval begins as pending' when new.args_sha256 <> args_hash(new.args) then 'args_sha256 is not that of its args'
                  when cardinality(new.approvers) = 0 then 'nobody may decide it' end;
  elsif old.state <> 'pending' then
    v_why := case when to_jsonb(new) is distinct from to_jsonb(old) then format('it is %s', old.state) end;
  elsif (new.id, new.action_id, new.quorum, new.evidence, new.requested_by) is distinct from (old.id, old.action_id, old.quorum, old.evidence, old.requested_by)
        or not new.approvers @> old.approvers then
    v_why := 'action_id, quorum, evidence, requested_by and approvers stay as they are';
  elsif new.args_sha256 is distinct from args_hash(new.args) then
    v_why := 'args_sha256 is not that of its args';
  elsif new.state = 'approved' then
    select count(distinct e.person) into v_voices from approval_event e join person p on p.name = e.person
     where e.approval_id = new.id and e.kind = 'voted' and e.args_sha256 = new.args_sha256 and p.name is distinct from new.requested_by and may_decide(p, new.approvers);
    v_why := case when not (v_voices >= new.quorum or new.decided_via = 'timeout' and new.on_timeout = 'approve' and new.expires_at <= now())
                  then format('%s of %s voices approve it', v_voices, new.quorum) end;
  end if;
  if v_why is not null then
    raise exception using errcode = 'NT009', message = format('approval %s: %s', coalesce(new.id, old.id), v_why), hint = 'people decide through decide()';
  end if;
  return coalesce(new, old);
end $$;

create or replace trigger approval_guard before insert or update or delete on approval for each row execute function guard_approval();
revoke all on function guard_approval() from public;               -- a trigger needs none of it

-- guard_event(): events of approvals are only ever added
create or replace function guard_event() returns trigger language plpgsql volatile set search_path from current as $$
begin
  raise exception using errcode = 'NT009', message = 'approval_event is append-only', hint = 'what was decided stays';
end $$;

create or replace trigger event_guard before update or delete or truncate on approval_event for each statement execute function guard_event();
create or replace trigger approval_kept before truncate on approval for each statement execute function guard_event();

-- list_approvals(state or null, limit) -> approvals, newest first
create or replace function list_approvals(p_state text default 'pending', p_limit int default 50) returns table (
  id bigint, name text, app text, state text, preview text, approvers text[], decided_by text, via text, at timestamptz, expires_at timestamptz)
language sql stable set search_path from current as $$
  select id, name, app, state, preview, approvers, decided_by, decided_via, at, expires_at from approval
   where p_state is null or state = p_state order by id desc limit p_limit
$$;

-- show_approval(id) -> the approval, its history and who may decide it, as JSON; null when there is none
create or replace function show_approval(p_approval bigint) returns jsonb language sql stable set search_path from current as $$
  select to_jsonb(a) || jsonb_build_object(
           'events', (select coalesce(jsonb_agg(to_jsonb(e) - 'approval_id' order by e.id), '[]') from approval_event e where e.approval_id = a.id),
           'people', (select coalesce(jsonb_agg(p.name), '[]') from approvers_of(a.id) p))
    from approval a where a.id = p_approval
$$;
