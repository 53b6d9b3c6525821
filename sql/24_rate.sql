-- Rates: at most so many starts in any window of time, over all processes. Time is cut into slots, 64 to a window
-- and none shorter than 10 ms. A worker is given starts of slots to come, a few at a time, in one row's array: nothing
-- is written for a record. What was given counts as begun at the last moment of its slot; what was not used is given back.

-- parse_rate(text, of) -> (most, length_us): "100/m", "5/h", "20/10s", "1000/1m30s". Raises NT004.
create or replace function parse_rate(p_text text, p_of text, out most int, out length_us bigint) language plpgsql immutable set search_path from current as $$
declare v text[] := regexp_match(p_text, '^\s*(\d{1,9})\s*/\s*((?:\d+(?:\.\d+)?)?\s*(?:ms|s|m|h|d|w)\s*(?:\d+(?:\.\d+)?\s*(?:ms|s|m|h|d|w)\s*)*)$');
begin
  most := v[1]::int;
  length_us := (select round(sum(coalesce(nullif(x[1], ''), '1')::numeric * case x[2] when 'ms' then 1e3 when 's' then 1e6 when 'm' then 6e7 when 'h' then 36e8
                                                                                     when 'd' then 864e8 else 6048e8 end))
                  from regexp_matches(v[2], '(\d*\.?\d*)\s*(ms|s|m|h|d|w)', 'g') x);
  if v is null or most < 1 or length_us < 100000 or length_us > 2592000000000 then
    raise exception using errcode = 'NT004', message = format('%s: rate "%s" is not one', p_of, p_text),
      hint = 'a number of starts and a time from 100ms to 30d: "100/m", "1000/s", "20/10s"';
  end if;
end $$;

-- rate_slots(length_us) -> slot_us, the length of a slot; whole, slots of a window; span, slots that hold no more than the rate
-- together: one more than the window has, as a start may be anywhere in its slot, and one for the time that it takes to be felt
create or replace function rate_slots(p_length bigint, out slot_us bigint, out whole int, out span int) language sql immutable set search_path from current as $$
  select s, ceil(p_length::numeric / s)::int, ceil(p_length::numeric / s)::int + 2 from greatest(10000, p_length / 64) s
$$;

-- set_rate(handler, rate): null: none. What was begun under another window counts as begun at the next asking
create or replace function set_rate(p_handler int, p_rate text) returns void language plpgsql volatile set search_path from current as $$
declare p record;
begin
  if p_rate is null then
    delete from rate where handler_id = p_handler;
    perform wait_no_more(p_handler, found);
    return;
  end if;
  p := parse_rate(p_rate, format('handler "%s"', (select name from handler where id = p_handler)));
  insert into rate as r (handler_id, said, most, length_us) values (p_handler, p_rate, p.most, p.length_us)
  on conflict (handler_id) do update set said = excluded.said, most = excluded.most, length_us = excluded.length_us,
     since = case when r.length_us = excluded.length_us then r.since else 0 end
   where (r.said, r.most, r.length_us) is distinct from (excluded.said, excluded.most, excluded.length_us);
  perform wait_no_more(p_handler, found);
end $$;

-- waits_for_rate() -> what a record that waits for a start of its key has in place of an error. A constant also for the planner
create or replace function waits_for_rate() returns text language sql immutable set search_path from current as $$ select 'waits for the rate of its key' $$;

-- wait_no_more(handler, changed): its rate is another one, or none: records that went back until there is a start for their key come at once
create or replace function wait_no_more(p_handler int, p_changed boolean) returns void language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now();
begin
  if p_changed then
    update delayed set run_at = v_now where handler_id = p_handler and error = waits_for_rate() and run_at > v_now;
    perform ring();
  end if;
end $$;

