"""Eval sets: queries with relevance judgments, in the BEIR layout (`queries.jsonl[.gz]`, `qrels/<split>.tsv`)."""

import difflib
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

EVAL_SCHEMES = ("sample:", "sample:small", "beir:PATH")


class EvalSetError(ValueError):
    """An eval set is missing, malformed or names unknown documents.

    Carries `what`, `fix`, `code` and `exit_code` as `rag_serving.errors.RaglineError` does, without importing it (evals and rag_serving
    do not know each other); the CLI treats both alike.
    """

    code = "eval_set"
    exit_code = 1

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what} {fix}".strip())


@dataclass(frozen=True)
class Query:
    query_id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def split_of(query_id: str) -> Literal["tune", "heldout"]:
    """The half a query belongs to, from its id alone: first byte of sha256 even -> tune, odd -> heldout. Never changes as a set grows."""
    return "heldout" if hashlib.sha256(query_id.encode()).digest()[0] % 2 else "tune"


@dataclass(frozen=True)
class EvalSet:
    """Queries and `qrels[query_id][doc_id]`, a judgment (0: judged irrelevant). `unjudged` counts the queries left out for want of one."""

    name: str
    queries: tuple[Query, ...]
    qrels: Mapping[str, Mapping[str, int]]
    unjudged: int = 0

    @cached_property
    def sha256(self) -> str:
        """The eval-set hash: over ids, texts, metadata and judgments, whatever their order; the name does not count."""
        queries = sorted([query.query_id, query.text, _canonical(query.metadata)] for query in self.queries)
        judgments = sorted([query_id, doc_id, score] for query_id, row in self.qrels.items() for doc_id, score in row.items())
        return hashlib.sha256(_canonical([queries, judgments]).encode()).hexdigest()

    @property
    def duplicate_texts(self) -> int:
        """How many queries repeat the words of an earlier one."""
        return len(self.queries) - len({query.text for query in self.queries})

    def half(self, which: Literal["tune", "heldout"]) -> "EvalSet":
        """The queries of one half by `split_of`: fit weights and thresholds on `tune`, report on `heldout`."""
        queries = tuple(query for query in self.queries if split_of(query.query_id) == which)
        qrels = {query.query_id: self.qrels[query.query_id] for query in queries if query.query_id in self.qrels}
        return EvalSet(f"{self.name}/{which}", queries, qrels)

    def validate(self, doc_ids: Collection[str]) -> None:
        """Raise EvalSetError unless every query has a judgment above 0 and every judgment names a query and a document that exist."""
        if not self.queries:
            raise EvalSetError(f"eval set {self.name!r} has no queries.", fix="Give one with at least one judged query.")
        ids = Counter(query.query_id for query in self.queries)
        self._refuse([query_id for query_id, count in ids.items() if count > 1], "has duplicate query ids", "Give each query its own id.")
        self._refuse(
            [query_id for query_id in self.qrels if query_id not in ids], "judges unknown queries", "Add them or drop their lines."
        )
        known = doc_ids if isinstance(doc_ids, set | frozenset | dict) else set(doc_ids)
        self._refuse(
            sorted({doc_id for row in self.qrels.values() for doc_id in row if doc_id not in known}),
            "names documents that the corpus does not hold",
            "Use the eval set made for this corpus, or remove these judgments.",
        )
        self._refuse(
            [query_id for query_id in ids if max(self.qrels.get(query_id, {}).values(), default=0) <= 0],
            "has queries without a relevant document",
            "Judge at least one document above 0 for each, or drop them.",
        )

    def _refuse(self, culprits: list[str], what: str, fix: str) -> None:
        if culprits:
            more = ", ..." if len(culprits) > 3 else ""
            raise EvalSetError(f"eval set {self.name!r} {what}: {', '.join(culprits[:3])}{more} ({len(culprits)} in all).", fix=fix)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def plain_or_gz(path: Path) -> Path | None:
    """The file of that name, or with `.gz` added, whichever exists; the plain one first."""
    return next((each for each in (path, path.with_name(path.name + ".gz")) if each.is_file()), None)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and content of each non-blank line of a UTF-8 file, gzipped or not. EvalSetError names file and cause."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise EvalSetError(f"{path} is not UTF-8 after line {number}.", fix="Save it as UTF-8.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise EvalSetError(f"cannot read {path} after line {number}: {error}.", fix="Check its permissions, or fetch it again.") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a JSON Lines file, whose text can be stored as UTF-8. EvalSetError names file and line."""
    for number, line in text_lines(path):
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise EvalSetError(
                f"{path}, line {number}: half a character, \\u{ord(error.object[error.start]):04x}.",
                fix="Write the pair of surrogates whole, or remove the half.",
            ) from None
        except json.JSONDecodeError as error:
            raise EvalSetError(f"{path}, line {number}: not valid JSON ({error}).", fix="One JSON object on each line.") from None
        if not isinstance(row, dict):
            raise EvalSetError(
                f"{path}, line {number}: a {type(row).__name__} where an object is due.", fix="One JSON object on each line."
            )
        yield number, row


def _read_queries(path: Path) -> Iterator[Query]:
    seen: dict[str, int] = {}
    for number, row in json_lines(path):
        query_id, text, metadata = row.get("_id"), row.get("text"), row.get("metadata") or {}
        if isinstance(query_id, int) and not isinstance(query_id, bool):
            query_id = str(query_id)
        if not (isinstance(query_id, str) and query_id and isinstance(text, str) and text.strip() and isinstance(metadata, dict)):
            raise EvalSetError(f"{path}, line {number}: no usable query.", fix="Each needs `_id` and `text`; `metadata` is an object.")
        if query_id in seen:
            raise EvalSetError(f"{path}: query id {query_id!r} on lines {seen[query_id]} and {number}.", fix="Give each query its own id.")
        seen[query_id] = number
        yield Query(query_id, text, metadata)


def _read_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, line in text_lines(path):
        cells = line.split("\t")
        if number == 1 and not cells[-1].strip().lstrip("-").isdigit():
            continue
        try:
            query_id, doc_id, score = cells[0], cells[1], int(cells[2])
        except (IndexError, ValueError):
            raise EvalSetError(
                f"{path}, line {number}: {line[:80]!r} is no judgment.", fix="Each line: query-id, tab, corpus-id, tab, whole-number score."
            ) from None
        if qrels.setdefault(query_id, {}).setdefault(doc_id, score) != score:
            raise EvalSetError(f"{path}, line {number}: {query_id!r} and {doc_id!r} were judged otherwise above.", fix="Keep one judgment.")
    return qrels


def load_beir(path: Path, split: str = "test") -> EvalSet:
    """Read the eval set of a BEIR collection. Only queries with judgments in `split` are kept, as BEIR does. Raises EvalSetError."""
    queries_file, qrels_file = plain_or_gz(path / "queries.jsonl"), path / "qrels" / f"{split}.tsv"
    if queries_file is None:
        raise EvalSetError(f"no queries.jsonl or queries.jsonl.gz in {path}.", fix="Give the folder of a BEIR collection.")
    if not qrels_file.is_file():
        there = ", ".join(sorted(each.stem for each in (path / "qrels").glob("*.tsv"))) or "none"
        raise EvalSetError(f"no judgments at {qrels_file}.", fix=f"Splits found: {there}.")
    qrels = _read_qrels(qrels_file)
    queries = tuple(_read_queries(queries_file))
    kept = tuple(query for query in queries if query.query_id in qrels)
    missing = sorted(qrels.keys() - {query.query_id for query in kept})
    if missing:
        raise EvalSetError(
            f"{qrels_file} judges {len(missing)} queries that {queries_file.name} does not hold, such as {missing[0]!r}.",
            fix="Add them or drop their lines.",
        )
    if not kept:
        raise EvalSetError(f"{qrels_file} holds no judgments.", fix="Give at least one judged query.")
    return EvalSet(path.resolve().name, kept, qrels, unjudged=len(queries) - len(kept))


def write_beir(evalset: EvalSet, path: Path) -> None:
    """Write `queries.jsonl` and `qrels/test.tsv` under `path`; `load_beir` reads back a set of the same hash."""
    lines = [f"{query_id}\t{doc_id}\t{score}" for query_id, row in evalset.qrels.items() for doc_id, score in row.items()]
    broken = next((line for line in lines if line.count("\t") != 2 or len(line.splitlines()) != 1), None)
    if broken:
        raise EvalSetError(f"the ids in {broken!r} hold a tab or a line break.", fix="Rename them; a qrels file cannot hold such ids.")
    (path / "qrels").mkdir(parents=True, exist_ok=True)
    rows = [{"_id": query.query_id, "text": query.text, "metadata": dict(query.metadata)} for query in evalset.queries]
    (path / "queries.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (path / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines, ""]), encoding="utf-8")


def open_eval_set(address: str, *, root: Path) -> EvalSet:
    """The eval set at `sample:`, `sample:small`, `beir:PATH` or a bare path; paths are relative to `root`. Raises EvalSetError."""
    from evals.sample import load_sample

    scheme, colon, rest = address.partition(":")
    if address in ("sample:", "sample:full"):
        return load_sample("full")
    if address == "sample:small":
        return load_sample("small")
    if colon and scheme == "beir":
        return load_beir(root / rest)
    if address and (root / address).is_dir():
        return load_beir(root / address)
    close = difflib.get_close_matches(address, ["sample:", "sample:small"], n=1)
    valid = f"Valid: {', '.join(EVAL_SCHEMES)}, or the path of a BEIR folder."
    raise EvalSetError(f"no eval set at {address!r}.", fix=f"Did you mean {close[0]!r}? {valid}" if close else valid)
