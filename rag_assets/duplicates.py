"""What a corpus says more than once: equal documents, near-duplicates, and lines that stand in many documents; and in which languages."""

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from rag_assets.corpus import Table, require_table, table_batches
from rag_serving.store import Store

PROFILED = 20_000
NEAR = 0.8
_KEY, _PROFILE_VERSION = "corpus/profile.json", 1
_PERMUTATIONS, _BANDS, _SHINGLE = 64, 16, 3
_COMMON_SHARE, _COMMON_DOCUMENTS = 0.01, 5
_LANGUAGE_CHARACTERS = 500
_WORD = re.compile(r"\w+")

Hashes = NDArray[np.uint64]


def first_copies(contents: Iterable[str]) -> NDArray[np.int64]:
    """For each content the position of the first equal one: its own where it is no copy. 128 bits of a hash tell contents apart."""
    digests = b"".join(hashlib.blake2b(content.encode(), digest_size=16).digest() for content in contents)
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    opens = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(order)]
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(opens, np.arange(len(order)), 0))]
    return first


@dataclass(frozen=True, slots=True)
class Profile:
    """A sample of the documents, `profiled` of `documents`, looked through.

    `near_duplicates` counts documents much like an earlier one (three-word shingles, estimated Jaccard similarity 0.8 or more; documents
    equal to it not counted), `pairs` names a few. `boilerplate` is the share of characters in lines that stand in 1 % of the documents, and in
    five at least. `languages` are shares of documents by ISO 639-1 code, "und" where a text has fewer than 20 letters.
    """

    documents: int
    profiled: int
    near_duplicates: int
    pairs: tuple[tuple[str, str], ...]
    boilerplate: float
    languages: Mapping[str, float]


def profile_documents(store: Store) -> Profile:
    """Look through the current documents: all of them, or of more than 20,000 every n-th. Looked through once as long as they are the same."""
    table = require_table(store, "documents")
    seen = {"content_sha256": table.content_of("doc_id", "text"), "code": _PROFILE_VERSION}
    if store.exists(_KEY):
        known = json.loads(store.read(_KEY))
        if {name: known.pop(name, None) for name in seen} == seen:
            return Profile(**{**known, "pairs": tuple((one, other) for one, other in known["pairs"])})
    profile = _profile(store, table)
    store.write(_KEY, json.dumps(seen | asdict(profile), indent=2).encode())
    return profile


def _profile(store: Store, table: Table) -> Profile:
    step = max(1, -(-table.rows // PROFILED))
    ids, signatures, lines, languages = [], [], [], Counter[str]()
    seen: set[str] = set()
    for doc_id, content, text in _sampled(store, step):
        if content not in seen:
            seen.add(content)
            ids.append(doc_id)
            signatures.append(_signature(text))
        lines.append(_line_hashes(text))
        languages[_language_of(text)] += 1
    pairs = near_pairs(ids, signatures)
    profiled = languages.total()
    return Profile(
        documents=table.rows,
        profiled=profiled,
        near_duplicates=len(pairs),
        pairs=tuple(pairs[:5]),
        boilerplate=_boilerplate(lines),
        languages={language: round(count / profiled, 4) for language, count in languages.most_common(10)},
    )


def _sampled(store: Store, step: int) -> Iterator[tuple[str, str, str]]:
    passed = 0
    for batch in table_batches(store, "documents", columns=["doc_id", "content", "text"]):
        for place in range(-passed % step, batch.num_rows, step):
            yield batch["doc_id"][place].as_py(), batch["content"][place].as_py(), batch["text"][place].as_py()
        passed += batch.num_rows


def near_pairs(ids: list[str], signatures: list[Hashes]) -> list[tuple[str, str]]:
    """(earlier, later) for each later document that is much like an earlier one, by MinHash signatures in bands (Broder 1997; LSH).

    A pair is looked at when one of 16 bands of four values is equal: of pairs with similarity 0.8 that is 99.98 %.
    """
    buckets: dict[tuple[int, bytes], int] = {}
    pairs = []
    for later, signature in enumerate(signatures):
        if not signature.size:
            continue
        bands = [(number, band.tobytes()) for number, band in enumerate(signature.reshape(_BANDS, -1))]
        candidates = sorted({buckets[band] for band in bands if band in buckets})
        alike = next((earlier for earlier in candidates if float((signatures[earlier] == signature).mean()) >= NEAR), None)
        if alike is not None:
            pairs.append((ids[alike], ids[later]))
        for band in bands:
            buckets.setdefault(band, later)
    return pairs


def _multipliers() -> tuple[Hashes, Hashes]:
    random = np.random.default_rng(0)
    factors = random.integers(1, 1 << 63, size=_PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
    return factors, random.integers(0, 1 << 63, size=_PERMUTATIONS, dtype=np.uint64)


_FACTORS, _ADDENDS = _multipliers()


def _signature(text: str) -> Hashes:
    """64 minima over the hashed shingles of a text, by multiply-shift; empty for a text of fewer than three words."""
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.casefold())], np.uint64)
    if len(words) < _SHINGLE:
        return np.empty(0, np.uint64)
    shingles = (
        words[:-2] * np.uint64(0x9E3779B97F4A7C15) + words[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F) + words[2:] * np.uint64(0x165667B19E3779F9)
    )
    shingles = np.unique(shingles ^ (shingles >> np.uint64(29)))
    minima: Hashes = np.full(_PERMUTATIONS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), 4096):
        hashed = shingles[start : start + 4096, None] * _FACTORS + _ADDENDS
        minima = np.minimum(minima, (hashed >> np.uint64(32)).min(axis=0))
    return minima


def _line_hashes(text: str) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash and characters of each distinct line of a document."""
    lines = sorted({line.strip() for line in text.splitlines()} - {""})
    hashes = [zlib.crc32(line.encode()) << 32 | zlib.adler32(line.encode()) for line in lines]
    return np.array(hashes, np.uint64), np.array([len(line) for line in lines], np.int64)


def _boilerplate(lines: list[tuple[Hashes, NDArray[np.int64]]]) -> float:
    hashes = np.concatenate([np.empty(0, np.uint64), *(each for each, _ in lines)])
    lengths = np.concatenate([np.empty(0, np.int64), *(each for _, each in lines)])
    if not lengths.sum():
        return 0.0
    _, at, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    common = counts[at] >= max(_COMMON_DOCUMENTS, _COMMON_SHARE * len(lines))
    return round(float(lengths[common].sum() / lengths.sum()), 4)


def _language_of(text: str) -> str:
    import py3langid  # its model is in the wheel; measured: 0.1 ms a text

    opening = text[:_LANGUAGE_CHARACTERS]
    return str(py3langid.classify(opening)[0]) if sum(map(str.isalpha, opening)) >= 20 else "und"