-- rates() -> handlers that have one; those of keys apart
create or replace function rates() returns table (handler_id int, said text, most int, length_us bigint) language sql stable set search_path from current as $$
  select r.handler_id, r.said, r.most, r.length_us from rate r where not exists (select from handler h where h.id = r.handler_id and h.per is not null and h.debounce is null)
$$;

-- key_rates() -> handlers that have one for each value of per
create or replace function key_rates() returns table (handler_id int, said text, most int, length_us bigint) language sql stable set search_path from current as $$
  select r.handler_id, r.said, r.most, r.length_us from rate r where exists (select from handler h where h.id = r.handler_id and h.per is not null and h.debounce is null)
$$;

-- key_starts(handler, keys) -> what was given of their rates and still counts
create or replace function key_starts(p_handler int, p_keys text[]) returns table (key text, ends bigint[], counts int[])
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
begin
  return query select k.key, r.ends, r.counts                                      -- limit: key by key, also where the planner takes the table for empty
                 from unnest(p_keys) k (key) cross join lateral (select * from rate_key r where r.handler_id = p_handler and r.key = k.key limit 1) r;
end $$;

-- note_starts(worker, handler, keys, ends, counts) -> the time, in microseconds since 1970; null, and nothing noted: the worker does not hold the handler
-- Before any of these starts is used. ends, counts: of each key an array as text, all that is given of it in this window.
-- Who comes to hold the handler later sees them: the permit is not to be had before this commits.
create or replace function note_starts(p_worker int, p_handler int, p_keys text[], p_ends text[], p_counts text[]) returns bigint
language plpgsql volatile set search_path from current
set jit = off set enable_seqscan = off as $$
declare v_us bigint := extract(epoch from now()) * 1000000; v_length bigint;
begin
  perform from permit p where p.handler_id = p_handler and p.worker_id = p_worker and p.lease_until > (select now()) for key share;
  if not found then
    return null;
  end if;
  select length_us into v_length from rate where handler_id = p_handler;
  insert into rate_key as r (handler_id, key, ends, counts, until)
  select p_handler, k.key, k.ends::bigint[], k.counts::int[],
         to_timestamp((coalesce((k.ends::bigint[])[cardinality(k.ends::bigint[])], 0) + coalesce(v_length, 0) * 1.05) / 1000000.0)
    from unnest(p_keys, p_ends, p_counts) k (key, ends, counts) order by k.key
  on conflict (handler_id, key) do update set ends = excluded.ends, counts = excluded.counts, until = excluded.until;
  return v_us;
end $$;

-- forget_starts(now) -> rows of keys whose starts are all out of their window, which were deleted. It looks at a stretch of 200 pages, any one: the
-- table is as long as there are live keys, and an index by time would be one more write for each note
create or replace function forget_starts(p_now timestamptz) returns bigint language plpgsql volatile set search_path from current set jit = off set enable_seqscan = off as $$
declare
  v_n bigint; v_first bigint := 200 * floor(random() * ceil(pg_relation_size('rate_key') / current_setting('block_size')::int / 200.0));
  v_from tid := format('(%s,0)', v_first); v_to tid := format('(%s,0)', v_first + 200);
begin
  delete from rate_key where ctid in (select ctid from rate_key where ctid >= v_from and ctid < v_to and until < p_now for update skip locked);
  get diagnostics v_n = row_count;
  return v_n;
end $$;

-- take_rate(worker, handler, wanted, slots, unused, use, late, ahead) -> at_us, the time; slot_us; numbers of slots and how many starts
-- of each this worker has now; next_us: where there is none, when there is one. No row: no rate. Times are now()'s since 1970.
--   slots, unused   what it has not used of slots that it was given, of the past or to come
--   use             the part of what it took lately that it used; a process that does not run in time misses some
--   late            the answer will be there so late: slots that end before are of no use
--   ahead           slots that begin so soon after. Those of the next half of it go to whoever asks, others by workers' shares
create or replace function take_rate(p_worker int, p_handler int, p_wanted int, p_slots bigint[] default '{}', p_unused int[] default '{}',
  p_use real default 1, p_late interval default '3 ms', p_ahead interval default '100 ms') returns table (at_us bigint, slot_us bigint, slots bigint[], counts int[], next_us bigint)
