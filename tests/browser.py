"""A headless Chromium for tests, spoken to over pipes in its DevTools protocol: nothing to install but the browser."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE_S = 60.0


class Page:
    """The one page of a browser, and everything that it reported."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._buffer, self._number, self._session = to_browser, from_browser, b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "the browser has ended"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, script: bool = True
    ) -> float:
        """Returns the seconds until the page had loaded and was drawn."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if width < 700 else 1,
                 mobile=width < 700)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not script)
        began = time.monotonic()
        self.ask("Page.navigate", url=path.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.ask("Page.captureScreenshot", format="jpeg", quality=1)  # comes after the next frame
        return time.monotonic() - began

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.run(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.02)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.ask("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **more)

    def drag(self, x: float, y: float, to: float) -> None:
        """With the left button, to another x."""
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        self.mouse("Moved", x, y)
        self.mouse("Pressed", x, y, **button)
        for share in (0.3, 0.7, 1):
            self.mouse("Moved", x + share * (to - x), y, button="left", buttons=1)
        self.mouse("Released", to, y, **button)

    def screenshot(self, path: Path) -> None:
        """All of the page, not only what the window shows."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for since `open`."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    @property
    def complaints(self) -> list[Any]:
        """Uncaught errors, violations of the page's policy, and what was printed to the console."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        self.run("1")  # what came before has arrived then
        return [event["params"] for event in self.events if event["method"] in kinds]


@contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """A new browser with a new profile in `folder`."""
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if binary is None:
        give_up("no chromium in the PATH: apt-get install chromium")
    # The protocol's ends in the browser are descriptors 3 and 4.
    (from_us, to_browser), (from_browser, to_us) = os.pipe(), os.pipe()
    descriptors = f'exec "$0" "$@" 3<&{from_us} 4>&{to_us}'
    profile = tempfile.mkdtemp(dir=folder)
    process = subprocess.Popen(
        ["bash", "-c", descriptors, binary, *OPTIONS, f"--user-data-dir={profile}"],
        pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(from_us)
    os.close(to_us)
    try:
        yield Page(to_browser, from_browser)
    finally:
        os.close(to_browser)  # on which the browser ends
        os.close(from_browser)
        try:
            process.wait(PATIENCE_S / 4)
        except subprocess.TimeoutExpired:
            process.kill()


def give_up(reason: str) -> Any:
    """Skips, but fails where `.ci/run` wants a real browser."""
    if os.environ.get("PIPELINE_TESTS_NEED_CHROMIUM"):
        pytest.fail(reason)
    pytest.skip(reason)
