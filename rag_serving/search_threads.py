"""The threads in which LanceDB searches come after the event loop.

Under more load than the cores can do, a refusal and every other short step would wait for a turn among searches of milliseconds. Threads
inherit the niceness of the one that starts them, so LanceDB is first used in a thread that stands back; that needs no privilege.
"""

import asyncio
import threading

from rag_serving.niceness import stand_back

NICENESS = 10  # a tenth of the weight of the event loop's thread, where both want the same core


def start() -> None:
    """Import LanceDB and start its threads. Once a process, before anything else uses LanceDB: threads that run already stay as they are."""
    first = threading.Thread(target=_stand_back_and_connect, name="lancedb")
    first.start()
    first.join()


def _stand_back_and_connect() -> None:
    stand_back(NICENESS)
    asyncio.run(_connect())


async def _connect() -> None:
    import lancedb

    await lancedb.connect_async("memory://")
