"""Model: a Table that is kept by a SELECT, in a file of the app's sql/, as migrate makes it.

    -- anton: model
    -- refresh: orders, @hourly
    -- key: day
    select created_at::date as day, sum(total) as total from orders group by 1

A handler on each table of `refresh` and a schedule for each time of it rebuild the table by difference, as
sql/70_model.sql does. The table is made from the SELECT's columns and built by migrate, before any handler listens to
it: what was there at first is no event.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import asyncpg

from anton import due, sqlcheck
from anton.db import literal, quote
from anton.ddl import Found, inspect
from anton.errors import BadOption, DatabaseError, MigrationError, MigrationFailed, SqlRefused, UnknownOption
from anton.plan import LOCK_TIMEOUT, Step
from anton.sqlcheck import SqlStep
from anton.sqlfile import SqlFile, SqlModel
from anton.sqlfile import model as parsed
from anton.steps import Steps

if TYPE_CHECKING:
    from anton.groups import Functions

OPS = ("new", "updated", "deleted", "truncate")
BATCH = 1000  # records of one job; a refresh takes all jobs there are

_FUNCTIONS = """
select lower(p.proname) as name, bool_or(p.prokind = 'a') as aggregate, bool_or(p.proretset) as sets,
       bool_or(n.nspname <> 'pg_catalog' and p.prokind = 'f' and p.provolatile <> 'i') as opaque
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace
 where p.prokind = 'a' or p.proretset or n.nspname not in ('pg_catalog', 'information_schema') group by 1"""
_COLUMNS = """
select n.nspname::text as schema, c.relname::text as name, c.relkind::text as kind,
       array_agg(a.attname::text order by a.attnum) as columns,
       array_agg(format_type(a.atttypid, null) order by a.attnum) as types
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
  join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where c.oid = any ($1::bigint[]::oid[]) group by 1, 2, 3"""


@dataclass
class Model:
    """A declared model. schema, table: where its rows are. found: its table as it is, None when it is to be made."""

    said: SqlModel
    schema: str
    table: str
    found: Found | None = None
    alters: list[str] = field(default_factory=list)
    failed: bool = False                                               # it could not be made or built

    @property
    def sql(self) -> str:
        """Its table's name for SQL."""
        return f"{quote(self.schema)}.{quote(self.table)}"

    def handlers(self, app: str, place: Callable[[str], tuple[str, str]]) -> list[dict[str, Any]]:
        """What put_handler() takes for each table it is refreshed by."""
        said, read = self.said, {table: "change" for table, _ in self.said.incremental}
        return [{"app": app, "name": f"{said.name}:{name}", "table": name, "kind": "sql", "ops": list(OPS),
                 "read": read.get(name, "now"), "body": f"refresh {self.sql}", "batch": BATCH, "concurrency": 1,
                 "timeout": said.timeout, "into_tables": [self.sql], "model": said.name, "since": "model"}
                for name in said.tables]

    def schedules(self, app: str) -> list[dict[str, Any]]:
        """What put_schedule() takes for each time of it: of all rows, whatever has changed."""
        said = self.said
        return [{"app": app, "name": f"{said.name}:{cron}", "cron": due.normal(cron, said.file), "tz": said.tz,
                 "title": cron, "kind": "sql", "body": f"refresh {self.sql}", "overlap": "skip",
                 "options": {"model": said.name, "timeout": said.timeout, "into_tables": [self.sql]}}
                for cron in said.crons]


