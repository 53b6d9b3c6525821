// What the node peers share. Each is a program:
//   install                 makes its tables
//   enqueue COUNT           enqueues jobs 0 .. COUNT-1 in bulk; prints the seconds that took
//   drip COUNT RATE         enqueues them one by one, RATE a second; prints when each was known to be committed
//   work noop|start|insert  works until standard input ends; prints the calls made and when each job started
// Each prints "ready" once it has connected and waits for a line. Times are nanoseconds of CLOCK_MONOTONIC. The
// database comes from the libpq variables.
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import pg from "pg";

const now = () => process.hrtime.bigint();
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

export const lease = Number(process.env.PEER_LEASE ?? 0); // seconds; 0: the peer's default
export const pool = new pg.Pool({ max: 25 });

async function go() {
  console.log("ready");
  await lines.next();
}

/** What a job does. */
function handler(kind) {
  const seen = { calls: 0, starts: [] };
  const handle = async (job) => {
    const at = kind === "start" ? now() : 0n;
    seen.calls++;
    if (kind === "start") seen.starts.push([job, Number(at)]);
    if (kind === "insert") {
      await pool.query("insert into effects (job) values ($1)", [job]);
      await sleep(5);
    }
  };
  return { handle, seen };
}

/** Runs the command that this process was given. work(handle) returns once it has begun. */
export async function main({ install, connect = async () => {}, bulk, one, work }) {
  const [command, a, b] = process.argv.slice(2);
  if (command === "install") {
    await install();
  } else if (command === "enqueue") {
    await pool.query("select 1");
    await connect();
    await go();
    const began = now();
    await bulk(Number(a));
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
    const { handle, seen } = handler(a);
    await pool.query("select 1");
    await go();
    await work(handle);
    while (!(await lines.next()).done);
    console.log(JSON.stringify(seen));
  }
  process.exit(0);
}
