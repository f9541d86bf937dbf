"""Extractive answers: quoted word for word, cited, and withheld when the passages do not speak of what was asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_serving.context import Passage, assemble
from rag_serving.retrieval import Hit
from rag_serving.wording import terms
from rag_serving.writing.extraction import LONGEST, MOST_SENTENCES, NO_PASSAGES, NOTHING_FOUND, extract, sentences

BUCKETS = "Deletes the bucket. All objects in the bucket must be deleted before the bucket itself. For more information, see the guide."
USERS = "Creates a new user for the account.\n\n- The name must be unique.\n- Names are case sensitive."


def passages(*texts: str, titles: tuple[str, ...] = ()) -> tuple[Passage, ...]:
    named = [*titles, *("" for _ in texts)]
    hits = [Hit(f"c{at}", f"d{at}", "u", named[at], "", text, 0, len(text), 1.0, {}) for at, text in enumerate(texts)]
    return assemble(hits)


def test_answer_is_quoted_and_marked():
    """The sentence that has the words of the question is the answer, with the number of its passage."""
    answer = extract("must a user name be unique?", passages(BUCKETS, USERS))
    assert answer.text == "The name must be unique. [2]"
    assert [passage.number for passage in answer.cited] == [2]
    assert not answer.abstained


def test_rare_words_decide():
    """A word that few sentences have counts for more than one that most have."""
    texts = ["The bucket is large. The bucket is new. The bucket is red.", "The quota is per account."]
    assert extract("bucket quota", passages(*texts)).quotes[0].text == "The quota is per account."


def test_title_helps_its_sentences():
    """Of two equal sentences, the one whose passage is titled with the rest of the question wins, whatever its rank."""
    answer = extract("delete a key pair", passages("Deletes the item.", "Deletes it at once.", titles=("Bucket", "Key pair")))
    assert answer.quotes[0].passage.number == 2


def test_pointers_elsewhere_are_not_answers():
    """A sentence that only says where to read on gives way to one that says something."""
    text = "For more information, see versioning of buckets. Versioning of buckets keeps each version."
    assert extract("versioning of buckets", passages(text)).quotes[0].text == "Versioning of buckets keeps each version."


@pytest.mark.parametrize("query", ["who won the football world cup", "the of and", "🙂🙂", "?"])
def test_abstains(query):
    """Passages without the question's words, or a question without words, give one plain sentence and no citation."""
    answer = extract(query, passages(BUCKETS, USERS))
    assert (answer.text, answer.quotes, answer.cited, answer.abstained) == (NOTHING_FOUND, (), (), True)


def test_no_passages_abstains():
    """Without passages the answer says so."""
    assert extract("anything", ()).text == NO_PASSAGES


def test_scripts_without_spaces():
    """Chinese and Japanese questions find sentences by pairs of characters, and sentences end without a space."""
    answer = extract("如何删除存储桶?", passages("用户可以创建密钥。先清空,再删除存储桶。名称唯一。"))
    assert answer.quotes[0].text == "先清空,再删除存储桶。"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("delete", "deleting"),
        ("deletes", "deleted"),
        ("policies", "policy"),
        ("stopped", "stops"),
        ("DeleteBucket", "delete bucket"),
        ("address", "addresses"),
    ],
)
def test_word_forms_meet(one, other):
    """Plurals, tenses and compounds compare equal."""
    assert list(terms(one)) == list(terms(other))


def test_sentences_are_cut_where_they_end():
    """Sentences, list items and paragraphs are units; abbreviations before lower case and wrapped lines are not ends."""
    text = "Wait, e.g. a\nminute. Then go on.\n- First item\n- Second item\n\n# Heading\nLast one"
    assert list(sentences(text)) == ["Wait, e.g. a\nminute.", "Then go on.", "First item", "Second item", "Heading\nLast one"]


@given(st.text(max_size=300), st.lists(st.text(max_size=400), max_size=5))
def test_every_quote_stands_in_its_passage(query, texts):
    """Whatever is asked of whatever text: quotes are verbatim, few and short, each marked, and an abstention quotes nothing."""
    answer = extract(query, passages(*texts))
    assert all(quote.text in quote.passage.hit.text and 0 < len(quote.text) <= LONGEST for quote in answer.quotes)
    assert len(answer.quotes) <= MOST_SENTENCES
    assert answer.abstained == (not answer.quotes)
    if answer.quotes:
        assert answer.text == " ".join(f"{quote.text} [{quote.passage.number}]" for quote in answer.quotes)
