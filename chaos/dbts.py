"""dbt for tests, chaos and benches: one warm process that runs what it is told to, and projects in folders.

Importing dbt costs two seconds, so all runs share the process. It is not thread-safe, and neither is this.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

MACROS = Path(__file__).parent.parent / "dbt_project" / "macros"
PROJECT = """
name: shop
version: "1.0"
profile: shop
{hooked}
"""
HOOKS = "".join(
    f"""
{kind}:
  +pre-hook: "{{{{ anton_before() }}}}"
  +post-hook: "{{{{ anton_after() }}}}"
"""
    for kind in ("models", "seeds", "snapshots")
)
FLAGS = ("--quiet", "--no-send-anonymous-usage-stats", "--log-level-file", "none", "--no-write-json", "--no-use-colors")
CHILD = """
import json, os, signal, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)                                                          # what dbt prints is no answer
from dbt.cli.main import dbtRunner
manifests = {}

def run(project, args, again):
    if again or project not in manifests:
        parsed = dbtRunner().invoke(["--quiet", "parse", *args[-4:]])
        if parsed.exception or not parsed.success:
            return {"ok": False, "error": str(parsed.exception), "nodes": {}}
        manifests[project] = parsed.result
    began = time.perf_counter()
    done = dbtRunner(manifest=manifests[project]).invoke(args)
    nodes = {r.node.name: [str(r.status), r.message] for r in getattr(done.result, "results", None) or ()}
    bad = [f"{name}: {said}" for name, (status, said) in nodes.items() if said and status in ("error", "fail")]
    return {"ok": done.success, "error": str(done.exception) if done.exception else "; ".join(bad), "nodes": nodes,
            "seconds": time.perf_counter() - began}

for line in sys.stdin:
    project, args, again, mortal = json.loads(line)
    if not mortal:
        answer = run(project, args, again)
    else:                                                              # a child of its own, killed when we are told
        pid = os.fork()
        if pid == 0:
            run(project, args, again)
            os._exit(0)
        sys.stdin.readline()
        os.kill(pid, signal.SIGKILL)                                   # not waited for yet, so the pid is still its own
        answer = {"ok": True, "error": "", "nodes": {}, "killed": os.WIFSIGNALED(os.waitpid(pid, 0)[1])}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Failed(Exception):
    """A build that did not go well."""


class Child:
    """The process."""

    def __init__(self, log: Path) -> None:
        self.log = log.open("w")
        env = {"DO_NOT_TRACK": "1", "PATH": "/usr/bin:/bin", "HOME": str(log.parent), "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
        )

    def run(
        self, project: Path, *args: str, again: bool = False, until: Callable[[], object] | None = None
    ) -> dict[str, Any]:
        """What dbt made of these arguments: ok, error, nodes, seconds. until: when that returns, it is killed -9."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([str(project), list(args), again, until is not None]), file=self.process.stdin, flush=True)
        if until is not None:
            try:
                until()
            finally:
                print("kill", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, f"dbt ended: {Path(self.log.name).read_text()[-2000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Project:
    """A dbt project on a database. hooks=False: one that knows nothing of Anton. demo: that of the repository.

    who: user and password.
    """

    def __init__(
        self, child: Child, folder: Path, url: str, hooks: bool = True, demo: bool = False, **who: str
    ) -> None:
        self.child, self.folder, self.url, self.changed = child, folder, url, True
        if demo:
            shutil.copytree(MACROS.parent, folder)
        else:
            shutil.copytree(MACROS, folder / "macros")
            self.file("dbt_project.yml", PROJECT.format(hooked=HOOKS if hooks else ""))
        info = psycopg.conninfo.conninfo_to_dict(url)
        target = {
            "type": "postgres",
            "host": info.get("host", "localhost"),
            "port": int(info.get("port") or 5432),
            "user": info.get("user", "postgres"),
            "password": info.get("password", "none"),
            "dbname": info["dbname"],
            "schema": "public",
            "threads": 1,
        }
        target |= who
        profile = {"target": "it", "outputs": {"it": target}}
        self.file("profiles.yml", json.dumps({"shop": profile, "anton": profile}))

    def file(self, path: str, text: str) -> None:
        """Writes a file of the project; it is parsed again at the next run."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)
        self.changed = True

    def model(self, name: str, sql: str, **config: Any) -> None:
        """Writes a model."""
        shown = ", ".join(f"{key}={value!r}" for key, value in config.items())
        self.file(f"models/{name}.sql", f"{{{{ config({shown}) }}}}\n{sql}\n")

    def __call__(self, command: str, *args: str, until: Callable[[], object] | None = None) -> dict[str, Any]:
        """Runs it; what it came to. until: when that returns, it is killed -9. Raises Failed."""
        again, self.changed = self.changed, False
        where = ("--project-dir", str(self.folder), "--profiles-dir", str(self.folder))
        answer = self.child.run(self.folder, *FLAGS, command, *args, *where, again=again, until=until)
        if not answer["ok"]:
            raise Failed(answer["error"])
        return answer
