"""both.py [pytest arguments]: the suite on both servers at once, which mostly wait; fails when either does.

Tests that ask for no server are the same on both and run once, beside the embedded one; what is marked
once("why", "system") runs beside the system's.
The output of the embedded one is shown as it comes, and then that of the system's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

NOTHING = 5                                                                      # of pytest: no test was collected
ONLY = {"embedded": ("--beside-system",), "system": ("--asks-server",)}


def start(server: str, words: list[str], output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-o", f"cache_dir=.pytest_cache/{server}", *ONLY[server], *words]
    environment = {**os.environ, "ANTON_TEST_SERVER": server, "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)                             # hundreds of processes are started
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def show(process: subprocess.Popen[bytes], output: Path) -> int:
    """Copies what it says until it ends; its status."""
    with output.open("rb") as file:
        while True:
            ended = process.poll() is not None                                   # before what it said last is read
            sys.stdout.buffer.write(file.read())
            sys.stdout.flush()
            if ended:
                return process.returncode
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                pass


def main(words: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="anton-tests-of-") as folder:
        running = {server: start(server, words, Path(folder, server)) for server in ONLY}
        status = []
        try:
            for server, process in running.items():
                print(f"== tests on the {server} Postgres", flush=True)
                status.append(show(process, Path(folder, server)))
        except KeyboardInterrupt:                                                # they got it too, and clear up
            for server, process in running.items():
                show(process, Path(folder, server))
            return 130
    return 0 if set(status) <= {0, NOTHING} and 0 in status else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
