"""A real headless Chromium, over the pipe of its DevTools protocol: pages as people see and use them.

    with browser() as chromium, chromium.page(phone=True) as page:
        page.open(url)
        page.press("Tab", "Enter")
        page.requests                      every address it asked for
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60                                                          # seconds
WHY_NOT = "there is no Chromium: apt-get install chromium"
# DevTools' pipe is file descriptors 3 and 4 of Chromium.
_START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_OPTIONS = ("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run",
            "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--disable-default-apps", "--disable-features=Translate,MediaRouter,OptimizationHints",
            "--force-color-profile=srgb", "--hide-scrollbars")
_KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), "Space": ("Space", 32, " "),
         "Backspace": ("Backspace", 8, "")}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
DESKTOP = {"width": 1280, "height": 860, "deviceScaleFactor": 1, "mobile": False}


class Chromium:
    """The browser. tell: a command of DevTools, and its answer."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self.process, self._write, self._read, self._got = process, write, read, bytearray()
        self._count = 0
        self.pages: dict[str, Page] = {}

    def tell(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._count += 1
        asked = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(asked).encode() + b"\0")
        while True:
            told = self.hear()
            if told.get("id") == asked["id"]:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]

    def hear(self) -> dict[str, Any]:
        """The next message; what a page does is noted there."""
        told: dict[str, Any] = json.loads(self._message())
        page = self.pages.get(told.get("sessionId", ""))
        if page is not None and "method" in told:
            page.happened(told["method"], told["params"])
        return told

    def _message(self) -> bytes:
        while (end := self._got.find(0)) < 0:
            assert select.select([self._read], [], [], PATIENCE)[0], f"nothing from Chromium for {PATIENCE} s"
            more = os.read(self._read, 1 << 20)
            assert more, "Chromium ended"
            self._got += more
        message, self._got = bytes(self._got[:end]), self._got[end + 1:]
        return message

    @contextmanager
    def page(self, *, phone: bool = False, dark: bool = False, script: bool = True) -> Iterator[Page]:
        """A tab with cookies of its own. script: whether JavaScript runs."""
        context = self.tell("Target.createBrowserContext")["browserContextId"]
        target = self.tell("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session)
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.tell(f"{domain}.enable")
        page.tell("Emulation.setDeviceMetricsOverride", **(PHONE if phone else DESKTOP))
        page.tell("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"}])
        page.tell("Emulation.setScriptExecutionDisabled", value=not script)
        try:
            yield page
        finally:
            with suppress(OSError):
                self.tell("Target.disposeBrowserContext", browserContextId=context)
            del self.pages[session]


class Page:
    """A tab. requests: every address it asked for. faults: what it complained of, such as of the policy."""

    def __init__(self, chromium: Chromium, session: str) -> None:
        self._chromium, self._session = chromium, session
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.loads = 0

    def tell(self, method: str, **params: Any) -> Any:
        return self._chromium.tell(method, self._session, **params)

    def happened(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loads += 1
        elif method == "Log.entryAdded" and params["entry"]["source"] != "network":
            self.faults.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.faults.append(str(params["exceptionDetails"]))

    def wait(self, loads: int) -> None:
        """Until it has been loaded so often."""
        while self.loads < loads:
            self._chromium.hear()

    def open(self, url: str) -> None:
        before = self.loads
        self.tell("Page.navigate", url=url)
        self.wait(before + 1)

    def run(self, expression: str) -> Any:
        """What JavaScript gives; DevTools may run it where the page may not."""
        told = self.tell("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def html(self) -> str:
        root = self.tell("DOM.getDocument", depth=0)["root"]["nodeId"]
        return str(self.tell("DOM.getOuterHTML", nodeId=root)["outerHTML"])

    def click(self, selector: str, *, loads: bool = True) -> None:
        """A click of the mouse in the middle of what a CSS selector names."""
        root = self.tell("DOM.getDocument", depth=0)["root"]["nodeId"]
        node = self.tell("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        assert node, f"{selector} is not there"
        self.tell("DOM.scrollIntoViewIfNeeded", nodeId=node)
        quad = self.tell("DOM.getContentQuads", nodeId=node)["quads"][0]
        before, at = self.loads, {"x": sum(quad[::2]) / 4, "y": sum(quad[1::2]) / 4}
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
        if loads:
            self.wait(before + 1)

    def press(self, *keys: str) -> None:
        """Keys, one after the other; a text that is no key is typed."""
        for key in keys:
            if key not in _KEYS:
                self.tell("Input.insertText", text=key)
                continue
            name, code, text = _KEYS[key]
            down = {"key": name if key != "Space" else " ", "code": name, "windowsVirtualKeyCode": code}
            self.tell("Input.dispatchKeyEvent", type="keyDown", **down, **({"text": text} if text else {}))
            self.tell("Input.dispatchKeyEvent", type="keyUp", **down)

    def tab_to(self, selector: str, most: int = 60) -> int:
        """Tab until what a selector names has the focus; how often. Nothing but the keyboard is used."""
        for n in range(most):
            if self.run(f"document.activeElement.matches({json.dumps(selector)})"):
                return n
            self.press("Tab")
        raise AssertionError(f"{selector} cannot be reached by the keyboard")

    def axe(self) -> list[dict[str, Any]]:
        """What axe-core finds: violations, each with id, impact, help and nodes."""
        source = resources.files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
        self.tell("Runtime.evaluate", expression=source)
        found = self.run("axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map(v => "
                         "({id: v.id, impact: v.impact, help: v.help, nodes: v.nodes.map(n => n.html)})))")
        return list(found)

    def picture(self, file: Path, whole: bool = False) -> None:
        """A PNG of what is seen; whole: of the page down to its end."""
        told = self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(told["data"]))


@contextmanager
def browser() -> Iterator[Chromium]:
    """Starts Chromium, and ends it."""
    assert PROGRAM, WHY_NOT
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        words = [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), PROGRAM, *_OPTIONS,
                 f"--user-data-dir={folder}"]
        process = subprocess.Popen(words, pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(theirs_in)
        os.close(theirs_out)
        chromium = Chromium(process, ours_out, ours_in)
        try:
            yield chromium
        finally:
            with suppress(OSError, AssertionError, ValueError):
                chromium.tell("Browser.close")
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(ours_out)
            os.close(ours_in)
