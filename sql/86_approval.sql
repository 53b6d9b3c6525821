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

-- is_called(person, word) -> whether it is theirs: their name, e-mail address or Slack id, in any case
create or replace function is_called(p person, p_word text) returns boolean language sql immutable set search_path from current as $$
  select coalesce(lower(btrim(p_word, E' \t\r\n')) in (lower(p.name), lower(p.email), lower(p.slack_id)), false)
$$;

-- person_of(word) -> the name of whom it means; null: nobody
create or replace function person_of(p_word text) returns text language sql stable set search_path from current as $$
  select p.name from person p where is_called(p, p_word) order by p.name = p_word desc, p.active desc, p.id limit 1
$$;

-- guard_person(): one word means one person, whoever writes
create or replace function guard_person() returns trigger language plpgsql volatile security definer set search_path from current as $$
declare v_option text; v_word text; v_other text;
begin
  if tg_op = 'INSERT' and exists (select from person where name = new.name)     -- it changes that one, or is refused by its key
     or tg_op = 'UPDATE' and (new.name, new.email, new.slack_id) is not distinct from (old.name, old.email, old.slack_id) then
    return new;
  end if;
  perform pg_advisory_xact_lock(1634628724, (select oid::int from pg_namespace where nspname = current_schema()));   -- two would not see each other
  select w.option, w.word, p.name into v_option, v_word, v_other
    from (values ('name', new.name), ('email', new.email), ('slack', new.slack_id)) w (option, word) join person p on p.id <> new.id and is_called(p, w.word) limit 1;
  if v_other is not null then
    raise exception using errcode = 'NT004',
      message = format('%s="%s" of the person "%s" is not possible: "%s" is known by it, and one word means one person, in any case', v_option, v_word, new.name, v_other),
      hint = format('Change what is known of them: anton people add %s; or see who there is: anton people list', v_other);
  end if;
  return new;
end $$;

create or replace trigger person_guard before insert or update on person for each row execute function guard_person();
revoke all on function guard_person() from public;               -- a trigger needs none of it

-- may_decide(person, approvers) -> whether they are among them: by name, or by a group; the group * is in all groups
create or replace function may_decide(p person, p_approvers text[]) returns boolean language sql stable set search_path from current as $$
  select p.active and (p.name = any (p_approvers) or '*' = any (p.groups) and cardinality(p_approvers) > 0
                       or exists (select from unnest(p.groups) g where '@' || g = any (p_approvers)))
$$;

-- unheard() -> whom the actions of apps ask and cannot reach: who is nobody, and who has no address for via="email"
create or replace function unheard() returns table (app text, action text, problem text, remedy text) language sql stable set search_path from current as $$
  with asked as (
    select r.app, r.name, r.approval, w from action_rule r
     cross join lateral (select jsonb_array_elements_text(r.approval -> 'approvers') union select value from jsonb_each_text(coalesce(r.approval -> 'escalate', '{}'))) x (w)
     where r.missing_at is null and r.approval <> '{}')
  select a.app, a.name, format('it asks %s, and that is nobody', a.w), case when a.w ~ '^@' then format('anton people add NAME --group %s', substr(a.w, 2)) else format('anton people add %s', a.w) end
    from asked a where not exists (select from person p where may_decide(p, array[a.w]))
  union all
  select a.app, a.name, format('it asks %s by e-mail, who has no address', p.name), format('anton people add %s --email ADDRESS', p.name)
    from asked a join person p on may_decide(p, array[a.w]) and p.email is null where a.approval -> 'via' ? 'email' group by a.app, a.name, p.name
   order by 1, 2, 3
$$;

-- sees_all(name) -> whether they see every approval and call: who is in all groups
create or replace function sees_all(p_person text) returns boolean language sql stable set search_path from current as $$
  select exists (select from person where name = p_person and active and '*' = any (groups))
$$;

-- may_see(person, approval) -> whether it is any of their business: who may decide it, who asked for it, and who sees all
create or replace function may_see(p person, a approval) returns boolean language sql stable set search_path from current as $$
  select coalesce(p.active and (is_called(p, a.requested_by) or may_decide(p, a.approvers) or '*' = any (p.groups)), false)
$$;

-- approvers_of(approval) -> the people who may decide it
create or replace function approvers_of(p_approval bigint) returns setof person language sql stable set search_path from current as $$
  select p.* from approval a join person p on may_decide(p, a.approvers) and not is_called(p, a.requested_by) where a.id = p_approval order by p.name
$$;

-- texts(list) -> the texts of a JSON array; of anything else none
create or replace function texts(p_list jsonb) returns text[] language sql immutable set search_path from current as $$
  select array(select jsonb_array_elements_text(case when jsonb_typeof(p_list) = 'array' then p_list else '[]' end))
$$;

