-- A worker in psql alone, for the handler "greet" of app "other" on the table orders (docs/schema.md makes it):
--
--   psql -f examples/worker.sql
--
-- It works until nothing is ready, a job at a time. Run as many at once as you like; kill them when you like.
\set ON_ERROR_STOP on
\if :{?worker}
\else
  select anton.register_worker('other', 'a host', pg_backend_pid(), '1.0') as worker,
         array[anton.find_handler('other.greet')] as handlers \gset
\endif

select anton.token() as token \gset
select * from anton.poll(:worker, :'handlers');             -- what was delayed and is due is ready now
create temp table mine as
  select * from anton.claim(:worker, :token, :'handlers', array[1], array[1000], array[0]::bigint[], '30 s');
select count(*) = 0 as none from mine \gset
\if :none
  insert into mine select * from anton.reclaim(:worker, :token, :'handlers', '30 s');   -- of a worker that died
\endif

select count(*) > 0 as some from mine \gset
\if :some
  -- the work: no transaction is open while it is done
  create temp table answer as
    select m.id as job, m.lo + k.o - 1 as ordinal, o.id, 'Hello ' || o.customer as text,
           case when o.id is null then 'gone' when o.total < 0 or (o.total is null and m.attempt >= 2) then 'refused'
                when o.total is null then 'later' else 'done' end as fate
      from mine m cross join unnest(m.ids) with ordinality k (id, o) left join orders o on o.id = k.id
     where m.lo + k.o - 1 <> all (coalesce(m.settled, '{}'));
  select anton.heartbeat(:worker, array[:token], '30 s');   -- work that takes longer calls it every 10 s

  begin;
  select anton.retry(:token, job, array_agg(ordinal::int), '1 min', 'no total yet', true) from answer where fate = 'later' group by job;
  select anton.bury(:token, job, ordinal::int, 'failed', 'total is wrong', null) from answer where fate = 'refused';
  select bool_and(fate in ('done', 'gone')) as whole, bool_or(fate in ('done', 'gone')) as part from answer \gset
  \if :whole
    select anton.ack(:token, array_agg(distinct job), :worker, 0, (count(*) filter (where fate = 'gone'))::int) as receipt from answer \gset
  \elif :part
    select anton.ack_part(:token, job, array_agg(ordinal::int order by ordinal), :worker, 0, (count(*) filter (where fate = 'gone'))::int) as receipt
      from answer where fate in ('done', 'gone') group by job \gset
  \endif
  \if :part
    with written as (
      insert into letters (data) select jsonb_build_object('order', id, 'text', text) from answer where fate = 'done' returning id)
    select anton.put_output(:receipt, anton.watch('letters'), array_agg(id), null, array_agg(0)) from written having count(*) > 0;
  \endif
  commit;

  drop table mine, answer;
  \ir worker.sql
\else
  drop table mine;
  select anton.stop_worker(:worker);
\endif
