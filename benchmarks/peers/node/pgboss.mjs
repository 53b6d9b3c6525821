// pg-boss: insert() of many, batches of 500 fetched without a pause, each job a call of its own, woken by NOTIFY.
// Where a job's write is to commit with the job (transactional), a batch is one transaction: there of 20 jobs.
import { PgBoss } from "pg-boss";
import { kind, lease, main, pool } from "./common.mjs";

const QUEUE = "trivial";
const CHUNK = 5000;
const boss = new PgBoss({
  application_name: "pgboss",
  max: 16,
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
  async bulk(jobs) {
    for (let from = 0; from < jobs.length; from += CHUNK) {
      await boss.insert(QUEUE, jobs.slice(from, from + CHUNK).map((job) => ({ data: { job } })));
    }
  },
  one: (job) => boss.send(QUEUE, { job }),
  async work(handle) {
    await boss.start();
    const size = kind === "commit"
      ? { transactional: true, batchSize: 20, localConcurrency: 4 }
      : { batchSize: 500, localConcurrency: 2 };
    // A job that comes back after its worker died is not notified: a worker that listens polls for it each 30 s.
    const polling = { pollingIntervalSeconds: 0.5, ...(lease ? { notifyPollingIntervalSeconds: 1 } : {}) };
    const options = { ...size, ...polling, burstWhenBatchFull: true };
    await boss.work(QUEUE, options, async (jobs, db) => {
      await Promise.all(jobs.map((job) => handle(job.data.job, db)));
    });
  },
});
