-- The inbox: people, how they come in, and what they see. decide() alone decides.
-- Tokens come in as SHA-256, hex: who reads these tables learns none.

-- list_people() -> those who may decide things
create or replace function list_people() returns table (name text, email text, slack_id text, groups text[], at timestamptz)
language sql stable set search_path from current as $$
  select name, email, slack_id, groups, at from person where active order by name
$$;

-- drop_person(name) -> whether they were there: they decide nothing any more, and are signed out; what they decided stays
create or replace function drop_person(p_name text) returns boolean language plpgsql volatile set search_path from current as $$
declare v_id int;
begin
  update person set active = false, email = null, slack_id = null, groups = '{}' where name = person_of(p_name) and active returning id into v_id;
  delete from session where person_id = v_id;
  delete from link where person_id = v_id and used_at is null;
  return v_id is not null;
end $$;

-- address_of(person) -> their e-mail address; null: they have none, or nobody is called so
create or replace function address_of(p_person text) returns text language sql stable set search_path from current as $$
  select email from person where name = person_of(p_person) and active
$$;

-- make_link(person, token, for, approval) -> until when it holds. It signs them in, or, with an approval, shows and decides that one
create or replace function make_link(p_person text, p_token_sha256 text, p_for interval, p_approval bigint default null) returns timestamptz
language plpgsql volatile set search_path from current as $$
declare p person; a approval; v_until timestamptz := now() + p_for; v_why text;
begin
  select * into p from person where name = person_of(p_person) and active;
  select * into a from approval where id = p_approval;
  v_why := case when p.id is null then format('nobody is called "%s"', p_person)
                when p_approval is not null and a.id is null then format('no approval %s', p_approval)
                when a.id is not null and is_called(p, a.requested_by) then format('%s asked for it, and nobody approves their own', p.name)
                when a.id is not null and not may_decide(p, a.approvers) then format('%s is not among those who may: %s', p.name, array_to_string(a.approvers, ', ')) end;
  if v_why is not null then
    raise exception using errcode = 'NT009', message = 'no link: ' || v_why, hint = 'anton people list';
  end if;
  delete from link where expires_at < now() - interval '30 days';
  insert into link (token_sha256, person_id, approval_id, args_sha256, at, expires_at)
  values (p_token_sha256, p.id, a.id, a.args_sha256, now(), least(v_until, a.expires_at));
  return least(v_until, a.expires_at);
end $$;

-- read_link(token) -> {person, approval, args_sha256, why}; null when there is none. why: it is of no use any more. Changes nothing
create or replace function read_link(p_token_sha256 text) returns jsonb language sql stable set search_path from current as $$
  select jsonb_build_object('person', p.name, 'approval', l.approval_id, 'args_sha256', l.args_sha256, 'why', case
           when not p.active then 'its person is not known any more' when l.used_at is not null then 'it was used' when l.expires_at <= now() then 'its time is over' end)
    from link l join person p on p.id = l.person_id where l.token_sha256 = p_token_sha256
$$;

-- open_session(link, token, for) -> the person who is signed in by it, once; null: the link is of no use
create or replace function open_session(p_link_sha256 text, p_token_sha256 text, p_for interval) returns text
language plpgsql volatile set search_path from current as $$
declare v_person int;
begin
  update link l set used_at = now() from person p
   where l.token_sha256 = p_link_sha256 and l.approval_id is null and l.used_at is null and l.expires_at > now() and p.id = l.person_id and p.active
  returning l.person_id into v_person;
  if v_person is null then
    return null;
  end if;
  delete from session where expires_at <= now();
  insert into session (token_sha256, person_id, at, expires_at) values (p_token_sha256, v_person, now(), now() + p_for);
  return (select name from person where id = v_person);
end $$;

-- session_person(token) -> who it is; null: nobody
create or replace function session_person(p_token_sha256 text) returns text language sql stable set search_path from current as $$
  select p.name from session s join person p on p.id = s.person_id where s.token_sha256 = p_token_sha256 and s.expires_at > now() and p.active
$$;

-- end_session(token)
create or replace function end_session(p_token_sha256 text) returns void language sql volatile set search_path from current as $$
  delete from session where token_sha256 = p_token_sha256
$$;

-- decide_by_link(token, decision, via, edit, why) -> as decide(), by the person and for the arguments of the link, which is used by it
create or replace function decide_by_link(p_token_sha256 text, p_decision text, p_via text, p_edit jsonb default null, p_why text default null,
  out won boolean, out state text, out decided_by text, out decided_via text, out decided_at timestamptz, out next bigint)
