"""Postgres: rows in another database.

    orders.on_new_records(PostgresWrite(env("WAREHOUSE_URL"), "sales.orders", {"id": "{id}", "total": "{total}"},
                                        unique=["id"]))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

import asyncpg
import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, create_model

from anton import Approval, Ctx, Discard, Table
from anton.kit import (
    ActionComponent,
    BadOption,
    Call,
    Env,
    WorldError,
    fill,
    names_of,
    placeholders,
    quote,
    reveal,
    to_json,
)

# The row itself: its values, a constraint, a trigger that refuses it. Other refusals are nobody's row's fault.
_OF_THE_ROW = ("22", "23", "44", "P0", "21")


class Written(BaseModel):
    """What is written."""

    model_config = ConfigDict(extra="forbid")

    table: str
    row: dict[str, Any]


def _of(columns: set[str]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def check(row: dict[str, Any]) -> dict[str, Any]:
        if set(row) != columns:
            raise ValueError(f"its columns are {', '.join(sorted(columns))}, not {', '.join(sorted(row))}")
        return row

    return check


class PostgresWrite(ActionComponent):
    """Writes a row into a table of another Postgres for each record.

    database: its URL, env(…) as it holds a password; what does the writing may do no more there than it must. to:
    "schema.table". row: {column: "{name}"}, where "{name}" alone keeps its type; None: the record. unique: columns that
    a unique index is on: a row that is there already is replaced, and a call whose outcome is not known is made again.
    Without, it is "unsafe": such a call is unknown. into: gets {"table", "row", "record_id"}. timeout: seconds for all
    of it. approve, cap, rate: as of actions. map: the record's names for those in braces. A row that the database
    refuses is a dead letter.
    """

    service = "Postgres"
    example = "order_desk"
    arguments: type[BaseModel] | None = Written

    def __init__(self, database: Env | str, to: str, row: Mapping[str, str] | None = None, *,
                 unique: Sequence[str] = (), timeout: float = 30.0, into: Table[Any] | None = None,
                 approve: Approval | None = None, cap: str | Sequence[str] = (), rate: str | None = None,
                 map: Mapping[str, str] | None = None) -> None:
        super().__init__(secret=database, map=map)
        if not all(to.split(".")) or len(to.split(".")) > 2:
            raise BadOption("to", to, "PostgresWrite", 'a table: "orders" or "sales.orders"')
        if row is not None and not set(unique) <= set(row):
            raise BadOption("unique", unique, "PostgresWrite", f"columns of row=: {', '.join(row)}")
        self.to, self.columns, self.unique, self.timeout = to, row, tuple(unique), timeout
        self.into, self.approve, self.cap, self.rate = into, approve, cap, rate
        self.effect = "idempotent" if unique else "unsafe"
        if row is not None:                                            # no call by psql, and no edit, writes others
            self.arguments = create_model("Written", __base__=Written,
                                          row=(Annotated[dict[str, Any], AfterValidator(_of(set(row)))], ...))

    def unset(self) -> str | None:
        """What to set, when its URL is a reference to what is not there."""
        return self._secret.name if isinstance(self._secret, Env) and not reveal(self._secret) else None

    def credential(self) -> str | None:
        """Its URL, read now."""
        return reveal(self._secret)

    def options(self) -> dict[str, Any]:
        """Options of its Action. Its table is not for an edit, nor for psql, to choose."""
        return {**super().options(), "timeout": self.timeout * 2 + 5, "allow": {"table": [self.to]}, "concurrency": 4}

    def inputs(self) -> Mapping[str, Any]:
        """What row names; of any type."""
        return dict.fromkeys(placeholders(" ".join((self.columns or {}).values())), Any)

    def outputs(self) -> Mapping[str, Any]:
        """What `into` gets."""
        return {"table": str, "row": dict[str, Any], "record_id": Any}

    async def args(self, record: Any, ctx: Ctx) -> dict[str, Any]:
        """The row for one record."""
        whole = {name: record[name] if isinstance(record, Mapping) else getattr(record, name)
                 for name in names_of(record)}
        row = whole if self.columns is None else {
            column: whole[self._name(text)] if self._name(text) in whole else fill(text, record, self.map)
            for column, text in self.columns.items()}
        return {"table": self.to, "row": orjson.loads(to_json(row))}

    def _name(self, text: str) -> str:
        name = text[1:-1] if text.startswith("{") and text.endswith("}") else ""
        return self.map.get(name, name)

    async def send(self, args: Mapping[str, Any], key: str) -> dict[str, Any]:
        """One statement in a connection of its own. A break once it is on its way: nobody knows."""
        try:
            conn = await asyncpg.connect(self.credential(), timeout=self.timeout,
                                         server_settings={"application_name": "anton"})
        except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise WorldError(f"no connection to the database of {self.to}: {type(error).__name__}") from None
        try:
            await conn.execute(self._statement(args["row"]), orjson.dumps(args["row"]).decode(), timeout=self.timeout)
        except asyncpg.PostgresError as error:
            state = error.sqlstate or ""
            if state.startswith(_OF_THE_ROW):
                raise Discard(f"the database refused the row for {self.to}: {error}") from None
            if state.startswith(("08", "57")) or not state:
                raise RuntimeError(f"{self.to}: {error}") from None    # it may have been committed
            raise WorldError(f"the database cannot write to {self.to}: {error}") from None
        finally:
            with suppress(Exception):
                await conn.close(timeout=5)
        return {"key": key}

    def _statement(self, row: Mapping[str, Any]) -> str:
        to = ".".join(map(quote, self.to.split(".")))
        columns = [quote(name) for name in row]
        names = ", ".join(columns)
        text = f"insert into {to} ({names}) select {names} from jsonb_populate_record(null::{to}, $1::text::jsonb)"
        if not self.unique:
            return text
        rest = [one for one in columns if one not in map(quote, self.unique)]
        does = f"update set {', '.join(f'{one} = excluded.{one}' for one in rest)}" if rest else "nothing"
        return f"{text} on conflict ({', '.join(map(quote, self.unique))}) do {does}"

    def row(self, call: Call, result: Any) -> Any:
        """What `into` gets."""
        key = call.subject[1] if call.subject else [None]
        return {"table": call.args["table"], "row": call.args["row"], "record_id": key[0] if len(key) == 1 else None}
