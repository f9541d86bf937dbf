"""An eval set that grows: a BEIR folder to which judged queries and negatives are added one at a time.

Every addition is whole or absent after a crash: files are replaced in one step, queries before their judgments, and a query without judgments is
not read. One writer at a time, by a lock on the folder.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals.collections import EvalSet, EvalSetError, Query, encode_beir, load_beir, plain_or_gz, read_queries
from evals.negatives import FILE, Grade, Negative, encode_negatives, load_negatives, negative_id


def open_living(folder: Path) -> EvalSet:
    """The eval set in `folder`; an empty one where there is none yet. EvalSetError when what is there cannot be read."""
    if plain_or_gz(folder / "queries.jsonl") is None and not (folder / "qrels" / "test.tsv").exists():
        return EvalSet(folder.resolve().name, (), {})
    return load_beir(folder)


def add_judged(folder: Path, text: str, grades: Mapping[str, int], *, metadata: Mapping[str, Any] | None = None) -> EvalSet:
    """Add a query with its judgments, at least one above 0; a text that is there already gets the new judgments added to its own.

    `grades` is by document id: 0 not relevant, above 0 relevant, more is better. Returns the grown eval set.
    """
    if not any(grade > 0 for grade in grades.values()):
        raise EvalSetError(f"{text!r} has no relevant document.", fix="Judge one above 0, or add it as a negative query.")
    with _locked(folder):
        now = open_living(folder)
        known = next((query for query in now.queries if _folded(query.text) == _folded(text)), None)
        query = known or Query(f"r-{hashlib.sha256(_folded(text).encode()).hexdigest()[:16]}", text, dict(metadata or {}))
        queries = now.queries if known else (*now.queries, query)
        qrels = {**now.qrels, query.query_id: {**now.qrels.get(query.query_id, {}), **grades}}
        grown = EvalSet(now.name, queries, qrels)
        write_beir(replace(grown, queries=(*queries, *_unjudged(folder, grown))), folder)
    return grown


def _unjudged(folder: Path, judged: EvalSet) -> Iterator[Query]:
    """The queries that stay in the folder without a judgment in this split: another split may have them."""
    path = plain_or_gz(folder / "queries.jsonl")
    known = {query.query_id for query in judged.queries}
    yield from (query for query in (read_queries(path) if path else ()) if query.query_id not in known)


def add_negative(folder: Path, text: str, grade: Grade) -> None:
    """Add a question that the corpus does not answer; one that is there already stays as it is."""
    with _locked(folder):
        now = load_negatives(folder)
        if all(_folded(each.text) != _folded(text) for each in now):
            _replace(folder / FILE, encode_negatives([*now, Negative(negative_id(text), text, grade)]))


def write_beir(evalset: EvalSet, folder: Path) -> None:
    """Write `queries.jsonl` and `qrels/test.tsv` durably; `load_beir` reads back a set of the same hash."""
    queries, qrels = encode_beir(evalset)
    _replace(folder / "queries.jsonl", queries)
    _replace(folder / "qrels" / "test.tsv", qrels)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise _unwritable(folder, error) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unwritable(path: Path, error: OSError) -> EvalSetError:
    return EvalSetError(f"cannot write {path}: {error.strerror}.", fix="Name a folder that can be written, and make room.")


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
