"""App: everything one program declares, and how its main.py is loaded.

    main.py  --declares-->  Table, handlers, routes, schedules, actions  --on-->  app
    anton migrate | work | serve  --load_app()-->  app

`app` is implicit: declarations find it by themselves. It is an ASGI app too: `uvicorn anton:app`.
A name is unique in its app; two apps with different names share one database.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from anton import config
from anton.db import Database, set_resolver
from anton.errors import BadOption, ConfigError, DuplicateName, did_you_mean

if TYPE_CHECKING:
    from anton.dbt.project import DbtProject
    from anton.handler import Handler
    from anton.sense import Route, Webhook
    from anton.table import Table

F = TypeVar("F", bound=Callable[..., Any])

_NOT_OWN = (Path(__file__).parent, Path(os.__file__).parent)          # Anton's, and Python's


class App:
    """The registry of one app.

    name: scopes all it registers; autonomous.json's "name", else the folder's.
    tables, handlers, schedules, actions, projects: by name.
    routes, webhooks, mounts, middlewares: in the order of declaration.
    """

    def __init__(self, name: str = "app", folder: Path | str = ".") -> None:
        self.name = name
        self.folder = Path(folder).resolve()
        self.clear()

    def clear(self) -> None:
        """Forgets all declarations, as before main.py was loaded."""
        self.settings: config.Settings | None = None
        self.tables: dict[str, Table[Any]] = {}
        self.handlers: dict[str, Handler] = {}
        self.routes: list[Route] = []
        self.webhooks: list[Webhook] = []
        self.mounts: list[tuple[str, Any, str | None]] = []            # path, ASGI app, name
        self.middlewares: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []  # class, None: a function's; arguments
        self.exception_handlers: dict[Any, Callable[..., Any]] = {}    # by status, or class of exception
        self.schedules: dict[str, Any] = {}
        self.actions: dict[str, Any] = {}
        self.projects: dict[str, DbtProject] = {}                      # of dbt, by the names of their handlers
        self.aliases: dict[str, Any] = {}                              # FineTunes, by what their models are called
        self.budgets: dict[tuple[str, str, str, str], tuple[Any, str]] = {}   # amounts and who says so: ledger.agree()
        self.channels: set[str] = set()                                # of approvals: via=
        self.endings: list[Callable[[App], None]] = []                 # called once all of main.py was declared
        self.graphed: list[Any] = []                                   # others with nodes of their own: see wiring.py
        self._places: dict[tuple[str, str], str] = {}

    def finish(self) -> None:
        """Declares what follows from all that was declared."""
        for ending in self.endings:
            ending(self)

    def claim_name(self, kind: str, name: str, place: str) -> None:
        """Takes the name for the thing declared at place ("file:line"); DuplicateName names both places."""
        first = self._places.setdefault((kind, name), place)
        if first is not place:
            raise DuplicateName(kind, name, first, place)

    def place(self, kind: str, name: str) -> str:
        """Where it was declared, "main.py:12"; "" when it was not."""
        return self._places.get((kind, name), "")

    def mount(self, path: str, app: Any, name: str | None = None) -> None:
        """Serves another ASGI app below a path: app.mount("/static", StaticFiles(directory="static")).

        It is asked after all routes and webhooks, and says itself who may call it.
        """
        if not isinstance(path, str) or path and not path.startswith("/"):
            raise BadOption("path", path, "app.mount", 'a text that begins with "/", such as "/static"')
        if not callable(app):
            raise BadOption("app", app, f'app.mount("{path}")', "an ASGI app")
        self.claim_name("route", f"mount {path.rstrip('/')}", place_of_caller())
        self.mounts.append((path.rstrip("/"), app, name))

    def add_middleware(self, middleware_class: Any, *args: Any, **kwargs: Any) -> None:
        """An ASGI middleware around all that is served; the one added last is the outermost."""
        if not callable(middleware_class):
            raise BadOption("middleware_class", middleware_class, "app.add_middleware",
                            "a class, its arguments after it: app.add_middleware(CORSMiddleware, allow_origins=[…])")
        self.middlewares.append((middleware_class, args, kwargs))

    def middleware(self, kind: str) -> Callable[[F], F]:
        """@app.middleware("http"): async def f(request, call_next) is called around every request."""
        if kind != "http":
            raise BadOption("kind", kind, "@app.middleware", '"http": @app.middleware("http")')

        def declare(fn: F) -> F:
            self.middlewares.append((None, (), {"dispatch": fn}))
            return fn

        return declare

    def exception_handler(self, kind: int | type[Exception]) -> Callable[[F], F]:
        """@app.exception_handler(OutOfStock): f(request, error) answers a status, or what a route lets through."""
        if not isinstance(kind, int) and not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise BadOption("kind", kind, "app.exception_handler", "a status such as 404, or a class of exception")

        def declare(fn: F) -> F:
            self.exception_handlers[kind] = fn
            return fn

        return declare

    def add_exception_handler(self, kind: int | type[Exception], handler: Callable[..., Any]) -> None:
        """As exception_handler, without the decorator."""
        self.exception_handler(kind)(handler)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI. The web part is loaded at the first call, so that a worker never pays for it."""
        web = importlib.import_module("anton.web")
        await web.asgi(self)(scope, receive, send)

    def __repr__(self) -> str:
        return f"App({self.name!r}, {len(self.tables)} tables, {len(self.handlers)} handlers)"


