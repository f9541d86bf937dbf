"""The commands of `ragline`, by theme, and what they share: consoles, common options, and facts as JSON."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from rag_serving.errors import ConfigError
from rag_serving.releases import current_actor
from rag_serving.settings import Settings
from rag_serving.store import LocalStore, Store

console = Console(width=None if sys.stdout.isatty() else 120)
errors = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print facts as JSON.")]
Reason = Annotated[str, typer.Option(help="Why; it is written in the ledger.")]


def print_json(facts: Any) -> None:
    sys.stdout.write(json.dumps(facts, indent=2, default=str) + "\n")


def chosen_models(settings: Settings, chosen: str) -> tuple[str, ...]:
    """The named models, comma-separated or all; the default ones when none is named."""
    if not settings.models:
        raise ConfigError("no embedding models are configured.", fix="Run in the folder of ragline.toml, or set RAGLINE_CONFIG.")
    if chosen == "all":
        return tuple(spec.name for spec in settings.models)
    names = tuple(name.strip() for name in chosen.split(",") if name.strip()) or settings.default_models
    return tuple(settings.model(name).name for name in names)


def opened_store(settings: Settings) -> Store:
    return LocalStore(settings.store_dir)


def acting(settings: Settings) -> str:
    """Who acts, for the ledger."""
    return current_actor(settings.places.actor)
