-- Order: of a handler with ordered, one record of a key at a time, first what was first.
--
--   a record fails ->  turn: first (its job is delayed)       later ones of its key -> turn: waits, off the queue
--   it is done     ->  the next one of the key is first and gets a job        none is left: the key is as any other
--   it is dead     ->  on_dead = skip: as done; block: turn: dead, until its dead letter is replayed or dropped
--
-- What changes turns of a handler locks its row first: there is one order of doing it. A turn here is a record's in the line
-- of its key; those of tenants are in sql/26_tenant.sql, and an ordered handler has none of them.

-- is_ordered(handler)
create or replace function is_ordered(p_handler int) returns boolean language sql stable set search_path from current as $$
  select exists (select from handler where id = p_handler and ordered)
$$;

-- orders() -> the handlers whose records have an order: of each value of a column, or of the primary key
create or replace function orders() returns table (handler_id int, per text, on_dead text) language sql stable set search_path from current as $$
  select id, per, on_dead from handler where ordered
$$;

drop function if exists claim_ordered(int, bigint, int[], int[], int[], bigint[], interval, boolean);
drop function if exists claim_ordered(int, bigint, int[], int[], int[], bigint[], interval, boolean, text[]);
-- claim_ordered(...): as claim(), for handlers some of which are ordered. Of such, only who holds the permit gets jobs, and
-- nobody while another's lease, or one that ran out, holds earlier ones. The permit is locked meanwhile, so that it goes
-- to nobody else while this claims.
--   known  tokens of what this worker works. Under others of its own are jobs that it does not know of, as the answer to
--          a claim was lost: nothing later is claimed until they ran out and are done. Null: it does not say
create or replace function claim_ordered(p_worker int, p_token bigint, p_handlers int[], p_jobs int[], p_records int[],
  p_after bigint[], p_lease interval, p_lazy boolean default false, p_turns text[] default null,
  p_known bigint[] default null)
returns table (
  handler_id int, id bigint, change_id bigint, at timestamptz, cause bigint, trace bigint, lo int, hi int,
  attempt smallint, crashes smallint, depth smallint, op "char", tenant text, origin text, settled int[],
  ids bigint[], keys jsonb, cols text[], degraded text, table_id int, ms_waiting real, probe boolean)
language plpgsql volatile set search_path from current as $$
#variable_conflict use_column
declare v_held int[]; v_handlers int[]; v_jobs int[]; v_records int[]; v_after bigint[]; v_turns text[];
begin
  v_held := array(select p.handler_id from permit p
                   where p.handler_id = any (p_handlers) and p.worker_id = p_worker and p.lease_until > now() for key share);
  select array_agg(w.h), array_agg(w.j), array_agg(w.r), array_agg(w.a), array_agg(w.t) into v_handlers, v_jobs, v_records, v_after, v_turns
    from unnest(p_handlers, p_jobs, p_records, p_after, p_turns) w (h, j, r, a, t)
   where not is_ordered(w.h) or w.h = any (v_held) and not held_up(p_worker, w.h, now(), p_known);
  if v_handlers is not null then
    return query select * from claim(p_worker, p_token, v_handlers, v_jobs, v_records, v_after, p_lease, p_lazy, v_turns);
  end if;
end $$;

-- take_turns(handler): until the end of the transaction nobody else changes its turns
create or replace function take_turns(p_handler int) returns void language sql volatile set search_path from current as $$
  select from handler where id = p_handler for no key update
$$;

-- next_turn(handler, key): the first of what waits for its key gets a job, when nothing is before it
create or replace function next_turn(p_handler int, p_key text) returns void language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare t turn;
begin
  select * into t from turn where handler_id = p_handler and key = p_key order by n limit 1;
  if t.state = 'waits' then
    update turn set state = 'first' where handler_id = p_handler and key = p_key and n = t.n;
    insert into job (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, ids, keys)
    values (t.handler_id, t.id, t.change_id, t.at, t.cause, t.trace, t.ordinal, t.ordinal, t.attempt, t.crashes, t.depth, t.op,
            t.tenant, t.origin, t.ids, t.keys);
    perform ring();
  end if;
end $$;

-- put_turn(lease, ordinal, key, state, id, attempt): notes one record of a lease
create or replace function put_turn(v lease, p_ordinal int, p_key text, p_state text, p_id bigint, p_attempt int) returns void
language sql volatile set search_path from current as $$
  insert into turn (handler_id, key, state, id, change_id, at, cause, trace, ordinal, attempt, crashes, depth, op, tenant, origin, ids, keys)
  values (v.handler_id, p_key, p_state, p_id, v.change_id, v.at, v.cause, v.trace, p_ordinal, p_attempt, v.crashes, v.depth, v.op, v.tenant, v.origin,
          case when v.ids is not null then array[v.ids[p_ordinal - v.lo + 1]] end,
          case when v.keys is not null then jsonb_build_array(v.keys -> (p_ordinal - v.lo)) end)
