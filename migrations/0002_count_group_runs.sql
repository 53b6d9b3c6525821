-- How often a suspect has died in a run with others: the next such run is of fewer, the third is its own.
alter table lease alter together drop default, alter together type smallint using together::int * 2, alter together set default 0;
