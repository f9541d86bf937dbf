"""A page in a real headless Chromium, spoken to in the DevTools protocol over a pipe."""

import base64
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Tab:
    """One page. `heard` holds every event Chromium told: console messages, exceptions, requests."""

    def __init__(self, read_end: int, write_end: int) -> None:
        self._in, self._out = os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb")
        self._session: str | None = None
        self._number = 0
        self.heard: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._out.write(json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        self._out.flush()
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            self.heard.append(reply)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, *, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def show(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def press(self, key: str, *, code: int = 0, text: str = "") -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "chromium ended"
            data += byte
        return json.loads(data)

    def close(self) -> None:
        self._in.close()
        self._out.close()


@contextmanager
def chromium(program: str, profile: Path) -> Iterator[Tab]:
    """A tab of a browser with a new profile; the browser ends with the `with`."""
    to_browser, ours_out = os.pipe()
    ours_in, from_browser = os.pipe()

    def place() -> None:
        os.dup2(fd_in, 3)
        os.dup2(fd_out, 4)

    # 3 and 4 are where Chromium looks; the originals are moved up so that neither dup2 overwrites the other
    fd_in, fd_out = fcntl.fcntl(to_browser, fcntl.F_DUPFD, 10), fcntl.fcntl(from_browser, fcntl.F_DUPFD, 10)
    os.close(to_browser)
    os.close(from_browser)
    command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=place, stdout=quiet, stderr=quiet)  # noqa: PLW1509 - it only calls dup2
    os.close(fd_in)
    os.close(fd_out)
    tab = None
    try:
        tab = Tab(ours_in, ours_out)
        yield tab
    finally:
        if tab:
            tab.close()
        process.terminate()
        process.wait(timeout=10)
