"""The drift detectors. Each measures the champion as it is, from its own snapshot and its own bytes, never rebuilt, and keeps a report.

What the reports hold and who reads them is told in `rag_assets.drift`; findings that only warn also go out as alerts. Without a release a
report says just that. A model that cannot be loaded, or a damaged snapshot, is an error and no finding: the detector has not reported, and
silence places a hold of its own.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from evals.drift import cloud_shift, paired_cosine
from evals.significance import paired_difference
from rag_assets import alerts
from rag_assets.drift import Detector, DriftFinding, DriftReport, Kind, Severity, keep_report, latest_report, read_reports
from rag_assets.evaluation import Evaluation, evaluation_history, reciprocal_ranks
from rag_assets.measurement import ann_recall
from rag_assets.observations import query_window, reference_window
from rag_assets.service_vectors import by_service
from rag_assets.staleness import behind_source
from rag_assets.steps import current_snapshot, evaluate_snapshot, load_eval_set
from rag_assets.variety import AT_RELEASE, BEFORE, DIVERSITY, lost_variety, varied
from rag_assets.workbench import Workbench
from rag_serving.releases import Action, Ledger
from rag_serving.retrieval import Retriever, open_table
from rag_serving.signals import contract, work
from rag_serving.snapshots import Manifest, read_manifest, snapshot_key, verify
from rag_serving.store import Store

Vectors = NDArray[np.float32]
Found = tuple[Kind, Severity, str]

_FEWEST = 10
_RECALL_PROBES = 100


def _reported(report: DriftReport) -> work.Facts:
    found: work.Facts = {contract.DETECTOR: report.detector, contract.FINDINGS: [finding.kind for finding in report.findings]}
    return {**found, contract.SNAPSHOT_ID: report.snapshot_id} if report.snapshot_id else found


@work.worked(contract.DETECT, _reported)
def evaluation_drift(bench: Workbench) -> DriftReport:
    """The champion's snapshot measured afresh, however young its last evaluation is, and compared with the evaluation at its release.

    `mrr_fall` when the loss is significant and `gate.margin` cannot be excluded, or when the MRR fell below the gate's floor. Another model
    behind the champion's name is never measured there: that is the finding `fingerprint`.
    """
    manifest = _champion(bench)
    if manifest is None:
        return _unreleased(bench, "evaluation")
    swapped = _swapped(bench, manifest)
    if swapped:
        facts = _fingerprints(bench, manifest)
        return _keep(
            bench, "evaluation", manifest, swapped, numbers={"same_model": 0.0}, facts=facts, found=[("fingerprint", "hold", swapped)]
        )
    eval_set = load_eval_set(bench)
    before = _at_release(bench, manifest, eval_set.sha256)
    now = evaluate_snapshot(bench, manifest, eval_set, fresh=True)
    gate = bench.settings.gate
    numbers = {"mrr": now.mrr, "floor": gate.mrr_floor, "ann_recall": now.ann_recall, "same_model": 1.0, **now.metrics}
    below = now.mrr < gate.mrr_floor and (before is None or before.mrr >= gate.mrr_floor)
    numbers |= {"below_floor": float(below)}
    detail = f"MRR {now.mrr:.3f} on {now.eval_set}, the floor is {gate.mrr_floor:.2f}"
    fell = below
    if before:
        pair = paired_difference(reciprocal_ranks(bench.store, now), reciprocal_ranks(bench.store, before), alpha=gate.alpha)
        numbers |= {"mrr_at_release": before.mrr, "difference": pair.mean, "low": pair.low, "high": pair.high, "p_worse": pair.p_worse}
        numbers |= varied(before, AT_RELEASE)
        fell = below or (pair.p_worse <= gate.alpha and not pair.noninferior(gate.margin))
        detail += f"; {pair.mean:+.3f} [{pair.low:+.3f}, {pair.high:+.3f}] against {before.mrr:.3f} at its release (p = {pair.p_worse:.4f})"
    earlier = _of_release_before(bench, eval_set.sha256)
    if earlier:
        numbers |= varied(earlier, BEFORE)
    facts = {
        "embedding_model": now.embedding_model,
        "eval_set": now.eval_set,
        "compared_with": before.measured_at if before else "nothing yet",
    }
    found: list[Found] = [("mrr_fall", "hold", f"the champion's {detail}.")] if fell else []
    return _keep(bench, "evaluation", manifest, f"{detail}.", numbers=numbers, facts=facts, found=found)


@work.worked(contract.DETECT, _reported)
def embedding_drift(bench: Workbench) -> DriftReport:
    """Probe texts of the champion embedded again with the model as it is configured now, by paired cosine with the stored vectors.

    A fingerprint that is not the snapshot's is found before anything is compared; the cosines then only say how far apart the two are. Some of
    the texts are also embedded by the embedding service, where it answers, since that is where the vectors of queries come from.
    """
    manifest = _champion(bench)
    if manifest is None:
        return _unreleased(bench, "embedding")
    swapped = _swapped(bench, manifest)
    model, floor = bench.model(manifest.embedding_model), bench.settings.drift.cosine_floor
    numbers = {"same_model": float(not swapped), "cosine_floor": floor}
    found: list[Found] = [("fingerprint", "hold", swapped)] if swapped else []
    summary = swapped
    texts, stored = _stored(bench.store, manifest, bench.settings.drift.probes)
    if model.dims == manifest.dims:
        pairs = paired_cosine(stored, model.encode_documents(texts))
        numbers |= {"cosine_mean": pairs.mean, "cosine_min": pairs.minimum, "share_below": pairs.share_below, "probes": float(pairs.n)}
        moved = f"{pairs.n} texts embedded again have mean cosine {pairs.mean:.5f} with the stored vectors (least {pairs.minimum:.5f})"
        summary = f"{swapped} {moved}.".strip()
        if pairs.mean < floor and not swapped:
            found = [("runtime", "hold", f"{moved}; {floor:g} is the floor, though the model's fingerprint is unchanged.")]
    service = by_service(bench, manifest, texts, stored, floor=floor)
    found += [each for each in service.findings if each[0] not in {kind for kind, *_ in found}]
    facts = _fingerprints(bench, manifest) | {"embedding_service": service.names}
    return _keep(bench, "embedding", manifest, summary, numbers={**numbers, **service.numbers}, facts=facts, found=found)


@work.worked(contract.DETECT, _reported)
def query_drift(bench: Workbench) -> DriftReport:
    """The queries of now against those kept at the release, as the configured model sees them. A warning in the second week in a row."""
    manifest = _champion(bench)
    if manifest is None:
        return _unreleased(bench, "query")
    settings = bench.settings.drift
    window = query_window(bench.store, bench.settings, most=settings.window)
    reference = reference_window(bench.store, manifest.sha256, window)
    facts = {"origin": window.origin, "reference_kept_at": reference.at}
    if min(len(window.queries), len(reference.queries)) < _FEWEST:
        return _keep(bench, "query", manifest, f"fewer than {_FEWEST} queries to compare.", facts=facts)
    model = bench.model(manifest.embedding_model)
    numbers = _shift(model.encode_queries(reference.queries), model.encode_queries(window.queries))
    before = [report for report in read_reports(bench.store, "query") if report.at[:10] < _now()[:10]][-1:]
    again = [report for report in before if (report.snapshot_id, report.facts.get("origin")) == (manifest.snapshot_id, window.origin)]
    weeks = 1 + sum(report.numbers.get("p_mmd", 1.0) <= settings.alpha for report in again) if numbers["p_mmd"] <= settings.alpha else 0
    summary = f"{len(window.queries)} queries ({window.origin}) against {len(reference.queries)} kept at the release: {_in_words(numbers)}"
    found: list[Found] = [("query", "warn", f"{summary}; below {settings.alpha:g} twice in a row.")] if weeks > 1 else []
    return _keep(bench, "query", manifest, f"{summary}.", numbers=numbers | {"in_a_row": float(weeks)}, facts=facts, found=found)


@work.worked(contract.DETECT, _reported)
def corpus_drift(bench: Workbench) -> DriftReport:
    """Passages of the newest snapshot of the champion's model against the champion's own; only vectors of one fingerprint are compared."""
    manifest = _champion(bench)
    if manifest is None:
        return _unreleased(bench, "corpus")
    newest, settings = current_snapshot(bench, manifest.embedding_model), bench.settings.drift
    facts = {"newest": newest.snapshot_id if newest else "none"}
    if newest is None or newest.corpus_sha256 == manifest.corpus_sha256:
        return _keep(bench, "corpus", manifest, "the champion holds the newest corpus.", facts=facts)
    if newest.fingerprint != manifest.fingerprint or min(newest.rows, manifest.rows) < _FEWEST:
        return _keep(bench, "corpus", manifest, "the newest snapshot has another model or too few passages to compare.", facts=facts)
    sides = [_stored(bench.store, each, settings.window)[1] for each in (manifest, newest)]
    numbers = _shift(*sides) | {"rows": float(manifest.rows), "rows_newest": float(newest.rows)}
    summary = f"{newest.rows:,} passages of {newest.snapshot_id} against the champion's {manifest.rows:,}: {_in_words(numbers)}"
    found: list[Found] = [("corpus", "warn", f"{summary}; below {settings.alpha:g}.")] if numbers["p_mmd"] <= settings.alpha else []
    return _keep(bench, "corpus", manifest, f"{summary}.", numbers=numbers, facts=facts, found=found)


@work.worked(contract.DETECT, _reported)
def index_health(bench: Workbench) -> DriftReport:
    """Age of the champion, whether it holds what the source does, rows that no index covers, recall, and how varied its results are.

    The source is listed anew, so that it shows when nothing was built of a change; one that cannot be listed counts as changed. Variety is
    compared with the release and with the release before, because a corpus that was flooded came with a release of its own.
    """
    manifest = _champion(bench)
    if manifest is None:
        return _unreleased(bench, "index")
    settings, gate = bench.settings.drift, bench.settings.gate
    age = (datetime.now(UTC) - datetime.fromisoformat(manifest.built_at)).total_seconds() / 86400
    behind, changes = behind_source(bench, manifest)
    unindexed, recall = asyncio.run(_probe_index(bench.store, manifest))
    numbers = {"age_days": age, "corpus_behind": float(bool(behind)), "unindexed_rows": float(unindexed), "ann_recall": recall}
    numbers |= {"documents": float(manifest.documents), "rows": float(manifest.rows), "source_changes": changes}
    found: list[Found] = []
    if behind and age > settings.max_age_days:
        late = f"the champion was built {age:.1f} days ago ({settings.max_age_days:g} are allowed), and {behind}."
        found.append(("stale", "warn", late))
    if unindexed:
        found.append(("stale", "warn", f"{unindexed:,} of {manifest.rows:,} rows of the champion are in no index."))
    if recall < gate.ann_recall_floor:
        found.append(
            ("recall", "warn", f"the champion's vector index finds {recall:.3f} of the nearest; {gate.ann_recall_floor} is the floor.")
        )
    diversity = _diversity(latest_report(bench.store, "evaluation"), manifest.snapshot_id)
    lost = [each for each in lost_variety(diversity) if each[0] > settings.max_diversity_loss]
    if lost:
        found.append(("diversity", "warn", f"results {'; '.join(words for _, words in lost)}."))
    summary = f"built {age:.1f} days ago, {unindexed:,} rows unindexed, recall {recall:.3f}{f', {behind}' if behind else ''}"
    return _keep(bench, "index", manifest, f"{summary}.", numbers=numbers | diversity, found=found)


def _champion(bench: Workbench) -> Manifest | None:
    live = Ledger(bench.store).state().champion
    return read_manifest(bench.store, live.snapshot_id) if live else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _keep(
    bench: Workbench,
    detector: Detector,
    manifest: Manifest | None,
    summary: str,
    *,
    numbers: Mapping[str, float] | None = None,
    facts: Mapping[str, str] | None = None,
    found: Sequence[Found] = (),
) -> DriftReport:
    at, snapshot_id = _now(), manifest.snapshot_id if manifest else None
    finite = {name: float(value) for name, value in (numbers or {}).items() if np.isfinite(value)}
    findings = tuple(DriftFinding(kind, severity, snapshot_id or "", detail, finite, at) for kind, severity, detail in found)
    bench.reporter.note(f"{detector} drift: {summary}")
    report = keep_report(bench.store, DriftReport(detector, snapshot_id, at, summary, finite, facts or {}, findings))
    for finding in findings:
        if finding.severity == "warn":  # one that holds is told of by its hold
            alerts.send(bench.settings, alerts.Alert(f"drift_{finding.kind}", alerts.Severity.WARNING, finding.detail, finding.numbers, at))
    return report


def _unreleased(bench: Workbench, detector: Detector) -> DriftReport:
    return _keep(bench, detector, None, "nothing is released yet.")


def _swapped(bench: Workbench, manifest: Manifest) -> str:
    """What to say when the model configured under the snapshot's name is another one; empty when it is the same."""
    model = bench.model(manifest.embedding_model)
    if model.fingerprint == manifest.fingerprint:
        return ""
    return f"{model.spec.name!r} has fingerprint {model.fingerprint[:12]} now, the champion was built with {manifest.fingerprint[:12]}."


