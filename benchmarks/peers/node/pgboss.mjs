// pg-boss: insert() of many, batches of 500 fetched without a pause, each job a call of its own, woken by NOTIFY.
import { PgBoss } from "pg-boss";
import { lease, main, pool } from "./common.mjs";

const QUEUE = "trivial";
const CHUNK = 5000;
const boss = new PgBoss({
  application_name: "pgboss",
  max: 10,
  schedule: false,
  useListenNotify: true,
  ...(lease ? { superviseIntervalSeconds: 1, monitorIntervalSeconds: 1, maintenanceIntervalSeconds: 1 } : {}),
});
boss.on("error", (problem) => console.error(problem.message));
boss.on("warning", () => {});

await main({
  async install() {
    await boss.start();
    await boss.createQueue(QUEUE, { notify: true, ...(lease ? { heartbeatSeconds: lease } : {}) });
    await boss.stop({ graceful: false });
  },
  connect: () => boss.start(),
  async bulk(count) {
    for (let from = 0; from < count; from += CHUNK) {
      const size = Math.min(CHUNK, count - from);
      await boss.insert(QUEUE, Array.from({ length: size }, (_, i) => ({ data: { job: from + i } })));
    }
  },
  one: (job) => boss.send(QUEUE, { job }),
  async work(handle) {
    await boss.start();
    const options = { batchSize: 500, localConcurrency: 2, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 };
    await boss.work(QUEUE, options, async (jobs) => {
      await Promise.all(jobs.map((job) => handle(job.data.job)));
    });
  },
});
