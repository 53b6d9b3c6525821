-- Notices of what was edited while others had still to approve it. Names no schema.

alter table notice drop constraint notice_kind_check;
alter table notice add constraint notice_kind_check check (kind in ('asked', 'reminder', 'escalated', 'edited', 'decided'));
