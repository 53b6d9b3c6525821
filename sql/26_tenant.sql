-- Tenants: of a handler whose ready jobs name one, a claim takes a share from each of them in turn, however long another's
-- backlog is. Jobs without a tenant are those of one more, ''. Names are compared byte by byte, as the worker does.
-- A turn here is a tenant's in a claim; the table turn is another thing, of ordered handlers, whose tenants take none.

-- weigh_tenant(tenant, weight): so many turns in a row, where others have one; weight 1: as they
create or replace function weigh_tenant(p_tenant text, p_weight int) returns void language plpgsql volatile set search_path from current as $$
begin
  if coalesce(p_tenant, '') = '' or p_weight is null or p_weight not between 1 and 100 then
    raise exception using errcode = 'NT004', message = format('weight %s of tenant "%s": a tenant has a name, and a weight from 1 to 100',
      coalesce(p_weight::text, 'null'), p_tenant), hint = 'select weigh_tenant(''acme'', 3)';
  end if;
  insert into tenant (name, weight) values (p_tenant, p_weight) on conflict (name) do update set weight = excluded.weight;
  delete from tenant where name = p_tenant and weight = 1;
end $$;

-- tenant_weights() -> (tenant, weight) of those that have more than one
create or replace function tenant_weights() returns table (name text, weight int) language sql stable set search_path from current as $$
  select name, weight from tenant
$$;

-- set_priority(handler, priority): 0 to 9, null: 5; who goes first where handlers wait for a slot of a worker
create or replace function set_priority(p_handler int, p_priority text) returns void language plpgsql volatile set search_path from current as $$
begin
  if p_priority !~ '^[0-9]$' then
    raise exception using errcode = 'NT004', hint = '5 is the usual one, 9 goes first',
      message = format('handler "%s": priority %s is not a whole number from 0 to 9', (select name from handler where id = p_handler), p_priority);
  end if;
  update handler set priority = coalesce(p_priority::int, 5) where id = p_handler and priority <> coalesce(p_priority::int, 5);
end $$;

-- priorities() -> (handler, priority) of the handlers that do not have the usual one
create or replace function priorities() returns table (handler_id int, priority int) language sql stable set search_path from current as $$
  select id, priority::int from handler where priority <> 5
$$;

-- tenants_in_turn(handler, turn, most, end) -> up to so many tenants with ready jobs, from the one behind `turn` on, round
--   turn  who had the last one; null: begin with ''
--   end   '' is among them when a job with an id below this one has no tenant
create or replace function tenants_in_turn(p_handler int, p_turn text, p_most int, p_end bigint) returns text[]
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_sort = off as $$
declare v_found text[] := '{}'; v_at text := p_turn; v_rounds int := 0;
begin
  while cardinality(v_found) < p_most loop
    if v_at is not null then
      select j.tenant into v_at from job j
       where j.handler_id = p_handler and j.tenant is not null and j.tenant collate "C" > v_at order by j.tenant collate "C" limit 1;
    end if;
    if v_at is null then
      v_at := '';
      v_rounds := v_rounds + 1;
    end if;
    exit when v_rounds > 2 or v_at = any (v_found);
    if v_at <> '' or exists (select from job j where j.handler_id = p_handler and j.id < p_end and j.tenant is null) then
      v_found := v_found || v_at;
    end if;
  end loop;
  return v_found;
end $$;