app = App()
_declaring = app
_loaded_from: Path | None = None


def current_app() -> App:
    """The app that declarations are made on."""
    return _declaring


@contextmanager
def declaring(other: App) -> Iterator[App]:
    """Declarations inside are made on `other`, not on the implicit app."""
    global _declaring
    before, _declaring = _declaring, other
    try:
        yield other
    finally:
        _declaring = before


def load_app(target: str | None = None, folder: Path | str = ".") -> App:
    """Loads an app's module afresh and returns the implicit app with what it declared.

    target: the module, "main" or "shop.main"; None: autonomous.json's "app", and an empty app when there is no main.py.
    Raises ConfigError when there is no such module; what the module itself raises comes through.
    """
    settings = config.load(folder)
    module = target or settings.settings.app
    path = settings.folder.joinpath(*module.split("."))
    found = path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    app.clear()
    app.name, app.folder, app.settings = settings.name, settings.folder, settings.settings
    if not found:
        if target or settings.settings.app != "main":
            near = did_you_mean(module, [file.stem for file in settings.folder.glob("*.py")])
            raise ConfigError(f'no module "{module}" in {settings.folder}.{near} Name it as Python imports it, '
                              "without .py: --app shop.main", module=module)
        return app
    global _loaded_from
    for old in {_loaded_from or settings.folder, settings.folder}:
        _forget(old)
    if _loaded_from is not None and str(_loaded_from) in sys.path:
        sys.path.remove(str(_loaded_from))
    _loaded_from = settings.folder
    sys.path.insert(0, str(settings.folder))
    importlib.invalidate_caches()
    with declaring(app), _no_bytecode():
        importlib.import_module(module)
        app.finish()
    return app


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """An app is compiled each time: Python's cache misses an edit that keeps size and second of the last one."""
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = kept


def own_frames(error: BaseException) -> list[TracebackType]:
    """The error's traceback without Anton's, Python's and installed packages' frames; outermost first."""
    found, at = [], error.__traceback__
    while at is not None:
        path = Path(at.tb_frame.f_code.co_filename)
        if path.is_absolute() and not any(path.is_relative_to(place) for place in _NOT_OWN) \
                and "site-packages" not in path.parts:
            found.append(at)
        at = at.tb_next
    return found


def while_loading(error: BaseException) -> str | None:
    """What the app's own module raised while it was loaded, with the app's own lines; None for any other error."""
    if not any(frame.f_code is load_app.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        return None
    own = traceback.StackSummary.extract((at.tb_frame, at.tb_lineno) for at in own_frames(error))
    return "the app cannot be loaded:\n" + "".join((*own.format(), *traceback.format_exception_only(error))).rstrip()


def open_database(settings: config.Config | None = None, database: str | None = None) -> Database:
    """The database of an app: --database, the environment, autonomous.json, else the embedded one, which is started.

    settings: None is those of the current folder. Nothing is connected yet.
    """
    target = config.find_target(settings or config.load(), database)
    return Database(target.url, target.schema, target.pooled, source=target.source)


set_resolver(open_database)


def place_of_caller() -> str:
    """ "main.py:12": the nearest line that is neither Anton's nor a component's, seen from the current folder."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("anton", "anton_components"):
        frame = frame.f_back
    return shown(frame.f_code.co_filename, frame.f_lineno)


def shown(file: str, line: int) -> str:
    """ "file:line", the file relative to the current folder where it lies inside."""
    short = os.path.relpath(file)
    return f"{file if short.startswith('..') else short}:{line}"


def _forget(folder: Path) -> None:
    """Drops the app's own modules, so that they are read again; installed packages stay."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name == "__main__":
            continue
        path = Path(file)
        own = path.is_relative_to(folder) and "site-packages" not in path.parts
        if own and name.partition(".")[0] not in ("anton", "anton_components", "conftest"):
            del sys.modules[name]
