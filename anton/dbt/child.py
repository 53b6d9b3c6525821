"""Child: a process that keeps dbt and one project's manifest warm. JSON lines in, JSON lines out; one job at a time.

    {"id": 1, "args": ["build", "--select", "revenue"], "flags": [], "parse_flags": [], "application": "…"}
    <- {"id": 1, "event": "NodeStart", "node": "model.shop.revenue", …}
    <- {"id": 1, "done": true, "success": true, "error": null, "kind": null, "results": […]}

SIGINT cancels the job and its query. The end of stdin, as when the worker was killed, does the same and ends it all.
dbt is imported here and nowhere else. What dbt prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import yaml  # type: ignore[import-untyped]
from dbt.artifacts.resources.types import NodeType
from dbt.artifacts.resources.v1.config import Hook
from dbt.cli.main import dbtRunner
from dbt.contracts.graph.unparsed import UnparsedMacro
from dbt.parser.macros import MacroParser

from anton.dbt.manifest import fingerprint

KNOWN = ("NodeStart", "NodeFinished", "LogModelResult", "LogTestResult", "LogSeedResult", "LogSnapshotResult",
         "SkippingDetails")
RUNS = ("run", "build", "seed", "snapshot", "test", "compile")         # they take the manifest that is kept
BUILT = ("model", "seed", "snapshot")
GRACE = 2.0  # seconds for a cancelled job to end


class Child:
    """The loop. project: its folder. macros: Anton's own, for a project that has none. schema: the runtime's."""

    def __init__(self, project: Path, macros: Path, schema: str, out: TextIO) -> None:
        self.project, self.macros, self.out = project, macros, out
        self.vars = {} if schema == "anton" else {"anton_schema": schema}
        self.manifest: Any = None
        self.seen: tuple[int, str] | None = None                       # of the files that the manifest was made of
        self.job: dict[str, Any] = {}
        self.jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Until stdin ends."""
        threading.Thread(target=self._read, daemon=True).start()
        self.say(ready=True)
        while True:
            try:
                job = self.jobs.get()
                if job is None:
                    return
                self.job = job
                self.say(done=True, **self.invoke(job))
            except KeyboardInterrupt:                                  # between two jobs, or at the very end of one
                if self.job:
                    self.say(done=True, success=False, error="cancelled", kind="KeyboardInterrupt", results=[])
            self.job = {}

    def _read(self) -> None:
        for line in sys.stdin:
            self.jobs.put(json.loads(line))
        self.jobs.put(None)
        if self.job:                                                   # nobody is there to hear how it ends
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(GRACE)
            os._exit(1)

    def say(self, **facts: Any) -> None:
        """One line out."""
        self.out.write(json.dumps({"id": self.job.get("id"), **facts}, default=str) + "\n")
        self.out.flush()

    def invoke(self, job: dict[str, Any]) -> dict[str, Any]:
        """One invocation of dbt, with what it brought as JSON."""
        os.environ["PGAPPNAME"] = job["application"]                   # libpq's: the profile stays the same, as dbt
        try:                                                           # reads a project anew when that differs
            args, said = _without_vars(job["args"])
        except (yaml.YAMLError, TypeError) as wrong:
            return {"success": False, "error": f"--vars: {wrong}", "kind": "vars", "results": []}
        vars = self.vars | said
        given = ["--vars", json.dumps(vars)] if vars else []
        if args[0] in RUNS or args[0] == "parse":
            failure = self._parse(given, vars != self.vars, job)
            if failure is not None:
                return failure
            if args[0] == "parse":
                return {"success": True, "error": None, "kind": None, "results": [], "manifest": self.summary()}
            self._reset()
            with self._settings(job.get("settings") or {}):
                done = dbtRunner(self.manifest, [self._event]).invoke([*args, *given, *job["flags"]])
        else:
            own = given if args != job["args"] else []                 # not all of dbt's commands know them
            done = dbtRunner(callbacks=[self._event]).invoke([*args, *own, *job["flags"]])
        error = None if done.exception is None else str(done.exception).strip()
        kind = None if done.exception is None else type(done.exception).__name__
        return {"success": done.success, "error": error, "kind": kind, "results": _results(done.result)}

    def _parse(self, vars: list[str], once: bool, job: dict[str, Any]) -> dict[str, Any] | None:
        """Reads the project again when a file of it changed. What is wrong with it, when it cannot be read."""
        now = fingerprint(self.project)
        if self.manifest is not None and now == self.seen and not once:
            return None
        # with vars a project may look different: it is read for this job alone
        done = dbtRunner(callbacks=[self._event]).invoke(["parse", *vars, *job["parse_flags"]])
        if not done.success:
            error = str(done.exception or "dbt could not read the project").strip()
            return {"success": False, "error": error, "kind": "parse", "results": [], "parse": True}
        self.manifest, self.seen = done.result, None if once else now
        self._hook()
        return None

    def _hook(self) -> None:
        """Anton's macros and its two hooks, for this process alone, where the project has none of its own."""
        names = {macro.name for macro in self.manifest.macros.values()}
        if not self.macros.exists():
            return
        if "anton_after" not in names:
            for macro in _macros(self.macros, self.manifest):
                self.manifest.macros.setdefault(macro.unique_id, macro)
            for cache in ("_macros_by_name", "_macros_by_package"):
                setattr(self.manifest, cache, None)
        for node in self.manifest.nodes.values():
            if node.resource_type not in BUILT:
                continue
            if not any("anton_before" in hook.sql for hook in node.config.pre_hook):
                node.config.pre_hook.insert(0, Hook("{{ anton_before() }}", transaction=True))
            if not any("anton_after" in hook.sql for hook in node.config.post_hook):
                node.config.post_hook.append(Hook("{{ anton_after() }}", transaction=True))

    @contextmanager
    def _settings(self, settings: dict[str, str]) -> Iterator[None]:
        """Settings of the transaction that builds a node, for this job."""
        if not settings:
            yield
            return
        calls = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
        built = [node for node in self.manifest.nodes.values() if node.resource_type in BUILT]
        for node in built:
            node.config.pre_hook.insert(0, Hook(f"select {calls}", transaction=True))
        try:
            yield
        finally:
            for node in built:
                del node.config.pre_hook[0]

    def _reset(self) -> None:
        """A node that was compiled before is compiled anew; dbt would leave out its ephemeral models."""
        for node in self.manifest.nodes.values():
            if getattr(node, "compiled", False):
                node.compiled, node.compiled_code = False, None
                node.extra_ctes, node.extra_ctes_injected = [], False

    def _event(self, message: Any) -> None:
        info = message.info
        if info.name not in KNOWN and info.level not in ("info", "warn", "error"):
            return
        facts: dict[str, Any] = {"event": info.name, "level": str(info.level), "text": info.msg,
                                 "invocation": info.invocation_id}
        node = getattr(message.data, "node_info", None)
        if node is not None and node.unique_id:
            facts |= {"node": node.unique_id, "status": node.node_status}
        self.say(**facts)

    def summary(self) -> dict[str, Any]:
        """What the worker has to know of the manifest."""
        manifest = self.manifest
        nodes = {}
        for id, node in manifest.nodes.items():
            if node.resource_type in BUILT and node.resource_type != "operation":
                meta = {**(getattr(node, "meta", None) or {}), **(node.config.meta or {})}
                nodes[id] = {
                    "name": node.name, "type": str(node.resource_type), "schema": node.schema, "alias": node.alias,
                    "materialized": node.config.materialized, "file": node.original_file_path,
                    "parents": list(node.depends_on.nodes) if hasattr(node.depends_on, "nodes") else [],
                    "key": _key(node, meta), "tags": list(node.tags),
                    "columns": {name: {"type": column.data_type, "description": column.description}
                                for name, column in node.columns.items()}}
        tests = {id: {"name": node.name, "parents": list(node.depends_on.nodes)}
                 for id, node in manifest.nodes.items() if node.resource_type == NodeType.Test}
        sources = {id: {"schema": source.schema, "alias": source.identifier, "name": source.name,
                        "source": source.source_name} for id, source in manifest.sources.items()}
        exposures = {id: {"name": one.name, "parents": list(one.depends_on.nodes)}
                     for id, one in manifest.exposures.items()}
        return {"project": manifest.metadata.project_name, "nodes": nodes, "sources": sources, "tests": tests,
                "exposures": exposures, "macros": sorted(
                    macro.name for macro in manifest.macros.values() if macro.name.startswith("anton_"))}


