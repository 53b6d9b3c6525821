// One Graphile Worker process in its fastest documented configuration (worker.graphile.org/docs/performance).
//   node graphile.mjs migrate     installs its schema
//   node graphile.mjs once        prints "ready", waits for a line, works until no job is left, prints the calls made
// The database comes from the libpq variables PGHOST, PGPORT, PGUSER, PGDATABASE, ...
import { createInterface } from "node:readline";
import { runMigrations, runOnce } from "graphile-worker";
import { logger, preset } from "./settings.mjs";

if (process.argv[2] === "migrate") {
  await runMigrations({ preset, logger });
} else {
  let calls = 0;
  console.log("ready");
  for await (const _ of createInterface({ input: process.stdin })) break;
  await runOnce({ preset, logger, taskList: { trivial: () => void calls++ } });
  console.log(calls);
}
process.exit(0);
