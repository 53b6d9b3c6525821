-- Calls of models. Who asks calls begin_calls(), sends what it may, and calls end_calls(); both take many at once.
-- Locks are taken in one order: quota, spent, memo, call. No transaction is open while a model is asked.

-- period_start(period, at) -> when the period began that `at` is in, UTC
create or replace function period_start(p_period text, p_at timestamptz) returns timestamptz language sql stable set search_path from current as $$
  select case when p_period = 'total' then to_timestamp(0) else date_trunc(p_period, p_at, 'UTC') end
$$;

-- period_end(period, at) -> when it ends; null: never
create or replace function period_end(p_period text, p_at timestamptz) returns timestamptz language sql stable set search_path from current as $$
  select case when p_period <> 'total' then (period_start(p_period, p_at) at time zone 'UTC' + ('1 ' || p_period)::interval) at time zone 'UTC' end
$$;

-- put_budget(app, scope, name, period, unit, amount) -> its id
create or replace function put_budget(p_app text, p_scope text, p_name text, p_period text, p_unit text, p_amount numeric) returns int
language plpgsql volatile set search_path from current as $$
declare v_id int;
begin
  select id into v_id from budget where (app, scope, name, period, unit, amount) = (p_app, p_scope, p_name, p_period, p_unit, p_amount);
  if v_id is null then
    insert into budget (app, scope, name, period, unit, amount) values (p_app, p_scope, p_name, p_period, p_unit, p_amount)
    on conflict (app, scope, name, period, unit) do update set amount = excluded.amount returning id into v_id;
  end if;
  return v_id;
end $$;

-- put_quota(name, unit, amount, seconds): what the app says of a service's limit
create or replace function put_quota(p_name text, p_unit text, p_amount numeric, p_seconds double precision) returns void
language sql volatile set search_path from current as $$
  insert into quota as q (name, unit, amount, window_seconds, stated) values (p_name, p_unit, p_amount, p_seconds, true)
  on conflict (name, unit) do update set amount = excluded.amount, window_seconds = excluded.window_seconds, stated = true
   where (q.amount, q.window_seconds, q.stated) is distinct from (excluded.amount, excluded.window_seconds, true)
$$;

-- begin_calls(calls, worker) -> for each of them, by its n, what to do
--   send     call_id is its row; send it in `wait` seconds
--   answer   it was asked before: answer, of call_id
--   wait     somebody is asking it now: look again in `wait` seconds
--   later    the service's limit, or money that calls in flight hold: try again in `wait` seconds; reason
--   refused  a budget is used up; reason, and `wait` seconds until its next period (null: never)
--   never    it can cost more than all of a budget; reason
-- A service is sent at most 95 % of what it lets through, spaced evenly: what arrives up to `slack` seconds late (null: whenever) is no violation.
-- What cannot be sent in time is given up (end_calls, state unsent). The last row, verdict clock, says when all this was reckoned: `wait` seconds
-- after the call came, `slack` seconds before its end. lease: seconds after which a call counts as left by who asked.
-- ahead: how far off its time may be, default half a second. joins: it goes with a request that was let through for then: it counts as none, and its
-- tokens may be early by 1 % of their window.
create or replace function begin_calls(p_calls jsonb, p_worker text)
returns table (n int, verdict text, call_id bigint, wait double precision, slack double precision, answer jsonb, reason text)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare
  v_came timestamptz := now(); v_now timestamptz; v_ids int[]; v_known bigint; v_periods timestamptz[]; v_x numeric; v_blocked double precision;
  c record; m memo; q quota; b record; r record;
