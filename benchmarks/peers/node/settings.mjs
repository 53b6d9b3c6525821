// Graphile Worker's fastest documented configuration (worker.graphile.org/docs/performance).
import { Logger } from "graphile-worker";

export const preset = {
  worker: {
    concurrentJobs: 24,
    maxPoolSize: 25,
    localQueue: { size: 500 },
    completeJobBatchDelay: 0,
    failJobBatchDelay: 0,
  },
};
export const logger = new Logger(() => (level, message) => {
  if (level === "error") console.error(message);
});
