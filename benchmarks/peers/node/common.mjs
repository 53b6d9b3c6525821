// What the node peers share. Each is a program:
//   install                   makes its tables
//   enqueue COUNT FROM        enqueues jobs FROM .. FROM+COUNT-1 in bulk, all known beforehand; prints the seconds
//   single COUNT              enqueues jobs 0 .. COUNT-1, each by a call and a commit of its own, 16 calls at a time
//   drip COUNT RATE           enqueues them one by one, RATE a second; prints when each was known to be committed
//   work KIND                 works until standard input ends; prints the calls made and when each job started
// KIND, what a job does: noop; start: notes when it started; own: waits 10 to 200 ms by its number, then writes it by a
// connection of its own; commit: the same in the transaction that completes the job, where the peer has that.
// Each prints "ready" once it has connected and waits for a line. Times are nanoseconds of CLOCK_MONOTONIC. The
// database comes from the libpq variables.
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import pg from "pg";

const CALLERS = 16;
const WRITE = "insert into effects (job) values ($1)";
const now = () => process.hrtime.bigint();
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

export const kind = process.env.PEER_KIND;
export const lease = Number(process.env.PEER_LEASE ?? 0); // seconds; 0: the peer's default
export const pool = new pg.Pool({ max: 25 });

async function go() {
  console.log("ready");
  await lines.next();
}

/** What a job does; db: the transaction that completes it, as pg-boss hands it out. */
function handler() {
  const seen = { calls: 0, starts: [] };
  const handle = async (job, db) => {
    const at = kind === "start" ? now() : 0n;
    seen.calls++;
    if (kind === "start") seen.starts.push([job, Number(at)]);
    if (kind !== "own" && kind !== "commit") return;
    await sleep(10 * (1 + (job % 20)));
    await (kind === "commit" ? db.executeSql(WRITE, [job]) : pool.query(WRITE, [job]));
  };
  return { handle, seen };
}

/** CALLERS loops that take the next number until there is none. */
async function singles(one, count) {
  let next = 0;
  const caller = async () => {
    while (next < count) await one(next++);
  };
  await Promise.all(Array.from({ length: CALLERS }, caller));
}

/** Runs the command that this process was given. bulk takes numbers; work(handle) returns once it has begun. */
export async function main({ install, connect = async () => {}, bulk, one, work }) {
  const [command, a, b] = process.argv.slice(2);
  if (command === "install") {
    await install();
  } else if (command === "enqueue" || command === "single") {
    const jobs = Array.from({ length: Number(a) }, (_, i) => i + Number(b ?? 0));
    await connect();
    await Promise.all(Array.from({ length: CALLERS }, () => pool.query("select pg_sleep(0.05)")));
    await go();
    const began = now();
    await (command === "single" ? singles(one, jobs.length) : bulk(jobs));
    console.log(Number(now() - began) / 1e9);
  } else if (command === "drip") {
    const committed = [];
    await connect();
    await go();
    const began = now();
    for (let job = 0; job < Number(a); job++) {
      const wait = Number(began - now()) / 1e6 + (job * 1000) / Number(b);
      if (wait > 0) await sleep(wait);
      await one(job);
      committed.push([job, Number(now())]);
    }
    console.log(JSON.stringify(committed));
  } else {
    const { handle, seen } = handler();
    await pool.query("select 1");
    await go();
    await work(handle);
    while (!(await lines.next()).done);
    console.log(JSON.stringify(seen));
  }
  process.exit(0);
}
