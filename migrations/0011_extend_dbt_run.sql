-- dbt's runs can be cancelled, and a build knows what it saw. Names no schema: the runner sets search_path = <schema>, pg_catalog, pg_temp.

alter table dbt_run add column holder int;        -- the server's process that holds the lock of the run: cancelling ends it
alter table dbt_run drop constraint dbt_run_state_check;
alter table dbt_run add check (state in ('running', 'done', 'failed', 'died', 'cancelled'));

alter table dbt_request drop constraint dbt_request_state_check;
alter table dbt_request add check (state in ('waiting', 'running', 'done', 'failed', 'cancelled'));

alter table dbt_build add column snapshot pg_snapshot;  -- when it began to read; null: not known
