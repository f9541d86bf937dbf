"""Embedding models and their weights: pull."""

from typing import Annotated

import typer

from rag_assets.commands import chosen_models, console
from rag_serving.settings import load_settings

commands = typer.Typer(no_args_is_help=True, help="Embedding models and their weights.")


@commands.callback()
def theme() -> None:
    """Embedding models and their weights."""


@commands.command()
def pull(names: Annotated[str, typer.Argument(help="Comma-separated model names, or all.")] = "") -> None:
    """Fetch weights, checked against their pinned hashes."""
    from rag_serving.embedding import weights

    settings = load_settings()
    for name in chosen_models(settings, names):
        folder = weights.pull(settings.model(name).source, settings.models_dir, progress=lambda text: console.print(f"[dim]  {text}[/]"))
        console.print(f"{name}: {folder.relative_to(settings.root) if folder.is_relative_to(settings.root) else folder}")
