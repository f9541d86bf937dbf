"""What is live and how it changes: status, promote, canary, abort, rollback, hold, lift, releases, explain, pin, unpin, gc."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from rag_assets.commands import Json, Reason, acting, console, opened_store, print_json
from rag_serving.settings import Settings, load_settings

commands = typer.Typer()


@commands.command()
def status(as_json: Json = False) -> None:
    """What is live, with its metrics, and what holds."""
    from rag_assets.status import describe, print_status

    facts = describe(load_settings())
    print_json(facts) if as_json else print_status(console, facts)


@commands.command()
def promote(
    snapshot: Annotated[str, typer.Argument(help="Snapshot id or model name; default: the best that passes the gate.")] = "",
    override: Annotated[bool, typer.Option(help="Promote without a PASS verdict; needs --reason.")] = False,
    allow_shrink: Annotated[bool, typer.Option(help="Allow a corpus that lost more rows than gate.max_shrink.")] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Promote a snapshot; its evidence is verified again at this moment."""
    from rag_assets.rounds import promote_named

    _changed(
        lambda settings: promote_named(settings, snapshot, override=override, allow_shrink=allow_shrink, reason=reason), as_json=as_json
    )


@commands.command()
def canary(snapshot: Annotated[str, typer.Argument(help="Snapshot id or model name.")], reason: Reason, as_json: Json = False) -> None:
    """Name a snapshot the canary, beside the champion; it needs PASS verdicts of retrieval quality and warm-up."""
    from rag_assets.rounds import start_canary_named

    _changed(lambda settings: start_canary_named(settings, snapshot, reason=reason), as_json=as_json, moves_release=False)


@commands.command()
def abort(reason: Reason, as_json: Json = False) -> None:
    """End the canary; the champion stays live."""
    from rag_serving import promotion

    _changed(
        lambda settings: promotion.abort(opened_store(settings), actor=acting(settings), reason=reason),
        as_json=as_json,
        moves_release=False,
    )


@commands.command()
def rollback(
    to: Annotated[str, typer.Option(help="An earlier snapshot; default: the previous one.")] = "",
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Make the previous snapshot live again."""
    from rag_serving import promotion

    _changed(
        lambda settings: promotion.rollback(
            opened_store(settings), actor=acting(settings), reason=reason or "rolled back by hand", to=to or None
        ),
        as_json=as_json,
    )


@commands.command()
def hold(reason: Reason, as_json: Json = False) -> None:
    """Block every promotion until lifted."""
    from rag_serving import promotion

    _changed(
        lambda settings: promotion.hold(opened_store(settings), actor=acting(settings), reason=reason), as_json=as_json, moves_release=False
    )


@commands.command()
def lift(reason: Reason, as_json: Json = False) -> None:
    """End all holds."""
    from rag_serving import promotion

    _changed(
        lambda settings: promotion.lift(opened_store(settings), actor=acting(settings), reason=reason), as_json=as_json, moves_release=False
    )


@commands.command()
def releases(as_json: Json = False) -> None:
    """The ledger, newest first, with what every release stands on."""
    from rag_assets.terminal import releases_table
    from rag_serving.releases import Ledger

    store = opened_store(load_settings())
    entries = Ledger(store).entries()
    if as_json:
        print_json({"entries": [asdict(entry) for entry in entries]})
    elif entries:
        console.print(releases_table(store, entries))
    else:
        console.print("The ledger is empty. Make the first release with `ragline run`.")


@commands.command()
def explain(number: Annotated[int, typer.Argument(help="Number of a ledger entry.")], as_json: Json = False) -> None:
    """All the evidence of one entry: who, when, what was compared, every rule with its number."""
    from rag_assets import explain as explanation

    facts = explanation.explain(opened_store(load_settings()), number)
    print_json(facts) if as_json else explanation.print_explanation(console, facts)


@commands.command()
def pin(snapshot: str, reason: Reason, as_json: Json = False) -> None:
    """Never collect this snapshot."""
    from rag_serving import promotion

    _changed(
        lambda settings: promotion.pin(opened_store(settings), snapshot, actor=acting(settings), reason=reason),
        as_json=as_json,
        moves_release=False,
    )


@commands.command()
def unpin(snapshot: str, reason: Reason, as_json: Json = False) -> None:
    """Let a pinned snapshot be collected."""
    from rag_serving import promotion

    _changed(
        lambda settings: promotion.unpin(opened_store(settings), snapshot, actor=acting(settings), reason=reason),
        as_json=as_json,
        moves_release=False,
    )


@commands.command()
def gc(dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False, as_json: Json = False) -> None:
    """Collect snapshots, evidence and leftovers that nothing needs; live, previous, canary and pinned ones always stay."""
    from rag_assets import retention
    from rag_assets.terminal import print_collection

    settings = load_settings()
    store = opened_store(settings)
    decided = retention.plan(store, settings.retention)
    entry = None if dry_run else retention.collect(store, decided, actor=acting(settings))
    if as_json:
        print_json({"dry_run": dry_run, "entry": entry.number if entry else None, **asdict(decided)})
    else:
        print_collection(console, decided, dry_run=dry_run)


def _changed(change: Callable[[Settings], Any], *, as_json: bool, moves_release: bool = True) -> None:
    """Make a change to the ledger, say how long it took and, when it moves the release, how soon a running server followed."""
    from rag_assets.status import follow

    settings = load_settings()
    started = time.perf_counter()
    entry = change(settings)
    seconds = time.perf_counter() - started
    followed, word = follow(settings, entry.number) if entry and moves_release else (None, "")
    if as_json:
        print_json({"entry": asdict(entry) if entry else None, "seconds": round(seconds, 3), "server_followed_seconds": followed})
    elif entry is None:
        console.print("Nothing to do: the best snapshot is live already.")
    else:
        console.print(f"[bold]Entry {entry.number}: {entry.action}[/] {entry.snapshot_id or ''} in {seconds:.2f} s", highlight=False)
        if word:
            console.print(word, highlight=False)
