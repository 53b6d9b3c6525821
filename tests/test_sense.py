from collections.abc import Iterator
from typing import Any

import pytest

from anton import Request, Table, Webhook, delete, env, get, patch, post, put
from anton.app import App, declaring
from anton.errors import BadOption, BadSignature, DuplicateName, UnknownOption


@pytest.fixture
def app() -> Iterator[App]:
    with declaring(App("shop")) as app:
        yield app


def handle(request: Request) -> int:
    return 200


def test_routes_are_declared_by_method(app: App) -> None:
    for decorate in (get, post, put, patch, delete):
        assert decorate("/orders/{id}", status_code=201)(handle) is handle
    assert [(route.method, route.path) for route in app.routes] == [
        (method, "/orders/{id}") for method in ("GET", "POST", "PUT", "PATCH", "DELETE")]
    assert app.routes[0].options == {"status_code": 201}
    assert app.routes[0].fn is handle
    assert "test_sense.py" in app.routes[0].place


def test_secrets_are_not_shown(app: App) -> None:
    post("/a", verify="slack", secret=[env("NEW"), "hush"])(handle)
    assert app.routes[0].secrets == (env("NEW"), "hush")
    assert "hush" not in repr(app.routes[0])


def test_a_webhook_feeds_a_table(app: App) -> None:
    events = Table("events")
    hook = Webhook("/github", events, verify="github", secret=env("X"))
    assert app.webhooks == [hook]
    assert (hook.table, hook.secrets) == (events, (env("X"),))
    assert repr(hook) == 'Webhook("/github", events)'


@pytest.mark.parametrize(("wrong", "error", "message"), [
    (lambda: post("orders"), BadOption, 'begins with "/"'),
    (lambda: post("/a", secrt=1), UnknownOption, 'Did you mean "secret"'),
    (lambda: post(handle), BadSignature, r'no path: @post. Allowed: @post\("/orders"\)'),
    (lambda: Webhook("/x", "events"), BadOption, "a Table"),  # type: ignore[arg-type]
    (lambda: Webhook("x", Table("t")), BadOption, 'begins with "/"'),
])
def test_a_wrong_declaration_says_what_is_allowed(app: App, wrong: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()
    assert not app.routes
    assert not app.webhooks


def test_one_path_declared_twice_names_both_places(app: App) -> None:
    post("/x")(handle)
    get("/x")(handle)
    with pytest.raises(DuplicateName, match=r'route "POST /x" is declared twice: .*py:\d+ and .*py:\d+'):
        Webhook("/x", Table("t"))


def test_a_request_is_read_by_plain_calls() -> None:
    request = Request("POST", "/x", {"content-type": "application/json"}, {"a": "1"}, b'{"x": [1]}')
    assert request.json() == {"x": [1]}
    assert request.text() == '{"x": [1]}'
    assert Request("POST", "/x", {}, {}, b"a=1&b=x+y&a=2&c=").form() == {"a": "2", "b": "x y", "c": ""}
    with pytest.raises(ValueError, match="Expecting value"):
        Request("POST", "/x", {}, {}, b"").json()
