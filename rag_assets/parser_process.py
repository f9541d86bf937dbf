"""Parsing in a process of its own, so that a hostile file can take neither the run's memory nor its time, nor end it."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any, Self

from rag_assets.extraction import Extracted, extract
from rag_assets.sources.items import Refused
from rag_serving.errors import PlatformError
from rag_serving.settings import Parsing

_START_SECONDS = 60
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT", "LD_LIBRARY_PATH")


class ParserProcess:
    """A child process that parses one file at a time; a dead or overdue one is replaced. Close it, or use it in a `with` statement.

    It has a limit on memory above what the libraries themselves take, none of the environment's secrets, and answers in JSON.
    """

    def __init__(self, limits: Parsing) -> None:
        self._limits = limits
        self._child: _Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._child:
            self._child.end()
        self._child = None

    def parse(self, data: bytes, name: str, suffix: str, *, charset: str = "") -> Extracted:
        """What `extract` gives. Refused also for "timeout", "memory" and "parser_died", once a fresh process has failed likewise."""
        request = {"name": name, "suffix": suffix, "charset": charset, "max_pages": self._limits.max_pages}
        fresh = self._child is None
        try:
            return self._ask(request, data)
        except Refused as refusal:
            if refusal.reason not in ("memory", "parser_died"):
                raise
            self.close()
            if fresh:
                raise
        return self._ask(request, data)

    def _ask(self, request: dict[str, Any], data: bytes) -> Extracted:
        self._child = self._child or _Child(self._limits)
        try:
            answer = self._child.ask(request, data)
        except Refused:
            self.close()
            raise
        if "reason" in answer:
            raise Refused(answer["reason"], answer["detail"])
        if len(answer["text"]) > self._limits.max_bytes:
            raise Refused("too_large", f"its text is longer than {self._limits.max_bytes:,} characters")
        return Extracted(answer["title"], answer["text"], answer["metadata"])


class _Child:
    def __init__(self, limits: Parsing) -> None:
        self._timeout = limits.timeout_seconds
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process that writes it
        ours, theirs = socketpair()
        environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environ |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rag_assets.parser_process", str(theirs.fileno()), str(limits.memory_mb), str(self._timeout)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._complaints,
                pass_fds=[theirs.fileno()],
                env=environ,
                start_new_session=True,
            )
        self._line = Connection(ours.detach())
        if not self._line.poll(_START_SECONDS) or not self._hears_ready():
            said = self._last_words()
            self.end()
            raise PlatformError(f"the parser process did not start: {said}", fix='Run: pip install "ragline[pipeline]"')

    def _hears_ready(self) -> bool:
        try:
            return self._line.recv_bytes() == b"ready"
        except (EOFError, OSError):
            return False

    def ask(self, request: dict[str, Any], data: bytes) -> dict[str, Any]:
        try:
            self._line.send_bytes(json.dumps(request).encode())
            self._line.send_bytes(data)
            if not self._line.poll(self._timeout):
                raise Refused("timeout", f"parsing it took longer than {self._timeout:g} s")
            answer: dict[str, Any] = json.loads(self._line.recv_bytes())
        except (EOFError, OSError):
            raise self._cause() from None
        return answer

    def _cause(self) -> Refused:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        said, code = self._last_words(), self._process.returncode
        if "memory allocation" in said or "MemoryError" in said:
            return Refused("memory", "parsing it took more memory than allowed")
        ended = signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
        if code == -signal.SIGALRM:
            return Refused("timeout", f"parsing it took longer than {self._timeout:g} s")
        return Refused("parser_died", f"the parser ended with {ended}")

    def _last_words(self) -> str:
        size = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, size - 2000))
        return " ".join(self._complaints.read().decode(errors="replace").split())

    def end(self) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()
        self._complaints.close()


def serve(line: Connection, *, memory_mb: int, timeout_seconds: float) -> None:
    """Parse what comes in until the other end closes."""
    import kreuzberg  # noqa: F401 - loaded before the limit is set, so that the limit is for files alone

    _limit_memory(memory_mb)
    line.send_bytes(b"ready")
    while True:
        try:
            request, data = json.loads(line.recv_bytes()), line.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds + 5)  # for the case that nobody is left to end this process
        answer = _answer(request, data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        line.send_bytes(answer)


def _answer(request: dict[str, Any], data: bytes) -> bytes:
    try:
        found = extract(data, request["name"], request["suffix"], charset=request["charset"], max_pages=request["max_pages"])
        return json.dumps({"title": found.title, "text": found.text, "metadata": found.metadata}).encode()
    except Refused as refusal:
        reason, detail = refusal.reason, refusal.what
    except MemoryError:
        reason, detail = "memory", "parsing it took more memory than allowed"
    except RecursionError:
        reason, detail = "damaged", "it is nested too deeply"
    except BaseException as error:  # noqa: BLE001 - a panic of the Rust library is no Exception
        reason, detail = "damaged", f"the parser raised {type(error).__name__}"
    return json.dumps({"reason": reason, "detail": detail}).encode()


def _limit_memory(megabytes: int) -> None:
    """At most that much address space more than now, where the system can say and limit it."""
    status = Path("/proc/self/statm")
    if status.exists():
        taken = int(status.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + megabytes * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), memory_mb=int(sys.argv[2]), timeout_seconds=float(sys.argv[3]))
