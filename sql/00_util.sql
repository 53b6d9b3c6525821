-- Small functions that all the others use.

-- now() -> timestamptz
-- Anton's one clock: the database's wall time. Tests replace this function to move it. No SET clause, so that
-- it is inlined on the write path.
create or replace function now() returns timestamptz language sql volatile as $$
  select pg_catalog.clock_timestamp()
$$;

-- slot(at) -> smallint
-- The daily slot (0..8) of the change, receipt and output rings that a time falls into. Inlined, as now().
create or replace function slot(p_at timestamptz) returns smallint language sql immutable as $$
  select ((extract(epoch from p_at)::bigint / 86400) % 9)::smallint
$$;

-- token() -> bigint
-- A random lease token for workers written in SQL; others send their own random 64 bits.
create or replace function token() returns bigint language sql volatile set search_path from current as $$
  select ('x' || substr(md5(gen_random_uuid()::text), 1, 16))::bit(64)::bigint
$$;

-- setting(name) -> text, null when unknown
create or replace function setting(p_name text) returns text language sql stable set search_path from current as $$
  select value from setting where name = p_name
$$;

-- doorbell() -> (k1, k2, channel, enabled)
-- The advisory lock and the channel of the wake-up (docs/internals.md). Off where a NOTIFY would break
-- the user's PREPARE TRANSACTION.
create or replace function doorbell(out k1 int, out k2 int, out channel text, out enabled boolean)
language sql stable set search_path from current as $$
  select 1634628719, n.oid::int, n.nspname || '_bell',
         setting('doorbell') = 'on' and current_setting('max_prepared_transactions')::int = 0
    from pg_namespace n where n.nspname = current_schema()
$$;

-- find_handler(name) -> handler id
-- name is the handler's name, or app.name where two apps use it. Raises NT003 when unknown or ambiguous.
create or replace function find_handler(p_name text) returns int language plpgsql stable set search_path from current as $$
declare v_ids int[]; v_near text;
begin
  select array_agg(id) into v_ids from handler where name = p_name or app || '.' || name = p_name;
  if cardinality(v_ids) = 1 then
    return v_ids[1];
  end if;
  if v_ids is not null then
    raise exception using errcode = 'NT003', message = format('handler "%s" is in more than one app', p_name),
      hint = 'write it as app.' || p_name;
  end if;
  select string_agg(name, ', ' order by name) into v_near from handler;
  raise exception using errcode = 'NT003', message = format('no handler "%s"', p_name),
    hint = 'known: ' || coalesce(v_near, 'none; run: anton migrate');
end $$;
