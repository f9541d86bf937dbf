"""When each sensor last did its work, kept in the store: a watch that stopped is seen from outside Dagster too."""

import json
from datetime import UTC, datetime

from rag_serving.store import Store


def beat(store: Store, sensor: str) -> None:
    """Write that a sensor was evaluated just now, under `heartbeats/<sensor>.json`."""
    store.write(f"heartbeats/{sensor}.json", json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds")}).encode())
