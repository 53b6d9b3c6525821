-- Deliveries: what Webhooks and routes with verify= received, each id once. anton/webhook.py and anton/answered.py call these.

-- deliver(webhooks, ids, headers, bodies) -> {{position, first answer}, …} of those that were there before; null when none was
-- One entry of each array per delivery, no id twice, sorted by webhook and id, so that two processes that got the same ones
-- never wait for each other. Called inside the statement that writes the records of the others.
create or replace function deliver(p_webhooks text[], p_ids text[], p_headers text[], p_bodies bytea[]) returns int[]
language plpgsql volatile set search_path from current as $$
declare v_at timestamptz := now(); v_known int[];
begin
  begin                                                    -- ON CONFLICT costs a fifth more, and nearly all are new
    insert into delivery (webhook, id, at, headers, body)
    select g.webhook, g.id, v_at, g.headers::json, g.body from unnest(p_webhooks, p_ids, p_headers, p_bodies) g (webhook, id, headers, body);
  exception when unique_violation then
    insert into delivery (webhook, id, at, headers, body)
    select g.webhook, g.id, v_at, g.headers::json, g.body from unnest(p_webhooks, p_ids, p_headers, p_bodies) g (webhook, id, headers, body)
    on conflict do nothing;
    v_known := (select array_agg(array[g.n::int, d.status::int]) from unnest(p_webhooks, p_ids) with ordinality g (webhook, id, n)
                  join delivery d on (d.webhook, d.id) = (g.webhook, g.id) where d.xmin <> pg_current_xact_id()::xid);
  end;
  if exists (select from quarantine) then                  -- refused then, sent again, and now it fits
    delete from quarantine q using unnest(p_webhooks, p_ids) g (webhook, id) where (q.webhook, q.id) = (g.webhook, g.id) and q.status >= 300;
  end if;
  return v_known;
end $$;

-- delivered(webhook, id) -> the answer it got; null when it is not known
create or replace function delivered(p_webhook text, p_id text) returns int language sql stable set search_path from current as $$
  select status from delivery where webhook = p_webhook and id = p_id
$$;

-- answered(webhook, id) -> its first answer, the error of one that is in quarantine included; no row when it is not known
create or replace function answered(p_webhook text, p_id text) returns table (status int, reply bytea, reply_type text, error text)
language sql stable set search_path from current as $$
  select d.status, d.reply, d.reply_type, null from delivery d where d.webhook = p_webhook and d.id = p_id
  union all
  select q.status, null, null, q.error from quarantine q where q.webhook = p_webhook and q.id = p_id
   limit 1
$$;

-- keep_delivery(webhook, id, headers, body, status) -> whether it is new; waits for another transaction that keeps the same one
create or replace function keep_delivery(p_webhook text, p_id text, p_headers text, p_body bytea, p_status int) returns boolean
language plpgsql volatile set search_path from current as $$
declare v_at timestamptz := now();
begin
  insert into delivery (webhook, id, at, status, headers, body) values (p_webhook, p_id, v_at, p_status, p_headers::json, p_body)
  on conflict do nothing;
  return found;
end $$;

-- keep_reply(webhook, id, status, reply, type): how it was answered, which a route knows after its commit
create or replace function keep_reply(p_webhook text, p_id text, p_status int, p_reply bytea, p_type text) returns void
language sql volatile set search_path from current as $$
  update delivery set status = p_status, reply = p_reply, reply_type = p_type where webhook = p_webhook and id = p_id
$$;

-- quarantine(webhook, id, headers, body, error, status) -> the answer: this status, or the first one of a delivery that is known
-- One that is answered with an error may come again and fit then, so its id is not taken.
create or replace function quarantine(p_webhook text, p_id text, p_headers text, p_body bytea, p_error text, p_status int) returns int
language plpgsql volatile set search_path from current as $$
declare v_at timestamptz := now(); v_status int;
begin
  if p_status < 300 then
    insert into delivery (webhook, id, at, status, headers, body) values (p_webhook, p_id, v_at, p_status, p_headers::json, p_body)
    on conflict do nothing;
    if not found then
      return delivered(p_webhook, p_id);
    end if;
  else
    v_status := delivered(p_webhook, p_id);
    if v_status is not null then
      return v_status;
    end if;
  end if;
  insert into quarantine as q (webhook, id, at, last_at, status, error, headers, body)
  values (p_webhook, p_id, v_at, v_at, p_status, p_error, p_headers::json, p_body)
  on conflict (webhook, id) do update
     set last_at = excluded.last_at, times = q.times + 1, status = excluded.status, error = excluded.error, headers = excluded.headers,
         body = excluded.body;
  return p_status;
end $$;

-- forget_deliveries(now) -> how many were deleted: those older than 8 days, at most 10,000
-- Senders try for three days at most, and people send again by hand what is a week old. By the index on at, not by reading all.
create or replace function forget_deliveries(p_now timestamptz) returns bigint language plpgsql volatile set search_path from current
set enable_seqscan = off set jit = off as $$
declare v_n bigint;
begin
  delete from delivery where ctid in (select ctid from delivery where at < p_now - interval '8 days' limit 10000);
  get diagnostics v_n = row_count;
  return v_n;
end $$;
