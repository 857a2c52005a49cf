"""A headless Chromium for tests of pages, driven over a pipe with the standard library alone.

    with Browser() as browser:
        view = browser.open(path, width=400, dark=True)
        view.messages, view.requests, view.run("document.title"), view.picture()

Nothing is installed and no port is opened. `find()` is None where there is no Chromium.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60.0  # for one answer
_QUIET = (  # a fresh browser looks for updates, and for who its user is: not in a test
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--mute-audio",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


@cache
def find() -> str | None:
    """The path of a browser that starts, or None: some systems put a mere pointer to a shop there."""
    for program in filter(None, map(shutil.which, NAMES)):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([program, "--version"], check=True, capture_output=True, timeout=SECONDS)
            return program
    return None


@dataclass
class View:
    """A page that has been opened: what it said, what it asked for, and what it looks like."""

    browser: Browser
    session: str
    messages: list[str] = field(default_factory=list)  # errors, warnings, console calls
    requests: list[str] = field(default_factory=list)  # every URL asked for

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript, run by the test, not by the page."""
        answer = self.browser.call(
            "Runtime.evaluate",
            {"expression": expression, "returnByValue": True, "awaitPromise": True},
            self.session,
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self) -> np.ndarray:
        """The whole page, uint8 [H, W, 3]."""
        import matplotlib.image

        png = self.png()
        return (matplotlib.image.imread(io.BytesIO(png), format="png")[..., :3] * 255).astype(
            np.uint8
        )

    def png(self) -> bytes:
        """The whole page as the bytes of a PNG file."""
        options = {"format": "png", "captureBeyondViewport": True}
        answer = self.browser.call("Page.captureScreenshot", options, self.session)
        return base64.b64decode(answer["data"])

    def close(self) -> None:
        """Let go of the page."""
        target = self.browser.targets.pop(self.session)
        self.browser.views.pop(self.session)
        self.browser.call("Target.closeTarget", {"targetId": target})


class Browser:
    """One process, many pages."""

    def __init__(self) -> None:
        program = find()
        assert program is not None
        self._folder = tempfile.TemporaryDirectory(prefix="fxprune-browser-")
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # The browser reads commands at 3 and answers at 4: ours stay out of the way, and both
        # are in use while it starts, lest subprocess puts a pipe of its own there.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16) for fd in (commands, answers)]
        kept = [os.open(os.devnull, os.O_RDONLY)]
        while kept[-1] <= 4:
            kept.append(os.open(os.devnull, os.O_RDONLY))

        def wire() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._log = (Path(self._folder.name) / "log").open("w+b")
        self._process = subprocess.Popen(
            [program, *_QUIET, f"--user-data-dir={self._folder.name}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            preexec_fn=wire,
            close_fds=False,  # whatever Python opened closes by itself; 3 and 4 stay
            env={**os.environ, "HOME": self._folder.name, "no_proxy": "*"},
        )
        for fd in (commands, answers, *ends, *kept):
            os.close(fd)
        self._number, self._rest = 0, b""
        self.views: dict[str, View] = {}
        self.targets: dict[str, str] = {}

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._log.close()
        with contextlib.suppress(OSError):  # a helper process may still be writing
            self._folder.cleanup()

    def call(
        self, method: str, parameters: dict[str, Any] | None = None, session: str | None = None
    ) -> dict[str, Any]:
        """Give a command and wait for its answer; events that come meanwhile are noted."""
        self._number += 1
        number = self._number
        command: dict[str, Any] = {"id": number, "method": method, "params": parameters or {}}
        if session is not None:
            command["sessionId"] = session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _next(self, seconds: float = SECONDS) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            left = max(end - time.monotonic(), 0)
            if not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._answers, 1 << 20)
            if not part:
                self._log.seek(0)
                said = self._log.read().decode(errors="replace")[-2000:]
                raise RuntimeError(f"the browser has gone: {said}")
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\0")
        return json.loads(first)

    def _note(self, message: dict[str, Any]) -> None:
        view = self.views.get(message.get("sessionId", ""))
        if view is None:
            return
        method, values = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            view.messages.append(str(values["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            said = " ".join(str(a.get("value", a)) for a in values["args"])
            view.messages.append(f"{values['type']}: {said}")
        elif method == "Log.entryAdded":
            view.messages.append(f"{values['entry']['level']}: {values['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            view.requests.append(values["request"]["url"])

    def open(
        self, path: Path, *, width: int = 1100, dark: bool = False, scripts: bool = True
    ) -> View:
        """Load a file as a window of that width shows it, in light or dark; waits until it stands.

        scripts: whether the page may run any.
        """
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        options = {"targetId": target, "flatten": True}
        session = self.call("Target.attachToTarget", options)["sessionId"]
        view = self.views[session] = View(self, session)
        self.targets[session] = target
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", session=session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", size, session)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]}, session)
        if not scripts:
            self.call("Emulation.setScriptExecutionDisabled", {"value": True}, session)
        self.call("Page.navigate", {"url": path.resolve().as_uri()}, session)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            state = "[document.readyState, location.protocol].join()"
            if view.run(state) == "complete,file:":
                break
            time.sleep(0.02)
        view.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return view
