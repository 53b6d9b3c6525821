"""Later: debounce= makes one call of many changes, delay= and at= put events off. The tests move the clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from anton import Table, transaction
from anton.app import declaring
from anton.errors import BadOption
from anton.testing import TestApp


class Desk:
    """An app whose handlers note what they are called with."""

    def __init__(self, app: TestApp) -> None:
        self.app = app
        self.calls: list[Any] = []
        with declaring(app.app):
            self.orders = Table("orders")

    def listen(self, event: str, name: str = "note", **options: Any) -> None:
        with declaring(self.app.app):
            def note(order: Any) -> None:
                self.calls.append((order["id"], order["n"]))

            getattr(self.orders, event)(each=True, name=name, **options)(note)
        self.app.migrate()

    def sql(self, text: str) -> Any:
        rows = self.app._fetch(text)
        return rows[0][0] if rows else None

    def took(self) -> list[Any]:
        calls, self.calls[:] = sorted(self.calls), []
        return calls


@pytest.fixture
def desk(app: TestApp) -> Desk:
    return Desk(app)


def test_a_record_that_changes_again_is_handled_once_with_its_latest_state(desk: Desk) -> None:
    desk.listen("on_updated_records", debounce="2s", max_wait="30s")
    one, two = desk.orders.append({"n": 0}), desk.orders.append({"n": 0})
    for n in range(1, 4):
        desk.orders.select(id=one.id).update(n=n)
        desk.app.advance("1s")
    desk.orders.select(id=two.id).update(n=9)
    assert desk.took() == []
    desk.app.advance("1s")
    assert desk.took() == [(one.id, 3)]
    desk.app.advance("1s")
    assert desk.took() == [(two.id, 9)]


def test_a_delayed_row_is_there_now_and_handled_in_its_time(desk: Desk) -> None:
    desk.listen("on_new_records")
    later = desk.orders.append({"n": 1}, delay="1h")
    now = desk.orders.append({"n": 2})
    desk.app.run()
    assert desk.took() == [(now.id, 2)] and desk.orders.select().count() == 2
    desk.app.advance("59m")
    assert desk.took() == []
    desk.app.advance("1m")
    assert desk.took() == [(later.id, 1)]