begin
  perform from quota where quota.name in (select distinct x ->> 'quota' from jsonb_array_elements(p_calls) x) order by quota.name, unit for update;
  v_ids := array(select distinct e::int from jsonb_array_elements(p_calls) x, jsonb_array_elements_text(x -> 'budgets') e);
  if v_ids <> '{}' then
    insert into spent (budget_id, period) select id, period_start(budget.period, v_came) from budget where id = any (v_ids) order by id
    on conflict do nothing;
    perform from spent join budget on budget.id = budget_id where budget_id = any (v_ids) and spent.period = period_start(budget.period, v_came)
      order by budget_id for update of spent;
  end if;
  v_now := now();
  for c in
    select * from jsonb_to_recordset(p_calls) x (
      n int, hash text, ttl double precision, quota text, tokens bigint, reserved numeric, reserved_tokens bigint, budgets int[], app text,
      handler text, key jsonb, change_id bigint, trace bigint, tenant text, provider text, model text, prompt_version text, params jsonb,
      price_version text, lease double precision, ahead double precision, joins boolean)
     order by x.hash, x.n
  loop
    n := c.n; verdict := 'send'; call_id := null; wait := 0; slack := null; answer := null; reason := null;
    select * into m from memo where hash = c.hash for update;
    v_known := m.call_id;
    if m.answer is not null and m.expires_at > v_now and m.at > v_now - make_interval(secs => c.ttl) then
      verdict := 'answer'; call_id := m.call_id; answer := m.answer;
      return next; continue;
    elsif v_known is not null and m.answer is null
          and exists (select from call where call.id = m.call_id and call.state = 'asking' and call.lease_until > v_now) then
      verdict := 'wait'; wait := 0.25;
      return next; continue;
    end if;
    v_blocked := 0;
    for q in select * from quota where quota.name = c.quota loop
      v_blocked := greatest(v_blocked, extract(epoch from q.blocked_until - v_now));
      continue when q.amount is null or c.joins and q.unit = 'requests';
      wait := greatest(wait, case when isfinite(q.next_at) then extract(epoch from q.next_at - v_now) end
                             - case when c.joins then 0.01 * q.window_seconds else 0 end);
      slack := least(slack, 0.04 * q.window_seconds);
    end loop;
    if v_blocked > 0.5 or wait > coalesce(c.ahead, 0.5) then
      wait := greatest(wait, v_blocked);
      verdict := 'later'; reason := 'the limit of ' || c.quota; wait := greatest(wait - 0.25, 0.05);
      return next; continue;
    end if;
    wait := greatest(wait, v_blocked);
    v_periods := '{}';
    for b in select budget.*, s.period as since, s.reserved, s.settled
               from unnest(c.budgets) with ordinality u (id, o) join budget on budget.id = u.id
               join spent s on s.budget_id = budget.id and s.period = period_start(budget.period, v_came) order by u.o loop
      v_x := case b.unit when 'usd' then c.reserved else c.reserved_tokens end;
      v_periods := v_periods || b.since;
      if v_x is null or b.settled + b.reserved + v_x > b.amount then
        verdict := case when v_x > b.amount then 'never' when v_x is null or b.settled + v_x > b.amount then 'refused' else 'later' end;
        wait := case verdict when 'never' then null when 'later' then 0.25 else extract(epoch from period_end(b.period, v_now) - v_now) end;
        reason := format('%s %s of %s %s%s are spent%s%s', trim_scale(round(b.settled, 6)), b.unit, trim_scale(b.amount), b.unit,
                         case b.period when 'total' then '' else '/' || b.period end,
                         case when b.scope = 'app' then ' by the app' else format(' by %s %s', b.scope, b.name) end,
                         case when v_x is null then ', and what this call can cost is not known'
                              else format(', and this call can cost %s', trim_scale(v_x)) || case when v_x > b.amount then ', which is more than all of it' else '' end end);
        exit;
      end if;
    end loop;
    if verdict <> 'send' then
      return next; continue;
    end if;
    insert into call (at, app, handler, key, change_id, trace, tenant, provider, model, input_hash, prompt_version, params, reserved, reserved_tokens,
                      price_version, budgets, periods, worker, lease_until)
    values (v_now, c.app, c.handler, c.key, c.change_id, c.trace, c.tenant, c.provider, c.model, c.hash, c.prompt_version, coalesce(c.params, '{}'),
            c.reserved, c.reserved_tokens, c.price_version, c.budgets, v_periods, p_worker, v_now + make_interval(secs => coalesce(c.lease, 15)))
    returning id into call_id;
    if v_known is null then
      insert into memo (hash, call_id, at) values (c.hash, begin_calls.call_id, v_now) on conflict do nothing;
      if not found then                                    -- another transaction was quicker
        delete from call where call.id = begin_calls.call_id;
        verdict := 'wait'; wait := 0.05; call_id := null;
        return next; continue;
      end if;
    else
      update memo set call_id = begin_calls.call_id, answer = null, at = v_now, expires_at = null where hash = c.hash;
    end if;
    update spent s set reserved = s.reserved + case budget.unit when 'usd' then c.reserved else c.reserved_tokens end
      from unnest(c.budgets, v_periods) u (id, since) join budget on budget.id = u.id where s.budget_id = u.id and s.period = u.since;
    update quota set next_at = greatest(next_at, v_now) + make_interval(secs => case unit when 'requests' then 1 else c.tokens end
                                                                               * window_seconds / (amount * 0.95)::double precision)
     where quota.name = c.quota and amount is not null and not (unit = 'requests' and coalesce(c.joins, false));
    return next;
  end loop;
  n := -1; verdict := 'clock'; call_id := null; answer := null; reason := null;
  wait := extract(epoch from v_now - v_came);
  slack := extract(epoch from now() - v_now);
  return next;
