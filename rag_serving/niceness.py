"""Threads that come after others of their process where both want the same core."""

import os
import sys
import threading
from contextlib import suppress


def stand_back(niceness: int) -> None:
    """The calling thread gets this niceness, if it has none higher, and so does every thread it starts. Needs no privilege; only Linux has it."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))