language plpgsql volatile set search_path from current as $$
declare l link; p person; d record; v_why text;
begin
  select * into l from link where token_sha256 = p_token_sha256 for update;
  select * into p from person where id = l.person_id;
  v_why := case when l.token_sha256 is null or l.approval_id is null then 'there is none like this' when not p.active then 'its person is not known any more'
                when l.used_at is not null then 'it was used' when l.expires_at <= now() then 'its time is over' end;
  if v_why is not null then
    raise exception using errcode = 'NT009', message = 'this link decides nothing: ' || v_why, hint = 'sign in to the inbox, or ask for another';
  end if;
  select * into d from decide(l.approval_id, p.name, p_decision, p_via, l.args_sha256, p_edit, p_why);
  update link set used_at = now() where token_sha256 = p_token_sha256;
  won := d.won; state := d.state; decided_by := d.decided_by; decided_via := d.decided_via; decided_at := d.decided_at; next := d.next;
end $$;

-- inbox(app, person, limit) -> what waits for them: not what they asked for, nor what they gave their voice for already; the first to expire first
create or replace function inbox(p_app text, p_person text, p_limit int default 100) returns table (
  id bigint, name text, preview text, at timestamptz, expires_at timestamptz, requested_by text, supersedes bigint, taint text[], quorum int, voices int)
language sql stable set search_path from current as $$
  select a.id, a.name, a.preview, a.at, a.expires_at, a.requested_by, a.supersedes, a.taint, a.quorum, v.voices
    from person p join approval a on a.state = 'pending' and a.app = p_app and not is_called(p, a.requested_by) and may_decide(p, a.approvers)
   cross join lateral (select count(distinct e.person)::int as voices, coalesce(bool_or(e.person = p.name), false) as mine
                         from approval_event e where e.approval_id = a.id and e.kind = 'voted' and e.args_sha256 = a.args_sha256) v
   where p.name = p_person and p.active and not v.mine and a.expires_at > now() order by a.expires_at, a.id limit p_limit
$$;

drop function if exists decided(text, int);
-- decided(app, limit, person) -> what was decided, the newest first, of what this person may see; null: all
create or replace function decided(p_app text, p_limit int default 50, p_person text default null) returns table (
  id bigint, name text, preview text, state text, decided_by text, decided_via text, decided_at timestamptz, edited boolean, why text)
language sql stable set search_path from current as $$
  select a.id, a.name, a.preview, a.state, a.decided_by, a.decided_via, a.decided_at, a.after is not null, a.why
    from approval a left join person p on p.name = p_person
   where a.app = p_app and a.state <> 'pending' and (p_person is null or may_see(p, a)) order by a.decided_at desc nulls last, a.id desc limit p_limit
$$;

-- open_approval(id, person) -> show_approval() with what a page needs: {..., may, why_not, changed, now, voices, next, call}; null where this person may not see it. Changes nothing
--   may      this person may decide it now; why_not: else
--   changed  records that it rests on and that are not what they were when it was asked, as changed_evidence() has them
--   next     the one that took its place
create or replace function open_approval(p_approval bigint, p_person text) returns jsonb language plpgsql stable set search_path from current as $$
declare a approval; p person; v_changed jsonb := '[]'; v_voices text[]; v_why text;
begin
  select * into a from approval where id = p_approval;
  select * into p from person where name = p_person;
  if a.id is null or not may_see(p, a) then
    return null;
  end if;
  if a.state = 'pending' then
    v_changed := changed_evidence(a.evidence, evidence_again(a.evidence));
  end if;
  v_voices := array(select distinct e.person from approval_event e where e.approval_id = a.id and e.kind = 'voted' and e.args_sha256 = a.args_sha256);
  v_why := case when a.state <> 'pending' then format('it is %s', a.state) when a.expires_at <= now() then 'its time is over'
                when p.id is null or not p.active then format('nobody is called "%s"', p_person)
                when is_called(p, a.requested_by) then 'you asked for it, and nobody approves their own'
                when not may_decide(p, a.approvers) then format('you are not among those who may: %s', array_to_string(a.approvers, ', '))
                when p.name = any (v_voices) then 'you have approved it; others have to, too' end;
  return show_approval(a.id) || jsonb_build_object('may', v_why is null, 'why_not', v_why, 'changed', v_changed, 'voices', to_jsonb(v_voices),
    'next', (select n.id from approval n where n.supersedes = a.id order by n.id desc limit 1),
    'call', (select jsonb_build_object('id', c.id, 'state', c.state, 'error', c.error, 'sent_at', c.sent_at) from action c where c.id = a.action_id));
end $$;

