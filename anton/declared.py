"""Declared: an app's tables, handlers and schedules against the database, for migrate.

    examine()         looks, and refuses: Destructive, ModelMismatch, NearName, KeyNeeded, UnknownTable; changes nothing
    make_tables()     makes what is missing
    make_handlers()   the catalogue, then the triggers of every table whose handlers changed
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from anton import fits, sqlcheck, sqlfile
from anton.columns import MODELLESS, Column, Shape, kind_of
from anton.db import literal, quote, split_name
from anton.dbt.manifest import Node
from anton.dbt.project import DbtModel
from anton.ddl import VECTOR, Difference, Found, Spec, check_adopted, compare, create_sql, inspect, key_advice
from anton.edges import of_code, read, writes
from anton.errors import (
    AntonError,
    BadOption,
    DatabaseError,
    Destructive,
    KeyNeeded,
    ModelMismatch,
    NearName,
    NoVectors,
    UnknownTable,
    distance,
    near,
)
from anton.graph import cycles, meant
from anton.model import Model, Models
from anton.notices import unmailed, unposted
from anton.plan import LOCK_TIMEOUT, Step
from anton.poll import Poll
from anton.sqlcheck import SqlStep
from anton.steps import Steps
from anton.within import condition

if TYPE_CHECKING:
    from anton.lineage import Tables
    from anton.table import Table

HAS_VECTOR = "select exists (select from pg_available_extensions where name = 'vector')"
LOCK = (f"lock_timeout = '{LOCK_TIMEOUT}'",)


@dataclass
class Wanted:
    """A table that the app uses. found: None when it is to be made. spec: None when it is not ours to alter."""

    schema: str
    name: str
    found: Found | None
    spec: Spec | None = None
    difference: Difference = field(default_factory=Difference)
    rows: bool = False                                                 # it existed before this migrate
    can_work: bool = True                                              # False: it could not be made
    model: Model | None = None                                         # it is kept by this
    node: Node | None = None                                           # of dbt
    project: str = ""
    unbuilt: bool = False                                              # by dbt
    track: bool = False                                                # its records are compared though nobody listens

    @property
    def sql(self) -> str:
        """Its name for SQL."""
        return f"{quote(self.schema)}.{quote(self.name)}"

    @property
    def shown(self) -> str:
        """Its name for people."""
        return f"{self.schema}.{self.name}"


class Declared:
    """One app's declarations. app_schema: where unqualified names point."""

    def __init__(self, run: Steps, app_schema: str) -> None:
        self.run, self.conn, self.app, self.plan = run, run.conn, run.app, run.plan
        self.app_schema = app_schema
        self.handlers: list[dict[str, Any]] = []                       # what put_handler takes, and "since"
        self.schedules: list[dict[str, Any]] = []                      # what put_schedule takes
        self.models = Models(run, [], self.place, app_schema)
        self.known: Tables | None = None                               # what SQL may name; None: there is no SQL

    def place(self, name: str) -> tuple[str, str]:
        """Schema and name of a table as users write it."""
        schema, table = split_name(name)
        return schema or self.app_schema, table

    async def examine(self) -> list[Wanted]:
        """All tables the app uses, compared with the database."""
        for project in self.app.projects.values():
            await project.examine(self.run.db, project.schema or self.app_schema)
            self.plan.refused += project.unread(self.place)
        self._collect()
        rows = await self.conn.fetch(f"select name, app, model from {self.run.schema}.watched_tables()")
        watched = {row["name"]: row for row in rows}
        await self.models.examine()
        wanted = {model.sql: Wanted(model.schema, model.table, model.found, rows=model.found is not None, model=model)
                  for model in self.models.all}
        for table in self.app.tables.values():
            schema, name = self.place(table.name)
            if f"{quote(schema)}.{quote(name)}" in wanted:             # of a model: compared when that is made
                continue
            one = await self._table(table, watched)
            if one is not None:
                wanted[one.sql] = one
        for definition in self.handlers:
            one = await self._of_handler(definition, wanted)
            if one is not None:
                wanted.setdefault(one.sql, one)
                definition["table"] = one.sql
        self.handlers = [d for d in self.handlers if d["table"] in wanted]
        self._check_into()
        self.plan.refused += await fits.check_app(self.app, self.run.db, self.conn, self.app_schema)
        return list(wanted.values())

    def _collect(self) -> None:
        app = self.app.name
        files = [file for file in self.run.files if file.kind == "model"]
        self.models = Models(self.run, files, self.place, self.app_schema)
        for handler in self.app.handlers.values():
            self.handlers.append({"since": handler.since, **handler.definition(), "app": app})
        for project in self.app.projects.values():
            self.handlers += project.handlers(
                self.run.schema, lambda table: ".".join(map(quote, self.place(table.name))))
        self.schedules = [schedule.definition(app) for schedule in self.app.schedules.values()]
        for model in self.models.all:
            self.handlers += model.handlers(app, self.place)
            self.schedules += model.schedules(app)
        for file in self.run.files:
            if file.kind == "handler":
                self.handlers.append(sqlfile.handler(file, app))
            elif file.kind == "schedule":
                self.schedules.append(sqlfile.schedule(file, app))

    def _check_into(self) -> None:
        """Refuses what would write to a model's table: its next refresh would undo that."""
        kept = {(model.schema, model.table): model for model in self.models.all}
        given = [(f'handler "{d["name"]}"', d.get("into_tables", ())) for d in self.handlers if "model" not in d]
        given += [(f'"{d["name"]}"', d.get("options", {}).get("into_tables", ())) for d in self.schedules
                  if "model" not in d.get("options", {})]
        given += [(f'Webhook "{hook.path}"', (hook.table.name,)) for hook in self.app.webhooks]
        for of, names in given:
            for name in names:
                model = kept.get(self.place(name))
                if model is not None:
                    self.plan.refused.append(BadOption("into", name, of, "a Table that no model keeps: "
                                                       f"{model.said.file} would undo what is written to it"))

    async def _model(self, model: DbtModel[Any]) -> Wanted:
        """A model of dbt: never made or altered here, and it need not be built yet."""
        manifest = model.project.manifest
        assert manifest is not None                                    # examine() has read it
        node = model.node or manifest.node(model.dbt_name)             # raises, with the likely name
        row = await self.conn.fetchrow(
            "select c.oid, c.relkind::text as kind from pg_class c join pg_namespace n on n.oid = c.relnamespace "
            "where n.nspname = $1 and c.relname = $2", node.schema, node.alias)
        one = Wanted(node.schema, node.alias, None, node=node, project=model.project.name,
                     track=bool(model.project.whens and manifest.children(node.id)))
        if row is None:
            one.unbuilt = True
            self.plan.notes.append(f"{one.shown} is not built yet: anton dbt build --select {node.name}")
        elif row["kind"] in ("r", "p"):
            one.found, one.rows = await inspect(self.conn, row["oid"]), True
            if model.shape is not None:
                wrong = [line for line in check_adopted(model.shape, one.found)[0] if not line.startswith("the key of")]
                if wrong:
                    self.plan.refused.append(ModelMismatch(one.shown, wrong, model.place))
        return one

    async def _table(self, table: Table[Any], watched: Mapping[str, Any]) -> Wanted | None:
        if isinstance(table, DbtModel):
            return await self._model(table)
        schema, name = self.place(table.name)
        shape: Shape[Any] | None = table.shape
        spec = Spec(schema, name, self._columns(shape) if shape else MODELLESS, shape.key if shape else ("id",),
                    table.unique, table.index, shape.model.__name__ if shape else "")
        if spec.vectors and not await self.conn.fetchval(HAS_VECTOR):
            self.plan.refused.append(NoVectors(table.name, table.place, spec.vectors[0]))
            return None
        oid = await self._oid(schema, name)
        if oid is None:
            await self._check_new(table, schema, name)
            return Wanted(schema, name, None, spec)
        found = await inspect(self.conn, oid)
        one = Wanted(schema, name, found, rows=True)
        row = watched.get(one.sql)
        if row is not None and row["app"] == self.app.name:
            one.spec = spec
            one.difference = await compare(self.conn, spec, oid, row["model"] or {})
            if one.difference.refused:
                whys, sql = zip(*one.difference.refused, strict=True)
                self.plan.refused.append(Destructive(one.shown, whys, [line for lines in sql for line in lines]))
            self.plan.notes += one.difference.notes
        elif shape is not None:
            wrong, notes = check_adopted(shape, found)
            if wrong:
                self.plan.refused.append(ModelMismatch(one.shown, wrong, table.place))
            self.plan.notes += [f"{one.shown}: {note}" for note in notes if not table.read_only]   # the runtime's own
        return one

    def _columns(self, shape: Shape[Any]) -> tuple[Column, ...]:
        """Those of the table, with what meaning types say of values inside them."""
        fields, columns = shape.model.model_fields, []
        for column in shape.table_columns:
            info = fields.get(column.name)
            inside = None if info is None else condition(
                column.name, info.annotation, kind_of(info.annotation, info.metadata), self.run.schema)
            parts = [part for part in (column.check, inside) if part]
            columns.append(replace(column, check=" and ".join(parts) or None))
        return tuple(columns)

    async def _oid(self, schema: str, name: str) -> int | None:
        row = await self.conn.fetchrow(
            "select c.oid, c.relkind::text as kind from pg_class c join pg_namespace n on n.oid = c.relnamespace "
            "where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p', 'v', 'm', 'f')", schema, name)
        if row is not None and row["kind"] not in ("r", "p"):
            what = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}[row["kind"]]
            self.plan.refused.append(DatabaseError(f'"{schema}.{name}" is {what}: only ordinary and partitioned tables '
                                                   "fire events. Name the table it reads from.", table=name))
        return row["oid"] if row else None

    async def _check_new(self, table: Table[Any], schema: str, name: str) -> None:
        if not await self.conn.fetchval("select to_regnamespace($1) is not null", quote(schema)):
            known = await self.conn.fetch(
                "select nspname::text from pg_namespace where nspname !~ '^(pg|information)_'")
            close = near(schema, [row[0] for row in known])
            hint = f' Did you mean "{close}"?' if close else ""
            self.plan.refused.append(DatabaseError(
                f'table "{table.name}" ({table.place}): there is no schema "{schema}".{hint} Create it in a migration: '
                f"create schema {quote(schema)};", table=table.name))
        elif table.shape is None:
            close = slip(name, await self._names(schema))
            if close is not None:
                self.plan.refused.append(NearName(table.name, close, table.place))

    async def _names(self, schema: str) -> list[str]:
        rows = await self.conn.fetch("select relname::text from pg_class where relnamespace = to_regnamespace($1) "
                                     "and relkind in ('r', 'p', 'v', 'm', 'f') order by 1", quote(schema))
        return [row[0] for row in rows]

    async def _of_handler(self, definition: dict[str, Any], wanted: dict[str, Wanted]) -> Wanted | None:
        schema, name = self.place(definition["table"])
        one = wanted.get(f"{quote(schema)}.{quote(name)}")
        if one is None:                                                # of a SQL file: nothing declares its table
            oid = await self._oid(schema, name)
            if oid is None:
                known = [*await self._names(schema), *(table.name for table in wanted.values())]
                self.plan.refused.append(UnknownTable(definition["table"], known, self.plan.database))
                return None
            one = Wanted(schema, name, await inspect(self.conn, oid), rows=True)
        keyless = one.node is None and one.found is not None and not one.found.key
        if keyless and one.found is not None and {"updated", "deleted"} & set(definition["ops"]):
            self.plan.refused.append(KeyNeeded(one.shown, definition["name"], key_advice(schema, name, one.found)))
        return one

    # Tables

    async def make_tables(self, wanted: Sequence[Wanted]) -> None:
        """Makes missing tables, alters those that are ours, watches the others."""
        if any(one.spec is not None and one.spec.vectors for one in wanted):
            await self.run.step(Step("extension vector", VECTOR), unless_same="select oid from pg_extension where "
                                "extname = 'vector'")
        for one in wanted:
            if one.model is not None:
                continue
            same = f"select {self.run.schema}.table_state({literal(one.sql)})"
            if one.spec is None:
                watch = self._call("watch", one.sql)
                if one.node is not None:
                    names = ", ".join(map(literal, (one.project, one.node.id, one.schema, one.name)))
                    key = ", ".join(map(literal, one.node.key))
                    watch = f"select {self.run.schema}.dbt_register({names}, array[{key}]::text[], {one.track})"
                    same = f"select {self.run.schema}.dbt_state({names})"
                await self.run.step(Step(f"watch {one.shown}", watch), table=one.sql,
                                    unless_same=same)
                continue
            put = self._call("put_table", {"table": one.sql, "app": self.app.name, "model": one.spec.declared()})
            if one.found is None:
                body = f"{create_sql(one.spec)};\n{put}"
                one.can_work = await self.run.step(Step(f"table {one.shown}", body), table=one.sql)
                continue
            for alter in one.difference.alters:
                index = re.match(r"create (?:unique )?index concurrently (\S+)", alter)
                step = Step(f"table {one.shown}", alter, LOCK, transaction=index is None)
                await self.run.step(step, table=one.sql, only_plan=True,
                                    cleanup=f"drop index if exists {quote(one.schema)}.{index[1]}" if index else "")
            await self.run.step(Step(f"what is declared of {one.shown}", put), unless_same=same)

    def _call(self, function: str, argument: Any) -> str:
        if isinstance(argument, str):
            return f"select {self.run.schema}.{function}({literal(argument)})"
        text = json.dumps(argument, ensure_ascii=False, sort_keys=True)
        return f"select {self.run.schema}.{function}({literal(text)}::jsonb)"

    # Handlers

    async def make_handlers(self, wanted: Sequence[Wanted]) -> None:
        """Puts handlers and schedules into the catalogue, retires the vanished, brings all triggers up to date."""
        tables = {one.sql: one for one in wanted}
        await self._make_models(tables)
        wrong = await self._check(wanted) | self._unmade()
        await self._put_actions()
        await self._put_taints()
        for definition in self.handlers:
            one = tables[definition["table"]]
            if one.can_work and definition["name"] not in wrong:
                await self._handler(definition, one)
        for definition in self.schedules:
            if definition["name"] not in wrong:
                await self._put("schedule", "put_schedule", definition, None)
        for project in self.app.projects.values():
            await self._put("dbt project", "put_dbt_project", project.definition(self.app.name), None)
        if self.app.name != "sql":                                     # psql's own are nobody's code
            await self._retire()
        self._loops()
        kept = {model.sql for model in self.models.all}
        for row in await self.conn.fetch(f"select name, partitioned from {self.run.schema}.watched_tables()"):
            if row["name"] not in kept:
                await self._sync(row["name"], row["partitioned"], tables.get(row["name"]))
        for model in self.models.all:
            await self.models.build(model, partial(self._sync, model.sql, False, tables[model.sql]))

    async def _put_actions(self) -> None:
        """What the database has to know of actions to hold calls back, and where records come from outside."""
        app = self.app.name
        for action in self.app.actions.values():
            same = f"select {self.run.schema}.action_state({literal(app)}, {literal(action.name)})"
            await self.run.step(Step(f"action {action.name}", self._call("put_action", action.definition())),
                                unless_same=same)
        for row in await self.conn.fetch(f"select * from {self.run.schema}.unheard() where app = $1", app):
            self.plan.notes.append(f"action {row['action']}: {row['problem']}; {row['remedy']}")
        if unmailed(self.app):
            self.plan.notes.append('via=["email"] of an approval sends nothing: set SMTP_HOST, or handle Notices() '
                                   "where=\"via = 'email'\"")
        if channels := unposted(self.app):
            self.plan.notes.append(f"via={channels} of an approval is posted by nothing: hand Notices() to "
                                   "SlackAskApproval, where=\"via = 'slack'\"")
        names = f"array[{', '.join(literal(name) for name in sorted(self.app.actions))}]::text[]"
        gone = await self.conn.fetch(f"select {self.run.schema}.vanished_actions({literal(app)}, {names})")
        if gone and app != "sql":
            await self.run.step(Step("retire actions " + ", ".join(row[0] for row in gone),
                                     f"select {self.run.schema}.retire_actions({literal(app)}, {names})"))

    async def _put_taints(self) -> None:
        """Where records come from outside: what is made of them is to be looked at before it leaves."""
        outside = {hook.table.name: f"webhook {hook.path}" for hook in self.app.webhooks}
        for route in self.app.routes:
            outside |= {name: f"route {route.method} {route.path}" for name, op in of_code(route.fn).writes
                        if op != "rebuilt"}
        for schedule in self.app.schedules.values():
            poll = getattr(schedule.fn, "__self__", None)
            if isinstance(poll, Poll):
                outside[poll.into.name] = f"poll {schedule.name}"
        outside |= {name: "files" for name, table in self.app.tables.items() if hasattr(table, "storage_name")}
        for action in self.app.actions.values():
            if action.component is not None and action.component.outside:
                outside |= {table.name: f"answers {action.name}" for table in action.into}
        known = {row["name"]: row["taint"] for row in await self.conn.fetch(
            f"select format('%I.%I', schema_name, table_name) as name, taint from {self.run.schema}.watched")}
        for name in self.app.tables:
            sql, what = ".".join(map(quote, self.place(name))), outside.get(name)
            text = "null" if what is None else literal(what)
            if sql in known and known[sql] != what:
                await self.run.step(Step(f"where records of {name} come from",
                                         f"select {self.run.schema}.put_taint({literal(sql)}, {text})"))

    async def _make_models(self, tables: Mapping[str, Wanted]) -> None:
        await self.models.make()
        for model in self.models.all:
            one = tables[model.sql]
            one.can_work, one.difference.alters = not model.failed, model.alters
        declared = {self.place(table.name): table for table in self.app.tables.values()}
        for model in self.models.all:
            table, oid = declared.get((model.schema, model.table)), await self._oid(model.schema, model.table)
            if table is not None and table.shape is not None and oid is not None and not (model.alters or model.failed):
                wrong, notes = check_adopted(table.shape, await inspect(self.conn, oid))
                if wrong:
                    self.plan.refused.append(ModelMismatch(f"{model.schema}.{model.table}", wrong, table.place))
                self.plan.notes += [f"{model.schema}.{model.table}: {note}" for note in notes]

    def _unmade(self) -> set[str]:
        """Names of what would refresh the models that could not be made."""
        app = self.app.name
        return {definition["name"] for model in self.models.all if model.failed
                for definition in (*model.handlers(app, self.place), *model.schedules(app))}

    def sql_steps(self) -> list[SqlStep]:
        """The SQL that runs later: handlers, and the schedules of files."""
        places = {file.stem: file.name for file in self.run.files}
        found = []
        for kind, definitions in (("handler", self.handlers), ("schedule", self.schedules)):
            for definition in definitions:
                kept = "model" in definition or "model" in (definition.get("options") or {})  # our own SQL
                if definition.get("body") is not None and not kept:
                    name = definition["name"]
                    place = places.get(name) or self.app.place("handler", name)
                    table = definition.get("table", f"{self.run.schema}.tick")
                    found.append(SqlStep(kind, name, definition["body"], place, table, definition.get("params", {})))
        return found

    async def _check(self, wanted: Sequence[Wanted]) -> set[str]:
        """Has Postgres look at the SQL that runs later; the names of what it refuses. Not while columns lack."""
        steps = self.sql_steps()
        if not steps:
            return set()
        altered = {one.sql: [column.name for column in one.spec.columns] for one in wanted
                   if one.spec and (one.difference.alters or one.found is None)} if self.run.dry else {}
        self.known = await sqlcheck.tables(self.run.db, self.conn, self.app_schema, altered)
        wrong, unbuilt = set(), {one.sql for one in wanted if one.unbuilt}
        for step in steps:
            if step.table in unbuilt:                                  # its columns are not known yet
                continue
            reading = step.reading(self.known)
            self.plan.notes += [f"{step.place}, {warning}" for warning in reading.warnings]
            if any(one.difference.alters for one in wanted) and self.run.dry:
                continue
            error = await sqlcheck.check(self.run.db, self.conn, step, self.known)
            if isinstance(error, AntonError):
                self.plan.refused.append(error)
                wrong.add(step.name)
            elif error is not None:
                self.plan.notes.append(error)
        return wrong

    async def _handler(self, definition: dict[str, Any], one: Wanted) -> None:
        since = definition.pop("since")
        app, name = definition["app"], definition["name"]
        state = f"select {self.run.schema}.handler_state($1, $2)"
        known = any([await self.conn.fetchval(state, app, n) for n in (name, definition.get("was"))])
        handles_new = "new" in definition["ops"]
        backfill = f";\n{self._call('backfill', f'{app}.{name}')}" if not known and since == "beginning" else ""
        made = await self._put("handler", "put_handler", definition, one, backfill)
        if made and not known and handles_new and since == "now" and one.rows and await self._may_read(one):
            rows = await self.conn.fetchval(f"select count(*) from (select from {one.sql} limit 1000001) r")
            if rows:
                some = "more than 1,000,000" if rows > 1_000_000 else f"{rows:,}"
                self.plan.notes.append(f"{some} existing rows not handled: anton handlers backfill {name}")

    async def _may_read(self, one: Wanted) -> bool:
        return bool(await self.conn.fetchval("select has_table_privilege($1, 'select')", one.sql))

    async def _put(self, noun: str, function: str, definition: dict[str, Any], one: Wanted | None,
                   more: str = "") -> bool:
        step = Step(f"{noun} {definition['name']}", self._call(function, definition) + more)
        same = f"select {self.run.schema}.handler_state({literal(definition['app'])}, {literal(definition['name'])})"
        try:
            return await self.run.step(step, unless_same=same, table=one.sql if one else "")
        except AntonError as error:
            if self.run.dry and one is not None and (one.difference.alters or one.rows):
                self.plan.steps.append(step)                           # it may need what a step before it makes
                return True
            self.plan.refused.append(error)
            return False

    async def _retire(self) -> None:
        names = sorted([*(definition["name"] for definition in (*self.handlers, *self.schedules)), *self.app.projects])
        rows = await self.conn.fetch(f"select * from {self.run.schema}.vanished($1, $2)", self.app.name, names)
        for row in rows:
            jobs = f"its {row['jobs']:,} jobs are kept" if row["jobs"] else "it has no jobs"
            self.plan.notes.append(f"handler {row['name']} is not in the code any more: it gets no new jobs, {jobs}")
        if rows:
            kept = f"array[{', '.join(literal(name) for name in names)}]::text[]"
            await self.run.step(Step("retire " + ", ".join(row["name"] for row in rows),
                                     f"select {self.run.schema}.retire({literal(self.app.name)}, {kept})"))
        await self.models.retire()

    def _loops(self) -> None:
        """Handlers that can feed each other without end: said, not refused, for a handler may well stop by itself."""
        edges: dict[str, list[tuple[str, str]]] = {}
        builds = {name: found for one in self.app.projects.values()
                  for name, found in one.built_by(self.app_schema).items()}
        for definition in self.handlers:
            handler = self.app.handlers.get(definition["name"])
            written = (writes(handler, self.known) if handler else
                       read(definition["body"], self.known, definition["table"]).writes)
            if definition.get("model"):
                written = {(name, "rebuilt") for name in definition["into_tables"]}
            written = written | builds.get(definition["name"], set())
            for name, op in sorted((name, op) for name, said in written for op in meant([said])):
                for heard in definition["ops"]:
                    schema, table = self.place(name)
                    edges.setdefault(f"{definition['table']} {heard}", []).append(
                        (definition["name"], f"{quote(schema)}.{quote(table)} {op}"))
        for chain in cycles(edges):
            places = [self.app.place("handler", name) for name in chain[1::2]]
            at = ", ".join(place for place in places if place)
            self.plan.notes.append(f"a loop: {' -> '.join(chain)}{f' ({at})' if at else ''}. Unless a handler stops "
                                   "it, its records become dead letters when 32 have led to each other")

    async def _sync(self, name: str, partitioned: bool, one: Wanted | None) -> None:
        if one is not None and not one.can_work:
            return
        settings: tuple[str, ...] = LOCK
        lock = ""
        if partitioned and await self.conn.fetchval("select has_table_privilege($1, 'update, delete, truncate')", name):
            settings = (*LOCK, f"statement_timeout = '{LOCK_TIMEOUT}'")  # for all partitions together
            lock = f"lock table {name} in share row exclusive mode;\nset local statement_timeout = 0;\n"
        body = f"{lock}select {self.run.schema}.sync_triggers({self.run.schema}.watch({literal(name)}))"
        altered = one is not None and bool(one.difference.alters)
        same = f"select {self.run.schema}.table_state({literal(name)})"
        try:
            await self.run.step(Step(f"triggers of {name}", body, settings), table=name, release=True,
                                only_plan=altered, unless_same="" if altered else same)
        except AntonError as error:
            if one is None:
                self.plan.notes.append(f"triggers of {name}: {error}")  # another app's: not ours to mend
            else:
                self.plan.refused.append(error)


def slip(name: str, known: Sequence[str]) -> str | None:
    """The known name that `name` is most likely a slip of: two letters away at most; digits, short names are meant."""
    def letters(text: str) -> str:
        return re.sub(r"\d+", "", text)

    close = [other for other in known if letters(other) != letters(name) and 0 < distance(name, other) <= 2
             and len(name) > 3 and len(other) > 3]
    return min(close, key=lambda other: distance(name, other), default=None)
