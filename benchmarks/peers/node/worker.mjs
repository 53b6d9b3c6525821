// Graphile Worker in its fastest documented configuration (worker.graphile.org/docs/performance).
import { run, runMigrations } from "graphile-worker";
import { main, pool } from "./common.mjs";
import { logger, preset } from "./settings.mjs";

const BULK = `
select count(*) from graphile_worker.add_jobs(array(
  select row('trivial', json_build_object('job', j), null, null, null, null, null, null)::graphile_worker.job_spec
    from unnest($1::int[]) j))`;

await main({
  install: () => runMigrations({ preset, logger }),
  bulk: (jobs) => pool.query(BULK, [jobs]),
  one: (job) => pool.query("select from graphile_worker.add_job('trivial', $1)", [{ job }]),
  work: (handle) => run({ preset, logger, noHandleSignals: true, taskList: { trivial: ({ job }) => handle(job) } }),
});
