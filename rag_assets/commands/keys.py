"""API keys of the query service: create, list, revoke."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from rag_assets.commands import Json, acting, console, errors, opened_store, print_json
from rag_serving.edge.caller import SCOPES
from rag_serving.settings import load_settings

commands = typer.Typer(no_args_is_help=True, help="API keys of the query service.")


@commands.callback()
def theme() -> None:
    """API keys of the query service."""


@commands.command()
def create(
    name: Annotated[str, typer.Argument(help="Who it is for; never used twice.")],
    group: Annotated[list[str] | None, typer.Option(help="A group whose documents it may find; may be given several times.")] = None,
    scope: Annotated[str, typer.Option(help="Comma-separated: query, feedback, read.")] = ",".join(SCOPES),
    expires: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day (UTC) on which it is no longer good.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once, alone on standard output, and kept nowhere."""
    from rag_serving.edge.keys import create_key

    settings = load_settings()
    token, key = create_key(
        opened_store(settings),
        name,
        scopes=[part.strip() for part in scope.split(",") if part.strip()],
        groups=group or (),
        actor=acting(settings),
        expires=expires.replace(tzinfo=UTC) if expires else None,
    )
    if as_json:
        print_json({"key": token, **asdict(key)})
        return
    typer.echo(token)
    until = f", until {key.expires}" if key.expires else ""
    errors.print(f"[dim]for {escape(key.name)}: {', '.join(key.scopes)}{until}. Keep it now; it cannot be shown again.[/]", highlight=False)


@commands.command(name="list")
def list_keys(as_json: Json = False) -> None:
    """Every key with what it may do; never the key itself."""
    from rag_serving.edge.keys import read_keys

    found = read_keys(opened_store(load_settings()))
    if as_json:
        print_json({"keys": [{**asdict(key), "id": key.key_id, "revoked": asdict(ended) if ended else None} for key, ended in found]})
        return
    if not found:
        console.print("There are no keys: the query service is open, to this machine alone. Make one with `ragline keys create NAME`.")
        return
    table = Table(box=None, header_style="dim")
    for column in ("name", "id", "scopes", "groups", "created", "state"):
        table.add_column(column)
    now = datetime.now(UTC)
    for key, ended in found:
        state = (
            f"revoked {ended.at[:10]} by {ended.actor}"
            if ended
            else "expired"
            if key.expired(now)
            else f"until {key.expires[:10]}"
            if key.expires
            else "good"
        )
        cells = (key.name, key.key_id, " ".join(key.scopes), " ".join(key.groups) or "-", f"{key.created[:10]} by {key.created_by}", state)
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)


@commands.command()
def revoke(
    name: str, reason: Annotated[str, typer.Option(help="Why; it is kept with the key.")] = "revoked by hand", as_json: Json = False
) -> None:
    """End a key; serving processes refuse it within access.poll_seconds."""
    from rag_serving.edge.keys import revoke_key

    settings = load_settings()
    ended = revoke_key(opened_store(settings), name, actor=acting(settings), reason=reason)
    if as_json:
        print_json(asdict(ended))
    else:
        console.print(f"{escape(name)} was revoked at {ended.at}. Running services refuse it within {settings.access.poll_seconds:g} s.")