end $$;

-- charge(call, state, cost, tokens): moves a call to a state, and what its budgets hold for it with it
create or replace function charge(c call, p_state text, p_cost numeric, p_tokens bigint) returns void
language sql volatile set search_path from current as $$
  update spent s
     set reserved = s.reserved - case when c.state = 'asking' then x.held else 0 end,
         settled = s.settled - case when c.state = 'unknown' then x.held else 0 end
                   + case when p_state = 'unknown' then x.held when p_state in ('failed', 'unsent') then 0 else coalesce(x.took, x.held) end
    from (select u.id, u.since, case budget.unit when 'usd' then c.reserved else c.reserved_tokens end as held,
                 case budget.unit when 'usd' then p_cost else p_tokens end as took
            from unnest(c.budgets, c.periods) u (id, since) join budget on budget.id = u.id) x
   where s.budget_id = x.id and s.period = x.since;
  delete from call where id = c.id and p_state = 'unsent';
  update call set state = p_state, cost = case p_state when 'failed' then 0 when 'unknown' then null else p_cost end, lease_until = null
   where id = c.id and p_state <> 'unsent';
$$;

-- lock_calls(ids): what a change of their state will touch, in the one order
create or replace function lock_calls(p_ids bigint[]) returns void language plpgsql volatile set search_path from current as $$
begin
  perform from spent s where (s.budget_id, s.period) in (select u.b, u.p from call, unnest(call.budgets, call.periods) u (b, p) where call.id = any (p_ids))
    order by s.budget_id, s.period for update;
  perform from memo where hash in (select input_hash from call where id = any (p_ids)) order by hash for update;
end $$;

-- end_calls(calls): what came of them: state done, failed (nothing was paid), unknown (nobody knows) or unsent (there was no call)
-- ttl: seconds that an answer is kept. limits: [{unit, amount, seconds}] as the service said; block: seconds until it takes more.
create or replace function end_calls(p_calls jsonb) returns void language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare v_now timestamptz := now(); c record; k call; v_ids bigint[];
begin
  v_ids := array(select (x ->> 'id')::bigint from jsonb_array_elements(p_calls) x);
  perform from quota where quota.name in (select distinct x ->> 'quota' from jsonb_array_elements(p_calls) x) order by quota.name, unit for update;
  insert into quota as q (name, unit, amount, window_seconds)
  select distinct on (1, 2) x ->> 'quota', l ->> 'unit', (l ->> 'amount')::numeric, (l ->> 'seconds')::double precision
    from jsonb_array_elements(p_calls) x, jsonb_array_elements(x -> 'limits') l order by 1, 2
  on conflict (name, unit) do update set amount = excluded.amount, window_seconds = excluded.window_seconds
   where not q.stated and (q.amount, q.window_seconds) is distinct from (excluded.amount, excluded.window_seconds);
  insert into quota as q (name, unit, blocked_until)
  select x ->> 'quota', 'requests', max(v_now + make_interval(secs => (x ->> 'block')::double precision))
    from jsonb_array_elements(p_calls) x where (x ->> 'block')::double precision > 0 group by 1 order by 1
  on conflict (name, unit) do update set blocked_until = greatest(q.blocked_until, excluded.blocked_until);
  update quota q set next_at = q.next_at - make_interval(secs => x.over * q.window_seconds / (q.amount * 0.95)::double precision)
    from (select x ->> 'quota' as name, sum((x ->> 'over')::bigint) as over from jsonb_array_elements(p_calls) x
           where exists (select from call where call.id = (x ->> 'id')::bigint and call.state = 'asking') group by 1) x   -- told twice, it counts once
   where q.name = x.name and q.unit = 'tokens' and q.amount is not null and x.over <> 0;
  perform lock_calls(v_ids);
  for c in
    select * from jsonb_to_recordset(p_calls) x (
      id bigint, state text, tokens_in bigint, tokens_cached bigint, tokens_out bigint, cost numeric, answer jsonb, ttl double precision,
      answered_by text, error text, ms real)
     order by x.id
  loop
    select * into k from call where id = c.id for update;
    continue when k.id is null or k.state not in ('asking', 'unknown');
    perform charge(k, c.state, c.cost, c.tokens_in + c.tokens_out);
    update call set tokens_in = c.tokens_in, tokens_cached = c.tokens_cached, tokens_out = c.tokens_out, answered_by = c.answered_by,
                    error = c.error, ms = c.ms where id = c.id;
    if c.state = 'done' then
      insert into memo as m (hash, call_id, answer, at, expires_at)    -- its lease may have lapsed: the answer is paid all the same
      values (k.input_hash, c.id, c.answer, v_now, v_now + make_interval(secs => c.ttl))
      on conflict (hash) do update set answer = excluded.answer, call_id = excluded.call_id, at = v_now, expires_at = excluded.expires_at
       where m.answer is null;
    else
      delete from memo where hash = k.input_hash and call_id = c.id and answer is null;
    end if;
  end loop;
