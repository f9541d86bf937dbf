"""Chunking: exact spans, sizes, ids and heading paths."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rag_assets.chunking import chunk_documents
from rag_assets.sources import Document


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    made.enable_truncation(4)
    made.enable_padding(length=32)
    return made


TEXTS = st.text(st.sampled_from("ab é😀\n.#- 中`"), max_size=300)


@settings(deadline=None, max_examples=150)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), limit=st.integers(1, 30), suffix=st.sampled_from([".md", ".txt"]))
def test_spans_are_exact_and_lose_only_whitespace(texts, limit, suffix):
    """For any text, every chunk is its span of the document, chunks follow one another, and what lies between them is whitespace."""
    documents = [Document(f"d{n}{suffix}", f"d{n}{suffix}", "Title", text) for n, text in enumerate(texts)]
    chunks = list(chunk_documents(documents, max_tokens=limit, tokenizer=len))
    assert len({chunk.chunk_id for chunk in chunks}) == len(chunks)
    for document in documents:
        own = [chunk for chunk in chunks if chunk.doc_id == document.doc_id]
        if not document.text.strip():
            assert [(chunk.text, chunk.start, chunk.end) for chunk in own] == [("Title", 0, 0)]
            continue
        reached = 0
        for chunk in own:
            assert document.text[chunk.start : chunk.end] == chunk.text != ""
            assert not document.text[reached : chunk.start].strip()
            assert chunk.start >= reached
            assert len(chunk.text) <= limit
            reached = chunk.end
        assert not document.text[reached:].strip()
        assert len(document.text) > limit or len(own) == 1


def test_tokenizer_counts_without_its_truncation_padding(tokenizer):
    """A tokenizer set to truncate and pad still sizes chunks by their true length, and is left as it was."""
    document = Document("d", "d.txt", "T", " ".join(["word"] * 100))
    chunks = list(chunk_documents([document], max_tokens=10, tokenizer=tokenizer))
    assert [words(chunk.text) for chunk in chunks] == [10] * 10
    assert len(next(iter(chunk_documents([document], max_tokens=100, tokenizer=tokenizer))).text) == len(document.text)
    assert tokenizer.truncation["max_length"] == 4


def test_tokenizer_and_callable_agree(tokenizer):
    """Counting through a tokenizer and through a callable that counts alike gives the same chunks."""
    documents = [Document(f"d{n}", f"d{n}.txt", "T", "alpha beta. " * n) for n in range(1, 40)]
    counted = list(chunk_documents(documents, max_tokens=12, tokenizer=lambda text: len(tokenizer.pre_tokenizer.pre_tokenize_str(text))))
    assert list(chunk_documents(documents, max_tokens=12, tokenizer=tokenizer)) == counted


def test_ids_depend_on_document_span_and_text_alone():
    """The same passage keeps its id when other documents come or go or its title changes; another document's same text has another id."""
    one = Document("one", "one.txt", "T", "some text")
    two = Document("two", "two.txt", "T", "some text")
    alone = next(chunk_documents([one], max_tokens=9, tokenizer=words))
    after = list(chunk_documents([two, replace(one, title="New")], max_tokens=9, tokenizer=words))
    assert after[1].chunk_id == alone.chunk_id
    assert after[0].chunk_id != alone.chunk_id
    assert len(alone.chunk_id) == 32


def test_document_without_text_or_title_has_no_chunk():
    """Nothing to embed, nothing to retrieve: no chunk, while its neighbours keep theirs."""
    documents = [Document("a", "a", "", " \n"), Document("b", "b", "B", "")]
    assert [chunk.text for chunk in chunk_documents(documents, max_tokens=5, tokenizer=words)] == ["B"]


def test_heading_path_of_markdown():
    """A Markdown chunk carries the headings above it; a sibling section replaces the last, and code fences and other files give none."""
    text = "# A\n\nintro words here\n\n## B\n\nunder b words\n\n```\n# not a heading\n```\n\n# C\n\nunder c words\n"
    chunks = list(chunk_documents([Document("m", "m.md", "A", text)], max_tokens=5, tokenizer=words))
    under = {fragment: next(c.heading_path for c in chunks if fragment in c.text) for fragment in ("intro", "under b", "not a", "under c")}
    assert under == {"intro": "A", "under b": "A > B", "not a": "A > B", "under c": "C"}
    assert {c.heading_path for c in chunk_documents([Document("m", "m.txt", "A", text)], max_tokens=5, tokenizer=words)} == {""}
