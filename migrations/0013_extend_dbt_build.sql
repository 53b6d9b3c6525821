-- What a build knows of its grants, and a run of its lock. Names no schema: the runner sets search_path = <schema>, pg_catalog, pg_temp.

alter table dbt_build add column grants jsonb;    -- of the model's config then, {privilege: [grantee, …]}; null: not known
alter table dbt_run add column lock int;          -- the second key of the advisory lock that its holder has; null: of a release before

create index on dbt_build (unique_id, xid);       -- what others built since: dbt_behind()
create index on dbt_build (invocation_id);
create index on dbt_run (app, project) where state = 'running';