end $$;

drop function if exists renew_calls(bigint[]);

-- lapse_calls() -> how many calls were left by who made them: nobody knows what came of them, and they are charged at what they can cost at most
create or replace function lapse_calls() returns bigint language plpgsql volatile set search_path from current as $$
declare k call; v_n bigint := 0; v_ids bigint[] := array(select id from call where state = 'asking' and lease_until < now() order by id limit 1000);
begin
  perform lock_calls(v_ids);
  for k in select * from call where id = any (v_ids) and state = 'asking' and lease_until < now() order by id for update loop
    perform charge(k, 'unknown', null, null);
    update call set error = coalesce(error, 'its process ended while it was asked') where id = k.id;
    delete from memo where hash = k.input_hash and call_id = k.id and answer is null;
    v_n := v_n + 1;
  end loop;
  return v_n;
end $$;

-- settle_call(id, cost, tokens in, tokens out) -> whether it was unknown: somebody looked it up at the service. A cost of 0: it never arrived there.
create or replace function settle_call(p_id bigint, p_cost numeric default null, p_tokens_in bigint default null, p_tokens_out bigint default null)
returns boolean language plpgsql volatile set search_path from current as $$
declare k call;
begin
  perform lock_calls(array[p_id]);
  select * into k from call where id = p_id and state = 'unknown' for update;
  if k.id is null then
    return false;
  end if;
  perform charge(k, 'done', coalesce(p_cost, k.reserved), coalesce(p_tokens_in + p_tokens_out, case when p_cost = 0 then 0 else k.reserved_tokens end));
  update call set tokens_in = p_tokens_in, tokens_out = p_tokens_out, error = concat_ws('; ', error, 'settled by hand') where id = p_id;
  return true;
end $$;

-- find_call(hash) -> the call that asks this, or asked it last
create or replace function find_call(p_hash text) returns bigint language sql stable set search_path from current as $$
  select call_id from memo where hash = p_hash
$$;

-- forget_memos(hashes): answers that turned out to be of no use
create or replace function forget_memos(p_hashes text[]) returns void language sql volatile set search_path from current as $$
  delete from memo where hash in (select hash from memo where hash = any (p_hashes) and answer is not null order by hash for update)
$$;

-- forget_answers(now, days) -> how many memos that expired, and answers of days that are not kept, were forgotten; at most 10,000 of each at a time
create or replace function forget_answers(p_now timestamptz, p_keep int) returns bigint language plpgsql volatile set search_path from current
set enable_seqscan = off set jit = off as $$
declare v_n bigint; v_more bigint;
begin
  delete from memo where ctid = any (array(select ctid from memo where expires_at < p_now order by expires_at limit 10000 for update skip locked));
  get diagnostics v_n = row_count;
  delete from answer where ctid = any (array(select ctid from answer where at < p_now - make_interval(days => p_keep) order by at limit 10000));
  get diagnostics v_more = row_count;
  return v_n + v_more;