-- jobs_in_turn(handler, jobs, records, turn) -> rows of job, locked: at most so many jobs of about so many records
-- Each tenant gets its share by weight, and what it has no use for goes to the others. At most 32 of them, the next ones with
-- the next call. Jobs without a tenant are looked for among the oldest 2000: behind more of the others' they wait.
create or replace function jobs_in_turn(p_handler int, p_jobs int, p_records int, p_turn text) returns tid[]
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_sort = off set plan_cache_mode = force_generic_plan as $$
declare
  v_end bigint := coalesce((select j.id from job j where j.handler_id = p_handler order by j.id offset 2000 limit 1), 9223372036854775807);
  v_tenants text[] := tenants_in_turn(p_handler, p_turn, 32, v_end);
  v_weights int[] := array(select coalesce(w.weight, 1) from unnest(v_tenants) with ordinality t (name, o) left join tenant w using (name) order by o);
  v_after bigint[] := array_fill(0::bigint, array[cardinality(v_tenants)]);
  v_jobs bigint := p_jobs; v_records bigint := p_records;   -- that are still wanted; in this round: p_jobs, p_records
  v_all bigint; v_most int; v_rows tid[] := '{}'; v_found tid[]; v_n int; v_size bigint; v_last bigint; v_locked int;
begin
  while v_jobs > 0 and v_records > 0 and 0 < any (v_weights) loop
    v_all := (select sum(w) from unnest(v_weights) w);
    p_jobs := v_jobs;
    p_records := v_records;
    for i in 1 .. cardinality(v_tenants) loop
      exit when v_jobs <= 0 or v_records <= 0;
      continue when v_weights[i] = 0;
      v_most := least(v_jobs, (p_jobs * v_weights[i] + v_all - 1) / v_all);
      if v_tenants[i] = '' then
        with l as materialized (
          select j.ctid as row, j.id, j.hi - j.lo + 1 as n from job j
           where j.handler_id = p_handler and j.id > v_after[i] and j.id < v_end and j.tenant is null
           order by j.id limit v_most for update skip locked)
        select array_agg(x.row), count(*), sum(x.n), max(x.id), (select count(*) from l) into v_found, v_n, v_size, v_last, v_locked
          from (select row, n, id, sum(n) over (order by id) - n as before from l) x
         where x.before < (p_records * v_weights[i] + v_all - 1) / v_all;
      else                                                  -- an equation would let it read all of the handler's jobs by id
        with l as materialized (
          select j.ctid as row, j.id, j.hi - j.lo + 1 as n from job j
           where j.handler_id = p_handler and j.tenant is not null and j.id > v_after[i]
             and j.tenant collate "C" >= v_tenants[i] and j.tenant collate "C" <= v_tenants[i]
           order by j.tenant collate "C", j.id limit v_most for update skip locked)
        select array_agg(x.row), count(*), sum(x.n), max(x.id), (select count(*) from l) into v_found, v_n, v_size, v_last, v_locked
          from (select row, n, id, sum(n) over (order by id) - n as before from l) x
         where x.before < (p_records * v_weights[i] + v_all - 1) / v_all;
      end if;
      if v_n < v_most and v_n = v_locked then
        v_weights[i] := 0;                                  -- it has no more
      end if;
      v_rows := v_rows || v_found;
      v_after[i] := coalesce(v_last, v_after[i]);
      v_jobs := v_jobs - v_n;
      v_records := v_records - coalesce(v_size, 0);
    end loop;
  end loop;
  return v_rows;
end $$;

-- tenants_waiting(handler) -> tenants with ready jobs, at most 33; '' without one; none where no job has one, or their order is one for all
create or replace function tenants_waiting(p_handler int) returns text[] language sql volatile set search_path from current as $$
  select case when t <> array[''] and not (select ordered from handler where id = p_handler) then t else '{}' end from tenants_in_turn(p_handler, null, 33, 9223372036854775807) t
$$;

-- waits_turn(handler) -> who goes before or beside its ready records
create or replace function waits_turn(p_handler int) returns text language sql volatile set search_path from current as $$
  select nullif(concat_ws('; ',
           case when exists (select from handler o where o.app = h.app and o.priority > h.priority and not o.paused
                                and exists (select from job j where j.handler_id = o.id))
                then format('priority %s: handlers of a higher one have ready records and go first', h.priority) end,
           case when cardinality(t.names) > 32 then 'more than 32 tenants take turns'
                when cardinality(t.names) > 1 then format('%s tenants take turns', cardinality(t.names)) end), '')
    from handler h, lateral (select tenants_waiting(h.id) as names) t where h.id = p_handler
$$;
