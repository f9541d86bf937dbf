"""The embedding models of a service, each loaded once, off the event loop, on first use."""

import asyncio
import logging
from collections.abc import Sequence

from rag_serving.models import EmbeddingModel, load_model
from rag_serving.settings import Settings

RETRY_SECONDS = 15  # between attempts to load a preloaded model

log = logging.getLogger(__name__)


class Shelf:
    """`specs` are the configured models by name, `loaded` those that are in memory, `failed` why a preloaded one is not."""

    def __init__(self, settings: Settings) -> None:
        self.specs = {spec.name: spec for spec in settings.models}
        self._models_dir = settings.models_dir
        self._locks = {name: asyncio.Lock() for name in self.specs}
        self.loaded: dict[str, EmbeddingModel] = {}
        self.failed: dict[str, str] = {}

    async def get(self, name: str) -> EmbeddingModel:
        """The model of that configured name. Raises ModelError."""
        if name in self.loaded:
            return self.loaded[name]
        async with self._locks[name]:
            if name not in self.loaded:
                model = await asyncio.to_thread(load_model, self.specs[name], self._models_dir, progress=log.info)
                log.info("%s loaded: fingerprint %s, %s", name, model.fingerprint[:12], model.dtype)
                self.loaded[name] = model
        return self.loaded[name]

    async def preload(self, names: Sequence[str]) -> None:
        """Load these, trying again while one fails; `failed` says why."""
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                try:
                    await self.get(name)
                except Exception as error:
                    log.exception("%s cannot be loaded; the next attempt is in %s s", name, RETRY_SECONDS)
                    self.failed[name] = str(error)
                else:
                    waiting.remove(name)
            if waiting:
                await asyncio.sleep(RETRY_SECONDS)