-- flow_tables(tables) -> how many records each has, as of its statistics where there are more than 1,000, and how many of its changes are
-- of the last minute, as far as the newest 5,000 changes say
create or replace function flow_tables(p_tables text[]) returns table (name text, records bigint, exact boolean, changes bigint)
language plpgsql stable set search_path from current as $$
declare v_name text; v_rel regclass; v_n bigint; v_now timestamptz := now();
begin
  foreach v_name in array p_tables loop
    v_rel := to_regclass(v_name);
    continue when v_rel is null or not has_table_privilege(v_rel, 'select');
    execute format('select count(*) from (select from %s limit 1001) x', v_rel) into v_n;
    return query select v_name, case when v_n <= 1000 then v_n else greatest(1001, (select sum(greatest(reltuples, 0))::bigint from pg_class where oid = any (array(select tree(v_rel))))) end, v_n <= 1000,
      (select coalesce(sum(c.n), 0)::bigint from (select x.table_id, x.n, x.at from change x where x.slot = slot(v_now) order by x.id desc limit 5000) c join watched w on w.id = c.table_id
        where to_regclass(format('%I.%I', w.schema_name, w.table_name)) = v_rel and c.at > v_now - interval '1 minute');
  end loop;
end $$;

-- flow_handlers(app) -> how many records each handler settled in the last minute, as far as the newest 5,000 receipts say
create or replace function flow_handlers(p_app text) returns table (name text, n bigint)
language sql stable set search_path from current as $$
  with clock as (select now() as at),
  recent as (select x.handler_id, x.n, x.at from clock c cross join lateral (select handler_id, n, at from receipt where slot = slot(c.at) order by id desc limit 5000) x)
  select h.name, sum(r.n)::bigint from recent r cross join clock c join handler h on h.id = r.handler_id where h.app = p_app and r.at > c.at - interval '1 minute' group by 1
$$;

-- flow_actions(app) -> how many calls of each action are in each state, of the newest 2,000
create or replace function flow_actions(p_app text) returns table (name text, state text, n bigint, recent bigint)
language sql stable set search_path from current as $$
  select name, state, count(*), count(*) filter (where coalesce(changed_at, at) > now() - interval '1 minute')
    from (select * from action where app = p_app order by id desc limit 2000) a group by 1, 2 order by 1, 2
$$;

-- flow_recent(limit) -> flow() of what happened last, the newest first
create or replace function flow_recent(p_limit int default 15) returns table (
  id bigint, kind text, at timestamptz, name text, input text, n int, outputs text[], written bigint, ms real, detail text)
language sql stable set search_path from current as $$
  with oldest as (
    select coalesce(min(id), 1) - 1 as after from (
      (select id from receipt where slot = slot(now()) order by id desc limit p_limit)
      union all
      (select id from receipt where slot = slot(now() - interval '1 day') order by id desc limit p_limit) order by id desc limit p_limit) x
  )
  select f.* from oldest o, flow_from() s, flow(o.after, s.after_action - p_limit, 2 * p_limit) f order by f.at desc, f.id desc limit p_limit
$$;

-- first_time(sha256) -> whether a signed request has not been here before; they are kept for a day
create or replace function first_time(p_sha256 text) returns boolean language plpgsql volatile set search_path from current as $$
begin
  delete from seen_request where at < now() - interval '1 day';
  insert into seen_request (sha256, at) values (p_sha256, now()) on conflict do nothing;
  return found;
end $$;

-- person_of_slack(id) -> whose Slack id it is; null: nobody's
create or replace function person_of_slack(p_id text) returns text language sql stable set search_path from current as $$
  select name from person where slack_id = p_id and active
$$;

-- tell(approval, kind, among): notices for its channels. among: only people who may decide it as one of these
create or replace function tell(p_approval bigint, p_kind text, p_among text[] default null) returns void language sql volatile set search_path from current as $$
  insert into notice (at, app, approval_id, kind, via, person, "to", subject)
  select now(), a.app, a.id, p_kind, 'slack', null, substr(v, 7), a.preview from approval a cross join unnest(a.via) v where a.id = p_approval and v like 'slack:_%'
  union all
  select now(), a.app, a.id, p_kind, 'email', p.name, p.email, a.preview
    from approval a cross join lateral approvers_of(a.id) p
   where a.id = p_approval and 'email' = any (a.via) and p_kind <> 'decided' and p.email is not null and (p_among is null or may_decide(p, p_among))
     and not exists (select from approval_event e where e.approval_id = a.id and e.kind = 'voted' and e.person = p.name and e.args_sha256 = a.args_sha256)
$$;

-- tell_approval(): a new one is told of, and the end of one to the channels where it was asked
create or replace function tell_approval() returns trigger language plpgsql volatile security definer set search_path from current as $$
begin
  if tg_op = 'INSERT' then
    perform tell(new.id, 'asked');
  elsif old.state = 'pending' and new.state <> 'pending' then
    perform tell(new.id, 'decided');
  end if;
  return null;
end $$;

create or replace trigger approval_told after insert or update of state on approval for each row execute function tell_approval();
revoke all on function tell_approval() from public;               -- a trigger needs none of it