class Models:
    """The models of one app, each after those that it reads. place: schema and table of a name as users write it."""

    def __init__(self, run: Steps, files: Iterable[SqlFile], place: Callable[[str], tuple[str, str]],
                 app_schema: str) -> None:
        self.run, self.conn, self.plan, self.app = run, run.conn, run.plan, run.app.name
        self.place, self.app_schema = place, app_schema
        self.all = _in_order([Model(said, *place(said.name)) for said in map(parsed, files)], place)

    async def examine(self) -> None:
        """Looks at their tables. Refuses a name that another table, or another app's model, has."""
        for model in self.all:
            await self._rename(model)
            row = await self.conn.fetchrow(
                "select c.oid, c.relkind in ('r', 'p') as plain, m.app as of_app, m.name as of_model "
                "  from pg_class c join pg_namespace n on n.oid = c.relnamespace "
                f" left join {self.run.schema}.watched w on w.schema_name = n.nspname and w.table_name = c.relname "
                f" left join {self.run.schema}.model m on m.table_id = w.id "
                " where n.nspname = $1 and c.relname = $2", model.schema, model.table)
            if row is None:
                continue
            if (row["of_app"], row["of_model"]) != (self.app, model.said.name) or not row["plain"]:
                owner = f'kept by the model "{row["of_model"]}" of app "{row["of_app"]}"' if row["of_model"] else \
                    "none that a model keeps"
                self.plan.refused.append(DatabaseError(
                    f'{model.said.file}: there is a table "{model.schema}.{model.table}", and it is {owner}. '
                    "Rename the file, or that table.", table=model.table))
            model.found = await inspect(self.conn, row["oid"])

    async def make(self) -> None:
        """Makes or alters their tables, and notes what each is."""
        for model in self.all:
            try:
                await self._make(model)
            except (MigrationError, BadOption, UnknownOption, SqlRefused) as error:
                if self.run.dry and isinstance(error.__cause__, asyncpg.PostgresError):
                    self.plan.notes.append(f"{error} A plan does not make what it may need.")
                else:
                    self.plan.refused.append(error)
                model.failed = True

    async def retire(self) -> None:
        """Models that are not in the app any more keep their tables, and are refreshed no more."""
        names = [model.said.name for model in self.all]
        rows = await self.conn.fetch(
            f"select name from {self.run.schema}.model where app = $1 and missing_at is null and name <> all ($2)",
            self.app, names)
        for row in rows:
            self.plan.notes.append(f"model {row['name']} is not in sql/ any more: its table stays as it is, and is "
                                   "an ordinary one from now on")
        if rows:
            kept = f"array[{', '.join(map(literal, names))}]::text[]"
            await self.run.step(Step("retire the models " + ", ".join(row["name"] for row in rows),
                                     f"select {self.run.schema}.retire_models({literal(self.app)}, {kept})"))

    async def build(self, model: Model, sync: Callable[[], Any]) -> None:
        """Fills a table that is new before its triggers are put, any other one after: those changes are events."""
        first = model.found is None or not await self._built(model)
        step = Step(f"build model {model.said.name}", f"select {self.run.schema}.build_model("
                    f"{literal(self.app)}, {literal(model.said.name)})", ("statement_timeout = 0",))
        stale = model.failed or await self.conn.fetchval(
            f"select stale from {self.run.schema}.model where app = $1 and name = $2", self.app, model.said.name)
        if not first:
            await sync()
        if stale is not False and not model.failed:
            try:
                await self.run.step(step, table=model.sql, only_plan=True)
            except (MigrationFailed, DatabaseError) as error:
                self.plan.refused.append(error)
                model.failed = True
        if first and not model.failed:
            await sync()

    async def _built(self, model: Model) -> bool:
        return bool(await self.conn.fetchval(
            f"select built_at is not null from {self.run.schema}.model where app = $1 and name = $2",
            self.app, model.said.name))

    # --- one model

    async def _rename(self, model: Model) -> None:
        """With its table and its handlers, when it is known by its name of before alone."""
        said = model.said
        if said.was and await self.conn.fetchval(
                "select count(*) filter (where name = $2) = 1 and count(*) filter (where name = $3) = 0 "
                f"from {self.run.schema}.model where app = $1", self.app, said.was, said.name):
            put = f"select {self.run.schema}.rename_model({', '.join(map(literal, (self.app, said.was, said.name)))})"
            await self.run.step(Step(f"model {said.was} becomes {said.name}", put,
                                     (f"lock_timeout = '{LOCK_TIMEOUT}'",)), table=model.sql)

    async def _make(self, model: Model) -> None:
        said = model.said
        columns = await self._columns(model)
        for name in said.key:
            if name not in columns:
                raise UnknownOption(name, f"key: of {said.file}, whose SELECT gives other columns", list(columns))
        groups, distinct = await self._examine(model, columns)
        if model.found is None:
            lines = [f"{quote(name)} {type}" for name, type in columns.items()]
            lines.append(f"primary key ({', '.join(map(quote, said.key))})")
            body = f"create table {model.sql} (\n  " + ",\n  ".join(lines) + "\n)"
            put = self._put(said, model, groups, distinct)
            await self.run.step(Step(f"table {model.schema}.{model.table}, of {said.file}", f"{body};\n{put}"),
                                table=model.sql)
            return
        model.alters = self._alters(model, model.found, columns)
        for alter in model.alters:
            await self.run.step(Step(f"table {model.schema}.{model.table}, of {said.file}", alter,
                                     (f"lock_timeout = '{LOCK_TIMEOUT}'",)), table=model.sql, only_plan=True)
        same = f"select {self.run.schema}.model_state({literal(self.app)}, {literal(said.name)})"
        await self.run.step(Step(f"model {said.name}", self._put(said, model, groups, distinct)), unless_same=same)

    def _put(self, said: SqlModel, model: Model, groups: Sequence[Mapping[str, str]], distinct: bool) -> str:
        names = [f"{quote(schema)}.{quote(table)}" for schema, table in map(self.place, said.tables)]
        definition = {"app": self.app, "name": said.name, "table": model.sql, "body": said.body, "key": list(said.key),
                      "refresh": [*names, *said.crons], "incremental": list(groups), "distinct_keys": distinct,
                      "max_wait": said.max_wait}
        text = json.dumps(definition, ensure_ascii=False, sort_keys=True)
        return f"select {self.run.schema}.put_model({literal(text)}::jsonb)"

    def _alters(self, model: Model, found: Found, columns: Mapping[str, str]) -> list[str]:
        """What the table lacks. A column of another type is made anew: its values are computed anyway."""
        said, have = model.said, {name: attr.type for name, attr in found.columns.items()}
        changed = [name for name in have if have[name] != columns.get(name)]
        if found.key != said.key or set(changed) & set(said.key):
            raise MigrationError(f"{said.file}: the key of its table is ({', '.join(found.key)}), and is to be "
                                 f"({', '.join(said.key)}), or of another type. For that the table is made anew: "
                                 f"drop table {model.sql}; and run again: anton migrate", name=said.name)
        parts = [f"drop column {quote(name)}" for name in changed]
        parts += [f"add column {quote(name)} {columns[name]}" for name in columns
                  if name not in have or name in changed]
        return [f"alter table {model.sql} {', '.join(parts)}"] if parts else []

    async def _columns(self, model: Model) -> dict[str, str]:
        """Name to type of what its SELECT gives. Raises SqlRefused, or MigrationFailed."""
        said, made = model.said, "create temp view anton_model as\n"
        trial = self.conn.transaction()
        await trial.start()
        try:
            await self.conn.execute(f"set local search_path = {quote(self.app_schema)}, pg_catalog, pg_temp")
            await self.conn.execute(made + said.body)
            rows = await self.conn.fetch(
                "select attname::text as name, format_type(atttypid, atttypmod) as type from pg_attribute "
                " where attrelid = 'pg_temp.anton_model'::regclass order by attnum")
            return {row["name"]: row["type"] for row in rows}
        except asyncpg.PostgresError as error:
            wrong = error
        finally:
            await trial.rollback()
        at = int(getattr(wrong, "position", None) or 0) - 1 - len(made)
        step = SqlStep("model", said.name, "\n" * said.line + said.body, said.file)
        known = await sqlcheck.tables(self.run.db, self.conn, self.app_schema)
        refused = sqlcheck.refusal(step, wrong, known, said.line + at if at >= 0 else None)
        raise refused or MigrationFailed(said.file, said.line + 1, said.body.splitlines()[0], wrong) from wrong

    async def _examine(self, model: Model, outputs: Mapping[str, str]) -> tuple[list[dict[str, str]], bool]:
        """The groups of `incremental`, and whether the SELECT's form tells its keys apart. Notes what it also reads."""
        said, groups_of = model.said, importlib.import_module("anton.groups")  # sqlglot: only where there are models
        try:
            tree = groups_of.parse(said.body)
            names = {self._full(one) for one in groups_of.tables(tree)}
            heard = set(map(self.place, said.tables))
            also = sorted(f"{schema}.{table}" for schema, table in names - heard if schema not in _SYSTEM)
            if also and said.tables:
                self.plan.notes.append(f"model {said.name} also reads {', '.join(also)}, whose changes do not refresh "
                                       f"it: {said.file} has -- refresh: {', '.join((*said.tables, *said.crons))}")
            kinds, columns = await self._read(names)
            select = groups_of.Select(tree, self.app_schema, columns, await self._functions())
        except groups_of.Cannot as why:
            if said.incremental:
                raise self._refused(said, str(why)) from None
            return [], False
        groups = []
        for table, column in said.incremental:
            schema, name = self.place(table)
            views = sorted(one for (_, one), kind in kinds.items() if kind not in "rp")
            if views:
                raise self._refused(said, f"it reads {views[0]}, which is a view and may read {name}")
            if column not in columns.get((schema, name), {}):
                raise UnknownOption(column, f"incremental: of {said.file}", list(columns.get((schema, name), ())))
            try:
                found = select.outputs((schema, name), column)
            except groups_of.Cannot as why:
                raise self._refused(said, str(why)) from None
            if not found & set(outputs):
                raise self._refused(said, f"{column} is none of its columns")
            output = min(found & set(outputs), key=lambda one: (one not in said.key, one))
            groups.append({"table": f"{quote(schema)}.{quote(name)}", "column": column, "output": output})
        return groups, select.tells_apart(said.key)

    def _refused(self, said: SqlModel, why: str) -> MigrationError:
        given = ", ".join(f"{table}.{column}" for table, column in said.incremental)
        return MigrationError(f'{said.file}: "-- incremental: {given}" cannot be right: {why}. Without that line '
                              "every refresh looks at all rows, and is right.", name=said.name)

    def _full(self, name: tuple[str, str]) -> tuple[str, str]:
        return name[0] or self.app_schema, name[1]

    async def _read(self, names: Iterable[tuple[str, str]]) -> tuple[dict[tuple[str, str], str],
                                                                     dict[tuple[str, str], dict[str, str]]]:
        oids = [row[0] for row in await self.conn.fetch(
            "select to_regclass(n)::oid::bigint from unnest($1::text[]) n where to_regclass(n) is not null",
            [f"{quote(schema)}.{quote(table)}" for schema, table in names])]
        rows = await self.conn.fetch(_COLUMNS, oids)
        return ({(row["schema"], row["name"]): row["kind"] for row in rows},
                {(row["schema"], row["name"]): dict(zip(row["columns"], row["types"], strict=True)) for row in rows})

    async def _functions(self) -> Functions:
        rows = await self.conn.fetch(_FUNCTIONS)
        made: Functions = importlib.import_module("anton.groups").Functions(
            *(frozenset(row["name"] for row in rows if row[kind]) for kind in ("aggregate", "sets", "opaque")))
        return made


_SYSTEM = ("pg_catalog", "information_schema")


def _in_order(models: Sequence[Model], place: Callable[[str], tuple[str, str]]) -> list[Model]:
    """Each after those that it is refreshed by. Raises MigrationError for a circle."""
    by_table = {(model.schema, model.table): model for model in models}
    ordered: list[Model] = []

    def walk(model: Model, path: tuple[Model, ...]) -> None:
        if model in path:
            names = " -> ".join(one.said.name for one in (*path[path.index(model):], model))
            raise MigrationError(f"models refresh each other in a circle: {names}. Take one of these out of the "
                                 f"-- refresh: of {model.said.file}.", name=model.said.name)
        if model not in ordered:
            for name in model.said.tables:
                other = by_table.get(place(name))
                if other is not None:
                    walk(other, (*path, model))
            ordered.append(model)

    for model in models:
        walk(model, ())
    return ordered
