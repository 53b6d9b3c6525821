"""Project: a dbt project of an app, and its models as Tables.

    shop = DbtProject("dbt_project")
    revenue = shop.model("daily_revenue", Revenue)         read only: dbt writes it
    shop.run_when(orders, debounce="2s")                   what is downstream of orders is built when orders change
    revenue.run(upstream=True, gate=True)                  asks for a build; its end is on_rebuilt or on_failed

    @revenue.on_updated_records
    def changed(records): ...

What is asked for waits in dbt_request, commits with what surrounds it, and is worked by the handler dbt:PROJECT
(requests.py). The database and its password are those of Anton; dbt needs no profiles.yml.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import BaseModel

from anton.app import App, current_app, place_of_caller
from anton.columns import MODELLESS, Shape
from anton.db import Conn, Database, quote, split_name
from anton.dbt.lineage import part, relation
from anton.dbt.manifest import Manifest, Node, fingerprint
from anton.dbt.requests import Requests
from anton.dbt.runner import Runner
from anton.duration import duration
from anton.errors import AntonError, BadOption, ConfigError, did_you_mean
from anton.graph import Part
from anton.handler import Handler, interval
from anton.op import Call
from anton.record import ChangeOp, Record
from anton.schedule import cron
from anton.secret import One, reveal
from anton.table import Table
from anton.write import find_scope, transaction

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Length = str | float | timedelta

ATTEMPTS = 5  # of requests when the project cannot be read, or dbt not be run
FORMAT = 2  # of what is kept of a manifest


@dataclass(frozen=True)
class When:
    """A table whose changes ask for a build."""

    name: str
    table: Table[Any]
    debounce: timedelta
    max_wait: timedelta
    place: str


class DbtProject:
    """A folder with a dbt_project.yml.

    folder: seen from the app's. target: dbt's target.name. schema: of its models, default the app's. threads: how
    many models dbt builds at a time. env: more of dbt's environment, for env_var(): values, or env("X"). Raises
    ConfigError, DuplicateName.
    """

    def __init__(self, folder: str | Path = "dbt_project", *, target: str = "dev", schema: str | None = None,
                 threads: int = 4, env: Mapping[str, One] | None = None) -> None:
        of = f'DbtProject("{folder}")'
        self.app: App = current_app()
        self.folder = (self.app.folder / folder).resolve()
        self.target, self.schema, self.threads, self.env = target, schema, threads, dict(env or {})
        self.place = place_of_caller()
        if type(threads) is not int or not 1 <= threads <= 100:
            raise BadOption("threads", threads, of, "a whole number from 1 to 100")
        for option, value in (("target", target), ("schema", schema if schema is not None else "public")):
            if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][\w-]*", value):
                raise BadOption(option, value, of, "a name of letters, digits and _")
        self.name = name_of(self.folder)
        self.handler = f"dbt:{self.name}"
        self.whens: list[When] = []
        self.timed: dict[str, tuple[str, ...]] = {}                    # schedules, and the models that each builds
        self.models: dict[str, DbtModel[Any]] = {}
        self.app.claim_name("handler", self.handler, self.place)
        self.app.projects[self.handler] = self
        self.app.graphed.append(self)
        self._manifest = self._kept()
        self.work = Requests(self)

    @overload
    def model(self, name: str, model: None = None) -> DbtModel[Record]: ...
    @overload
    def model(self, name: str, model: type[M]) -> DbtModel[M]: ...
    def model(self, name: str, model: type[Any] | None = None) -> DbtModel[Any]:
        """A model, seed or snapshot as a Table: dbt's name of it, and a Pydantic model of its records.

        Its key is dbt's: of the contract, of the tests unique and not_null, of unique_key, or meta: {anton_key: …}.
        Whether the project has it is found by migrate.
        """
        if name not in self.models:
            self.models[name] = DbtModel(self, name, model)
        elif model is not None and self.models[name].model is not model:
            raise BadOption("model", model, f'{self!r}.model("{name}")', "the one that it was declared with before")
        return self.models[name]

    def run_when(self, table: Table[Any], *, debounce: Length = "2s", max_wait: Length = "30s") -> None:
        """Builds what is downstream of a table whenever its records change.

        debounce: so long nothing may have changed. max_wait: at the latest so long after the first change. Models whose
        parents turn out not to have changed are left out.
        """
        of = f"{self!r}.run_when"
        if not isinstance(table, Table):
            raise BadOption("table", table, of, "a Table that the project reads")
        quiet, longest = duration(debounce, "debounce", of), duration(max_wait, "max_wait", of)
        if longest < quiet:
            raise BadOption("max_wait", max_wait, of, f"not less than debounce, {debounce}")
        name, place = f"{self.handler} when {table.name}", place_of_caller()
        self.app.claim_name("handler", name, place)
        self.whens.append(When(name, table, quiet, longest, place))

    def run_on(self, times: str, *, models: Sequence[str] = (), upstream: bool = False, gate: bool = False,
               full_refresh: bool = False, tz: str = "UTC") -> None:
        """Builds by the clock: five cron fields. models: dbt's names; none: all."""
        def build() -> None:
            self.run(*models, upstream=upstream, gate=gate, full_refresh=full_refresh)

        name = f"{self.handler} at {times}" + (f" {' '.join(models)}" if models else "")
        cron(times, name=name, tz=tz)(build)
        self.timed[name] = tuple(models)

    def run(self, *models: str, upstream: bool = False, gate: bool = False, full_refresh: bool = False,
            vars: Mapping[str, Any] | None = None, timeout: Length | None = None) -> None:
        """Asks for a build of these models, or of all; see DbtModel.run()."""
        self._ask({"models": list(models), "upstream": upstream, "gate": gate, "full_refresh": full_refresh,
                   "vars": dict(vars or {}),
                   "timeout": None if timeout is None else interval(duration(timeout, "timeout", f"{self!r}.run"))})

    def _ask(self, what: dict[str, Any]) -> None:
        found = find_scope()
        if found is None:
            with transaction():
                self._ask(what)
            return
        scope, who = found
        db = scope.db

        async def ask(conn: Conn) -> bool:
            await db.call(conn, "dbt_ask", self.app.name, self.name, what)
            return True

        scope.add(Call(f"dbt {self.name}", ask, who))

    # What migrate and the worker ask

    def runner(self, db: Database, schema: str) -> Runner:
        """The child for a database. Not started yet."""
        return Runner(db, self.folder, self.app.folder, name=self.name, target=self.target, schema=schema,
                      threads=self.threads, env=self._environment())

    async def schema_in(self, db: Database) -> str:
        """Where its models go."""
        if self.schema is not None:
            return self.schema
        async with db.conn() as conn:
            return str(await db.call_value(conn, "setting", "app_schema"))

    @property
    def manifest(self) -> Manifest | None:
        """What was known of the project last; None before the first migrate."""
        return self._manifest

    async def examine(self, db: Database, schema: str) -> Manifest:
        """What there is in the project; dbt reads it only when a file of it changed. Raises DbtFailed, ConfigError."""
        if self._manifest is None or self._manifest.facts.get("stamp") != self.stamp(schema):
            runner = await self.work.runner(db, schema)
            facts = await runner.manifest()
            compiled = await runner.invoke(["compile"])                # for columns in the graph; it may fail
            for raw in compiled.raw:
                if raw["node"] in facts["nodes"]:
                    facts["nodes"][raw["node"]]["code"] = raw["code"]
            self.keep(facts, schema)
        assert self._manifest is not None
        self.settle(schema)
        return self._manifest

    def unread(self, place: Callable[[str], tuple[str, str]]) -> list[AntonError]:
        """What run_when() waits for in vain, as the project does not read it. place: schema and name of a table."""
        assert self._manifest is not None
        found: list[AntonError] = []
        for when in self.whens:
            schema, name = place(when.table.name)
            if self._manifest.of_tables([(schema, name)]):
                continue
            known = sorted(f"{one['schema']}.{one['alias']}" for one in self._manifest.sources.values())
            found.append(ConfigError(
                f"{self!r}.run_when({when.table!r}): the project does not read {schema}.{name}: nothing would be built."
                f"{did_you_mean(f'{schema}.{name}', known)} Write a source in models/sources.yml: "
                f"sources: [{{name: app, schema: {schema}, tables: [{{name: {name}}}]}}], and read it by "
                f"{{{{ source('app', '{name}') }}}}. Its sources are {', '.join(known) or 'none'}", place=when.place))
        return found

    def keep(self, facts: Mapping[str, Any], schema: str) -> Manifest:
        """Notes what dbt said of the project, also for the next start."""
        stamped = {**facts, "stamp": self.stamp(schema)}
        self._manifest = Manifest(stamped)
        file = self._file()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.touch(0o600)                                          # what dbt compiled may hold a secret
            part.write_text(json.dumps(stamped))
            part.replace(file)
        except OSError:                                                # a folder that may not be written to
            pass
        self.settle(schema)
        return self._manifest

    def graph(self) -> Part:
        """What it adds to the graph of the app; nothing before the first migrate."""
        if self._manifest is None:
            return Part(notes=[f"{self!r}: anton migrate reads it"])
        default = self._manifest.facts["stamp"][4] if self.schema is None else "public"
        tables = {}
        for table in self.app.tables.values():
            schema, name = split_name(table.name)
            if not isinstance(table, DbtModel):
                tables[f"{quote(schema or default)}.{quote(name)}"] = [
                    column.name for column in (table.shape.table_columns if table.shape else MODELLESS)]
        heard = self._manifest.of_tables(self._place(when.table, default) for when in self.whens)
        found = part(self._manifest, tables, default, self.app.name, heard)
        nodes = {node.name: node for node in self._manifest.nodes.values() if node.materialized != "ephemeral"}
        timed = [(f"schedule:{name}", f"table:{node_name(nodes[model], default)}", "rebuilt")
                 for name, models in self.timed.items() for model in models or nodes if model in nodes]
        return Part(found.nodes, [*found.edges, *timed], found.columns)

    def built_by(self, default: str) -> dict[str, set[tuple[str, str]]]:
        """What a change that run_when() waits for leads to, by the name of its handler: tables that are rebuilt."""
        assert self._manifest is not None
        below = {when.name: self._manifest.downstream(self._manifest.of_tables([self._place(when.table, default)]))
                 for when in self.whens}
        return {name: {(relation(self._manifest, id), "rebuilt") for id in ids} for name, ids in below.items()}

    @staticmethod
    def _place(table: Table[Any], default: str) -> tuple[str, str]:
        schema, name = split_name(table.name)
        return schema or default, name

    def settle(self, schema: str) -> None:
        """Gives its models the names of their relations."""
        for model in self.models.values():
            model.settle(schema)

    def stamp(self, schema: str) -> list[Any]:
        """What the manifest depends on."""
        given = hashlib.sha256(json.dumps(sorted(self._environment().items())).encode()).hexdigest()
        return [FORMAT, *fingerprint(self.folder), self.target, schema, given]

    def _environment(self) -> dict[str, str]:
        """What env= gives dbt, read now; what is not set is left out."""
        return {name: value for name, given in self.env.items() if (value := reveal(given)) is not None}

    def definition(self, app: str) -> dict[str, Any]:
        """What put_dbt_project() takes."""
        return {"app": app, "name": self.handler, "attempts": ATTEMPTS, "backoff": "1 s"}

    def handlers(self, schema: str, of: Any) -> list[dict[str, Any]]:
        """What put_handler() takes for run_when(). schema: the runtime's, quoted. of: gives a table's name for SQL."""
        found = []
        for when in self.whens:
            ops: tuple[ChangeOp, ...] = ("rebuilt",) if isinstance(when.table, DbtModel) else (
                "new", "updated", "deleted", "truncate")
            what = json.dumps({"merge": "when", "tables": [of(when.table)], "debounce": interval(when.debounce),
                               "max_wait": interval(when.max_wait)})
            body = f"select {schema}.dbt_ask({{app}}, {{project}}, {{what}})"
            params: dict[str, tuple[str, str | None]] = {
                "app": ("text", self.app.name), "project": ("text", self.name), "what": ("jsonb", what)}
            handler = Handler(self.app.name, when.name, when.table, ops, "sql", None, when.place, read="now", body=body,
                              params=params)
            found.append({"since": "now", **handler.definition()})
        return found

    def _file(self) -> Path:
        return self.app.folder / ".anton" / "dbt" / f"{self.name}.json"

    def _kept(self) -> Manifest | None:
        try:
            return Manifest(json.loads(self._file().read_text()))
        except (OSError, ValueError, KeyError, TypeError):             # none, or of another Anton
            return None

    def __repr__(self) -> str:
        return f'DbtProject("{self.name}")'


