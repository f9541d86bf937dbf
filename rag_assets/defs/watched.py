"""Dagster's sensor decorator with a heartbeat: whoever reads the store sees when a sensor last did its work."""

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

import dagster as dg

from rag_assets.heartbeats import beat
from rag_serving.errors import StoreError

log = logging.getLogger(__name__)

Watch = Callable[..., dg.SensorResult]


def sensor(**options: Any) -> Callable[[Watch], dg.SensorDefinition]:
    """`dg.sensor` for functions that take the workbench as `bench`; each evaluation that raises nothing leaves a heartbeat in its store."""
    define = dg.sensor(**options)
    return lambda watch: define(_beating(watch))


def _beating(watch: Watch) -> Watch:
    @wraps(watch)
    def watched(*args: Any, **kwargs: Any) -> dg.SensorResult:
        result = watch(*args, **kwargs)
        try:
            beat(inspect.signature(watch).bind(*args, **kwargs).arguments["bench"].store, watch.__name__)
        except StoreError as error:  # what the sensor did is done, and its cursor must be kept; the missing heartbeat tells the rest
            log.warning("the heartbeat of %s was not written: %s", watch.__name__, error)
        return result

    return watched