def _fingerprints(bench: Workbench, manifest: Manifest) -> dict[str, str]:
    configured = bench.model(manifest.embedding_model)
    return {"embedding_model": manifest.embedding_model, "fingerprint": manifest.fingerprint, "fingerprint_now": configured.fingerprint}


def _at_release(bench: Workbench, manifest: Manifest, eval_set_sha256: str) -> Evaluation | None:
    """The last evaluation on this eval set before the champion's promotion, else the first one after it."""
    kept = evaluation_history(bench.store, manifest.sha256, eval_set_sha256)
    comparable = [evaluation for evaluation in kept if evaluation.k == bench.settings.eval.k]
    entries = Ledger(bench.store).entries()
    promoted = [entry.at for entry in entries if entry.action is Action.PROMOTE and entry.snapshot_id == manifest.snapshot_id][-1]
    earlier = [evaluation for evaluation in comparable if evaluation.measured_at <= promoted]
    return next(iter(earlier[-1:] or comparable), None)


def _of_release_before(bench: Workbench, eval_set_sha256: str) -> Evaluation | None:
    """The last evaluation on this eval set of the snapshot that was live before the champion; None where it was never measured on it."""
    previous = Ledger(bench.store).state().previous
    kept = evaluation_history(bench.store, previous.manifest_sha256, eval_set_sha256) if previous else []
    return next((evaluation for evaluation in reversed(kept) if evaluation.k == bench.settings.eval.k), None)


