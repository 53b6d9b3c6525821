-- Files: begin_scan() … end_scan() bring a Table of files up to date; begin_load() … end_load() note what is in.

-- begin_scan(app, table) -> token; null while another scan of the table is at work
-- A scan that says nothing for a minute is taken for dead; its token is then good for nothing.
create or replace function begin_scan(p_app text, p_table text) returns bigint language plpgsql volatile set search_path from current as $$
declare v_token bigint := token(); v_now timestamptz := now();
begin
  insert into file_scan (app, table_name) values (p_app, p_table) on conflict do nothing;
  update file_scan set token = v_token, busy_until = v_now + interval '1 minute', started_at = v_now
   where app = p_app and table_name = p_table and busy_until < v_now;
  return case when found then v_token end;
end $$;

-- keep_scan(app, table, token): the scan lives for another minute. Raises NT001 when it was taken for dead.
create or replace function keep_scan(p_app text, p_table text, p_token bigint) returns void language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  update file_scan set busy_until = v_now + interval '1 minute' where app = p_app and table_name = p_table and token = p_token;
  if not found then
    raise exception using errcode = 'NT001', message = format('another scan of %s has begun', p_table);
  end if;
end $$;

-- merge_files(app, table, token, paths, sizes, etags, times, settle) -> (added, changed)
-- Files that were found, up to some thousands: each is looked up, as reading all that is known for each part of a scan would make the
-- scan's time grow with its square. Of one whose time lies less than settle away, somebody may be writing it: it is left for the next scan.
create or replace function merge_files(p_app text, p_table text, p_token bigint, p_paths text[], p_sizes bigint[], p_etags text[],
                                       p_modified timestamptz[], p_settle interval, out added bigint, out changed bigint)
returns record language plpgsql volatile set search_path from current
set enable_seqscan = off set jit = off as $$
declare v_now timestamptz := now(); v_found text := '(select * from unnest($1, $2, $3, $4) x (path, size, etag, modified) where modified not between $5 - $6 and $5 + $6 or $6 = ''0'') f';
begin
  perform keep_scan(p_app, p_table, p_token);
  execute format('update %s t set size = f.size, etag = f.etag, modified = f.modified from %s where t.path = f.path and (t.size, t.etag, t.modified) is distinct from (f.size, f.etag, f.modified)', p_table, v_found)
    using p_paths, p_sizes, p_etags, p_modified, v_now, p_settle;
  get diagnostics changed = row_count;
  execute format('insert into %s (path, size, etag, modified) select path, size, etag, modified from %s where not exists (select from %1$s t where t.path = f.path) on conflict do nothing', p_table, v_found)
    using p_paths, p_sizes, p_etags, p_modified, v_now, p_settle;
  get diagnostics added = row_count;
end $$;

-- known_files(table, after, limit) -> paths in the order of the key, to be compared with what was found
create or replace function known_files(p_table text, p_after text, p_limit int) returns setof text language plpgsql stable set search_path from current as $$
begin
  return query execute format('select path from %s where $1 is null or path > $1 order by path limit $2', p_table) using p_after, p_limit;
end $$;

-- drop_files(app, table, token, paths) -> how many: files that are gone
create or replace function drop_files(p_app text, p_table text, p_token bigint, p_paths text[]) returns bigint language plpgsql volatile set search_path from current
set enable_seqscan = off set jit = off as $$
declare v_n bigint;
begin
  perform keep_scan(p_app, p_table, p_token);
  execute format('delete from %s where path = any ($1)', p_table) using p_paths;
  get diagnostics v_n = row_count;
  return v_n;
end $$;

-- end_scan(app, table, token, files): files: how many files; null: it did not see all
create or replace function end_scan(p_app text, p_table text, p_token bigint, p_files bigint) returns void language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  update file_scan set busy_until = '-infinity', files = coalesce(p_files, files), finished_at = case when p_files is null then finished_at else v_now end
   where app = p_app and table_name = p_table and token = p_token;
end $$;

-- begin_load(app, storage, path, version, table) -> the load, begun now or before
-- A version that comes back after another one was begun is loaded anew: the load of then keeps its rejects under another name,
-- and whoever is still at it finds that it has moved.
create or replace function begin_load(p_app text, p_storage text, p_path text, p_version text, p_table text) returns setof load
language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  update load l set version = format('%s, load %s', version, id), reached = -1, state = case when state = 'done' then state else 'changed' end
   where (l.app, l.storage, l.path, l.version, l.table_name) = (p_app, p_storage, p_path, p_version, p_table)
     and exists (select from load x where (x.app, x.storage, x.path, x.table_name) = (p_app, p_storage, p_path, p_table) and x.id > l.id);
  insert into load (app, storage, path, version, table_name, started_at) values (p_app, p_storage, p_path, p_version, p_table, v_now)
    on conflict do nothing;
  return query select * from load l where (l.app, l.storage, l.path, l.version, l.table_name) = (p_app, p_storage, p_path, p_version, p_table);
end $$;

-- lock_load(load, reached) -> whether it is still there, and the caller's to go on with until its transaction ends
-- Two that load the same file take turns at this. Times without a zone are UTC, and no day is guessed from 01/02/2026.
create or replace function lock_load(p_load bigint, p_reached bigint) returns boolean language plpgsql volatile set search_path from current as $$
begin
  perform set_config('timezone', 'UTC', true), set_config('datestyle', 'ISO, YMD', true);
  set constraints all immediate;                           -- so that each error is found with its row
  perform from load where id = p_load and reached = p_reached and state <> 'done' for update;
  return found;
end $$;

-- advance_load(load, reached, n, row_numbers, data, errors): notes what this transaction wrote, and what it did not
create or replace function advance_load(p_load bigint, p_reached bigint, p_n bigint, p_rows bigint[], p_data text[], p_errors text[])
returns void language plpgsql volatile set search_path from current as $$
begin
  update load set reached = p_reached, n = n + p_n, rejected = rejected + cardinality(p_rows), state = 'loading', error = null, finished_at = null
   where id = p_load;
  insert into load_reject (load_id, row_number, data, error) select p_load, * from unnest(p_rows, p_data, p_errors);
end $$;

-- end_load(load, state, error): done, failed, or changed: its file is another one by now
create or replace function end_load(p_load bigint, p_state text, p_error text default null) returns void language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  update load set state = p_state, error = p_error, finished_at = v_now where id = p_load and state <> 'done';
end $$;

-- load_findings() -> for anton doctor: loads that are not whole
create or replace function load_findings() returns table (kind text, subject text, problem text, remedy text)
language sql stable set search_path from current as $$
  select 'load', format('%s/%s', l.storage, l.path),
         case when l.state = 'failed' then format('is in %s up to row %s: %s', l.table_name, l.n + l.rejected, l.error)
              when l.state = 'changed' then format('was replaced when %s of its rows were in %s', l.n, l.table_name)
              else format('%s of its rows did not fit %s', l.rejected, l.table_name) end,
         format('select * from %I.load_reject where load_id = %s; when seen to: delete from %1$I.load where id = %2$s', current_schema(), l.id)
    from load l where l.state = 'failed' or l.rejected > 0 or (l.state = 'changed' and l.n > 0) order by l.id
$$;
