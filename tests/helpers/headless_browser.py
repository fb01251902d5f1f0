"""A page in headless Chromium, over the pipe of its DevTools protocol: what it logs, how it is laid out, how it looks."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PATIENCE = 60.0  # seconds for one answer, on a machine that has other things to do


@dataclass
class Page:
    """One tab. ``said``: all that the console and the browser's log said, exceptions and refused loads included."""

    to: int
    back: int
    said: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)
    _session: str | None = None
    _number: int = 0
    _rest: bytes = b""
    _loaded: bool = False

    def open(self, file: Path, width: int = 1280, dark: bool = False, media: str = "screen") -> None:
        if self._session is None:
            target = self("Target.createTarget", url="about:blank")["targetId"]
            self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._loaded = False
        self("Page.navigate", url=file.resolve().as_uri())
        while not self._loaded:
            self._receive()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def shoot(self, file: Path, whole: bool = True) -> None:
        shot = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def __call__(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        ends = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self.back], [], [], max(0, ends - time.monotonic()))
            data = os.read(self.back, 2**16) if ready else b""
            assert data, "Chromium does not answer"
            self._rest += data
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        event, parameters = message.get("method"), message.get("params", {})
        if event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Network.requestWillBeSent":
            self.requested.append(parameters["request"]["url"])
        elif event in (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        ):
            self.said.append(json.dumps(parameters))
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """``profile``: an empty folder for Chromium's own files."""
    assert CHROMIUM, "no chromium; on Debian: apt-get install chromium"
    down, to = os.pipe()
    back, up = os.pipe()
    # It listens on descriptor 3 and answers on 4. Root has no sandbox; the page is our own.
    command = [
        "bash", "-c", f'exec "$@" 3<&{down} 4>&{up}', "bash", CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
        "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]  # fmt: skip
    process = subprocess.Popen(command, pass_fds=(down, up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(down)
    os.close(up)
    page = Page(to, back)
    try:
        yield page
        page._session = None
        page("Browser.close")
    finally:
        os.close(to)
        os.close(back)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