$$;

-- probe_next(handler): of one that is failing, what was to probe says nothing of the world: another may, at once
create or replace function probe_next(p_handler int) returns void language sql volatile set search_path from current as $$
  update handler set probe_at = now() where id = p_handler and failing_since is not null
$$;

-- put_off(token, id, ordinals, keys): settles these records here; each waits for those of its key that are before it
create or replace function put_off(p_token bigint, p_id bigint, p_ordinals int[], p_keys text[]) returns void
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v lease; v_key text;
begin
  v := settle(p_token, p_id, p_ordinals);
  perform take_turns(v.handler_id);
  for i in 1..cardinality(p_ordinals) loop
    perform put_turn(v, p_ordinals[i], p_keys[i], 'waits', nextval('change_seq'), v.attempt);
  end loop;
  for v_key in select distinct k from unnest(p_keys) k loop
    perform next_turn(v.handler_id, v_key);
  end loop;
  perform leave_turns(v.handler_id);
  perform probe_next(v.handler_id);
end $$;

-- retry_in_turn(token, id, ordinals, keys, after, error, burn): as retry(), and the keys wait for these records
create or replace function retry_in_turn(p_token bigint, p_id bigint, p_ordinals int[], p_keys text[], p_after interval, p_error text, p_burn boolean)
returns void language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v lease; v_job bigint; v_attempt int; v_own boolean;
begin
  v := settle(p_token, p_id, p_ordinals);
  perform take_turns(v.handler_id);
  v_attempt := v.attempt + p_burn::int;
  for i in 1..cardinality(p_ordinals) loop
    v_job := nextval('change_seq');
    update turn set id = v_job where handler_id = v.handler_id and id = p_id and state = 'first' and key = p_keys[i];
    v_own := found;
    if not v_own then
      perform end_turn(v.handler_id, p_id);                 -- it has another key than before
    end if;
    if not v_own and exists (select from turn where handler_id = v.handler_id and key = p_keys[i]) then   -- it came with one that is before it
      perform put_turn(v, p_ordinals[i], p_keys[i], 'waits', v_job, v_attempt);
      continue;
    elsif not v_own then
      perform put_turn(v, p_ordinals[i], p_keys[i], 'first', v_job, v_attempt);
    end if;
    insert into delayed (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, ids, keys, run_at, error)
    values (v.handler_id, v_job, v.change_id, v.at, v.cause, v.trace, p_ordinals[i], p_ordinals[i], v_attempt, v.crashes, v.depth, v.op, v.tenant, v.origin,
            case when v.ids is not null then array[v.ids[p_ordinals[i] - v.lo + 1]] end,
            case when v.keys is not null then jsonb_build_array(v.keys -> (p_ordinals[i] - v.lo)) end, now() + p_after, p_error);
  end loop;
  perform leave_turns(v.handler_id);
  perform probe_next(v.handler_id);
end $$;

-- bury_in_turn(token, id, ordinal, key, reason, error, traceback) -> dead letter id; 0: it waits for its turn
-- As bury(); with on_dead = block its key waits for it until it is replayed or dropped, else the next of the key goes on.
-- What crashed behind another one of its key that waits, or is dead, has not run: it is no dead letter. Of what could not be
-- read ('?') nobody knows whether it ran.
create or replace function bury_in_turn(p_token bigint, p_id bigint, p_ordinal int, p_key text, p_reason text, p_error text, p_traceback text)
returns bigint language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v lease; v_dead bigint;
begin
  select * into v from lease where token = p_token and id = p_id;
  if p_reason = 'crashed' and p_key <> '?' and exists (select from turn t where t.handler_id = v.handler_id and t.key = p_key)
     and not exists (select from turn t where t.handler_id = v.handler_id and t.id = p_id) then
    update lease set crashes = 0 where token = p_token and id = p_id;
    perform put_off(p_token, p_id, array[p_ordinal], array[p_key]);
    return 0;
  end if;
  v_dead := bury(p_token, p_id, p_ordinal, p_reason, p_error, p_traceback);
  perform take_turns(v.handler_id);
  if (select on_dead from handler where id = v.handler_id) = 'skip' then
    perform end_turn(v.handler_id, p_id);
    return v_dead;
  end if;
  update turn set state = 'dead', id = v_dead where handler_id = v.handler_id and id = p_id and state = 'first' and key = p_key;
  if not found then
    perform end_turn(v.handler_id, p_id);                   -- as above
    perform put_turn(v, p_ordinal, p_key, 'dead', v_dead, v.attempt + 1);
  end if;
  perform leave_turns(v.handler_id);
  return v_dead;
