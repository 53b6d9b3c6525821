"""Lineage: what it costs to read which column of a model comes from which."""

from __future__ import annotations

import time

from anton.lineage import Tables
from anton.sqlread import columns
from benchmarks.harness import Row, Rows, Run, WrongResult, at_most, bench, median

_MODELS = (  # simple ones: up to two tables, a CTE; each text is made anew by its number, so that nothing is cached
    "select id, customer_id, total * {n} as total, status from t1",
    "select customer_id, count(*) as orders, sum(total) as total, max(created_at) as last from t2 where id > {n} "
    "group by 1",
    "select o.id, c.name, o.total from t3 o join t4 c on c.id = o.customer_id where o.total > {n}",
    "with paid as (select customer_id, total from t5 where total > {n}) select c.name, sum(p.total) as total, "
    "count(*) as n from paid p join t6 c on c.id = p.customer_id group by c.name",
    "select id, total, sum(total) over (partition by customer_id order by created_at) + {n} as running from t7",
)


@bench(at_most("lineage_ms", 10, "ms"))
def lineage_time(run: Run) -> Rows:
    """Column lineage of a simple model among 500 known tables: milliseconds of CPU, not of the clock, as it waits for
    nothing; the median over all.
    """
    names = ("id", "customer_id", "name", "total", "status", "created_at")
    tables = Tables({f"public.t{n}": names for n in range(500)})
    if columns(_MODELS[3].format(n=0), tables)["total"] != {("public.t5", "total")}:
        raise WrongResult("the total of a model does not come from t5.total")
    times = []
    for n in range(1, run.size(200, 10)):
        for text in _MODELS:
            began = time.process_time()
            columns(text.format(n=n), tables)
            times.append((time.process_time() - began) * 1000)
    return {"lineage_ms": Row(median(times), detail={"slowest_ms": round(max(times), 2), "models": len(times)})}
