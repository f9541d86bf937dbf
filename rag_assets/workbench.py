"""What every step of the line works with: settings, store, loaded models, and a reporter of progress."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from rag_serving.models import EmbeddingModel, load_model
from rag_serving.settings import Settings
from rag_serving.store import LocalStore, Store


class Reporter(Protocol):
    """Hears how long work goes: lines for what happened, a bar for what is under way."""

    def note(self, text: str) -> None: ...
    def bar(self, title: str) -> AbstractContextManager["Bar"]: ...


class Bar(Protocol):
    def __call__(self, done: int, total: int, /) -> None: ...


class LogReporter:
    """Progress as log lines, at most ten a bar: what the Dagster UI shows."""

    def __init__(self) -> None:
        self._log = logging.getLogger("ragline")

    def note(self, text: str) -> None:
        self._log.info(text)

    @contextmanager
    def bar(self, title: str) -> Iterator[Bar]:
        shown = 0

        def update(done: int, total: int) -> None:
            nonlocal shown
            tenth = done * 10 // max(total, 1)
            if tenth > shown:
                shown = tenth
                self._log.info("%s: %d of %d", title, done, total)

        yield update


class Workbench:
    """Opened once a process and handed to each step. Models load on first use and stay loaded.

    `tally` counts work really done: texts "embedded" and snapshots "built".
    """

    def __init__(self, settings: Settings, *, store: Store | None = None, reporter: Reporter | None = None) -> None:
        self.settings = settings
        self.store = store or LocalStore(settings.store_dir)
        self.reporter: Reporter = reporter or LogReporter()
        self.tally: Counter[str] = Counter()
        self._models: dict[str, EmbeddingModel] = {}

    @property
    def models_dir(self) -> Path:
        return self.settings.models_dir

    def model(self, name: str) -> EmbeddingModel:
        """The loaded embedding model of that name; ConfigError when it is not configured, ModelError when it cannot be had."""
        if name not in self._models:
            spec = self.settings.model(name)
            self.reporter.note(f"loading {name}")
            self._models[name] = load_model(spec, self.models_dir, progress=self.reporter.note)
        return self._models[name]

    def release_models(self) -> None:
        """Forget loaded models, so that their memory can be used."""
        self._models.clear()