-- unsent() -> channels by which actions of apps ask, or somebody is asked now, and whose notices no handler takes. One of all notices takes those of Slack;
-- of e-mails only one that says so in its where=, as elsewhere they would go twice
create or replace function unsent() returns table (app text, action text, problem text, remedy text) language sql stable set search_path from current as $$
  with asked (app, name, channel) as (
    select r.app, r.name, v from action_rule r cross join lateral unnest(texts(r.approval -> 'via')) v where r.missing_at is null
    union select a.app, a.name, v from approval a cross join lateral unnest(a.via) v where a.state = 'pending'),
  takes as (
    select h.app, h.where_sql ~* $re$(?<!\ynot )(?<!\ynot \()\yvia\s*(=\s*|in\s*\([^)]*)'email'$re$ as mails, h.where_sql ~* $re$'slack'$re$ as posts
      from handler h join watched w on w.id = h.table_id where w.relid = to_regclass('notice') and h.enabled and h.missing_at is null)
  select a.app, a.name, format('it asks in %s, and no handler of Notices() posts there', a.channel), $t$Notices().on_new_records(SlackAskApproval(), where="via = 'slack'"), then: anton migrate$t$
    from asked a where a.channel like 'slack:_%' and not exists (select from takes t where t.app in (a.app, 'sql') and (t.posts or t.mails is not true))
  union all
  select a.app, a.name, 'it asks by e-mail, and no handler of Notices() sends those', $t$set SMTP_HOST, or handle Notices() where="via = 'email'", then: anton migrate$t$
    from asked a where a.channel = 'email' and not exists (select from takes t where t.app in (a.app, 'sql') and t.mails)
   order by 1, 2, 3
$$;

-- voices(approval, among) -> how many of them have approved it, as its arguments are, and may now
create or replace function voices(a approval, p_among text[]) returns bigint language sql stable set search_path from current as $$
  select count(distinct lower(p.name)) from approval_event e join person p on p.name = e.person
   where e.approval_id = a.id and e.kind = 'voted' and e.args_sha256 = a.args_sha256 and not is_called(p, a.requested_by) and may_decide(p, p_among)
$$;

-- lacking(approval) -> whose voices are still to come, null when all are there
create or replace function lacking(a approval) returns text language sql stable set search_path from current as $$
  select format('%s of %s voices%s approve it', v, n, ' of ' || nullif(array_to_string(among, ', '), ''))
    from (select voices(a, a.approvers) as v, a.quorum as n, null::text[] as among
          union all select voices(a, texts(d -> 'approvers')), (d ->> 'quorum')::int, texts(d -> 'approvers') from jsonb_array_elements(a.needs) d) x
   where v < n limit 1
$$;

-- record_of(table, key) -> the record as it is now, null when it is gone. table: schema.name, quoted or not; key: [k1, k2, ...]
create or replace function record_of(p_table text, p_key jsonb) returns jsonb language plpgsql stable set search_path from current as $$
declare w watched; v_rel regclass; v_record jsonb;
begin
  select * into w from watched where p_table in (format('%I.%I', schema_name, table_name), schema_name || '.' || table_name);
  v_rel := case when w.key_kind <> 'none' then to_regclass(format('%I.%I', w.schema_name, w.table_name)) end;
  if v_rel is null then
    return null;
  end if;
  if exists (select from unnest(w.key_columns) c where c not in (select name from table_columns(v_rel))) then   -- renamed since it was looked at
    select k.keys, k.types into w.key_columns, w.key_types from table_key(v_rel) k;
    if cardinality(w.key_columns) is distinct from jsonb_array_length(p_key) then
      return null;
    end if;
  end if;
  execute format('select to_jsonb(t) from %I.%I t where %s', w.schema_name, w.table_name,
                 (select string_agg(format('t.%I = ($1 ->> %s)::%s', c, o - 1, t), ' and ' order by o) from unnest(w.key_columns, w.key_types) with ordinality x (c, t, o)))
    into v_record using p_key;
  return v_record;
exception when data_exception then                         -- its key is of another type now
  return null;
end $$;

-- preview_of(template, action, args) -> what people read: the template with the arguments in it, read once from left to right, so that a value is
-- never a template; without one "refund: amount 5, order_id 7"
create or replace function preview_of(p_template text, p_name text, p_args jsonb) returns text language sql immutable set search_path from current as $$
  with shown as (select k, o, case when jsonb_typeof(v) = 'null' then '' else v #>> '{}' end as v from jsonb_each(p_args) with ordinality x (k, v, o))
  select case when coalesce(p_template, '') = '' then (select p_name || ': ' || coalesce(string_agg(k || ' ' || v, ', ' order by o), '') from shown)
              else (select string_agg(coalesce((select v from shown where k = m[2]), m[1]), '' order by o)
                      from regexp_matches(p_template, '([^{]+|\{([^{}]*)\}|\{)', 'g') with ordinality x (m, o)) end
$$;

-- evidence_of(subjects) -> the records an approval rests on, as they are now: subjects: [[table, key], ...]
create or replace function evidence_of(p_subjects jsonb) returns jsonb language sql stable set search_path from current as $$
  select coalesce(jsonb_agg(jsonb_build_object('table', s ->> 0, 'key', s -> 1, 'record', r, 'sha256', args_hash(r)) order by o), '[]')
    from jsonb_array_elements(p_subjects) with ordinality x (s, o) cross join lateral record_of(s ->> 0, s -> 1) r
$$;

-- evidence_again(evidence) -> its records, as they are now
create or replace function evidence_again(p_evidence jsonb) returns jsonb language sql stable set search_path from current as $$
  select evidence_of((select coalesce(jsonb_agg(jsonb_build_array(e -> 'table', e -> 'key') order by o), '[]') from jsonb_array_elements(p_evidence) with ordinality x (e, o)))
$$;

-- changed_args(before, after) -> {name: [before, after]} of those that differ
create or replace function changed_args(p_before jsonb, p_after jsonb) returns jsonb language sql immutable set search_path from current as $$
  select coalesce(jsonb_object_agg(k, jsonb_build_array(p_before -> k, p_after -> k)), '{}')
    from (select jsonb_object_keys(p_before) union select jsonb_object_keys(p_after)) x (k) where p_before -> k is distinct from p_after -> k
$$;

-- changed_evidence(before, after) -> [{"table", "key", "changed": {name: [before, after]}}] of the records that differ
create or replace function changed_evidence(p_before jsonb, p_after jsonb) returns jsonb language sql immutable set search_path from current as $$
  select coalesce(jsonb_agg(jsonb_build_object('table', b -> 'table', 'key', b -> 'key',
           'changed', changed_args(coalesce(nullif(b -> 'record', 'null'), '{}'), coalesce(nullif(n -> 'record', 'null'), '{}')))), '[]')
    from jsonb_array_elements(p_before) b left join jsonb_array_elements(p_after) n on n -> 'table' = b -> 'table' and n -> 'key' = b -> 'key'
   where n ->> 'sha256' is distinct from b ->> 'sha256'
$$;

-- outdated(action) -> whether what was approved rests on a record that is not what it was then: it is asked about again
create or replace function outdated(a action) returns boolean language sql stable set search_path from current as $$
  select exists (select from approval p where p.id = a.approval_id and p.action_id = a.id and p.state = 'approved' and p.evidence <> '[]'
                    and changed_evidence(p.evidence, evidence_again(p.evidence)) <> '[]')
$$;

-- note_event(approval, kind, person, via, args_sha256, detail): adds to what happened to an approval; guard_voice() lets nothing else do so
create or replace function note_event(p_approval bigint, p_kind text, p_person text default null, p_via text default null, p_args_sha256 text default null, p_detail jsonb default '{}')
returns void language plpgsql volatile set search_path from current as $$
begin
  perform set_config('anton.event', concat_ws(' ', p_approval, p_kind, p_person), true);
  insert into approval_event (approval_id, at, kind, person, via, args_sha256, detail) values (p_approval, now(), p_kind, p_person, p_via, p_args_sha256, p_detail);
  perform set_config('anton.event', '', true);
end $$;

-- steps_of(definition, at) -> [{"at", "to"}]: what is to happen to an approval that is asked then, the earliest first; without "to" a reminder
create or replace function steps_of(d jsonb, p_at timestamptz) returns jsonb language sql stable set search_path from current as $$
  select coalesce(jsonb_agg(jsonb_strip_nulls(jsonb_build_object('at', p_at + k, 'to', v)) order by k), '[]')
    from (select k::interval, v from jsonb_each_text(coalesce(d -> 'escalate', '{}')) x (k, v)
          union all select k::interval, null from jsonb_array_elements_text(coalesce(d -> 'remind', '[]')) k) x (k, v)
$$;

-- declared_of(call) -> what its action says of asking people, else what the call says itself; null: nothing does
create or replace function declared_of(a action) returns jsonb language sql stable set search_path from current as $$
  select coalesce((select r.approval from action_rule r where r.app = a.app and r.name = a.name and r.approval <> '{}'),
                  case when texts(a.approve -> 'approvers') <> '{}' then a.approve end)
$$;

-- ask_approval(action, definition, preview) -> approval id. preview: of workers of the release before; guard_approval() makes it
-- A call waits for a person: approvers, via, quorum, editable, timeout, on_timeout, escalate ({"1h": "@cfo"}), remind (["1h"]), subjects, reason.
-- Whom the call alone asks (action.approve) is asked besides those of its action: each have their quorum, and time approves when both say so.
-- null when it is not to be asked for any more.
create or replace function ask_approval(p_action bigint, d jsonb, p_preview text default null) returns bigint language plpgsql volatile set search_path from current as $$
declare a action; v_last approval; v_id bigint; v_now timestamptz := now(); v_evidence jsonb; v_also jsonb; v_may text[];
begin
  select * into a from action where id = p_action for update;
  if a.id is null or a.state not in ('new', 'ready', 'retrying', 'failed') then
    return null;
  end if;
  select * into v_last from approval where action_id = a.id order by id desc limit 1;
  v_evidence := evidence_of(coalesce(d -> 'subjects', case when a.subject is null then '[]' else jsonb_build_array(a.subject) end));
  if texts(a.approve -> 'approvers') <> '{}' and exists (select from action_rule r where r.app = a.app and r.name = a.name and r.approval <> '{}') then
    v_also := a.approve;
    v_may := case when jsonb_typeof(d -> 'editable') is distinct from 'array' then texts(v_also -> 'editable')
                  else array(select k from unnest(texts(d -> 'editable')) k where jsonb_typeof(v_also -> 'editable') is distinct from 'array' or k = any (texts(v_also -> 'editable'))) end;
    d := d || jsonb_build_object('needs', jsonb_build_array(jsonb_build_object('approvers', d -> 'approvers', 'quorum', coalesce((d ->> 'quorum')::int, 1)),
                                                            jsonb_build_object('approvers', v_also -> 'approvers', 'quorum', coalesce((v_also ->> 'quorum')::int, 1))),
      'approvers', array(select x from unnest(texts(d -> 'approvers') || texts(v_also -> 'approvers')) with ordinality u (x, o) group by x order by min(o)),
      'via', array(select x from unnest(texts(coalesce(d -> 'via', '["inbox"]')) || texts(v_also -> 'via')) with ordinality u (x, o) group by x order by min(o)),
      'quorum', greatest((d ->> 'quorum')::int, (v_also ->> 'quorum')::int, 1),
      'editable', case when 'array' in (jsonb_typeof(d -> 'editable'), jsonb_typeof(v_also -> 'editable')) then to_jsonb(v_may) end,
      'on_timeout', case when d ->> 'on_timeout' = 'approve' and v_also ->> 'on_timeout' = 'approve' then 'approve' else 'reject' end);
  end if;
  insert into approval (action_id, app, name, args, args_sha256, preview, evidence, taint, reason, approvers, via, quorum, editable, requested_by, trace,
                        on_timeout, expires_at, escalate, supersedes, difference, at, needs)
  values (a.id, a.app, a.name, a.args, args_hash(a.args), p_preview, v_evidence, a.taint, d ->> 'reason',
          array(select jsonb_array_elements_text(d -> 'approvers')), array(select jsonb_array_elements_text(coalesce(d -> 'via', '["inbox"]'))),
          coalesce((d ->> 'quorum')::int, 1), case when jsonb_typeof(d -> 'editable') = 'array' then array(select jsonb_array_elements_text(d -> 'editable')) end,
          a.requested_by, a.trace, coalesce(d ->> 'on_timeout', 'reject'), v_now + (d ->> 'timeout')::interval, steps_of(d, v_now),
          case when v_last.state in ('superseded', 'approved') then v_last.id end,
          case when v_last.state in ('superseded', 'approved') then jsonb_build_object('args', changed_args(v_last.args, a.args), 'evidence', changed_evidence(v_last.evidence, v_evidence)) end, v_now,
          coalesce(d -> 'needs', '[]'))
  returning id into v_id;
  perform note_event(v_id, 'asked', null, null, args_hash(a.args));
  perform mark_action(a.id);
  update action set state = 'waiting', approval_id = v_id where id = a.id;
  return v_id;
end $$;

-- refreshed(approval, now) -> until when people have time, where another one takes its place: as long as they had, where time approves
create or replace function refreshed(v approval, p_now timestamptz) returns timestamptz language sql immutable set search_path from current as $$
  select case when v.on_timeout = 'reject' then v.expires_at else p_now + (v.expires_at - v.at) end
$$;

-- refresh_approval(approval) -> the approval that is asked now: itself, or the one that took its place as a record it rests on had changed.
-- One that time approves gives people all of its time again.
create or replace function refresh_approval(p_approval bigint) returns bigint language plpgsql volatile set search_path from current as $$
declare v approval; v_now jsonb; v_at timestamptz := now(); v_new bigint;
begin
  select * into v from approval where id = p_approval for update;
  if v.state <> 'pending' then
    return v.id;
  end if;
  v_now := evidence_again(v.evidence);
  if changed_evidence(v.evidence, v_now) = '[]' then
    return v.id;
  end if;
  perform note_event(v.id, 'superseded', null, null, v.args_sha256, jsonb_build_object('evidence', changed_evidence(v.evidence, v_now)));
  update approval set state = 'superseded', decided_at = v_at where id = v.id;
  insert into approval (action_id, app, name, args, args_sha256, preview, evidence, taint, reason, approvers, via, quorum, editable, requested_by, trace,
                        on_timeout, expires_at, escalate, supersedes, difference, at, needs)
  values (v.action_id, v.app, v.name, v.args, v.args_sha256, v.preview, v_now, v.taint, v.reason, v.approvers, v.via, v.quorum, v.editable, v.requested_by, v.trace,
          v.on_timeout, refreshed(v, v_at), v.escalate, v.id, jsonb_build_object('args', '{}'::jsonb, 'evidence', changed_evidence(v.evidence, v_now)), v_at, v.needs)
  returning id into v_new;
  perform note_event(v_new, 'asked', null, null, v.args_sha256);
  perform mark_action(v.action_id);
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
declare v approval; p person; v_call action; v_now timestamptz := now(); v_why text; v_args jsonb; v_bad text; v_edited boolean;
begin
  select * into v from approval where id = p_approval for update;
  select * into p from person where name = person_of(p_person);
  v_why := case when v.id is null then format('no approval %s', p_approval)
                when p_decision is null or p_decision not in ('approve', 'reject') then format('the decision "%s" is none: approve or reject', p_decision)
                when p.id is null then format('nobody is called "%s"', p_person)
                when is_called(p, v.requested_by) then format('%s asked for it, and nobody approves their own', p.name)
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
    if v.state = 'superseded' then
      next := coalesce(next, (select max(n.id) from approval n where n.supersedes = v.id));
    end if;
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
  if v_why is null and p_decision = 'approve' then           -- what would be refused at once is said while somebody is there to edit it
    select * into v_call from action where id = v.action_id;
    v_call.args := v_args;
    v_why := (select coalesce(forbidden(v_call, r), beyond(v_call, r)) from action_rule r where r.app = v.app and r.name = v.name and r.missing_at is null);
  end if;
  if v_why is not null then
    raise exception using errcode = 'NT009', message = format('approval %s: %s', p_approval, v_why), hint = 'anton approvals list, anton people list';
  end if;
  if p_decision = 'reject' then
    perform note_event(v.id, 'rejected', p.name, p_via, v.args_sha256, jsonb_strip_nulls(jsonb_build_object('why', p_why)));
    update approval set state = 'rejected', decided_by = p.name, decided_via = p_via, decided_at = v_now, why = p_why where id = v.id;
    perform mark_action(v.action_id);
    update action set state = 'rejected', error = p_why where id = v.action_id;
  else
    v_edited := v_args <> v.args;
    if v_edited then
      perform note_event(v.id, 'edited', p.name, p_via, args_hash(v_args), changed_args(v.args, v_args));
      update approval set before = coalesce(before, args), after = v_args, args = v_args, args_sha256 = args_hash(v_args) where id = v.id returning * into v;
    end if;
    if not exists (select from approval_event e where e.approval_id = v.id and e.kind = 'voted' and e.person = p.name and e.args_sha256 = v.args_sha256) then
      perform note_event(v.id, 'voted', p.name, p_via, v.args_sha256);
    end if;
    if lacking(v) is not null then
      if v_edited then
        perform tell(v.id, 'edited');                            -- what they are asked for is another thing now
      end if;
      won := true; state := 'pending';
      return;
    end if;
    perform note_event(v.id, 'approved', p.name, p_via, v.args_sha256);
    update approval set state = 'approved', decided_by = p.name, decided_via = p_via, decided_at = v_now where id = v.id;
    perform mark_action(v.action_id);
    update action set state = 'ready', args = v.args where id = v.action_id;
  end if;
  select true, a.state, a.decided_by, a.decided_via, a.decided_at into won, state, decided_by, decided_via, decided_at from approval a where a.id = v.id;
end $$;

-- expire_approval(approval): its time is over: on_timeout says what that means. Time approves nothing that is not as it was: that is asked again
create or replace function expire_approval(p_approval bigint) returns void language plpgsql volatile set search_path from current as $$
declare v approval; v_now timestamptz := now();
begin
  select * into v from approval where id = p_approval and state = 'pending' for update;
  if v.id is null then
    return;
  elsif v.on_timeout = 'approve' and refresh_approval(v.id) <> v.id then
    return;
  elsif v.on_timeout = 'approve' then
    perform note_event(v.id, 'approved', null, 'timeout', v.args_sha256);
    update approval set state = 'approved', decided_via = 'timeout', decided_at = v_now where id = v.id;
    perform mark_action(v.action_id);
    update action set state = 'ready', args = v.args where id = v.action_id;
  else
    perform note_event(v.id, 'expired', null, 'timeout', v.args_sha256);
    update approval set state = 'expired', decided_via = 'timeout', decided_at = v_now where id = v.id;
    perform mark_action(v.action_id);
    update action set state = 'expired', error = format('nobody decided approval %s in time', v.id) where id = v.action_id;
  end if;
end $$;

-- grown(needs, who) -> with them among those of the action
create or replace function grown(p_needs jsonb, p_who text) returns jsonb language sql immutable set search_path from current as $$
  select jsonb_set(p_needs, '{0,approvers}', (p_needs #> '{0,approvers}') || to_jsonb(p_who))
$$;

-- work_approval(approval): what is due of it: a reminder, an escalation, or the end of its time
create or replace function work_approval(v approval) returns void language plpgsql volatile set search_path from current as $$
declare v_to text := v.escalate -> 0 ->> 'to';
begin
  if v.expires_at <= now() then
    perform expire_approval(v.id);
  elsif v_to is null then
    perform note_event(v.id, 'reminded', null, null, v.args_sha256);
    update approval set escalate = escalate - 0 where id = v.id;
    perform tell(v.id, 'reminder');
  else
    perform note_event(v.id, 'escalated', null, null, v.args_sha256, jsonb_build_object('to', v_to));
    update approval set approvers = case when v_to = any (approvers) then approvers else approvers || v_to end, escalate = escalate - 0,
           needs = case when texts(needs #> '{0,approvers}') @> array[v_to] or needs = '[]' then needs else grown(needs, v_to) end where id = v.id;
    perform tell(v.id, 'escalated', array[v_to]);
  end if;
end $$;

-- work_approvals() -> how many had something due. One that cannot be done says so in its error, is tried again in a minute, and holds up no other
create or replace function work_approvals() returns int language plpgsql volatile set search_path from current as $$
declare v approval; v_now timestamptz := now(); v_n int := 0;
begin
  for v in select * from approval where state = 'pending' and due_at <= v_now order by due_at limit 100 for update skip locked loop
    v_n := v_n + 1;
    begin
      perform work_approval(v);
    exception when others then
      update approval set error = sqlerrm, retry_at = v_now + interval '1 minute' where id = v.id;
    end;
  end loop;
  return v_n;
end $$;

-- next_approval() -> when work_approvals() has something to do next
create or replace function next_approval() returns timestamptz language sql stable set search_path from current as $$
  select min(due_at) from approval where state = 'pending'
$$;

-- asks(needs, approvers, quorum) -> whether so many voices are needed of these people alone
create or replace function asks(p_needs jsonb, p_approvers text[], p_quorum int) returns boolean language sql immutable set search_path from current as $$
  select exists (select from jsonb_array_elements(p_needs) n where texts(n -> 'approvers') <@ p_approvers and (n ->> 'quorum')::int >= p_quorum)
$$;

drop function if exists loosened(approval, action_rule);
-- loosened(approval, rule, call) -> what of it is less than its action declares in approve=, or its call asks for besides, null when nothing is; a rule
-- of nulls declares nothing
create or replace function loosened(p approval, r action_rule, c action) returns text language sql stable set search_path from current as $$
  select case when not p.approvers <@ (array(select jsonb_array_elements_text(d -> 'approvers')) || array(select value from jsonb_each_text(coalesce(d -> 'escalate', '{}'))) || also)
                then format('its action is approved by %s', (select string_agg(x, ', ') from jsonb_array_elements_text(d -> 'approvers') x))
              when p.quorum < coalesce((d ->> 'quorum')::int, 1) then format('its action needs %s voices', d ->> 'quorum')
              when also <> '{}' and not exists (select from approval b where b.id = p.supersedes and b.action_id = p.action_id and b.state = 'superseded' and b.needs = p.needs)
                   and not (asks(p.needs, texts(d -> 'approvers') || array(select value from jsonb_each_text(coalesce(d -> 'escalate', '{}'))),
                                              coalesce((d ->> 'quorum')::int, 1)) and asks(p.needs, also, coalesce((c.approve ->> 'quorum')::int, 1)))
                then format('its call is approved by %s, too', array_to_string(also, ', '))
              when p.on_timeout <> 'reject' and (p.on_timeout is distinct from d ->> 'on_timeout' or also <> '{}' and p.on_timeout is distinct from c.approve ->> 'on_timeout') then 'its action is not approved by time' end
    from (select coalesce(r.approval, case when own <> '{}' then c.approve end), case when r.approval is null then '{}' else own end from texts(c.approve -> 'approvers') own) x (d, also)
   where d is not null
$$;

-- asked_less(action, rule) -> whether it needs an approval, and the one that it has asked less than the rule says
create or replace function asked_less(a action, r action_rule) returns boolean language plpgsql stable set search_path from current as $$
declare p approval; v_rule action_rule; v_bare action := a;
begin
  v_bare.approval_id := null;
  if a.approval_id is null or not unapproved(v_bare, r) then
    return false;
  end if;
  if r.approval <> '{}' then
    v_rule := r;
  end if;
  select * into p from approval x where x.id = a.approval_id and x.action_id = a.id and x.state = 'approved';
  return loosened(p, v_rule, a) is not null
      or coalesce(p.decided_via = 'timeout' and p.expires_at - p.at < (coalesce(nullif(r.approval, '{}'), a.approve) ->> 'timeout')::interval, false);
end $$;

-- noted(approval, kind) -> whether this transaction has noted that of it, as its arguments and who decided it are
create or replace function noted(a approval, p_kind text) returns boolean language sql stable set search_path from current as $$
  select exists (select from approval_event e where e.approval_id = a.id and e.kind = p_kind and e.xid = pg_current_xact_id_if_assigned() and e.args_sha256 = a.args_sha256
                    and (a.state = 'pending' or e.person is not distinct from a.decided_by and e.via is not distinct from a.decided_via))
$$;

-- guard_approval(): what may become of an approval, whoever writes. The preview is always that of its arguments, by the template that its action declares.
-- One of the call alone, which anybody may write who writes calls, stands behind them and is named as such
create or replace function guard_approval() returns trigger language plpgsql volatile security definer set search_path from current as $$
declare
  v_why text; v_rule action_rule; v_call action; v_last approval; d jsonb;
  v_free text[] := '{state,args,args_sha256,before,after,approvers,needs,escalate,due_at,decided_by,decided_via,decided_at,why,error,retry_at}';
begin
  if tg_op = 'DELETE' then
    v_why := 'approvals are kept';
  elsif tg_op = 'INSERT' then
    select r.* into v_rule from action a join action_rule r on r.app = a.app and r.name = a.name where a.id = new.action_id and r.approval <> '{}';
    select * into v_call from action where id = new.action_id;
    select * into v_last from approval b where b.id = new.supersedes and b.action_id = new.action_id and b.state = 'superseded' and noted(b, 'superseded');
    d := declared_of(v_call);
    new.at := now();
    if v_last.id is not null then                          -- until when, and what follows, is as it was, or as it is declared: never what an insert says
      new.escalate := v_last.escalate; new.expires_at := refreshed(v_last, new.at);
    elsif d is not null then
      new.escalate := steps_of(d, new.at); new.expires_at := new.at + (d ->> 'timeout')::interval;
    end if;
    v_why := case when new.state <> 'pending' then 'an approval begins as pending'
                  when coalesce(new.decided_by, new.decided_via, new.why, new.error, new.decided_at::text, new.retry_at::text, new.before::text, new.after::text) is not null
                    then 'nobody has decided it yet'
                  when (new.app, new.name) is distinct from (v_call.app, v_call.name) or new.requested_by is distinct from v_call.requested_by
                       or new.supersedes is null and new.args is distinct from v_call.args then 'it is not about its call: app, name, args, requested_by' when new.args_sha256 <> args_hash(new.args) then 'args_sha256 is not that of its args'
                  when cardinality(new.approvers) = 0 then 'nobody may decide it' else loosened(new, v_rule, v_call) end;
  elsif old.state <> 'pending' then
    v_why := case when to_jsonb(new) is distinct from to_jsonb(old) then format('it is %s', old.state) end;
  elsif to_jsonb(new) - v_free is distinct from to_jsonb(old) - v_free then
    v_why := 'what is asked, of whom, and until when stays as it is';
  elsif new.approvers <> old.approvers and (new.approvers is distinct from old.approvers || (old.escalate -> 0 ->> 'to')
                                            or (old.escalate -> 0 ->> 'at')::timestamptz > now() or new.escalate = old.escalate) then
    v_why := 'approvers grow as escalate says';
  elsif new.needs <> old.needs and (new.needs is distinct from grown(old.needs, old.escalate -> 0 ->> 'to') or (old.escalate -> 0 ->> 'at')::timestamptz > now() or new.escalate = old.escalate) then
    v_why := 'those who are asked for one call grow as escalate says';
  elsif new.escalate is distinct from old.escalate and (new.escalate is distinct from old.escalate - 0 or not noted(new, 'escalated') and not noted(new, 'reminded')) then
    v_why := 'escalate goes on step by step, each noted';
  elsif new.state = old.state and (new.decided_by, new.decided_via, new.decided_at, new.why) is distinct from (old.decided_by, old.decided_via, old.decided_at, old.why) then
    v_why := 'nobody has decided it yet';
  elsif new.retry_at > now() + interval '1 minute' then
    v_why := 'what could not be done is tried again in a minute';
  elsif new.args_sha256 is distinct from args_hash(new.args) then
    v_why := 'args_sha256 is not that of its args';
  elsif new.args <> old.args and (not noted(new, 'edited')
                                  or (new.before, new.after) is distinct from (coalesce(old.before, old.args), new.args)) then
    v_why := 'its arguments are edited by who decides it';
  elsif new.state = 'approved' and not coalesce(new.decided_via = 'timeout' and new.on_timeout = 'approve' and new.expires_at <= now(), false) and lacking(new) is not null then
    v_why := lacking(new);
  elsif new.state <> old.state and not noted(new, new.state) then
    v_why := format('it becomes %s with its event, in one transaction', new.state);
  elsif new.state = 'expired' and (new.expires_at <= now()) is not true then
    v_why := 'its time is not over';
  end if;
  if v_why is not null then
    raise exception using errcode = 'NT009', message = format('approval %s: %s', coalesce(new.id, old.id), v_why), hint = 'people decide through decide()';
  end if;
  if tg_op = 'UPDATE' and (new.state, new.escalate) is distinct from (old.state, old.escalate) then
    new.error := null; new.retry_at := null;
  end if;
  if tg_op <> 'DELETE' then
    new.due_at := case when new.state = 'pending' then greatest(least(new.expires_at, (new.escalate -> 0 ->> 'at')::timestamptz), new.retry_at) end;
  end if;
  if tg_op = 'INSERT' or new.args <> old.args then
    select preview_of(r.approval ->> 'preview', a.name, new.args)
           || case when coalesce(r.approval ->> 'preview', '') = '' and a.approve ->> 'preview' <> '' then format(' (its call says: %s)', preview_of(a.approve ->> 'preview', a.name, new.args)) else '' end
      into new.preview from action a left join action_rule r on r.app = a.app and r.name = a.name where a.id = new.action_id;
  end if;
  return coalesce(new, old);
end $$;

create or replace trigger approval_guard before insert or update or delete on approval for each row execute function guard_approval();
revoke all on function guard_approval() from public;               -- a trigger needs none of it

-- guard_voice(): an event is added by note_event() as the runtime decides; and a voice is of a person who may decide it now, for its arguments, once.
-- An edit is noted before it is made
create or replace function guard_voice() returns trigger language plpgsql volatile security definer set search_path from current as $$
declare a approval; p person; v_why text;
begin
  select * into a from approval where id = new.approval_id for update;
  select * into p from person where name = person_of(new.person);
  v_why := case when a.id is null then 'there is no such approval'
                when a.state <> 'pending' then format('it is %s', a.state)
                when new.kind in ('voted', 'edited', 'rejected') and new.person is null then 'a voice is somebody''s'
                when new.kind = 'approved' and new.person is null
                     and not (new.via is not distinct from 'timeout' and a.on_timeout = 'approve' and a.expires_at <= now()) then 'time approves nothing of it now'
                when new.person is not null then case
                  when p.id is null then format('nobody is called "%s"', new.person)
                  when is_called(p, a.requested_by) then format('%s asked for it, and nobody approves their own', p.name)
                  when not may_decide(p, a.approvers) then format('%s is not among those who may: %s', p.name, array_to_string(a.approvers, ', '))
                  when a.expires_at <= now() then 'its time is over'
                  when new.kind <> 'edited' and new.args_sha256 is distinct from a.args_sha256 then 'its arguments are not those that were shown; look again'
                  when new.kind = 'voted' and exists (select from approval_event e where e.approval_id = a.id and e.kind = 'voted' and e.person = p.name
                                                         and e.args_sha256 = a.args_sha256) then format('%s has approved it', p.name) end end;
  v_why := coalesce(v_why, case when current_setting('anton.event', true) is distinct from concat_ws(' ', new.approval_id, new.kind, new.person)
                                then 'what happens to it is noted as it happens, not by an insert' end);
  if v_why is not null then
    raise exception using errcode = 'NT009', message = format('approval %s: no event "%s": %s', new.approval_id, new.kind, v_why),
      hint = 'people decide by: select decide(approval, person, ''approve'' or ''reject'', via, args_sha256)';
  end if;
  new.person := coalesce(p.name, new.person);
  new.xid := pg_current_xact_id();
  return new;
end $$;

create or replace trigger event_voice before insert on approval_event for each row execute function guard_voice();
revoke all on function guard_voice() from public;               -- a trigger needs none of it

-- guard_event(): events of approvals are only ever added
create or replace function guard_event() returns trigger language plpgsql volatile set search_path from current as $$
begin
  raise exception using errcode = 'NT009', message = 'approval_event is append-only', hint = 'what was decided stays';
end $$;

create or replace trigger event_guard before update or delete or truncate on approval_event for each statement execute function guard_event();
do $$ begin                                                      -- nor is a right to change them granted to anybody, their owner included
  execute format('revoke update, delete, truncate on approval_event from public, %s', (select relowner::regrole from pg_class where oid = 'approval_event'::regclass));
end $$;
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
           'events', (select coalesce(jsonb_agg(to_jsonb(e) - array['approval_id', 'xid'] order by e.id), '[]') from approval_event e where e.approval_id = a.id),
           'people', (select coalesce(jsonb_agg(p.name), '[]') from approvers_of(a.id) p))
    from approval a where a.id = p_approval
$$;
