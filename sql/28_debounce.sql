-- Debounce: one job for a key that has come to rest, with its record as it is then.
-- Writers only add: the jobs of such a handler carry its id with a minus, and nobody claims them. Workers fold them into
-- a row for each key, and make a job of a key that is due. So no writer waits for another, however hot a key is.

-- debounced() -> jobs made: folds what was written, about 2,000 changes of each handler, then takes what is due. For more its worker calls it again, and
-- claims in between
create or replace function debounced() returns int language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare h handler; v_now timestamptz; v_n bigint; v_all bigint;
begin
  if exists (select from job where handler_id < 0) then
    for h in select * from handler x where exists (select from job j where j.handler_id = -x.id) order by x.id loop
      v_all := 0;
      loop
        v_n := fold(h);
        v_all := v_all + v_n;
        exit when v_n = 0 or v_all >= 2000;
      end loop;
    end loop;
  end if;
  v_now := now();                                          -- no job is older than a change it stands for
  return case when exists (select from debounce where due_at <= v_now) then ripen(v_now) else 0 end;
end $$;

-- fold(handler) -> changes folded into its keys, about 2,000 at most; 0: none, or another worker is at it
-- A key that changes is due a debounce later, and max_wait after its first change at most. With per, a record that
-- another of its key has replaced is settled here, and its receipt says so.
create or replace function fold(h handler) returns bigint language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare w watched; v_now timestamptz := now(); v_rows tid[]; v_n bigint; v_key text := 'r.record';
begin
  if not pg_try_advisory_xact_lock(1634628731, h.id) then
    return 0;
  end if;
  with locked as materialized (
    select ctid as row, id, hi - lo + 1 as n from job where handler_id = -h.id order by id limit 1000 for update skip locked)
  select array_agg(x.row) into v_rows
    from (select j.row, sum(j.n) over (order by j.id) - j.n as before from locked j) x
   where x.before < 2000;
  if v_rows is null then
    return 0;
  end if;
  select * into w from watched where id = h.table_id;
  if h.per is not null then                                -- its value now; who has none is a key by itself
    select format('coalesce((select jsonb_build_array(%s) from %I.%I t where %s), jsonb_build_object(''record'', r.record))',
                  case when h.per in (select name from table_columns(w.relid)) then format('to_jsonb(t.%I)', h.per) else format('t.data -> %L', h.per) end,
                  w.schema_name, w.table_name, string_agg(format('t.%I = (r.record ->> %s)::%s', c, o - 1, w.key_types[o]), ' and '))
      into v_key from unnest(w.key_columns) with ordinality x (c, o);
  end if;
  execute format($f$
    with raw as (
      delete from job using many($1) x (row) where job.ctid = x.row returning job.*
    ), part as materialized (
      select raw.id, raw.change_id, raw.at, raw.cause, raw.depth, raw.trace, raw.tenant, raw.lo,
             coalesce(raw.ids, c.ids[raw.lo:raw.hi]) as ids,
             coalesce(raw.keys, jsonb_path_query_array(c.keys, '$[$lo to $hi]', jsonb_build_object('lo', raw.lo - 1, 'hi', raw.hi - 1))) as keys,
             c.degraded is not null and $6 as unsure, raw.op
        from raw left join lateral (
          select ids, keys, degraded from change where id = raw.change_id and slot = slot(raw.at) and raw.ids is null and raw.keys is null limit 1) c on true
    ), passing as materialized (
      select *, case when unsure then passes($2, ids, keys, op) end as who from part
    ), r as materialized (
      select p.id, p.change_id, p.at, p.cause, p.depth, p.trace, p.tenant, p.lo, u.record, u.o
        from passing p cross join lateral (
          select jsonb_build_array(i) as record, o from unnest(p.ids) with ordinality x (i, o)
          union all select k, o from jsonb_array_elements(p.keys) with ordinality x (k, o)) u
       where p.who is null or u.o = any (p.who)
    ), keyed as materialized (
      select %s as key, r.* from r
    ), latest as materialized (
      select distinct on (key) key, record, min(at) over (partition by key) as first_at, max(at) over (partition by key) as last_at,
             cause, depth, trace, tenant
        from keyed order by key, id desc, o desc
    ), replaced as materialized (
      select k.record, k.change_id, k.lo + k.o - 1 as ordinal, k.cause from keyed k join latest l using (key) where $7 and k.record <> l.record
      union all
      select d.record, 0, 1, d.cause from latest l join debounce d on d.handler_id = $2 and d.key = l.key where $7 and d.record <> l.record
    ), receipt_ as (
      insert into receipt (id, slot, at, handler_id, n, change_ids, los, his, causes, ids, keys)
      select nextval('change_seq'), slot($3), $3, $2, 0, array_agg(change_id order by o), array_agg(ordinal order by o), array_agg(ordinal order by o),
             array_agg(cause order by o), case when $8 then array_agg((record ->> 0)::bigint order by o) end, case when not $8 then jsonb_agg(record order by o) end
        from (select *, row_number() over () as o from (select distinct on (record) * from replaced order by record) x) y group by o / 1000
    ), put as (
      insert into debounce as d (handler_id, key, record, first_at, last_at, due_at, cause, depth, trace, tenant)
      select $2, key, record, first_at, last_at, least(last_at + $4, first_at + $5), cause, depth, trace, tenant from latest order by key
      on conflict (handler_id, key) do update
         set record = excluded.record, first_at = least(d.first_at, excluded.first_at), last_at = greatest(d.last_at, excluded.last_at),
             due_at = least(greatest(d.last_at, excluded.last_at) + $4, least(d.first_at, excluded.first_at) + $5),
             cause = excluded.cause, depth = excluded.depth, trace = excluded.trace, tenant = excluded.tenant)
    select coalesce(sum(hi - lo + 1), 0) from raw$f$, v_key)
    into v_n using v_rows, h.id, v_now, coalesce(h.debounce, '0'), case when h.debounce is null then '0' else h.max_wait end,
                   h.where_sql is not null, h.per is not null, w.key_kind = 'id';
  return v_n;
