"""The sample's eval set: what the worked examples of the API reference set out to do, asked of its operations.

A query is an example's title where it reads "To <verb> ..." in four words or more, else the first sentence of its description without
"The following example"; the service's short name follows as "in <serviceId>" where the text lacks it. Left out: texts under four words,
descriptions without a full stop or colon, and examples of operations that are no document. Equal texts are one query, all their
operations relevant.
"""

import hashlib
import html
import re
from collections.abc import Iterator, Mapping
from typing import Any

from evals.collections import EvalSet, Query
from evals.sample.reference import Service, Tier, services

MIN_WORDS = 4
_SENTENCE = re.compile(r"(.+?)[.:!?]+(?:\s|$)")
_OPENING = re.compile(r"(?:the following|this) example\s+", re.IGNORECASE)


def _plain(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def _wording(example: Mapping[str, Any]) -> str:
    title = _plain(example.get("title") or "")
    if re.match(r"To [a-z]", title) and len(title.split()) >= MIN_WORDS:
        return title.rstrip(".")
    sentence = _SENTENCE.match(_plain(example.get("description") or ""))
    return _OPENING.sub("", sentence[1], count=1) if sentence else ""


def _asked(service: Service) -> Iterator[tuple[str, str]]:
    short_name = service.model["metadata"]["serviceId"]
    documented = service.operations.keys()
    for operation, examples in service.examples.items():
        for text in map(_wording, examples if operation in documented else ()):
            if len(text.split()) >= MIN_WORDS:
                named = re.search(rf"\b{re.escape(short_name)}\b", text, re.IGNORECASE)
                yield text if named else f"{text} in {short_name}", f"{service.name}.{operation}"


def load_sample(tier: Tier = "full") -> EvalSet:
    """Build the eval set from the installed botocore: 1,344 queries, or 391 in the small tier, at the pinned version. Raises EvalSetError.

    A query's id is the hash of its text, so it never depends on order; `metadata["service"]` is its slice.
    """
    relevant: dict[str, set[str]] = {}
    for service in services(tier):
        for text, doc_id in _asked(service):
            relevant.setdefault(text, set()).add(doc_id)
    queries, qrels = [], {}
    for text, doc_ids in sorted(relevant.items()):
        query_id = hashlib.sha256(text.encode()).hexdigest()[:16]
        queries.append(Query(query_id, text, {"service": min(doc_ids).partition(".")[0]}))
        qrels[query_id] = dict.fromkeys(sorted(doc_ids), 1)
    return EvalSet("sample" if tier == "full" else "sample-small", tuple(queries), qrels)