end $$;

-- end_turn(handler, id): the record of this job, or dead letter, waits no more; the next one of its key may go on
create or replace function end_turn(p_handler int, p_id bigint) returns void language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_key text;
begin
  perform take_turns(p_handler);
  delete from turn where handler_id = p_handler and id = p_id returning key into v_key;
  if found then
    perform next_turn(p_handler, v_key);
  end if;
end $$;

-- heads(handler, ids) -> which of these jobs are the first of a key that others wait for
create or replace function heads(p_handler int, p_ids bigint[]) returns bigint[]
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$ begin
  return array(select t.id from turn t where t.handler_id = p_handler and t.id = any (p_ids) and t.state = 'first');
end $$;

-- waiting_keys(handler, keys or null) -> keys of which some record waits; null: all there are
create or replace function waiting_keys(p_handler int, p_keys text[] default null) returns text[]
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$ begin
  return array(select distinct t.key from turn t where t.handler_id = p_handler and (p_keys is null or t.key = any (p_keys)));
end $$;

-- replayed(handler, dead letter, job): what waited for the dead letter waits for its job
create or replace function replayed(p_handler int, p_dead bigint, p_job bigint) returns void language plpgsql volatile set search_path from current as $$
begin
  if is_ordered(p_handler) then
    perform take_turns(p_handler);
    update turn set state = 'first', id = p_job where handler_id = p_handler and id = p_dead and state = 'dead';
  end if;
end $$;

-- settle_turns(handler): after its options have changed: without ordered nothing waits, with skip not for the dead
create or replace function settle_turns(p_handler int) returns void language plpgsql volatile set search_path from current as $$
declare h handler; v_key text;
begin
  perform take_turns(p_handler);
  select * into h from handler where id = p_handler;
  if not exists (select from turn where handler_id = p_handler) or h.ordered and h.on_dead = 'block' then
    return;
  end if;
  delete from turn where handler_id = p_handler and (state = 'dead' or not h.ordered and state = 'first');
  if h.ordered then
    for v_key in select distinct key from turn where handler_id = p_handler loop
      perform next_turn(p_handler, v_key);
    end loop;
    return;
  end if;
  insert into job (handler_id, id, change_id, at, cause, trace, lo, hi, attempt, crashes, depth, op, tenant, origin, ids, keys)
  select handler_id, id, change_id, at, cause, trace, ordinal, ordinal, attempt, crashes, depth, op, tenant, origin, ids, keys
    from turn where handler_id = p_handler order by n;
  delete from turn where handler_id = p_handler;
  perform ring();
end $$;

-- leave_turns(handler): of one that has no order any more, which its worker learns later, nothing waits
create or replace function leave_turns(p_handler int) returns void language plpgsql volatile set search_path from current as $$
begin
  if not is_ordered(p_handler) then
    perform settle_turns(p_handler);
  end if;
end $$;

-- cancel_turn(job) -> whether it was a record that waits for others of its key
create or replace function cancel_turn(p_job bigint) returns boolean language plpgsql volatile set search_path from current as $$
declare t turn; v_now timestamptz := now();
begin
  delete from turn where id = p_job and state = 'waits' returning * into t;
  if t.id is null then
    return false;
  end if;
  insert into receipt (id, slot, at, handler_id, n, change_ids, los, his, causes, ids, keys, depth, trace, tenant)   -- of nothing done
  values (nextval('change_seq'), slot(v_now), v_now, t.handler_id, 0, array[t.change_id], array[t.ordinal], array[t.ordinal], array[t.cause], t.ids, t.keys, t.depth, t.trace, t.tenant);
  return true;
end $$;

-- turn_waits_for(handler, key) -> what the records of a key wait for: that the first is tried again, worked, or that people decide
create or replace function turn_waits_for(p_handler int, p_key text) returns text language plpgsql stable set search_path from current as $$
declare t turn; v_due timestamptz; v_key jsonb; v_name text;
begin
  select * into t from turn where handler_id = p_handler and key = p_key order by n limit 1;
  v_key := coalesce(case when t.ids is not null then to_jsonb(t.ids) else t.keys -> 0 end,
                    (select change_key(c, t.ordinal) from change c where c.id = t.change_id and c.slot = slot(t.at)));
  select record_name(h.table_id, v_key) into v_name from handler h where h.id = p_handler;
  if t.state = 'dead' then
    return format('waits for %s, which is dead: anton dead replay %s, or anton dead drop %2$s', v_name, t.id);
  end if;
  select run_at into v_due from delayed where handler_id = p_handler and id = t.id;
  return format('waits for %s, which %s', v_name, case when v_due is null then 'is to be worked' else 'waits for a retry at ' || date_trunc('second', v_due) end);
end $$;
