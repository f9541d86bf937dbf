"""Every error ragline raises on purpose, in one tree.

RaglineError
├── ConfigError            ragline.toml or the environment is wrong
├── SourceError            a corpus source is missing, empty or unreadable
├── ModelError             an embedding model cannot be had, verified or loaded
├── StoreError             bytes are missing, damaged or cannot be written
│   ├── SnapshotError      a snapshot is missing, incomplete or altered
│   │   └── SearchUnavailable  nothing of an opened one can be searched or read now
│   └── AlreadyExists      a create-if-absent found the key taken
├── ReleaseError           the ledger refuses an entry
│   ├── ReleaseConflict    another writer appended first
│   ├── PromotionRefused   the evidence does not allow a promotion
│   ├── NoPrevious         there is nothing to roll back to
│   └── DrillFailed        a rollback drill was too slow, or answered otherwise than the snapshot did when it was measured
├── EncoderError           the embedding service did not give usable vectors
│   ├── EncoderUnavailable it is down, slow or overloaded
│   └── ModelMismatch      its fingerprint is not the snapshot's
├── LanguageModelError     the language model gave no usable answer; `reason` says in which way
├── AccessError            a caller, a host or an origin that may not; an API key that cannot be made or found
├── LimitExceeded          asked too often or too much, or more than there is room for; `retry_after` says when to come back
├── RerankError            the reranker gave no usable scores
├── QueryError             a request cannot be answered as asked
├── DeadlineExceeded       the time for a request ended before its answer was ready
├── NotReady               no verified snapshot is open yet
└── PlatformError          a port, a database or a process is not as needed

Each says what happened, with which value, and what to do next. `evals.collections.EvalSetError` (an eval set is malformed or names unknown
documents) has the same attributes outside this tree, because evals and rag_serving do not import each other.
"""


class RaglineError(Exception):
    """Base of the tree. `code` is stable and goes into API replies and logs; `exit_code` is the CLI's."""

    code = "ragline_error"
    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what} {fix}".strip())


class ConfigError(RaglineError):
    code = "config"
    exit_code = 78


class SourceError(RaglineError):
    code = "source"


class ModelError(RaglineError):
    code = "model"


class StoreError(RaglineError):
    code = "store"


class SnapshotError(StoreError):
    code = "snapshot"


class SearchUnavailable(SnapshotError):
    code = "search_unavailable"


class AlreadyExists(StoreError):
    code = "already_exists"


class ReleaseError(RaglineError):
    code = "release"


class ReleaseConflict(ReleaseError):
    code = "release_conflict"


class PromotionRefused(ReleaseError):
    """The evidence does not allow it; `code` names the reason.

    promotion_refused, held, collected, corpus_shrunk, override_incomplete, override_expired, and of a verdict: verdict_absent, verdict_edited,
    verdict_foreign, verdict_failed, verdict_stale, verdict_outdated (the champion changed since, or the gate asks for more).
    """

    code = "promotion_refused"

    def __init__(self, what: str, *, fix: str = "", code: str = "promotion_refused") -> None:
        super().__init__(what, fix=fix)
        self.code = code


class NoPrevious(ReleaseError):
    code = "no_previous"


class DrillFailed(ReleaseError):
    code = "drill_failed"


class EncoderError(RaglineError):
    code = "encoder"


class EncoderUnavailable(EncoderError):
    code = "encoder_unavailable"


class ModelMismatch(EncoderError):
    code = "model_mismatch"


class LanguageModelError(RaglineError):
    """`reason`: unavailable, overloaded, refused, timeout, malformed, cut, too_long, length, content_filter or withheld."""

    code = "language_model"

    def __init__(self, what: str, *, fix: str = "", reason: str) -> None:
        super().__init__(what, fix=fix)
        self.reason = reason


class RerankError(RaglineError):
    code = "rerank"


class QueryError(RaglineError):
    code = "query"

    def __init__(self, what: str, *, fix: str = "", code: str = "query") -> None:
        super().__init__(what, fix=fix)
        self.code = code


class AccessError(RaglineError):
    code = "access"

    def __init__(self, what: str, *, fix: str = "", code: str = "access") -> None:
        super().__init__(what, fix=fix)
        self.code = code


class LimitExceeded(RaglineError):
    """`retry_after` is in seconds. `code`: overloaded, or of one key: rate_limited, budget_exhausted."""

    code = "overloaded"

    def __init__(self, what: str, *, fix: str = "", code: str = "overloaded", retry_after: float = 1.0) -> None:
        super().__init__(what, fix=fix)
        self.code = code
        self.retry_after = retry_after


class DeadlineExceeded(RaglineError):
    code = "deadline_exceeded"


class NotReady(RaglineError):
    code = "not_ready"


class PlatformError(RaglineError):
    code = "platform"


def in_log(error: BaseException) -> str:
    """What a log may tell of an error met while a request is answered: ours in their own words, of others the kind alone.

    Messages of libraries quote what they were given, and that is what somebody asked or wrote.
    """
    return str(error) if isinstance(error, RaglineError) else type(error).__name__