language plpgsql volatile set search_path from current set jit = off as $$
declare
  r rate; z record; v_first bigint; v_from bigint; v_near int; v_last int; v_i int;
  v_all int; v_once int; v_k int; v_part int; v_sum int := 0; v_sums int[] := '{}'; v_room int; v_changed boolean := false;
begin
  select * into r from rate where handler_id = p_handler for update;
  if not found then
    return;
  end if;
  at_us := extract(epoch from now()) * 1000000;             -- after the lock: it may have taken a while
  z := rate_slots(r.length_us);
  slot_us := z.slot_us;
  v_from := at_us + extract(epoch from p_late) * 1000000;
  v_first := v_from / slot_us;
  v_last := z.span + least(30, (v_from + (extract(epoch from p_ahead) * 1000000)::bigint) / slot_us - v_first);
  v_near := z.span + (v_from + (extract(epoch from p_ahead) * 500000)::bigint) / slot_us - v_first;
  v_changed := carried(r, v_first);                         -- from now on it runs out
  r := rate_as_of(r, v_first, z.span, v_last);              -- given[span] is the first slot's
  for i in 1 .. cardinality(p_slots) loop
    v_i := least(greatest(p_slots[i] - r.since + 1, 0), cardinality(r.given) + 1);
    if v_i between 1 and cardinality(r.given) then
      r.given[v_i] := greatest(0, r.given[v_i] - p_unused[i]);
      v_changed := true;
    end if;
  end loop;
  slots := '{}';
  counts := '{}';
  if p_wanted > 0 then
    select * from rate_pace(r.most, z.whole, p_use) into v_k, v_all, v_once;
    select ceil(v_once::numeric / greatest(1, count(*))) into v_part from worker w
     where w.stopped_at is null and w.seen_at > now() - interval '30 s' and w.app = (select app from worker where id = p_worker);
    for i in 1 .. cardinality(r.given) loop                 -- v_sums: what each span holds, by the slot that it ends with
      v_sum := v_sum + r.given[i] - case when i > z.span then r.given[i - z.span] else 0 end;
      v_sums := v_sums || v_sum;
    end loop;
    for i in z.span .. v_last loop
      v_room := least(p_wanted, v_once - r.given[i], case when i > v_near then v_part end);
      for j in i .. cardinality(r.given) loop
        v_room := least(v_room, r.most - v_sums[j]);
      end loop;
      v_sum := 0;
      for j in i - v_k + 1 .. i loop
        v_sum := v_sum + r.given[j];
      end loop;
      v_room := least(v_room, v_all - v_sum);
      if v_room > 0 then
        slots := slots || r.since + i - 1;
        counts := counts || v_room;
        r.given[i] := r.given[i] + v_room;
        for j in i .. cardinality(r.given) loop
          v_sums[j] := v_sums[j] + v_room;
        end loop;
        p_wanted := p_wanted - v_room;
        v_changed := true;
      end if;
    end loop;
  end if;
  if v_changed then
    update rate set since = r.since, given = r.given where handler_id = p_handler;
  end if;
  if cardinality(slots) = 0 then
    next_us := next_start(r, at_us);
  end if;
  return next;
end $$;

-- rate_pace(most, whole, use) -> slots of a tenth of the window; how many starts these may have, and how many a single one: it is
-- smooth, and yet makes up for starts that come back unused
create or replace function rate_pace(p_most int, p_whole int, p_use real, out few int, out together int, out once int) language sql immutable set search_path from current as $$
  select k, t, greatest(ceil(2.0 * p_most / p_whole / u)::int, least(10, t))
    from greatest(1, p_whole / 10) k cross join greatest(p_use, 0.25) u cross join cast(least(p_most, ceil(1.2 * p_most * greatest(1, p_whole / 10) / p_whole / u)) as int) t
