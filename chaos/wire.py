"""Wire: half-open connections on a real link: workers in a network of their own, and a direction that goes silent.

    Postgres, producers: network A   10.77.0.1 -- veth -- 10.77.0.2   network B: workers

Packets are lost by telling one end a wrong hardware address of the other: nothing is refused, nothing closed, only the
kernels' own timers (keepalive, TCP_USER_TIMEOUT) can tell. Takes root; where there is none this fault is left out.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import servers

from chaos.cell import SETTINGS, Cell, make_template
from chaos.faults import Result, acks, fault, first_ack, under_load

SERVER, WORKERS = "10.77.0.1", "10.77.0.2"
NOWHERE = "02:00:00:00:00:99"
NEW_NET = 0x40000000  # CLONE_NEWNET
NOTICED = 45.0  # seconds: keepalive and TCP_USER_TIMEOUT are 20 s each


def possible() -> bool:
    """Whether this machine lets us make networks."""
    done = (
        subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
        if Path("/proc/self/ns").exists()
        else None
    )
    return done is not None and done.returncode == 0


def _libc(call: str, *args: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), call)(*args):
        raise OSError(ctypes.get_errno(), call)


def _ip(*words: str, inside: int | None = None) -> None:
    enter = ["nsenter", "-t", str(inside), "-n"] if inside else []
    subprocess.run([*enter, "ip", *words], check=True, capture_output=True)


class Link:
    """What joins the two networks. far: a process in the workers' one."""

    def __init__(self, far: int) -> None:
        self.far = far
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "anton0", "type", "veth", "peer", "name", "anton1")
        _ip("link", "set", "anton1", "netns", str(far))
        _ip("addr", "add", f"{SERVER}/24", "dev", "anton0")
        _ip("link", "set", "anton0", "up")
        _ip("addr", "add", f"{WORKERS}/24", "dev", "anton1", inside=far)
        _ip("link", "set", "anton1", "up", inside=far)
        _ip("link", "set", "lo", "up", inside=far)

    def silence(self, way: str) -> None:
        """replies: what the server sends is lost; requests: what workers send; both."""
        if way != "requests":
            _ip("neigh", "replace", WORKERS, "lladdr", NOWHERE, "dev", "anton0", "nud", "permanent")
        if way != "replies":
            _ip("neigh", "replace", SERVER, "lladdr", NOWHERE, "dev", "anton1", "nud", "permanent", inside=self.far)

    def mend(self) -> None:
        """All of it passes again."""
        for address, device, inside in ((WORKERS, "anton0", None), (SERVER, "anton1", self.far)):
            _ip("neigh", "flush", "dev", device, "nud", "permanent", inside=inside)
            _ip("neigh", "flush", "to", address, "dev", device, inside=inside)


@contextmanager
def networks() -> Iterator[Link]:
    """This thread, and what it starts from here on, in a network of its own; the link to another one."""
    with Path("/proc/thread-self/ns/net").open() as before:
        _libc("unshare", NEW_NET)
        far = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        try:
            mine = Path("/proc/thread-self/ns/net").readlink()
            end = time.monotonic() + 5
            while Path(f"/proc/{far.pid}/ns/net").readlink() == mine and time.monotonic() < end:
                time.sleep(0.01)
            yield Link(far.pid)
        finally:
            far.kill()
            far.wait()
            _libc("setns", before.fileno(), 0)


@fault("N3", "half-open links: replies, requests or both are lost, and nobody is told; workers that vanish so")
def half_open(cell: Cell, n: int) -> Result:
    """Others have the work after its lease; who was cut off finds out by the kernels' timers, and works again."""
    result, others, noticed, freed = Result(n), list[float](), list[float](), list[float]()
    settings = {**SETTINGS, "listen_addresses": f"127.0.0.1,{SERVER}"}
    with networks() as link, servers.running("system", **settings) as server:
        with (server.folder / "data" / "pg_hba.conf").open("a") as hba:
            hba.write(f"host all all {SERVER}/24 trust\n")
        servers.restart(server)
        with Cell(server, make_template(server), cell.seed) as one:
            url = one.url.replace("127.0.0.1", SERVER)
            with under_load(one, result):
                for way in [("both", "replies", "requests")[at % 3] for at in range(n)]:
                    cut, near = one.start(2, net=link.far, url=url), one.start(1)
                    first_ack(one)
                    time.sleep(1)
                    pids = [pid for above in cut for pid in one.children(above)]
                    before = _backends(one)
                    link.silence(way)
                    others.append(first_ack(one))
                    began = time.monotonic()
                    freed.append(_freed(one, pids))
                    while _backends(one) & before and time.monotonic() - began < NOTICED:
                        time.sleep(0.2)
                    result.more["sessions_left"] = result.more.get("sessions_left", 0) + len(_backends(one) & before)
                    link.mend()
                    for pid in near:
                        one.signal(pid, signal.SIGTERM)
                        one.workers.discard(pid)
                    began, acked = time.monotonic(), acks(one)
                    while acks(one) < acked + 20 and time.monotonic() - began < NOTICED:
                        time.sleep(0.05)
                    noticed.append(time.monotonic() - began)
                    for above in cut:
                        one.signal(above, signal.SIGTERM)
                        one.workers.discard(above)
            one.end()
    result.verdict.require(
        max(noticed) < NOTICED, f"a worker did not go on for {max(noticed):.0f} s after its link was whole"
    )
    result.verdict.require(max(freed) < NOTICED, f"jobs of workers that were cut off were held for {max(freed):.0f} s")
    result.verdict.require(
        not result.more["sessions_left"], f"{result.more['sessions_left']} sessions of vanished workers stayed"
    )
    result.more |= {"others_ack_max_s": max(others), "freed_max_s": max(freed), "resumed_max_s": max(noticed)}
    return result


def _backends(cell: Cell) -> set[int]:
    (found,) = cell.one("select array_agg(pid) from pg_stat_activity where client_addr = %s", WORKERS)
    return set(found or ())


def _freed(cell: Cell, pids: list[int]) -> float:
    """Seconds until these workers' processes hold nothing any more."""
    began = time.monotonic()
    while time.monotonic() - began < NOTICED:
        (held,) = cell.one(
            "select count(*) from anton.lease l join anton.worker w on w.id = l.worker_id where w.pid = any (%s)", pids
        )
        if not held:
            break
        time.sleep(0.05)
    return time.monotonic() - began
