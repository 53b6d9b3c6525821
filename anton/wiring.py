"""Wiring: the one graph of an app, from its declarations, its SQL, its database, and what others add.

    wired = wire(app, told)            told: await ask(db, conn); None: from the code alone
    wired.graph.text()
    wired.columns_text("revenue")      each column of a table, what it comes from, and what comes of it

An object in app.graphed adds its own nodes, edges and columns: it has graph() -> Part, as a dbt project does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import asyncpg

from anton import sqlfile
from anton.app import App
from anton.calls import Calls
from anton.columns import MODELLESS
from anton.component import Component
from anton.db import Conn, Database, quote, split_name
from anton.edges import Uses, named, of_code, read, sqlread, uses
from anton.errors import NotMigrated, UnknownTable
from anton.files import Files
from anton.graph import Graph, Node, Part
from anton.outbox import Action
from anton.poll import Poll
from anton.sqlfile import SqlFile
from anton.status import Row
from anton.status import ask as rows_of

if TYPE_CHECKING:
    from anton.lineage import Column, Reading, Tables

CHANGES = ("new", "updated", "deleted")


@dataclass
class Told:
    """What the database says: tables and views, who listens, who was seen to write. schema: of unqualified names."""

    schema: str
    relations: list[Row]
    listeners: list[Row]
    seen: list[Row]


async def ask(db: Database, conn: Conn) -> Told:
    """Asks the database. Raises NotMigrated and the like."""
    try:
        schema = await db.call_value(conn, "setting", "app_schema")
        return Told(schema, *[await rows_of(db, conn, name) for name in ("relations", "listeners", "seen")])
    except (asyncpg.InvalidSchemaNameError, asyncpg.UndefinedFunctionError) as error:
        raise NotMigrated(db.schema, db.name) from error


def wire(app: App, told: Told | None = None) -> Wiring:
    """The graph of an app."""
    wired = Wiring(app, told)
    wired.build()
    return wired


class Wiring:
    """The graph, with which column comes from which: columns[table, column] = {id of the step: its sources}."""

    def __init__(self, app: App, told: Told | None) -> None:
        self.app, self.told, self.graph = app, told, Graph()
        self.default = told.schema if told else "public"
        self.columns: dict[Column, dict[str, set[Column]]] = {}
        self.files = sqlfile.read(app.folder / "sql")
        self.tables = self._tables()
        self.senders = {action.sender.name for action in app.actions.values()}

    # Names

    def sql_name(self, name: str) -> str:
        """A table as users write it, with its schema, quoted: orders -> public.orders."""
        schema, table = split_name(name)
        return f"{quote(schema or self.default)}.{quote(table)}"

    def shown(self, name: str) -> str:
        """A table for people: public.orders -> orders."""
        return self.sql_name(name).removeprefix(f"{quote(self.default)}.")

    def id_of(self, name: str) -> str:
        """The id of a table or view."""
        shown = self.shown(name)
        return f"view:{shown}" if f"view:{shown}" in self.graph.nodes else f"table:{shown}"

    # What there is

    def _tables(self) -> Tables:
        """All that SQL may name, of the declarations, of the database or of the app's files."""
        relations = self.told.relations if self.told else ()
        known: dict[str, list[str]] = {row["name"]: row["columns"] for row in relations}
        for table in self.app.tables.values():
            columns = table.shape.table_columns if table.shape else MODELLESS
            known.setdefault(self.sql_name(table.name), [column.name for column in columns])
        for file in self.files:
            if file.kind == "model":
                known.setdefault(self.sql_name(file.stem), [])
        texts = [file.text for file in (*sqlfile.read(self.app.folder / "migrations"), *self.files) if not file.kind]
        made = sqlread().Tables(known, self.default)
        for text in texts if self.told is None else ():
            reading = read(text, made)
            if reading.makes:
                for name in reading.makes:
                    known.setdefault(name, [column for table, column in reading.fills if table == name])
                made = sqlread().Tables(known, self.default)
        return made  # type: ignore[no-any-return]

    def build(self) -> None:
        for table in self.app.tables.values():
            if isinstance(table, Calls):
                continue
            self.graph.add(Node("table", self.shown(table.name), self.app.name, table.place))
        for file in self.files:
            if not file.kind:
                self._plain(file)
        self._views()
        self._comes_in()
        for action in self.app.actions.values():
            node = Node("action", action.name, self.app.name, action.place)
            self._uses(node, Uses({(table.name, "new") for table in action.into}))
        for handler in self.app.handlers.values():
            if handler.name in self.senders:                                # it is the action
                continue
            node = Node("handler", handler.name, self.app.name, handler.place)
            self._listens(node, handler.table.name, handler.ops)
            self._uses(node, uses(handler, self.tables))
            if handler.body is not None:
                self._reading(node, read(handler.body, self.tables, self.sql_name(handler.table.name)))
            if isinstance(handler.component, Component | Action):
                self._acts(node, handler.component)
            elif handler.fn is not None:
                self._sends(node, handler.fn)
        for file in self.files:
            self._file(file)
        self._told()
        for one in self.app.graphed:
            self._part(one.graph())

    def _acts(self, node: Node, by: Component | Action) -> None:
        """A component that acts, or an action on a table."""
        if isinstance(by, Component) and not by.acts:
            return
        made = next((one for one in self.app.actions.values() if by in (one, one.component)), None)
        about = by.service if isinstance(by, Component) else ""
        action = Node("action", made.name if made else by.name, self.app.name, about=about)
        self.graph.add(action)
        self.graph.join(node.id, action.id)

    def _sends(self, node: Node, fn: Callable[..., Any]) -> None:
        """Actions that a function names."""
        for name in named(fn, Action):
            self.graph.join(node.id, f"action:{name}")

    def _comes_in(self) -> None:
        """Routes, webhooks, schedules, polls, files."""
        for route in self.app.routes:
            node = Node("route", f"{route.method} {route.path}", self.app.name, route.place)
            self._uses(node, of_code(route.fn, self.tables))
            self._sends(node, route.fn)
        for hook in self.app.webhooks:
            self._uses(Node("webhook", hook.path, self.app.name, hook.place), Uses({(hook.table.name, "new")}))
        scans = set()
        for table in self.app.tables.values():
            if isinstance(table, Files):
                scans.add(f"scan_{table.name}")
                node = Node("files", f"{table.storage_name}/{table.pattern}", self.app.name, table.place)
                self._uses(node, Uses({(table.name, op) for op in CHANGES}))
        for schedule in self.app.schedules.values():
            poll = getattr(schedule.fn, "__self__", None)
            if schedule.name in scans:
                continue
            if isinstance(poll, Poll):
                self._uses(Node("poll", schedule.name, self.app.name, schedule.place, schedule.title),
                           Uses({(poll.into.name, "new")}))
            else:
                node = Node("schedule", schedule.name, self.app.name, schedule.place, schedule.title)
                self._uses(node, of_code(schedule.fn, self.tables))
                self._sends(node, schedule.fn)

    def _listens(self, node: Node, table: str, ops: Iterable[str]) -> None:
        self.graph.add(node)
        self.graph.join(self.id_of(table), node.id, *ops)

    def _uses(self, node: Node, what: Uses) -> None:
        self.graph.add(node)
        for table, op in sorted(what.writes):
            self.graph.join(node.id, self.id_of(table), op)
        for table in sorted(what.reads):
            if (self.id_of(table), node.id) not in self.graph.edges:   # it listens to it already
                self.graph.join(self.id_of(table), node.id, "reads")
        for table in sorted(what.names):
            id = self.id_of(table)
            if (id, node.id) not in self.graph.edges and (node.id, id) not in self.graph.edges:
                self.graph.join(id, node.id, "uses")

    # SQL

    def _reading(self, node: Node, reading: Reading, listens: str = "") -> None:
        self._uses(node, Uses(reading.writes, reading.reads))
        for (table, column), sources in reading.fills.items():
            self._fill(table, column, node.id, sources)
        for name in sorted(reading.calls):
            if f"function:{name}" in self.graph.nodes:
                self.graph.join(node.id, f"function:{name}", "calls")
        self.graph.notes += [f"{node.place}, {warning}" for warning in reading.warnings]

    def _fill(self, table: str, column: str, by: str, sources: Iterable[Column]) -> None:
        mine = self.columns.setdefault((self.shown(table), column), {}).setdefault(by, set())
        mine |= {(self.shown(name), one) for name, one in sources}

    def _plain(self, file: SqlFile) -> None:
        """SQL that migrate runs: what it makes is there from then on."""
        reading = read(file.text, self.tables)
        for name, kind in reading.makes.items():
            self.graph.add(Node(kind, self.shown(name), self.app.name, file.name))
        for name, (reads, writes) in reading.bodies.items():
            self._uses(Node("function", name, self.app.name, file.name), Uses(writes, reads))
        views = [name for name, kind in reading.makes.items() if kind == "view"]
        for view in views:
            of = {table for (made, _), sources in reading.fills.items() if made == view for table, _ in sources}
            for source in sorted(of | (reading.reads if len(views) == 1 else set())):
                self.graph.join(self.id_of(source), self.id_of(view), "reads")
        for (table, column), sources in reading.fills.items():
            self._fill(table, column, self.id_of(table), sources)
        if reading.writes:
            self._uses(Node("sql", file.name, self.app.name, file.name), Uses(reading.writes))
        self.graph.notes += [f"{file.name}, {warning}" for warning in reading.warnings]

    def _views(self) -> None:
        """Views of the database that are over tables of the graph, whoever made them."""
        views = {row["name"]: read(row["query"], self.tables) for row in (self.told.relations if self.told else ())
                 if row["query"]}
        there = {self.sql_name(node.name) for node in self.graph.nodes.values() if node.kind in ("table", "view")}
        grown = True
        while grown:
            grown = False
            for name, reading in views.items():
                if name not in there and reading.reads & there:
                    there.add(name)
                    grown = True
        for name in views.keys() & there:
            self.graph.add(Node("view", self.shown(name)))
        for name in sorted(views.keys() & there):
            node = self.graph.nodes[f"view:{self.shown(name)}"]
            self._uses(node, Uses(set(), views[name].reads))
            for column, sources in views[name].outputs.items():
                self._fill(name, column, node.id, sources)

    def _file(self, file: SqlFile) -> None:
        """A handler, schedule or model of sql/."""
        if file.kind == "handler":
            made = sqlfile.handler(file, self.app.name)
            node = Node("handler", file.stem, self.app.name, file.name)
            self._listens(node, made["table"], made["ops"])
            self._uses(node, Uses({(table, "new") for table in made.get("into_tables", ())}))
            self._reading(node, read(file.text, self.tables, self.sql_name(made["table"])))
        elif file.kind == "schedule":
            about = file.header.get("title", file.header.get("cron", ""))
            self._reading(Node("schedule", file.stem, self.app.name, file.name, about), read(file.text, self.tables))
        elif file.kind == "model":
            self._model(file)

    def _model(self, file: SqlFile) -> None:
        refresh = [word for word in re.split(r"\s*,\s*", file.header.get("refresh", "")) if word]
        times = [word for word in refresh if not re.fullmatch(r'[A-Za-z_"][\w."]*', word)]
        node = Node("model", file.stem, self.app.name, file.name, ", ".join(times))
        self.graph.add(Node("table", self.shown(file.stem), self.app.name, file.name))
        for table in refresh:
            if table not in times:
                self._listens(node, table, CHANGES)
        reading = read(file.text, self.tables)
        self._reading(node, reading)
        self._uses(node, Uses({(file.stem, op) for op in (*CHANGES, "rebuilt")}))
        for column, sources in reading.outputs.items():
            self._fill(file.stem, column, node.id, sources)

    # What the database adds

    def _told(self) -> None:
        names: dict[tuple[str, str], str] = {}
        for row in self.told.listeners if self.told else ():
            own = row["app"] == self.app.name
            name = row["name"] if own else f"{row['app']}.{row['name']}"
            refreshed = re.fullmatch(r"refresh (\S+)", row["body"] or "")
            if refreshed:                                              # what keeps a model, one for each table and time
                names[row["app"], row["name"]] = self._kept(row, self.shown(refreshed[1]), own)
                continue
            ids = [id for kind in ("handler", "schedule", "poll", "model")
                   if (id := f"{kind}:{name}") in self.graph.nodes]
            if own and row["name"] in self.senders:
                continue
            names[row["app"], row["name"]] = ids[0] if ids else f"{'schedule' if row['cron'] else 'handler'}:{name}"
            if not ids and not (own and name.startswith("scan_")):
                self._listener(row, name)
        for row in self.told.seen if self.told else ():
            by = names.get((row["app"], row["handler"]))
            if by in self.graph.nodes:
                self.graph.join(by, self.id_of(row["table"]), seen=True)

    def _kept(self, row: Row, model: str, own: bool) -> str:
        node = Node("model", model, row["app"])
        if not own:                                                    # else its file said it
            self.graph.add(node)
            if not row["cron"]:
                self._listens(node, row["table"], CHANGES)
            self._uses(node, Uses({(model, op) for op in (*CHANGES, "rebuilt")}))
        return node.id

    def _listener(self, row: Row, name: str) -> None:
        """One of psql or of another app, or one that the code has no more."""
        node = Node("schedule" if row["cron"] else "handler", name, row["app"], about=row["title"] or "")
        if not row["cron"]:
            self._listens(node, row["table"], row["ops"])
        self._uses(node, Uses({(table, "new") for table in row["into_tables"]}))
        if row["body"] is not None:
            self._reading(node, read(row["body"], self.tables, None if row["cron"] else row["table"]))

    def _part(self, part: Part) -> None:
        self.graph.add(*part.nodes)
        for source, target, *how in part.edges:
            self.graph.join(source, target, *how)
        for (table, column), sources in part.columns.items():
            self._fill(table, column, self.id_of(table), sources)
        self.graph.notes += part.notes

    # Columns

    def columns_of(self, table: str) -> list[Row]:
        """Each column of a table or view: from: [{table, column, by}], to: the same. Raises UnknownTable."""
        name = self.shown(table)
        known = dict.fromkeys(self.tables.columns.get(self.sql_name(table), ()))
        known |= {column: None for at, column in self.columns if at == name}
        if not known and self.id_of(table) not in self.graph.nodes:
            raise UnknownTable(table, [self.shown(one) for one in self.tables.columns])
        return [{"column": column, "from": self._sources((name, column)), "to": [
            {"table": at, "column": one, "by": by} for (at, one), steps in sorted(self.columns.items())
            for by, sources in sorted(steps.items()) if sources & {(name, column), (name, "*")}]} for column in known]

    def _sources(self, column: Column) -> list[Row]:
        steps = sorted(self.columns.get(column, {}).items())
        return [{"table": table, "column": one, "by": by} for by, sources in steps for table, one in sorted(sources)]

    def columns_text(self, table: str) -> str:
        """For people: what each column comes from, all the way, and where it goes."""
        lines = []
        for row in self.columns_of(table):
            lines.append(row["column"])
            lines += self._back((self.shown(table), row["column"]), "  ", ())
            lines += [f"  -> {one['table']}.{one['column']}  ({self._step(one['by'])})" for one in row["to"]]
        return "\n".join(lines)

    def _back(self, column: Column, indent: str, seen: tuple[Column, ...]) -> list[str]:
        lines = []
        for one in self._sources(column):
            before = (one["table"], one["column"])
            lines.append(f"{indent}<- {one['table']}.{one['column']}  ({self._step(one['by'])})")
            if before not in (*seen, column):
                lines += self._back(before, indent + "  ", (*seen, column))
        return lines

    def _step(self, id: str) -> str:
        node = self.graph.nodes.get(id)
        return id if node is None else " ".join((node.kind, node.name, *([node.place] if node.place else ())))
