-- Turns: of handlers by their priority, of tenants by their weight. Names no schema.
alter table handler add column priority smallint not null default 5 check (priority between 0 and 9);

create table tenant (                             -- those that have more turns than one
  name text primary key,
  weight int not null check (weight between 1 and 100)
);

create index job_tenant on job (handler_id, tenant collate "C", id) where tenant is not null;
