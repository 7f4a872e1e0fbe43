"""Headless Chromium for tests of pages: DevTools messages over a pipe, no dependency, no port.

Take the `browser` fixture into a test module by importing it. Without Chromium the tests are skipped, except where
OPD_REQUIRE_CHROMIUM=1 says that it must be there.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BINARIES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 60.0  # seconds; a cold start on a busy machine takes some
KEYS = {
    "Tab": ("Tab", 9, ""),
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Home": ("Home", 36, ""),
    "End": ("End", 35, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
}


class Browser:
    """One Chromium process. Nothing it opens reaches a network: host names do not resolve, requests are refused."""

    def __init__(self, binary: str):
        self._home = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        command = [
            binary,
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._home.name}",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--mute-audio",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "about:blank",
        ]
        env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        env["HOME"] = self._home.name
        # Chromium reads from descriptor 3 and writes to 4; ours must be neither while they are put there.
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            command,
            env=env,
            preexec_fn=place,
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._id = 0
        self._buffer = b""
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One DevTools command and its result; events that come meanwhile are kept."""
        sent = self._send(method, session, **params)
        while True:
            got = self._read()
            if got.get("id") == sent:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']['message']}")
                return got["result"]
            self._keep(got)

    def events(self, session: str) -> list[dict[str, Any]]:
        """Takes the events of one tab so far."""
        mine = [event for event in self._events if event.get("sessionId") == session]
        self._events = [event for event in self._events if event.get("sessionId") != session]
        return mine

    def wait(self, session: str, method: str) -> None:
        """Until the tab has reported `method`; its events stay for `events`."""
        while not any(e["method"] == method and e.get("sessionId") == session for e in self._events):
            self._keep(self._read())

    def _keep(self, message: dict[str, Any]) -> None:
        if "method" not in message:
            return
        self._events.append(message)
        if message["method"] == "Page.javascriptDialogOpening":  # else the page, and we with it, would wait for ever
            self._send("Page.handleJavaScriptDialog", message["sessionId"], accept=False)

    def _send(self, method: str, session: str | None, **params: Any) -> int:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._id

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._in, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("chromium has ended" if ready else f"chromium said nothing for {TIMEOUT:.0f} s")
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    @contextmanager
    def open(
        self,
        path: Path,
        *,
        width: int = 1400,
        height: int = 900,
        dark: bool = False,
        scripts: bool = True,
    ) -> Iterator[Tab]:
        """A fresh tab showing one file, loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session, path.resolve().as_uri())
        try:
            for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
                tab.call(f"{domain}.enable")
            tab.size(width, height)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            tab.call("Emulation.setEmulatedMedia", features=[scheme])
            tab.call("Emulation.setScriptExecutionDisabled", value=not scripts)
            tab.call("Page.navigate", url=tab.url)
            self.wait(session, "Page.loadEventFired")
            yield tab
        finally:
            self.call("Target.closeTarget", targetId=target)
            self.events(session)

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        for fd in (self._in, self._out):
            os.close(fd)
        self._home.cleanup()


class Tab:
    """One page. Elements are named by CSS selectors; input goes the way of real keys, mouse and fingers."""

    def __init__(self, browser: Browser, session: str, url: str):
        self.browser, self.session, self.url = browser, session, url
        self._problems: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def js(self, expression: str) -> Any:
        """The value of an expression, as JSON; a promise is waited for."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            details = got["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return got["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        code, number, text = KEYS.get(key, (f"Key{key.upper()}", ord(key[0].upper()), key))
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def hover(self, css: str) -> None:
        x, y = self._place(css)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, css: str) -> None:
        x, y = self._place(css)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, css: str) -> None:
        """With a finger: no pointer comes near before."""
        self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        x, y = self._place(css)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def select(self, css: str, value: str) -> None:
        """Picks an option of a <select> by its value."""
        self.js(
            f"(() => {{ const s = document.querySelector({json.dumps(css)}); s.value = {json.dumps(value)};"
            "if (s.selectedIndex < 0) throw new Error('no such option');"
            "s.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def png(self, path: Path | None = None, *, whole: bool = False) -> bytes:
        """A picture of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        picture = base64.b64decode(shot["data"])
        if path is not None:
            path.write_bytes(picture)
        return picture

    def problems(self) -> list[str]:
        """What went wrong so far: exceptions, errors on the console, policy violations, dialogs, and every request but
        the one for the file itself."""
        time.sleep(0.02)
        self.js("0")  # what was on its way has arrived when the answer has
        for event in self.browser.events(self.session):
            told = self._problem(event["method"], event["params"])
            if told:
                self._problems.append(told)
        return list(self._problems)

    def _problem(self, method: str, params: dict[str, Any]) -> str | None:
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                return "exception: " + details.get("exception", {}).get("description", details["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert", "warning"):
                return f"console: {[arg.get('value') for arg in params['args']]}"
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                return "log: " + params["entry"]["text"]
            case "Audits.issueAdded" if params["issue"]["code"] == "ContentSecurityPolicyIssue":
                return f"policy: {params['issue']['details']['contentSecurityPolicyIssueDetails']}"
            case "Page.javascriptDialogOpening":
                return "dialog: " + params["message"]
            case "Network.requestWillBeSent" if params["request"]["url"] != self.url:
                return "request: " + params["request"]["url"]
        return None

    def _place(self, css: str) -> tuple[float, float]:
        x, y = self.js(
            f"(() => {{ const e = document.querySelector({json.dumps(css)});"
            "if (!e) throw new Error('no such element'); e.scrollIntoView({block: 'center'});"
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return x, y


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    binary = next((found for name in BINARIES if (found := shutil.which(name))), None)
    if binary is None:
        told = f"no Chromium: none of {', '.join(BINARIES)} is on the path"
        if os.environ.get("OPD_REQUIRE_CHROMIUM") == "1":
            pytest.fail(told)
        pytest.skip(told)
    started = Browser(binary)
    yield started
    started.close()
