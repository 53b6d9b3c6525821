"""The app that hostile requests are sent to: a route of each kind, which stores what it is sent, and webhooks."""

from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

from fastapi import Form, Header, HTTPException, UploadFile
from pydantic import BaseModel

from anton import Request, Table, Webhook, delete, get, patch, post, put, sql, transaction


class Order(BaseModel):
    id: int | None = None
    customer: str
    total: Decimal = Decimal(1)
    at: datetime | None = None
    tags: list[str] = []
    more: dict[str, Any] = {}
    score: float | None = None
    mark: UUID | None = None


orders, notes = Table("orders", Order, unique=["customer"]), Table("notes")
Webhook("/hook", notes, verify="github", secret="what the senders of chaos sign with")
Webhook("/hooked-orders", orders, verify="github", secret="what the senders of chaos sign with")


@post("/orders", verify=False)
async def create(order: Order) -> Order:
    return orders.append(order)


@get("/orders/{id}")
async def read(id: int) -> Order:
    found = await orders.aget(id)
    if found is None:
        raise HTTPException(404)
    return found


@get("/orders")
def some(customer: str | None = None, since: date | None = None, mark: UUID | None = None, total: Decimal | None = None,
         at: datetime | None = None, limit: int = 10) -> list[Order]:
    given = {"customer": customer, "mark": mark, "total": total, "at": at}
    found = orders.select("at > {since}", since=since) if since is not None else orders.select(
        **{name: value for name, value in given.items() if value is not None})
    return list(found.limit(max(0, min(limit, 10))))


@patch("/orders/{id}", verify=False)
async def change(id: int, total: Decimal, note: str = "") -> int:
    orders.select(id=id).update(total=total)
    notes.append({"about": id, "note": note})
    return 202


@delete("/orders/{id}", verify=False)
def drop(id: int) -> None:
    orders.select(id=id).delete()


@put("/notes/{path:path}", verify=False)
def note(path: str, request: Request, agent: Annotated[str, Header(alias="user-agent")] = "") -> Any:
    return notes.append({"path": path, "agent": agent, "headers": dict(request.headers), "query": dict(request.query),
                         "client": request.client, "got": request.json()})


@post("/anything", verify=False)
async def anything(body: Any) -> Any:
    async with transaction():
        return notes.append({"got": body})


@post("/form", verify=False)
def form(request: Request) -> Any:
    return notes.append(request.form())


@post("/upload", verify=False)
async def upload(file: UploadFile, title: Annotated[str, Form()] = "", n: Annotated[int, Form()] = 0) -> Any:
    return notes.append({"title": title, "n": n, "name": file.filename, "kind": file.content_type,
                         "size": len(await file.read())})


@get("/search")
async def search(q: str, n: int = 0) -> Any:
    return [dict(row) for row in await sql(
        "select id from notes where data ->> 'title' like {q} limit {n}", q=q, n=abs(n))]
