"""Queries that got worse between two evaluations of one eval set: what was asked, what was expected, what came, and where it stood before."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.collections import EvalSet
from evals.significance import EvidenceError

_GOT = 3


@dataclass(frozen=True, slots=True)
class Regression:
    """One query that lost reciprocal rank. Ranks are of the first relevant document, None where none came within the cutoff.

    `expected` are the relevant documents, the most relevant first; `got` are the first three that came.
    """

    query_id: str
    query: str
    expected: tuple[str, ...]
    got: tuple[str, ...]
    rank_before: int | None
    rank_after: int | None
    difference: float


def worst_regressions(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], eval_set: EvalSet, *, limit: int = 50
) -> list[Regression]:
    """The `limit` queries that lost most reciprocal rank, worst first; queries that lost nothing are left out.

    `before` and `after` are rows of `evals.metrics.QueryRow` as mappings. EvidenceError unless both are of the queries of `eval_set`.
    """
    champion = {row["query_id"]: row for row in before}
    candidate = {row["query_id"]: row for row in after}
    if not champion.keys() == candidate.keys() == eval_set.qrels.keys():
        raise EvidenceError(
            f"{len(champion):,} and {len(candidate):,} measured queries are not the {len(eval_set.qrels):,} of eval set {eval_set.name!r}.",
            fix="Evaluate both on this eval set.",
        )
    found = [
        Regression(
            query_id=query.query_id,
            query=query.text,
            expected=relevant_documents(eval_set.qrels[query.query_id]),
            got=tuple(candidate[query.query_id]["retrieved"][:_GOT]),
            rank_before=champion[query.query_id]["rank"],
            rank_after=candidate[query.query_id]["rank"],
            difference=candidate[query.query_id]["reciprocal_rank"] - champion[query.query_id]["reciprocal_rank"],
        )
        for query in eval_set.queries
        if query.query_id in candidate
    ]
    return sorted((each for each in found if each.difference < 0), key=lambda each: (each.difference, each.query_id))[:limit]


def regressions_markdown(found: Iterable[Regression]) -> str:
    """The regressions as a Markdown table, or a sentence where there are none."""
    lines = [
        _line([each.query, ", ".join(each.expected), ", ".join(each.got), _rank(each.rank_before), _rank(each.rank_after)])
        for each in found
    ]
    if not lines:
        return "No query lost reciprocal rank.\n"
    return "\n".join([_line(["query", "expected", "got", "rank before", "rank after"]), "| --- | --- | --- | ---: | ---: |", *lines]) + "\n"


def relevant_documents(judgments: Mapping[str, int]) -> tuple[str, ...]:
    """The documents judged above 0, the most relevant first."""
    return tuple(sorted((doc_id for doc_id, grade in judgments.items() if grade > 0), key=lambda doc_id: (-judgments[doc_id], doc_id)))


def _rank(rank: int | None) -> str:
    return "not found" if rank is None else str(rank)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
