"""Why an entry stands in the ledger: who, when, what was compared, and every rule with its number."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rag_assets.evaluation import read_evaluation
from rag_serving.errors import ReleaseError, SnapshotError, StoreError
from rag_serving.releases import Entry, Ledger, fold
from rag_serving.snapshots import read_manifest
from rag_serving.store import Store
from rag_serving.verdicts import GATES, RETRIEVAL_QUALITY

Facts = dict[str, Any]
_STYLES = {"passed": "", "failed": "red", "open": "yellow"}


def explain(store: Store, number: int) -> Facts:
    """All the evidence of entry `number`: the entry, the snapshot it names, the release it followed, its verdicts and their evaluations.

    Evidence of gates is what the entry recorded, not what is on file today. Raises ReleaseError when there is no such entry.
    """
    entries = Ledger(store).entries()
    if not 1 <= number <= len(entries):
        raise ReleaseError(
            f"the ledger has no entry {number}.", fix=f"Give a number from 1 to {len(entries)}." if entries else "It is empty."
        )
    entry = entries[number - 1]
    before = fold(entries[: number - 1]).champion
    verdicts = _verdicts(entry)
    given = {verdict["gate"] for verdict in verdicts}
    other = {name: value for name, value in entry.evidence.items() if name not in given | {"verdict"}}
    return {
        "entry": {name: value for name, value in asdict(entry).items() if name != "evidence"},
        "snapshot": _snapshot(store, entry.snapshot_id),
        "followed": before.snapshot_id if before else None,
        "verdicts": verdicts,
        "evaluations": _evaluations(store, verdicts),
        "evidence": other,
    }


def _verdicts(entry: Entry) -> list[Facts]:
    named = {**entry.evidence, RETRIEVAL_QUALITY: entry.evidence.get("verdict")}
    return [dict(named[gate]) for gate in GATES if isinstance(named.get(gate), Mapping)]  # an abort names its snapshot under "canary"


def _snapshot(store: Store, snapshot_id: str | None) -> Facts | None:
    if snapshot_id is None:
        return None
    try:
        manifest = read_manifest(store, snapshot_id)
    except SnapshotError as error:
        return {"snapshot_id": snapshot_id, "problem": error.what}
    shown = ("embedding_model", "fingerprint", "corpus_sha256", "documents", "rows", "built_at")
    return {"snapshot_id": snapshot_id, **{name: getattr(manifest, name) for name in shown}}


def _evaluations(store: Store, verdicts: Sequence[Facts]) -> list[Facts]:
    """The stored evaluation of each snapshot that a verdict compared, on that verdict's eval set."""
    found: dict[str, Facts] = {}
    for verdict in verdicts:
        for snapshot_id, manifest_sha256 in (
            (verdict["snapshot_id"], verdict["manifest_sha256"]),
            (verdict["champion"], _manifest_sha256(store, verdict["champion"])),
        ):
            if snapshot_id and manifest_sha256 and snapshot_id not in found:
                with suppress(StoreError):
                    evaluation = read_evaluation(store, manifest_sha256, verdict["eval_set_sha256"])
                    if evaluation:
                        found[snapshot_id] = asdict(evaluation)
    return list(found.values())


def _manifest_sha256(store: Store, snapshot_id: str | None) -> str | None:
    if snapshot_id:
        with suppress(SnapshotError):
            return read_manifest(store, snapshot_id).sha256
    return None


def rules_markdown(rules: Sequence[Mapping[str, Any]]) -> str:
    """A gate's rules as a Markdown table: the rule, whether it passed, its number, what was required, and the sentence."""
    head = ["| rule | | observed | required | |", "|:---|:---|---:|---:|:---|"]
    rows = ("| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(rule)) + " |" for rule in rules)
    return "\n".join([*head, *rows]) + "\n"


def rules_table(rules: Sequence[Mapping[str, Any]]) -> Table:
    """The same for a terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, right in (("rule", False), ("", False), ("observed", True), ("required", True), ("", False)):
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for rule in rules:
        table.add_row(*(escape(cell) for cell in _cells(rule)), style=_STYLES[_said(rule)])
    return table


def _said(rule: Mapping[str, Any]) -> str:
    return "passed" if rule["passed"] else "failed" if rule.get("conclusive", True) else "open"


def _cells(rule: Mapping[str, Any]) -> tuple[str, ...]:
    return (rule["name"], _said(rule), _number(rule["observed"]), _number(rule["required"]), rule.get("detail", ""))


def _number(value: float) -> str:
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def print_explanation(console: Console, facts: Facts) -> None:
    entry = facts["entry"]
    console.print(f"[bold]Entry {entry['number']}: {entry['action']}[/] {entry['snapshot_id'] or ''}", highlight=False)
    console.print(f"  by {escape(entry['actor'])} at {entry['at']}: {escape(entry['reason'])}", highlight=False)
    console.print(f"  before it, {facts['followed'] or 'nothing'} was live", highlight=False)
    snapshot = facts["snapshot"] or {}
    if "problem" in snapshot:
        console.print(f"  [yellow]{escape(snapshot['problem'])}[/]", highlight=False)
    elif snapshot:
        console.print(
            f"  {snapshot['embedding_model']}: {snapshot['documents']:,} documents, {snapshot['rows']:,} chunks, built {snapshot['built_at']}",
            highlight=False,
        )
    for verdict in facts["verdicts"]:
        console.print()
        console.print(f"[bold]{verdict['gate']}[/]  {escape(verdict['summary'])}", highlight=False)
        console.print(
            f"  [dim]measured {verdict['measured_at']} on eval set {verdict['eval_set_sha256'][:12]}, "
            f"compared with {verdict['champion'] or 'nothing'}[/]",
            highlight=False,
        )
        console.print(rules_table(verdict["rules"]))
    for evaluation in facts["evaluations"]:
        metrics = {
            name: value for name, value in evaluation["metrics"].items() if name.startswith(("mrr_at", "ndcg", "recall", "latency_p"))
        }
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if not name.endswith(("_low", "_high")))
        console.print(
            f"\n[bold]evaluation[/]  {evaluation['embedding_model']}  [dim]{evaluation['snapshot_id']}[/]\n  {shown}", highlight=False
        )
    if facts["evidence"]:
        console.print()
        console.print_json(data=facts["evidence"], default=str)