def _diversity(report: DriftReport | None, snapshot_id: str) -> dict[str, float]:
    """What the champion's evaluation says of how varied its results are, now and at the release; nothing before its first."""
    numbers = report.numbers if report and report.snapshot_id == snapshot_id else {}
    return {name: value for name, value in numbers.items() if name.startswith(DIVERSITY)}


def _stored(store: Store, manifest: Manifest, most: int) -> tuple[list[str], Vectors]:
    """Up to `most` texts with their stored vectors, always the same ones of a snapshot; every file is verified first."""
    verify(store, manifest.snapshot_id)
    rng = np.random.default_rng(int(manifest.sha256[:8], 16))
    rows = np.sort(rng.choice(manifest.rows, size=min(most, manifest.rows), replace=False))

    async def read() -> tuple[list[str], Vectors]:
        table = await open_table(store.folder(snapshot_key(manifest.snapshot_id)))
        try:
            found = await table.take_offsets(rows.tolist()).select(["content", "vector"]).to_arrow()
        finally:
            table.close()
        return found["content"].to_pylist(), found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, manifest.dims)

    return asyncio.run(read())


async def _probe_index(store: Store, manifest: Manifest) -> tuple[int, float]:
    """Rows that some index does not cover, and the share of the 10 nearest of stored vectors that serving's search finds."""
    probes = (await asyncio.to_thread(_stored, store, manifest, _RECALL_PROBES))[1]
    retriever = await Retriever.open(store, manifest.snapshot_id)
    table = await open_table(store.folder(snapshot_key(manifest.snapshot_id)))
    try:
        covered = [await table.index_stats(index.name) for index in await table.list_indices()]
        unindexed = max((statistics.num_unindexed_rows for statistics in covered if statistics), default=0)
        return unindexed, await ann_recall(retriever, probes, k=10)
    finally:
        table.close()
        retriever.close()


def _shift(reference: Vectors, window: Vectors) -> dict[str, float]:
    shift = cloud_shift(reference, window)
    return {
        "mmd": shift.mmd,
        "p_mmd": shift.p_mmd,
        "auc": shift.auc,
        "p_auc": shift.p_auc,
        "centroid_cosine": shift.centroid_cosine,
        "reference": float(shift.n_reference),
        "window": float(shift.n_window),
    }


def _in_words(numbers: Mapping[str, float]) -> str:
    return f"MMD^2 {numbers['mmd']:.5f} (p = {numbers['p_mmd']:.3f}), classifier AUC {numbers['auc']:.3f} (p = {numbers['p_auc']:.3f})"
