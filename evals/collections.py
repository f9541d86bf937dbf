"""Eval sets: queries with relevance judgments, in the BEIR layout (`queries.jsonl[.gz]`, `qrels/<split>.tsv`)."""

import difflib
import gzip
import hashlib
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from evals.answers import occurrences

AMBIGUOUS_SHARE = 0.005  # of the queries; so few cannot move MRR by more than a quarter of the default margin
EVAL_SCHEMES = ("sample:", "sample:small", "beir:PATH")


class EvalSetError(ValueError):
    """An eval set is missing, malformed, names unknown documents or is contaminated by the corpus (`code` "contaminated").

    Carries `what`, `fix`, `code` and `exit_code` as `rag_serving.errors.RaglineError` does, without importing it (evals and rag_serving
    do not know each other); the CLI treats both alike.
    """

    exit_code = 1

    def __init__(self, what: str, *, fix: str = "", code: str = "eval_set") -> None:
        self.what = what
        self.fix = fix
        self.code = code
        super().__init__(f"{what} {fix}".strip())


@dataclass(frozen=True)
class Query:
    query_id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Where an answer stands: characters `[start, end)` of a document's text."""

    doc_id: str
    start: int
    end: int


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

    @cached_property
    def _by_text(self) -> Mapping[str, tuple[str, ...]]:
        """Query ids by folded text."""
        ids: dict[str, list[str]] = {}
        for query in self.queries:
            ids.setdefault(fold(query.text), []).append(query.query_id)
        return {text: tuple(each) for text, each in ids.items()}

    @property
    def duplicate_texts(self) -> int:
        """How many queries repeat the words of an earlier one, case and white space aside."""
        return len(self.queries) - len(self._by_text)

    @property
    def ambiguous(self) -> tuple[str, ...]:
        """Ids of the queries that share their words with a query judged otherwise: no ranking can satisfy both."""
        return tuple(
            query_id
            for ids in self._by_text.values()
            if any(self.qrels.get(other) != self.qrels.get(ids[0]) for other in ids)
            for query_id in ids
        )

    def answer_spans(self, texts: Mapping[str, str]) -> dict[str, tuple[AnswerSpan, ...]]:
        """Where the answers of each query stand in its relevant documents, from `texts[doc_id]`, the documents as they were indexed.

        An answer is a string of `metadata["answers"]`, or `metadata["answer"]`, at `metadata["start"]` where that is given and true, else at
        each occurrence that does not begin or end within a word; any white space matches any other. A query is absent from the result if it
        has no answer, or none that stands in a relevant document: span-level scores do not count it.
        """
        found: dict[str, tuple[AnswerSpan, ...]] = {}
        for query in self.queries:
            relevant = [doc_id for doc_id, score in self.qrels.get(query.query_id, {}).items() if score > 0 and doc_id in texts]
            given = query.metadata.get("answers") or [query.metadata.get("answer")]
            answers = [answer for answer in given if isinstance(answer, str) and answer.strip()] if isinstance(given, list) else []
            start = query.metadata.get("start")
            spans = {
                AnswerSpan(doc_id, *span)
                for doc_id in relevant
                for answer in answers
                for span in occurrences(answer, texts[doc_id], start=start if isinstance(start, int) and len(answers) == 1 else None)
            }
            if spans:
                found[query.query_id] = tuple(sorted(spans, key=lambda span: (span.doc_id, span.start, span.end)))
        return found

    def standing_in(self, aliases: Mapping[str, str]) -> "EvalSet":
        """The same set, of the same hash, with each judgment of a document in `aliases` given to the equal document that stands for it."""
        if not any(doc_id in aliases for row in self.qrels.values() for doc_id in row):
            return self
        qrels: dict[str, dict[str, int]] = {}
        for query_id, row in self.qrels.items():
            judged = qrels.setdefault(query_id, {})
            for doc_id, score in row.items():
                standing = aliases.get(doc_id, doc_id)
                judged[standing] = max(score, judged.get(standing, score))
        mapped = replace(self, qrels=qrels)
        mapped.__dict__["sha256"] = self.sha256
        return mapped

    def half(self, which: Literal["tune", "heldout"]) -> "EvalSet":
        """The queries of one half by `split_of`: fit weights and thresholds on `tune`, report on `heldout`."""
        queries = tuple(query for query in self.queries if split_of(query.query_id) == which)
        qrels = {query.query_id: self.qrels[query.query_id] for query in queries if query.query_id in self.qrels}
        return EvalSet(f"{self.name}/{which}", queries, qrels)

    def validate(self, doc_ids: Collection[str]) -> None:
        """Raise EvalSetError unless the set can carry evidence.

        It has two queries or more, every query has an id of its own and a judgment above 0, and every judgment names a query and a document
        that exist. At most AMBIGUOUS_SHARE of the queries share their words with one that was judged otherwise: collections written by many
        hands hold a few (4 of 10,570 in SQuAD's development set).
        """
        if len(self.queries) < 2:
            count = "one query" if self.queries else "no queries"
            raise EvalSetError(
                f"eval set {self.name!r} has {count}.", fix="Give one with two judged queries at least; a gate asks for more."
            )
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
        if len(self.ambiguous) > AMBIGUOUS_SHARE * len(self.queries):
            self._refuse(
                list(self.ambiguous),
                f"has queries of the same words but different judgments (more than {AMBIGUOUS_SHARE:.1%} of all)",
                "Merge each such group into one query with all its judgments.",
            )

    def _refuse(self, culprits: list[str], what: str, fix: str) -> None:
        if culprits:
            more = ", ..." if len(culprits) > 3 else ""
            raise EvalSetError(f"eval set {self.name!r} {what}: {', '.join(culprits[:3])}{more} ({len(culprits)} in all).", fix=fix)


def fold(text: str) -> str:
    """The words of a text: case, compatibility forms (NFKC) and the kind and amount of white space aside."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


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


def read_queries(path: Path) -> Iterator[Query]:
    """The queries of a `queries.jsonl[.gz]`, judged or not, in order. EvalSetError names file and line."""
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
    queries = tuple(read_queries(queries_file))
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


def encode_beir(evalset: EvalSet) -> tuple[bytes, bytes]:
    """The content of `queries.jsonl` and of `qrels/test.tsv`; `load_beir` reads back a set of the same hash."""
    lines = [f"{query_id}\t{doc_id}\t{score}" for query_id, row in evalset.qrels.items() for doc_id, score in row.items()]
    broken = next((line for line in lines if line.count("\t") != 2 or len(line.splitlines()) != 1), None)
    if broken:
        raise EvalSetError(f"the ids in {broken!r} hold a tab or a line break.", fix="Rename them; a qrels file cannot hold such ids.")
    rows = [{"_id": query.query_id, "text": query.text, "metadata": dict(query.metadata)} for query in evalset.queries]
    queries = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return queries.encode(), "\n".join(["query-id\tcorpus-id\tscore", *lines, ""]).encode()


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
