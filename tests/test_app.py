import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anton import Table, app
from anton.app import App, current_app, declaring, load_app, place_of_caller
from anton.errors import ConfigError, DuplicateName

MAIN = '''
from anton import Records, Table, cron, get
from helper import WORD

orders = Table(WORD)

@orders.on_new_records
def score(records: Records) -> None: ...

@get("/hello")
def hello() -> str:
    return WORD

@cron.daily
def clean() -> None: ...
'''


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    path, modules = sys.path[:], set(sys.modules)
    yield
    app.clear()
    app.name = "app"
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def folder(tmp_path: Path, name: str = "shop", word: str = "orders") -> Path:
    made = tmp_path / name
    made.mkdir(exist_ok=True)
    (made / "main.py").write_text(MAIN)
    (made / "helper.py").write_text(f"WORD = {word!r}")
    return made


def test_main_is_loaded_with_what_it_declares(tmp_path: Path) -> None:
    loaded = load_app(folder=folder(tmp_path))
    assert loaded is app
    assert (loaded.name, list(loaded.tables), list(loaded.handlers)) == ("shop", ["orders"], ["score"])
    assert ([route.path for route in loaded.routes], list(loaded.schedules)) == (["/hello"], ["clean"])
    assert loaded.handlers["score"].app == "shop"
    assert loaded.place("handler", "score").endswith("main.py:7")
    assert repr(loaded) == "App('shop', 1 tables, 1 handlers)"


def test_an_edit_is_seen_though_it_keeps_the_size_and_second_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for word in ("ones", "twos"):
        made = folder(tmp_path, word=word)
        os.utime(made / "helper.py", (1e9, 1e9))
        assert list(load_app(folder=made).tables) == [word]


def test_loading_again_reads_the_files_anew(tmp_path: Path) -> None:
    load_app(folder=folder(tmp_path))
    load_app(folder=folder(tmp_path, word="prompts"))
    assert list(app.tables) == ["prompts"]
    load_app(folder=folder(tmp_path, "other", "words"))
    assert (app.name, list(app.tables)) == ("other", ["words"])


def test_a_folder_without_main_is_an_empty_app(tmp_path: Path) -> None:
    loaded = load_app(folder=tmp_path)
    assert (loaded.tables, loaded.handlers) == ({}, {})


def test_the_app_may_be_named_by_flag_or_file(tmp_path: Path) -> None:
    made = folder(tmp_path)
    (made / "main.py").rename(made / "start.py")
    assert list(load_app("start", made).tables) == ["orders"]
    (made / "autonomous.json").write_text('{"name": "named", "app": "start"}')
    loaded = load_app(folder=made)
    assert (loaded.name, list(loaded.tables)) == ("named", ["orders"])
    with pytest.raises(ConfigError, match='no module "strat" in .*Did you mean "start"'):
        load_app("strat", made)


def test_what_main_raises_comes_through(tmp_path: Path) -> None:
    made = folder(tmp_path)
    (made / "main.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_app(folder=made)
    (made / "main.py").write_text("from anton import Table\na = Table('x')\nb = Table('x')\n")
    with pytest.raises(DuplicateName, match=r"main.py:2 and .*main.py:3"):
        load_app(folder=made)


def test_declarations_go_to_the_app_that_declares() -> None:
    mine = App("mine")
    assert current_app() is app
    with declaring(mine):
        table: Table[Any] = Table("things")
        assert current_app() is mine
    assert current_app() is app
    assert mine.tables == {"things": table}
    assert "things" not in app.tables


def test_a_place_is_the_users_line_seen_from_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert place_of_caller() == f"test_app.py:{sys._getframe().f_lineno}"
