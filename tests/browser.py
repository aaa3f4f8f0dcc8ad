"""A headless Chromium, driven through the pipe of its DevTools protocol: real keys, pointer and screens.

with Chromium(profile) as page:
    page.open("file:///...", width=390, dark=True)
    page.press("ArrowRight")
    page.ask("document.title")
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
PATIENCE_S = 60.0


class Chromium:
    """One page. `requests`: the addresses it has asked for; `errors`: what its scripts raised."""

    def __init__(self, profile: Path) -> None:
        (read, self.commands), (self.answers, write) = os.pipe(), os.pipe()
        options = [*FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]

        def place() -> None:  # Chromium reads commands from 3 and answers to 4
            high = [os.dup(read), os.dup(write)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([str(CHROMIUM), *options], preexec_fn=place, pass_fds=(3, 4), **quiet)
        os.close(read)
        os.close(write)
        self.stream, self.number, self.session = os.fdopen(self.answers, "rb", buffering=0), 0, None
        self.buffer, self.events = b"", deque[dict]()
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *_: object) -> None:
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=PATIENCE_S)
        os.close(self.commands)
        self.stream.close()

    def call(self, method: str, **params: Any) -> dict:
        """Send a command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            event = answer.get("params", {})
            if answer["method"] == "Network.requestWillBeSent":
                self.requests.append(event["request"]["url"])
            if answer["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(event["exceptionDetails"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self.buffer:
            data = self.stream.read(1 << 16)
            assert data, "the browser is gone"
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        mobile = width < 500
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Page.navigate", url=url)

    def ask(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Wait for an expression to become true."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.ask(script):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def point(self, script: str, *, click: bool = False, across: float = 0.5) -> None:
        """Move the pointer onto an element, to a share of its width, and click it."""
        self.ask(f"({script}).scrollIntoView({{block: 'nearest'}})")
        box = self.ask(f"({script}).getBoundingClientRect().toJSON()")
        at = {"x": box["left"] + box["width"] * across, "y": box["top"] + box["height"] / 2}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