def _without_vars(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without --vars, and what it says; the last one holds."""
    kept: list[str] = []
    vars: dict[str, Any] = {}
    rest = iter(args)
    for arg in rest:
        if arg != "--vars" and not arg.startswith("--vars="):
            kept.append(arg)
            continue
        text = next(rest, "") if arg == "--vars" else arg.removeprefix("--vars=")
        said = yaml.safe_load(text) or {}
        if not isinstance(said, dict):
            raise TypeError(f"{text!r} is no mapping; write for example {{day: 2026-01-31}}")
        vars = said
    return kept, vars


def _key(node: Any, meta: dict[str, Any]) -> list[str]:
    """The columns that tell its rows apart: of the contract or of tests, of unique_key, of meta."""
    own = meta.get("anton_key")
    given = own or getattr(node, "primary_key", None) or getattr(node.config, "unique_key", None) or []
    return [given] if isinstance(given, str) else [str(one) for one in given]


def _macros(file: Path, manifest: Any) -> Iterator[Any]:
    """Anton's macros as if they stood in the project."""
    name = manifest.metadata.project_name
    parser: Any = MacroParser.__new__(MacroParser)
    parser.project, parser.manifest = SimpleNamespace(project_name=name), manifest
    for path in sorted(file.rglob("*.sql")) if file.is_dir() else [file]:
        raw = UnparsedMacro(path=str(path), original_file_path=str(path), package_name=name,
                            raw_code=path.read_text(), resource_type=NodeType.Macro, language="sql")
        yield from parser.parse_unparsed_macros(raw)


def _results(result: Any) -> list[Any]:
    """What a command returned: of each node its status, or the lines of `ls`."""
    if isinstance(result, list):
        return [str(one) for one in result]
    found = []
    for one in getattr(result, "results", None) or ():
        node = getattr(one, "node", None)
        if node is None:
            continue
        config = getattr(node, "config", None)
        found.append({
            "node": node.unique_id, "name": node.name, "type": str(node.resource_type), "status": str(one.status),
            "seconds": round(one.execution_time or 0, 3), "message": one.message or "",
            "failures": getattr(one, "failures", None), "attached": getattr(node, "attached_node", None),
            "parents": list(node.depends_on.nodes) if hasattr(node.depends_on, "nodes") else [],
            "code": getattr(node, "compiled_code", None),
            "test": {key: getattr(config, key, None) for key in ("severity", "error_if", "warn_if", "fail_calc")}
            if str(node.resource_type) == "test" else None})
    return found


def main() -> None:
    """python -m anton.dbt.child PROJECT MACROS SCHEMA"""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                                                      # dbt prints, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Child(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], out).run()


if __name__ == "__main__":
    main()