end $$;

-- list_costs(days) -> what was asked and paid, by day, handler and model, the newest first
--   unknown   calls that nobody knows the end of; cost holds what each can have cost at most
--   unpriced  calls whose price is not known; cost holds nothing for them
--   memo      records that were answered without a call
create or replace function list_costs(p_days int) returns table (
  day date, app text, handler text, model text, calls bigint, failed bigint, unknown bigint, unpriced bigint, memo bigint, tokens_in numeric,
  tokens_cached numeric, tokens_out numeric, cost numeric)
language sql volatile set search_path from current set enable_seqscan = off set jit = off as $$
  select lapse_calls();
  select (c.at at time zone 'UTC')::date, c.app, c.handler, c.model, count(*), count(*) filter (where c.state = 'failed'), count(*) filter (where c.state = 'unknown'),
         count(*) filter (where (c.state = 'done' and c.cost is null) or (c.state = 'unknown' and c.reserved is null)),
         coalesce(sum((select count(*) from answer a where a.call_id = c.id and a.memo)), 0)::bigint,
         sum(c.tokens_in), sum(c.tokens_cached), sum(c.tokens_out),
         trim_scale(coalesce(sum(case c.state when 'unknown' then c.reserved else c.cost end), case when bool_and(c.state = 'failed') then 0 end))
    from call c where c.at > (select now()) - make_interval(days => p_days) group by 1, 2, 3, 4 order by 1 desc, 2, 3, 4
$$;

-- list_budgets() -> each budget and what is spent of it in its period of now
create or replace function list_budgets() returns table (
  app text, scope text, name text, amount numeric, unit text, period text, settled numeric, reserved numeric, share numeric, ends_at timestamptz)
language sql volatile set search_path from current set enable_seqscan = off set jit = off as $$
  select lapse_calls();
  select b.app, b.scope, b.name, b.amount, b.unit, b.period, trim_scale(coalesce(s.settled, 0)), trim_scale(coalesce(s.reserved, 0)),
         round((coalesce(s.settled, 0) + coalesce(s.reserved, 0)) / nullif(b.amount, 0), 3), period_end(b.period, now())
    from budget b left join spent s on s.budget_id = b.id and s.period = period_start(b.period, (select now())) order by 1, 2, 3, 6
$$;

-- list_calls(state, limit) -> calls, the newest first
create or replace function list_calls(p_state text, p_limit int) returns table (
  id bigint, at timestamptz, app text, handler text, model text, state text, tokens_in bigint, tokens_out bigint, cost numeric, reserved numeric, error text)
language sql volatile set search_path from current as $$
  select lapse_calls();
  select id, at, app, handler, model, state, tokens_in, tokens_out, cost, reserved, error from call
   where p_state is null or state = p_state order by id desc limit p_limit
$$;

-- show_call(id) -> a call with the records it answered, null when there is none
create or replace function show_call(p_id bigint) returns jsonb language sql stable set search_path from current as $$
  select to_jsonb(c) - 'worker' - 'lease_until' || jsonb_build_object(
           'worker', c.worker, 'answered', (select jsonb_agg(jsonb_build_object('key', a.key, 'memo', a.memo, 'at', a.at, 'context', a.context) order by a.at)
                                              from answer a where a.call_id = c.id))
    from call c where c.id = p_id
$$;

-- thoughts(receipts) -> what models were asked by the handler runs of these receipts
create or replace function thoughts(p_receipts bigint[]) returns table (
  receipt_id bigint, record text, call_id bigint, model text, prompt_version text, params jsonb, memo boolean, cost numeric, context jsonb)
language sql stable set search_path from current as $$
  select a.cause, record_name(h.table_id, a.key), a.call_id, coalesce(c.answered_by, c.model), a.prompt_version, c.params, a.memo, c.cost, a.context
    from answer a join receipt r on r.id = a.cause join handler h on h.id = r.handler_id left join call c on c.id = a.call_id
   where a.cause = any (p_receipts) order by a.cause, a.call_id
$$;
