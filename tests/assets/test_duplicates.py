"""Duplicates: equal contents by first copy, near-duplicates by similarity, repeated lines, languages."""

import random

from hypothesis import given
from hypothesis import strategies as st

from rag_assets import duplicates
from rag_assets.corpus import DOCUMENTS, TableWriter
from rag_assets.duplicates import first_copies, near_pairs, profile_documents

ENGLISH = "The rollback restores the snapshot that was live before, and every query is answered from it within seconds."
GERMAN = "Die Wiederherstellung setzt den vorherigen Stand ein, und jede Anfrage wird innerhalb weniger Sekunden daraus beantwortet."
CHINESE = "系统会恢复之前的快照,并在几秒钟内根据该快照回答每个查询,这样用户就不会注意到任何变化。"


@given(st.lists(st.sampled_from(["", "a", "b", "c", "ab"]), max_size=20))
def test_first_copies_are_the_first(contents):
    """Each content is led back to the first equal one, as by comparing them all."""
    assert first_copies(contents).tolist() == [contents.index(content) for content in contents]


def write(store, texts):
    writer = TableWriter(store, "documents", DOCUMENTS)
    writer.extend({"doc_id": f"d{n}", "uri": "u", "title": "", "text": text, "content": str(hash(text))} for n, text in enumerate(texts))
    return writer.finish(made_from="test")


def words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices([f"word{n}" for n in range(5000)], k=count)  # noqa: S311 - drawn, not secret


def test_near_duplicates_are_those_above_the_similarity():
    """Texts with 2 % of their words changed are found, texts with half of them changed and unrelated ones are not."""
    base = words(1, 300)
    slightly = [word if n % 50 else "changed" for n, word in enumerate(base)]
    half = [word if n % 2 else "changed" for n, word in enumerate(base)]
    texts = {"base": base, "other": words(2, 300), "slightly": slightly, "half": half, "short": ["one", "two"]}
    signatures = [duplicates._signature(" ".join(text)) for text in texts.values()]
    assert near_pairs(list(texts), signatures) == [("base", "slightly")]


def test_the_estimate_is_the_similarity():
    """The share of equal minima is the Jaccard similarity of the shingles, within four standard errors of 64 draws."""
    base = words(3, 400)
    for every in (5, 20, 60):
        other = [word if n % every else f"new{n}" for n, word in enumerate(base)]
        sets = [{tuple(text[n : n + 3]) for n in range(len(text) - 2)} for text in (base, other)]
        true = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        estimate = float((duplicates._signature(" ".join(base)) == duplicates._signature(" ".join(other))).mean())
        assert abs(estimate - true) < 4 * (true * (1 - true) / 64) ** 0.5


def test_profile_of_a_small_corpus(store):
    """Copies are no near-duplicates, a footer in every document is boilerplate, and each language has its share."""
    footer = "Copyright by nobody at all, all rights reversed."
    texts = [f"{ENGLISH} {n}\n{' '.join(words(n, 30))}\n{footer}" for n in range(8)] + [GERMAN, CHINESE, "?!"]
    write(store, [*texts, texts[0]])
    profile = profile_documents(store)
    assert (profile.documents, profile.profiled, profile.near_duplicates) == (12, 12, 0)
    assert 8 * len(footer) / sum(map(len, texts)) * 0.8 < profile.boilerplate < 0.5
    assert profile.languages == {"en": 0.75, "de": 0.0833, "zh": 0.0833, "und": 0.0833}


def test_a_large_corpus_is_sampled(store, monkeypatch):
    """Of more documents than the limit every n-th is looked through, and the profile says how many."""
    monkeypatch.setattr(duplicates, "PROFILED", 10)
    write(store, [f"{ENGLISH} {' '.join(words(9, 200))} {n}" for n in range(95)])
    profile = profile_documents(store)
    assert (profile.documents, profile.profiled) == (95, 10)
    assert profile.near_duplicates == 9


def test_profile_is_made_once(store, monkeypatch):
    """The same documents are not looked through again; other ones are."""
    write(store, [ENGLISH, GERMAN])
    made = profile_documents(store)
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "_language_of", lambda _: 1 / 0)
        assert profile_documents(store) == made
    write(store, [ENGLISH])
    assert profile_documents(store).documents == 1
