"""Word evidence: the formula of docs/retrieval.md, as it stands there, and words as they are compared."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_serving.settings import Wording
from rag_serving.wording import terms, word_evidence, worded

PIECES = [
    "DeleteBucket",
    "deletes",
    "deleting",
    "the",
    "bucket",
    "Buckets",
    "is",
    "class",
    "classes",
    "東京タワー",
    "東京",
    "s3",
    "x_y",
    "é",
    "ﬁne",
]
PIECES += ["running", "runs", "İstanbul", "🙂", "a" * 60, "HTTPServer", "of", "and", "it's", "1999", "ß", "Straße", "policies", "policy"]
passages = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map(" ".join)
pools = st.lists(st.tuples(passages, passages), max_size=8)


def by_the_formula(query, pool, *, weights, distinctness):
    """Evidence with plain sets of words and pairs."""
    asked = list(terms(query))
    asked_words, asked_pairs = set(asked), set(pairwise(asked))
    titles = [set(terms(title)) for title, _ in pool]
    bodies = [list(terms(text)) for _, text in pool]
    words = [asked_words & set(body) for body in bodies]
    pairs = [asked_pairs & set(pairwise(body)) for body in bodies]
    seen = Counter()
    for title, found_words, found_pairs in zip(titles, words, pairs, strict=True):
        seen.update(title | found_words)
        seen.update(found_pairs)

    def mass(found):
        return math.fsum(math.log(1 + (len(pool) - seen[term] + 0.5) / (seen[term] + 0.5)) for term in found)

    return [
        weights.pairs * mass(found_pairs) / (mass(asked_pairs) or 1.0)
        + weights.words * mass(found_words) / (mass(asked_words) or 1.0)
        + weights.title * distinctness * mass(title & asked_words) / (mass(title) or 1.0)
        for title, found_words, found_pairs in zip(titles, words, pairs, strict=True)
    ]


@settings(max_examples=100, deadline=None)
@given(query=passages, pool=pools, distinctness=st.floats(0, 1))
def test_evidence_is_the_formula(query, pool, distinctness):
    """For any texts the bonus equals the formula to the last bit, and lies between 0 and the sum of the weights."""
    weights = Wording(pairs=0.3, words=0.2, title=0.1)
    found = word_evidence(query, [worded(*each) for each in pool], weights=weights, distinctness=distinctness)
    assert found == by_the_formula(query, pool, weights=weights, distinctness=distinctness)
    assert all(0 <= bonus <= 0.6 + 1e-9 for bonus in found)


@settings(max_examples=100, deadline=None)
@given(text=passages)
def test_no_term_holds_a_space(text):
    """A term is never empty and holds no space, so that words between spaces are those words."""
    assert all(term and " " not in term for term in terms(text))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Deletes the DeleteBucket policies", ["delet", "delet", "bucket", "polic"]),
        ("running runs class", ["run", "run", "class"]),
        ("the of and", []),
        ("東京タワー s3", ["東京", "京タ", "タワ", "ワー", "s3"]),
        ("x_y it's", ["x", "y", "s"]),
        ("a" * 60, ["a" * 60]),
    ],
)
def test_terms(text, found):
    """Endings, function words, compounds and scripts without spaces, by example."""
    assert list(terms(text)) == found
