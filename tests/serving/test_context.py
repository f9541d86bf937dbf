"""Assembling: which hits an answer may rest on, and under which numbers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_serving.context import assemble, count_tokens
from rag_serving.embedding.weights import pull
from rag_serving.retrieval import Hit

ROOT = Path(__file__).parents[2]


def hit(text: str, *, doc_id: str = "d", start: int = 0) -> Hit:
    return Hit(f"{doc_id}-{start}", doc_id, "u", "t", "", text, start, start + len(text), 1.0, {})


def test_numbers_follow_rank():
    """Passages are numbered from 1 in the order of the hits."""
    hits = [hit(f"text {name}", doc_id=name) for name in "abc"]
    assert [(passage.number, passage.hit.doc_id) for passage in assemble(hits)] == [(1, "a"), (2, "b"), (3, "c")]


def test_no_hits_no_passages():
    """Nothing found gives nothing to answer from."""
    assert assemble([]) == ()


def test_same_words_come_once():
    """A text that another document repeats, up to case and spacing, is left out, and numbers stay without gaps."""
    passages = assemble([hit("One  text.", doc_id="a"), hit("one text.", doc_id="b"), hit("Other text.", doc_id="c")])
    assert [(passage.number, passage.hit.doc_id) for passage in passages] == [(1, "a"), (2, "c")]


def test_overlapping_spans_come_once():
    """Two chunks of one document that share more than half of the shorter are one; neighbours are two."""
    first, inside, beside = hit("abcdefghij", start=0), hit("cdefghijkl", start=2), hit("klmnopqrst", start=10)
    assert [passage.hit for passage in assemble([first, inside, beside])] == [first, beside]


def test_budget_drops_the_long_and_keeps_the_short():
    """What does not fit is left out; a later, shorter passage may still come."""
    passages = assemble([hit("a" * 240, doc_id="a"), hit("b" * 240, doc_id="b"), hit("c" * 120, doc_id="c")], budget=100)
    assert [passage.hit.doc_id for passage in passages] == ["a", "c"]


def test_first_is_cut_rather_than_lost():
    """A first hit over the budget gives its beginning, so that there is always something to answer from."""
    (passage,) = assemble([hit("aaaa " * 500)], budget=100)
    assert passage.text == "aaaa " * 99 + "aaaa "


@given(st.lists(st.tuples(st.text(max_size=40), st.integers(0, 60), st.sampled_from("ab")), max_size=12), st.integers(1, 80))
def test_budget_holds(rows, budget):
    """Whatever the hits, passages together stay within the budget and each is the beginning of its hit's text."""
    passages = assemble([hit(text, doc_id=doc_id, start=start) for text, start, doc_id in rows], budget=budget)
    assert sum(count_tokens(passage.text) for passage in passages) <= budget
    assert all(passage.hit.text.startswith(passage.text) for passage in passages)
    assert [passage.number for passage in passages] == list(range(1, len(passages) + 1))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("", 0), ("word", 1), ("longer word", 3), ("a, b", 3), ("one\n\ntwo", 3), ("1,000", 5), ("如何删除", 4), ("x" * 400, 100)],
    ids=["nothing", "word", "long word", "mark", "break", "number", "Chinese", "run"],
)
def test_tokens_are_counted_without_a_tokenizer(text, tokens):
    """Four letters of a Latin word are a token, as is each other character but spaces."""
    assert count_tokens(text) == tokens


@pytest.mark.heavy
def test_counts_are_seldom_too_low(tmp_path, capsys):
    """Against the tokenizer of Llama 2, the count of this project's own pages and code is 1 to 1.5 times the true one."""
    from tokenizers import Tokenizer

    folder = pull("wheel:wordllama-256", tmp_path, progress=print)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    texts = [path.read_text() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("rag_serving/**/*.py"))]
    true = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    share = sum(map(count_tokens, texts)) / true
    with capsys.disabled():
        print(f"\nestimated tokens: {share:.2f} times those of Llama 2 on {true} tokens of documentation and code")
    assert 1.0 <= share <= 1.5
