"""A language model behind any OpenAI-compatible endpoint: one prompt in, one text out."""

from types import TracebackType
from typing import Any, Self

import httpx2

from rag_serving.errors import ConfigError, PlatformError
from rag_serving.settings import Settings


class ChatModel:
    """`POST {RAGLINE_LLM_URL}/chat/completions`, with connections kept while the context is open."""

    def __init__(self, base_url: str, model: str, *, key: str = "", timeout_seconds: float = 60.0) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model
        self._base_url = base_url.rstrip("/")
        self._client = httpx2.AsyncClient(headers=headers, timeout=timeout_seconds, trust_env=False)

    @classmethod
    def configured(cls, settings: Settings) -> Self:
        """The model that RAGLINE_LLM_URL, RAGLINE_LLM_MODEL and RAGLINE_LLM_KEY name; ConfigError when the first two are not set."""
        places = settings.places
        if not (places.llm_url and places.llm_model):
            raise ConfigError(
                "no language model is configured.",
                fix="Set RAGLINE_LLM_URL (an OpenAI-compatible address ending in /v1) and RAGLINE_LLM_MODEL.",
            )
        return cls(places.llm_url, places.llm_model, key=places.llm_key.get_secret_value() if places.llm_key else "")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.aclose()

    async def ask(self, prompt: str) -> str:
        """The reply to one prompt, at temperature 0. PlatformError when the endpoint cannot be reached, refuses, or gives no text."""
        body = {"model": self.model, "temperature": 0, "max_tokens": 200, "messages": [{"role": "user", "content": prompt}]}
        try:
            response = await self._client.post(f"{self._base_url}/chat/completions", json=body)
            response.raise_for_status()
            reply: Any = response.json()
            return str(reply["choices"][0]["message"]["content"])
        except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise PlatformError(
                f"the language model at {self._base_url} gave no answer: {type(error).__name__} {error}.", fix="Check RAGLINE_LLM_URL."
            ) from None
