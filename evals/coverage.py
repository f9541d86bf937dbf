"""Which parts of a corpus does an eval set speak of? What no query touches can break without a number moving."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the corpus: its documents, how many a judgment names, and how many some query's results show."""

    name: str
    documents: int
    judged: int
    retrieved: int

    @property
    def touched(self) -> float:
        """Share of its documents that a judgment names."""
        return self.judged / self.documents


@dataclass(frozen=True, slots=True)
class Coverage:
    """Parts, the largest untouched ones first, and the same over the whole corpus."""

    parts: tuple[Part, ...]
    whole: Part

    @property
    def untouched(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if not part.judged)


def part_of(doc_id: str) -> str:
    """The part a document belongs to by its id: its folder, else the word before the first dot or #, else the corpus itself."""
    folder = PurePosixPath(doc_id).parent
    if str(folder) != ".":
        return folder.parts[0] if folder.parts[0] != "/" else str(folder)
    stem = doc_id.partition("#")[0]
    head, dot, _ = stem.partition(".")
    return head if dot or stem != doc_id else "(root)"


def coverage(parts: Mapping[str, str], *, judged: Collection[str], retrieved: Iterable[str]) -> Coverage:
    """Coverage of a corpus, `parts` by document id. `judged`: ids with a judgment above 0; `retrieved`: ids among any query's results."""
    judged_in = Counter(parts[doc_id] for doc_id in set(judged) if doc_id in parts)
    retrieved_in = Counter(parts[doc_id] for doc_id in set(retrieved) if doc_id in parts)
    documents = Counter(parts.values())
    found = [Part(name, count, judged_in[name], retrieved_in[name]) for name, count in documents.items()]
    found.sort(key=lambda part: (part.judged > 0, -part.documents * (1 - part.touched), part.name))
    return Coverage(tuple(found), Part("all", len(parts), judged_in.total(), retrieved_in.total()))
