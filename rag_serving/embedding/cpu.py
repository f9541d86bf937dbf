"""What this CPU gives an embedding model: its arithmetic, its cores, and how they are shared."""

import os
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})  # measured: three times the throughput with the first, twice with the second


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, so that `dtype = "auto"` uses it."""
    return bool(_BF16_FLAGS & _cpu_flags())


def thread_count() -> int:
    """OMP_NUM_THREADS when it is set, else the physical cores this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return _usable_cores()


@cache
def _usable_cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pairs = zip(_cpu_lines("physical id"), _cpu_lines("core id"), strict=False)
    return max(1, min(usable, len(set(pairs)) or usable))


_mine = threading.local()


def compute_on(cores: int) -> None:
    """From now on the calling thread computes on so many cores, where the model lets threads compute at once."""
    _mine.cores = cores


def own_thread_count() -> int:
    """The cores on which the calling thread computes: its share, or all."""
    return getattr(_mine, "cores", None) or thread_count()


def stand_back(niceness: int) -> None:
    """The calling thread gets this niceness, if it has none higher, and so does every thread it starts. Needs no privilege; only Linux has it."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(niceness, os.getpriority(os.PRIO_PROCESS, thread)))


def _cpu_flags() -> frozenset[str]:
    return frozenset(next(iter(_cpu_lines("flags")), "").split())


def _cpu_lines(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key]
