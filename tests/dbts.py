"""dbt for tests: one warm process that runs whatever it is told to, and projects in folders of their own.

Importing dbt costs two seconds, so all tests of a session share the process. It is not thread-safe, and neither is this.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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
HOOKS = "".join(f"""
{kind}:
  +pre-hook: "{{{{ anton_before() }}}}"
  +post-hook: "{{{{ anton_after() }}}}"
""" for kind in ("models", "seeds", "snapshots"))
CHILD = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)                                                          # what dbt prints is no answer
from dbt.cli.main import dbtRunner
manifests = {}
for line in sys.stdin:
    project, args, again = json.loads(line)
    if again or project not in manifests:
        parsed = dbtRunner().invoke(["--quiet", "parse", *args[-4:]])
        if parsed.exception or not parsed.success:
            print(json.dumps({"ok": False, "error": str(parsed.exception), "nodes": {}}), file=answers, flush=True)
            continue
        manifests[project] = parsed.result
    done = dbtRunner(manifest=manifests[project]).invoke(args)
    nodes = {r.node.name: [str(r.status), r.message] for r in getattr(done.result, "results", None) or ()}
    error = str(done.exception) if done.exception else "; ".join(f"{n}: {m}" for n, (s, m) in nodes.items() if m and s in ("error", "fail"))
    print(json.dumps({"ok": done.success, "error": error, "nodes": nodes}), file=answers, flush=True)
"""


class Child:
    """The process. run() raises what it said when it did not go well."""

    def __init__(self, log: Path) -> None:
        self.log = log.open("w")
        env = {"DO_NOT_TRACK": "1", "PATH": "/usr/bin:/bin", "HOME": str(log.parent), "LANG": "C.UTF-8"}
        self.process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=env)

    def run(self, project: Path, *args: str, again: bool = False) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps([str(project), list(args), again]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, f"dbt ended: {Path(self.log.name).read_text()[-2000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


class Failed(Exception):
    """A build that did not go well."""


class Project:
    """A dbt project on a database. hooks=False: one that knows nothing of Anton."""

    def __init__(self, child: Child, folder: Path, url: str, hooks: bool = True) -> None:
        self.child, self.folder, self.url, self.changed = child, folder, url, True
        self.file("dbt_project.yml", PROJECT.format(hooked=HOOKS if hooks else ""))
        if hooks:
            shutil.copytree(MACROS, folder / "macros")
        info = psycopg.conninfo.conninfo_to_dict(url)
        self.file("profiles.yml", json.dumps({"shop": {"target": "it", "outputs": {"it": {
            "type": "postgres", "host": info.get("host", "localhost"), "port": int(info.get("port", 5432)), "user": info.get("user", "postgres"),
            "password": info.get("password", "none"), "dbname": info["dbname"], "schema": "public", "threads": 1}}}}))

    def file(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)
        self.changed = True

    def model(self, name: str, sql: str, **config: Any) -> None:
        shown = ", ".join(f"{key}={value!r}" for key, value in config.items())
        self.file(f"models/{name}.sql", f"{{{{ config({shown}) }}}}\n{sql}\n")

    def __call__(self, command: str, *args: str) -> dict[str, Any]:
        """Runs it; the status of each node. Raises Failed."""
        again, self.changed = self.changed, False
        answer = self.child.run(self.folder, "--quiet", "--no-send-anonymous-usage-stats", "--log-level-file", "none", "--no-write-json", "--no-use-colors",
                                command, *args, "--project-dir", str(self.folder), "--profiles-dir", str(self.folder), again=again)
        if not answer["ok"]:
            raise Failed(answer["error"])
        return {name: status for name, (status, _) in answer["nodes"].items()}
