-- Answers by their call: what costs and a call's own page count. Names no schema: the runner sets search_path.

create index on answer (call_id);