$$;

-- carried(rate, first) -> given is of another window, or of a clock that was put back: all of it counts as of the first slot
create or replace function carried(r rate, p_first bigint) returns boolean language sql immutable set search_path from current as $$
  select cardinality(r.given) > 0 and (r.since = 0 or r.since + cardinality(r.given) > p_first + 200)
$$;

-- rate_as_of(rate, first, span, last) -> the rate with given from a span that ends with the slot first on, to the last, or beyond
create or replace function rate_as_of(r rate, p_first bigint, p_span int, p_last int) returns rate language plpgsql immutable set search_path from current as $$
declare v_since bigint := p_first - p_span + 1; v_past bigint := v_since - r.since; v_sum int;
begin
  if carried(r, p_first) then
    v_sum := least(r.most, (select sum(g) from unnest(r.given) g));
    r.given := array_fill(0, array[p_span - 1]) || v_sum;
  elsif v_past >= cardinality(r.given) then
    r.given := '{}';
  elsif v_past >= 0 then
    r.given := r.given[v_past + 1 :];
  else
    r.given := array_fill(0, array[-v_past::int]) || r.given;
  end if;
  r.since := v_since;
  r.given := r.given || array_fill(0, array[greatest(0, p_last - cardinality(r.given))]);
  return r;
end $$;

-- next_start(rate, at_us) -> at_us, or the beginning of the first slot that has a start to give
create or replace function next_start(r rate, p_at bigint) returns bigint language plpgsql immutable set search_path from current as $$
declare z record; p record; v_sum int := 0; v_few int := 0;
begin
  z := rate_slots(r.length_us);
  p := rate_pace(r.most, z.whole, 1);
  r := rate_as_of(r, p_at / z.slot_us, z.span, z.span);
  select coalesce(sum(g), 0) into v_sum from unnest(r.given) g;           -- also what was given for later slots
  for i in z.span .. cardinality(r.given) + z.span loop
    select coalesce(sum(g), 0) into v_few from unnest(r.given[i - p.few + 1 : i]) g;
    if v_sum < r.most and v_few < p.together then
      return greatest(p_at, (r.since + i - 1) * z.slot_us);
    end if;
    v_sum := v_sum - coalesce(r.given[i - z.span + 1], 0);                -- the next span begins behind it
  end loop;
  return p_at;
end $$;

-- rate_used(handler) -> starts that were given in the last window
create or replace function rate_used(p_handler int) returns bigint language sql volatile set search_path from current as $$
  select coalesce(sum(g.n), 0)
    from rate r cross join rate_slots(r.length_us) z cross join (select (extract(epoch from now()) * 1000000)::bigint as us) t
   cross join unnest(r.given) with ordinality g (n, i)
   where r.handler_id = p_handler and r.since + g.i - 1 between t.us / z.slot_us - z.whole and t.us / z.slot_us
$$;

-- next_rate(handler) -> when the handler may begin something next, null when now or without a rate
create or replace function next_rate(p_handler int) returns timestamptz language sql volatile set search_path from current as $$
  select to_timestamp(n / 1000000.0)
    from rate r cross join (select (extract(epoch from now()) * 1000000)::bigint as us) t cross join next_start(r, t.us) n
   where r.handler_id = p_handler and n > t.us
$$;

-- waits_for(handler) -> what may hold up its ready records, where a limit or a rate does
create or replace function waits_for(p_handler int) returns text language sql volatile set search_path from current as $$
  select coalesce(waits_for_permit(p_handler),
                  (select format('waits for its rate, %s: %s begun in the last window, the next %s', r.said, rate_used(p_handler), to_char(n, 'HH24:MI:SS.MS'))
                     from rate r cross join next_rate(p_handler) n where r.handler_id = p_handler and n is not null))
$$;
