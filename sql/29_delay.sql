-- Delay: writes whose events are due later. The row is there at once; its jobs wait in delayed.

-- put_due(delay, at) -> when: what is written next in this transaction has its events then; a time that has passed: at once
-- Both null: what follows is due at once again.
create or replace function put_due(p_delay interval, p_at timestamptz) returns timestamptz language plpgsql volatile set search_path from current as $$
declare v_now timestamptz := now(); v_due timestamptz := coalesce(p_at, v_now + p_delay);
begin
  perform set_config('anton.due', case when v_due > v_now then to_char(v_due at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || '+00' else '' end, true);
  return v_due;
end $$;
