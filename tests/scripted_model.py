"""A scripted language model on a real socket, and a serving process that asks it, for the tests of serving."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from live_server import running
from small_service import serving, settings_for

from rag_serving.settings import Settings
from rag_serving.store import LocalStore
from rag_serving.writing import scripted_llm
from rag_serving.writing.scripted_llm import Script


@contextmanager
def scripted(mode: str = "quote") -> Iterator[tuple[str, Script]]:
    """Its base URL, ending in /v1, and what it does and sees."""
    script = Script(mode)
    with running(scripted_llm.create_app(script), ready_path="/v1/models") as url:
        yield f"{url}/v1", script


def with_model(settings: Settings, url: str, **generation: object) -> Settings:
    """The same with a language model at `url`."""
    return settings.model_copy(
        update={
            "places": settings.places.model_copy(update={"llm_url": url, "llm_model": "scripted"}),
            "generation": settings.generation.model_copy(update=generation),
        }
    )


@contextmanager
def answering(root: Path, store: LocalStore, url: str, **generation: object) -> Iterator[httpx2.Client]:
    """A client of a serving process whose answers the model at `url` writes."""
    with serving(with_model(settings_for(root), url, **generation), store) as client:
        yield client
