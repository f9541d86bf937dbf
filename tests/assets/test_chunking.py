"""Chunking: exact spans, sizes, ids, heading paths, and nothing that the model would cut off."""

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from rag_assets.chunking import Chunk, Chunker, Sizing
from rag_assets.sources import Document

STRATEGIES = ["structure", "sentence", "fixed"]


def words(text: str) -> int:
    return len(text.split())


def chunk(documents, *, max_tokens, tokenizer, window=1 << 30, prompt="", **knobs) -> list[Chunk]:
    chunker = Chunker(Sizing(max_tokens, tokenizer, window=window, prompt=prompt), **knobs)
    return [each for found in chunker.chunks(documents) for each in found]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({"?": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="?"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.enable_truncation(4)
    made.enable_padding(length=32)
    return made


TEXTS = st.text(st.sampled_from("ab é😀\n.#- 中`。"), max_size=300)


@settings(deadline=None, max_examples=200)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    limit=st.integers(1, 30),
    markup=st.sampled_from(["markdown", "rst", ""]),
    strategy=st.sampled_from(STRATEGIES),
    overlap=st.integers(0, 15),
)
def test_spans_are_exact_and_lose_only_whitespace(texts, limit, markup, strategy, overlap):
    """For any text and strategy, every chunk is its span of the document and within the limit, and what no chunk holds is whitespace."""
    documents = [Document(f"d{n}", f"d{n}", "Title", text, {"markup": markup}) for n, text in enumerate(texts)]
    chunks = chunk(documents, max_tokens=limit, tokenizer=len, strategy=strategy, overlap=min(overlap, limit // 2))
    assert len({each.chunk_id for each in chunks}) == len(chunks)
    for document in documents:
        own = [each for each in chunks if each.doc_id == document.doc_id]
        if not document.text.strip():
            assert [(each.text, each.start, each.end) for each in own] == [("Title", 0, 0)]
            continue
        reached = 0
        for each in own:
            assert document.text[each.start : each.end] == each.text != ""
            assert not document.text[reached : each.start].strip()
            assert overlap or each.start >= reached
            assert len(each.text) <= limit
            assert each.end > reached
            reached = each.end
        assert not document.text[reached:].strip()
        assert len(document.text) > limit or len(own) == 1


def test_tokenizer_counts_without_its_truncation_padding(tokenizer):
    """A tokenizer set to truncate and pad still sizes chunks by their true length, and is left as it was."""
    document = Document("d", "d.txt", "T", " ".join(["word"] * 100))
    assert [words(each.text) for each in chunk([document], max_tokens=10, tokenizer=tokenizer)] == [10] * 10
    assert len(chunk([document], max_tokens=100, tokenizer=tokenizer)[0].text) == len(document.text)
    assert tokenizer.truncation["max_length"] == 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokenizer_and_callable_agree(tokenizer, strategy):
    """Counting through a tokenizer and through a callable that counts alike gives the same chunks."""
    documents = [Document(f"d{n}", f"d{n}.txt", "T", "alpha beta. " * n) for n in range(1, 40)]
    given = {"max_tokens": 12, "strategy": strategy, "overlap": 3}
    counted = chunk(documents, tokenizer=lambda text: len(tokenizer.pre_tokenizer.pre_tokenize_str(text)), **given)
    assert chunk(documents, tokenizer=tokenizer, **given) == counted


def test_ids_depend_on_document_span_and_text_alone():
    """The same passage keeps its id when other documents come or go or its title changes; another document's same text has another id."""
    one = Document("one", "one.txt", "T", "some text")
    two = Document("two", "two.txt", "T", "some text")
    alone = chunk([one], max_tokens=9, tokenizer=words)[0]
    after = chunk([two, replace(one, title="New")], max_tokens=9, tokenizer=words)
    assert after[1].chunk_id == alone.chunk_id
    assert after[0].chunk_id != alone.chunk_id
    assert len(alone.chunk_id) == 32


def test_document_without_text_or_title_has_no_chunk():
    """Nothing to embed, nothing to retrieve: no chunk, while its neighbours keep theirs."""
    documents = [Document("a", "a", "", " \n"), Document("b", "b", "B", "")]
    assert [each.text for each in chunk(documents, max_tokens=5, tokenizer=words)] == ["B"]


MARKDOWN = "# A\n\nintro words here\n\n## B\n\nunder b words\n\n```\n# not a heading\n```\n\n# C\n\nunder c words\n"
RST = "Aa\n==\n\nintro words here\n\nBb\n--\n\nunder b words\n\nCc\n==\n\nunder c words\n"


def paths(text: str, markup: str, **knobs) -> dict[str, str]:
    chunks = chunk([Document("m", "m", "A", text, {"markup": markup})], max_tokens=5, tokenizer=words, **knobs)
    fragments = [fragment for fragment in ("intro", "under b", "not a", "under c") if fragment in text]
    return {fragment: next(each.heading_path for each in chunks if fragment in each.text) for fragment in fragments}


def test_heading_path_of_markdown():
    """A Markdown chunk carries the headings above it; a sibling section replaces the last, and code fences and plain text give none."""
    assert paths(MARKDOWN, "markdown") == {"intro": "A", "under b": "A > B", "not a": "A > B", "under c": "C"}
    assert set(paths(MARKDOWN, "").values()) == {""}


def test_heading_path_of_restructuredtext():
    """A reStructuredText chunk carries the underlined titles above it, by the order in which the underlines came up."""
    assert paths(RST, "rst") == {"intro": "Aa", "under b": "Aa > Bb", "under c": "Cc"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_path(strategy):
    """However passages are cut, the one under the last section has its path."""
    assert paths("# A\n\nwords here.\n\n# C\n\nmore under c words\n", "markdown", strategy=strategy)["under c"] == "C"


def test_sentences_are_whole_and_overlap_repeats_them():
    """Sentence chunks end where sentences end; with overlap each begins with the last sentences of the one before."""
    text = "One two three. Four five six! Seven eight? Nine ten eleven twelve. Thirteen."
    plain = [each.text for each in chunk([Document("d", "d", "T", text)], max_tokens=6, tokenizer=words, strategy="sentence")]
    assert plain == ["One two three. Four five six!", "Seven eight? Nine ten eleven twelve.", "Thirteen."]
    again = [each.text for each in chunk([Document("d", "d", "T", text)], max_tokens=6, tokenizer=words, strategy="sentence", overlap=3)]
    assert again[1].startswith("Four five six! Seven eight?")


def test_a_run_of_dots_is_cut_in_time():
    """A million dots are no million attempts to end a sentence."""
    started = time.monotonic()
    found = chunk([Document("d", "d", "T", "One. " * 10 + "." * 1_000_000 + "x")], max_tokens=6, tokenizer=words, strategy="sentence")
    assert found[-1].text.endswith("..x")
    assert time.monotonic() - started < 10


def test_fixed_chunks_are_full():
    """Fixed chunks hold exactly the limit but for the last, and step by limit less overlap."""
    text = " ".join(f"w{n}" for n in range(25))
    found = chunk([Document("d", "d", "T", text)], max_tokens=10, tokenizer=words, strategy="fixed", overlap=4)
    assert [each.text.split()[0] for each in found] == ["w0", "w6", "w12", "w18"]
    assert [words(each.text) for each in found] == [10, 10, 10, 7]


INPUTS = st.fixed_dictionaries(
    {"title": st.integers(0, 30), "prompt": st.integers(0, 4), "length": st.integers(1, 120), "over": st.integers(4, 9)}
)


@settings(deadline=None, max_examples=60)
@given(size=INPUTS, strategy=st.sampled_from(STRATEGIES))
def test_title_and_prompt_leave_room(tokenizer, size, strategy):
    """What the model is given, prompt and title and special tokens included, fits its window as long as a quarter of the limit is left."""
    title, prompt, length, over = (size[name] for name in ("title", "prompt", "length", "over"))
    sizing = Sizing(20, tokenizer, window=20 + over, prompt="p " * prompt)
    chunker = Chunker(sizing, strategy=strategy)
    document = Document("d", "d", " ".join(["title"] * title), " ".join(["word"] * length))
    found = next(chunker.chunks([document]))
    tokens = [2 + prompt + words(f"{document.title}\n{each.text}") for each in found]
    assert chunker.truncated(found) == [count > sizing.window for count in tokens]
    if 2 + 1 + prompt + title + 20 // 4 <= sizing.window:
        assert not any(chunker.truncated(found))


def test_truncation_is_found(tokenizer):
    """A chunk that its model would cut off is named: here one whose title alone is over the window."""
    chunker = Chunker(Sizing(8, tokenizer, window=10))
    fits, over = chunker.chunks([Document("a", "a", "T", "two words"), Document("b", "b", "t " * 9, "two words")])
    assert chunker.truncated([*fits, *over]) == [False, True]
