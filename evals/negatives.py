"""Questions without an answer in the corpus, and the score below which a retrieval is better not answered.

Three grades, from easy to hard: `off_domain` (about something else altogether), `left_out` (in the style of the corpus, its topic missing from it)
and `near_miss` (on a topic of the corpus, the fact itself missing). A threshold on retrieval scores is tuned with `left_out`: near misses score
like answerable questions and are for checks of answers, not of retrieval.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evals.collections import EvalSetError, json_lines, plain_or_gz, split_of
from evals.significance import EvidenceError

FILE = "negatives.jsonl"


class Grade(StrEnum):
    OFF_DOMAIN = "off_domain"
    LEFT_OUT = "left_out"
    NEAR_MISS = "near_miss"


@dataclass(frozen=True, slots=True)
class Negative:
    """A question that no document of the corpus answers."""

    query_id: str
    text: str
    grade: Grade


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """A tuned threshold and what it does to questions it was not tuned on.

    Scores below `threshold` are refused. `auc` is the area under the ROC curve of answerable against each grade, over all queries.
    `false_refusals` is the share of held-out answerable queries below the threshold, `caught` that of the held-out negatives of each grade.
    """

    threshold: float
    auc: Mapping[str, float]
    false_refusals: float
    caught: Mapping[str, float]
    queries: Mapping[str, int]


def load_negatives(folder: Path) -> tuple[Negative, ...]:
    """`negatives.jsonl[.gz]` of an eval set's folder: `_id`, `text`, `metadata.grade`; empty where there is none. Raises EvalSetError."""
    path = plain_or_gz(folder / FILE)
    if path is None:
        return ()
    found = []
    for number, row in json_lines(path):
        query_id, text = row.get("_id"), row.get("text")
        grade = (row.get("metadata") or {}).get("grade", Grade.NEAR_MISS.value)
        if not (isinstance(query_id, str) and query_id and isinstance(text, str) and text.strip()) or grade not in [*Grade]:
            raise EvalSetError(
                f"{path}, line {number}: no usable negative query.",
                fix=f"Each needs `_id`, `text` and a `metadata.grade` out of {', '.join(Grade)}.",
            )
        found.append(Negative(query_id, text, Grade(grade)))
    repeated = [query_id for query_id, count in Counter(each.query_id for each in found).items() if count > 1]
    if repeated:
        raise EvalSetError(f"{path}: query id {repeated[0]!r} stands twice.", fix="Give each query its own id.")
    return tuple(found)


def encode_negatives(negatives: Sequence[Negative]) -> bytes:
    """The content of a `negatives.jsonl` that `load_negatives` reads back."""
    rows = [{"_id": each.query_id, "text": each.text, "metadata": {"grade": each.grade.value}} for each in negatives]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def negative_id(text: str) -> str:
    """The id of a negative query, from its words alone."""
    return f"n-{hashlib.sha256(' '.join(text.split()).casefold().encode()).hexdigest()[:16]}"


def auc(answerable: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that an answerable query scores above a negative one, ties counted half (Mann-Whitney U / (n m))."""
    from scipy.stats import rankdata

    if not answerable or not negative:
        raise EvidenceError("a ROC curve needs answerable and negative queries.", fix="Give both.")
    ranks = rankdata([*answerable, *negative])[: len(answerable)]
    return float((ranks.sum() - len(answerable) * (len(answerable) + 1) / 2) / (len(answerable) * len(negative)))


def tune_threshold(answerable: Mapping[str, float], negatives: Mapping[str, tuple[Grade, float]]) -> NoAnswer:
    """The threshold with the largest J = caught - falsely refused (Youden 1950) on the tune halves; J and AUC of both halves tell of it.

    Values are retrieval scores by query id. Tuned on `left_out` queries where there are any, else on those of every grade. Raises
    EvidenceError without answerable queries or negatives in either half, or if a score is not finite.
    """
    grades = {grade for grade, _ in negatives.values()}
    tuning = {Grade.LEFT_OUT} if Grade.LEFT_OUT in grades else grades
    positive = _halves(answerable)
    negative = _halves({query_id: score for query_id, (grade, score) in negatives.items() if grade in tuning})
    if any(not len(values) for values in (*positive.values(), *negative.values())):
        raise EvidenceError("a half of the eval set has no answerable or no negative queries.", fix="Give more negative queries.")
    candidates = np.unique(np.concatenate([positive["tune"], negative["tune"]]))
    middles = (candidates[:-1] + candidates[1:]) / 2 if len(candidates) > 1 else candidates
    gains = [float(np.mean(negative["tune"] < at) - np.mean(positive["tune"] < at)) for at in middles]
    threshold = float(middles[int(np.argmax(gains))])
    by_grade = {
        grade.value: {query_id: score for query_id, (found, score) in negatives.items() if found is grade}
        for grade in Grade
        if grade in grades
    }
    heldout = {grade: _halves(scores)["heldout"] for grade, scores in by_grade.items()}
    return NoAnswer(
        threshold=threshold,
        auc={grade: auc(list(answerable.values()), list(scores.values())) for grade, scores in by_grade.items()},
        false_refusals=float(np.mean(positive["heldout"] < threshold)),
        caught={grade: float(np.mean(scores < threshold)) for grade, scores in heldout.items() if len(scores)},
        queries={"answerable": len(answerable), **{grade: len(scores) for grade, scores in by_grade.items()}},
    )


def _halves(scores: Mapping[str, float]) -> dict[str, NDArray[np.float64]]:
    halves = {half: np.array([score for query_id, score in scores.items() if split_of(query_id) == half]) for half in ("tune", "heldout")}
    if not all(np.isfinite(values).all() for values in halves.values()):
        raise EvidenceError("a retrieval score is not finite.", fix="Retrieve again.")
    return halves
