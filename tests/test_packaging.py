"""What `pip wheel .` makes is whole: installed alone it makes, migrates and works an app in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import psycopg
import pytest

from anton.share import version

REPO = Path(__file__).parent.parent


def run(*words: str | Path, **options: Any) -> str:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **options.pop("env", {})}
    text = [str(word) for word in words]
    done = subprocess.run(text, capture_output=True, text=True, check=False, env=env, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", folder, REPO)
    [file] = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel. What it depends on is lent by ours, without Anton itself."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "-qq", "--no-deps", "--no-index", wheel)
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")  # a .pth in there is not followed
    return folder / "bin"


def test_the_wheel_carries_sql_migrations_components_and_the_template(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("sql", "migrations"):
        for file in (REPO / folder).glob("*.sql"):
            assert f"anton/_share/{folder}/{file.name}" in names
    for file in (REPO / "components").rglob("*.py"):
        assert file.relative_to(REPO / "components").as_posix() in names
    for file in (REPO / "anton" / "template_files").rglob("*.in"):
        assert file.relative_to(REPO).as_posix() in names
    assert {"anton/py.typed", "anton/autonomous.schema.json"} <= names
    assert f"anton_framework-{version()}" in wheel.name


def test_the_wheel_carries_nothing_else(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"anton", "anton_components"}


def test_an_installed_anton_runs_an_app_of_another_folder(installed: Path, tmp_path: Path, bare: str) -> None:
    env = {"PATH": f"{installed}:{os.environ['PATH']}", "PYTHONPATH": "", "DATABASE_URL": bare}
    place = run(installed / "python", "-c", "import anton; print(anton.__file__)", cwd=tmp_path)
    assert place.startswith(str(installed.parent))
    run("anton", "new", "bot", cwd=tmp_path, env=env)
    folder = tmp_path / "bot"
    run("anton", "migrate", cwd=folder, env=env)
    with psycopg.connect(bare, autocommit=True) as conn:
        conn.execute("insert into orders (customer, total) values ('Ann', 500)")
        work = ("from anton import app; from anton.app import load_app, open_database; from anton.worker import Worker;"
                "import asyncio; asyncio.run(Worker(open_database(), load_app(), capture=True).run_until_idle())")
        run("python", "-c", work, cwd=folder, env=env)
        assert conn.execute("select text from letters").fetchall() == [("Thank you, Ann!",)]
        assert conn.execute("select id from big_orders").fetchall() == [(1,)]
    assert "thank" in run("autonomous", "status", cwd=folder, env=env)


def test_the_lock_names_packages_and_hashes_and_no_index() -> None:
    lines = (REPO / "requirements.lock").read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("--")]
    pinned = [line for line in lines if line and line[0] not in " #"]
    assert pinned
    for line in pinned:
        assert "==" in line, line
    assert sum("--hash=sha256:" in line for line in lines) >= len(pinned)