class DbtModel(Table[T]):
    """A dbt model, seed or snapshot as a Table. Made by DbtProject.model(); read only.

    on_rebuilt: each committed build. on_failed: one that failed. on_new_records and its like: the records that differ
    from those before, compared by key in the build's own transaction, also for a plain `dbt run`.
    """

    def __init__(self, project: DbtProject, name: str, model: type[Any] | None) -> None:
        self.project, self.dbt_name = project, name
        node = self.node
        key = list(node.key) if node is not None and node.key and model is not None else None
        if key is not None and not set(key) <= set(model.model_fields if model is not None else ()):
            key = None
        first = next(iter(model.model_fields), None) if model is not None else None
        if model is not None and key is None and "id" not in model.model_fields:
            key = [first] if first is not None else None
        super().__init__(node_name(node, project.schema or "public") if node is not None else (
            f"{project.schema}.{name}" if project.schema else name), model, key=key)  # type: ignore[arg-type]
        self.read_only = f'dbt writes it, as model "{name}" of {project.folder.name}/. Change what it is made of, ' \
                         "and ask for a build: .run()"

    @property
    def node(self) -> Node | None:
        """What dbt says of it, None before the first migrate or when the project does not have it."""
        manifest = self.project.manifest
        if manifest is None:
            return None
        return next((node for node in manifest.nodes.values() if self.dbt_name in (node.name, node.id)), None)

    def run(self, *, upstream: bool = False, gate: bool = False, full_refresh: bool = False,
            vars: Mapping[str, Any] | None = None, timeout: Length | None = None) -> None:
        """Asks for a build, in any handler, route or script; it commits with what surrounds it.

        upstream: what it is made of is built first. gate: its tests run inside of the build, and one that fails rolls
        it back: the old table stays. full_refresh, vars: as dbt's. timeout: of the build, default one hour.
        What is asked for while a build waits or runs becomes one build. Its end is on_rebuilt, or on_failed.
        """
        self.project.run(self.dbt_name, upstream=upstream, gate=gate, full_refresh=full_refresh, vars=vars,
                         timeout=timeout)

    def settle(self, schema: str) -> None:
        """Takes the name of its relation, once that is known."""
        node = self.node
        if node is None:
            return
        name = node_name(node, schema)
        if name != self.name:
            app = self.project.app
            if app.tables.get(self.name) is self:
                del app.tables[self.name]
            app.claim_name("table", name, self.place)
            self.name = name
            app.tables[name] = self
        if self.model is not None and node.key and set(node.key) <= set(self.model.model_fields):
            self.shape = Shape(self.model, list(node.key), name)

    def __repr__(self) -> str:
        return f'{self.project!r}.model("{self.dbt_name}")'


def node_name(node: Node, schema: str) -> str:
    """A node's relation as a Table is named: without its schema where that is the app's."""
    def dotted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"' if "." in name or '"' in name else name

    return dotted(node.alias) if node.schema == schema else f"{dotted(node.schema)}.{dotted(node.alias)}"


def name_of(folder: Path) -> str:
    """The name in a dbt_project.yml. Raises ConfigError."""
    file = folder / "dbt_project.yml"
    try:
        found = re.search(r"""^name\s*:\s*["']?([A-Za-z_]\w*)["']?\s*(?:#.*)?$""", file.read_text(), re.MULTILINE)
    except OSError:
        raise ConfigError(f"there is no dbt_project.yml in {folder}. anton dbt init {folder.name} makes one",
                          folder=str(folder)) from None
    if found is None:
        raise ConfigError(f'{file} has no name. Write one: name: shop', file=str(file))
    return found[1]
