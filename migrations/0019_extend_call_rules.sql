-- Whom one call alone asks besides those of its action, and since when its taint is known. Names no schema.

alter table approval add column needs jsonb not null default '[]';  -- [{"approvers", "quorum"}]: of each of these so many, besides quorum; [] asks no more
alter table action add column taint_known boolean not null default false;  -- its taint was looked up when it was made; of older calls where they begin
