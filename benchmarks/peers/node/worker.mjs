// Graphile Worker in its fastest documented configuration (worker.graphile.org/docs/performance).
import { run, runMigrations } from "graphile-worker";
import { main, pool } from "./common.mjs";
import { logger, preset } from "./settings.mjs";

const BULK = `
select count(*) from graphile_worker.add_jobs(array(
  select row('trivial', json_build_object('job', i), null, null, null, null, null, null)::graphile_worker.job_spec
    from generate_series(0, $1::int - 1) i))`;

await main({
  install: () => runMigrations({ preset, logger }),
  bulk: (count) => pool.query(BULK, [count]),
  one: (job) => pool.query("select from graphile_worker.add_job('trivial', $1)", [{ job }]),
  work: (handle) => run({ preset, logger, noHandleSignals: true, taskList: { trivial: ({ job }) => handle(job) } }),
});