end $$;

-- ripen(now) -> jobs made of keys that are due, 5,000 at most
-- A key waits as long as a change is unfolded that may be older than its time.
create or replace function ripen(p_now timestamptz) returns int language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare v_n int;
begin
  with due as materialized (
    select d.ctid as row from debounce d
     where d.due_at <= p_now and d.due_at <= coalesce((select j.at from job j where j.handler_id = -d.handler_id order by j.id limit 1), p_now)
     order by d.due_at limit 5000 for update skip locked
  ), taken as (
    delete from debounce d using many(array(select due.row from due)) x (row) where d.ctid = x.row returning d.*
  ), ranked as (
    select t.*, (row_number() over (partition by t.handler_id, t.cause, t.depth, t.trace, t.tenant order by t.due_at, t.key) - 1) / least(h.batch, 1000) as part,
           h.table_id, left(h.ops[1], 1)::"char" as op, w.key_kind = 'id' as is_id
      from taken t join handler h on h.id = t.handler_id join watched w on w.id = h.table_id
  ), chunk as materialized (
    select nextval('change_seq') as id, g.* from (
      select handler_id, table_id, op, cause, depth, trace, tenant, count(*)::int as n,
             case when is_id then array_agg((record ->> 0)::bigint order by due_at, key) end as ids,
             case when not is_id then jsonb_agg(record order by due_at, key) end as keys
        from ranked group by handler_id, table_id, op, cause, depth, trace, tenant, part, is_id) g
  ), kept as (
    insert into change (id, slot, at, xid, table_id, op, n, ids, keys, cause, depth, trace, tenant)
    select id, slot(p_now), p_now, pg_current_xact_id(), table_id, op, n, ids, keys, cause, depth, trace, tenant from chunk where n > 16)
  insert into job (handler_id, change_id, at, cause, trace, lo, hi, depth, op, tenant, ids, keys)
  select handler_id, id, p_now, cause, trace, 1, n, depth, op, tenant, case when n <= 16 then ids end, case when n <= 16 then keys end
    from chunk order by id;
  get diagnostics v_n = row_count;
  return v_n;
end $$;

-- resting(handler) -> (keys, next_at): what waits to come to rest, changes that are not folded yet among it
create or replace function resting(p_handler int, out keys bigint, out next_at timestamptz) returns record
language sql stable set search_path from current as $$
  select (select count(*) from debounce where handler_id = p_handler)
           + (select coalesce(sum(hi - lo + 1), 0) from job where handler_id = -p_handler),
         (select min(due_at) from debounce where handler_id = p_handler)
$$;
