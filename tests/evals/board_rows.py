"""Leaderboard rows for the tests of the table and of the pictures."""

import math

from evals.contrasts import Contrast
from evals.reports import Cost, LeaderboardRow


def row(model: str, mrr: float, status: str, **more) -> LeaderboardRow:
    metrics = {"mrr_at_10": mrr, "mrr_at_10_low": mrr - 0.015, "mrr_at_10_high": mrr + 0.015, "recall_at_10": 0.95, "ndcg_at_10": 0.88}
    return LeaderboardRow(model, metrics | {"latency_p50_ms": 3.1, "latency_p95_ms": 14.23}, f"snapshot-of-{model}", status, **more)


ROWS = [
    row("wordllama-256", 0.742, "refused"),
    LeaderboardRow("BM25", {"mrr_at_10": 0.79, "recall_at_10": math.nan}, None, "baseline"),
    row("multilingual-e5-small", 0.860, "champion"),
    LeaderboardRow("unmeasured", {}, None, "failed"),
]
FULL = [
    row(
        "wordllama-256",
        0.742,
        "inconclusive",
        contrast=Contrast(-0.118, -0.14, -0.10, 0.0003, "worse"),
        cost=Cost(1234.4, 0.81, 104.26, 1.5),
    ),
    row(
        "a-rather-long-model-name",
        0.858,
        "passed",
        contrast=Contrast(-0.002, -0.01, 0.01, 0.734, "no difference seen"),
        cost=Cost(None, None, 80.0, 1.25),
    ),
    row("multilingual-e5-small", 0.860, "champion", cost=Cost(31.2, 60.5, 98.7, 2.0)),
    ROWS[1],
]
