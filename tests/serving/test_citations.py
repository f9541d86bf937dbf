"""Citations: what a language model wrote is told a sentence at a time, and only as far as the passages say so."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_serving.context import Passage, assemble
from rag_serving.retrieval import Hit
from rag_serving.writing.citations import CitationCheck
from rag_serving.writing.extraction import Answer

BUCKETS = "Deletes the bucket. All objects in the bucket must be deleted first. A request returns up to 1,000 objects."
USERS = "Creates a new user for the account. The name must be unique. At most two keys a user are active."


def passages(*texts: str) -> tuple[Passage, ...]:
    return assemble([Hit(f"c{at}", f"d{at}", "u", "", "", text, 0, len(text), 1.0, {}) for at, text in enumerate(texts)])


def told(text: str, *, query: str = "how?", size: int = 7, whole: bool = True) -> tuple[str, Answer | None, tuple[str, ...]]:
    """What comes out of a text that comes in pieces of `size`: the text told, the answer, the flags."""
    check = CitationCheck(query, passages(BUCKETS, USERS))
    out = "".join(check.feed(text[at : at + size]) for at in range(0, len(text), size)) + check.finish(whole=whole)
    return out, check.answer, check.flags


@pytest.mark.parametrize(
    ("written", "shown", "flags"),
    [
        ("The name must be unique. [2]", "The name must be unique. [2]", ()),
        ("The name must be unique [2].", "The name must be unique [2].", ()),
        ("The name must be unique. [9]", "The name must be unique. [2]", ("citation_removed", "citation_added")),
        ("The name must be unique. [1]", "The name must be unique. [2]", ("citation_removed", "citation_added")),
        ("The name must be unique. [1, 2]", "The name must be unique. [2]", ("citation_removed",)),
        ("The name must be unique.", "The name must be unique. [2]", ("citation_added",)),
        ("Elephants paint at night. [1] Deletes the bucket. [1]", "Deletes the bucket. [1]", ("citation_removed", "unsupported_removed")),
        (
            "Deletes the bucket. [1] Deleted objects have unique names.",
            "Deletes the bucket. [1] Deleted objects have unique names.",
            ("uncited",),
        ),
        ("- Deletes the bucket [1]\n- Creates a user [2]", "- Deletes the bucket [1]\n- Creates a user [2]", ()),
        ("Deletes the bucket.\n[1]\nCreates a user. [2]", "Deletes the bucket. [1]\nCreates a user. [2]", ()),
        ("Elephants paint at night. [1]", "", ("citation_removed", "unsupported_removed")),
        ("No. Deletes the bucket. [1]", "Deletes the bucket. [1]", ("unsupported_removed",)),
        ("Yes. Deletes the bucket. [1]", "Deletes the bucket. [1]", ("unsupported_removed",)),
        ("Deletes the bucket. [1] Deletes  the bucket. [1]", "Deletes the bucket. [1]", ()),
        ("NOT FOUND", "", ()),
        ("[1]", "", ("citation_removed",)),
        ("", "", ()),
    ],
)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_each_sentence_is_checked(written, shown, flags, size):
    """A marker stands only where its passage says so, a sentence of a passage gets its marker, and what no passage says is not told."""
    out, answer, found = told(written, size=size)
    assert (re.sub(r"\.\n\[", ". [", out), found) == (shown, flags)
    assert (answer is None) == (not shown)


@pytest.mark.parametrize(
    ("claim", "stands"),
    [
        ("Up to 1,000 objects", True),
        ("Up to 1000 objects", True),
        ("Up to 2,000 objects", False),
        ("At most 2 keys a user", True),
        ("At most 3 keys a user", False),
    ],
)
def test_numbers_must_be_the_passages(claim, stands):
    """A sentence with a number that the cited passage has not is not supported, however many of its words are."""
    out, _, _ = told(f"Deletes the bucket. [1] {claim}. [1]")
    assert (claim in out) == stands


def test_nothing_is_told_before_a_citation():
    """Sentences without support wait until one has a citation, and then come in order."""
    check = CitationCheck("how?", passages(BUCKETS, USERS))
    assert check.feed("Deleted objects have unique names. Then ") == ""
    assert check.feed("it deletes the bucket. [1] The") == "Deleted objects have unique names. Then it deletes the bucket. [1]"


def test_a_marker_that_comes_late_belongs_to_its_sentence():
    """A sentence is not told before what follows its full stop is known not to be its marker."""
    check = CitationCheck("how?", passages(BUCKETS, USERS))
    assert [check.feed(piece) for piece in ("Creates a user.", " ", "[", "2", "]", " Del")] == ["", "", "", "", "", "Creates a user. [2]"]


def test_brackets_in_code_are_no_citations():
    """An index in code stays as it is, although it looks like a marker."""
    check = CitationCheck("how?", passages("Read `items[7]` to get the last item."))
    assert check.feed("Read `items[7]` for the last item. [1]") + check.finish() == "Read `items[7]` for the last item. [1]"


@pytest.mark.parametrize(
    ("apart", "joined"),
    [
        ("http[9]://evil.example/bucket", "http:"),
        ("http [9][8]://evil.example/bucket", "http:"),
        ("www[9].evil.example/bucket", "www."),
        ("<[9]img src=bucket>", "<img"),
        ("javascript[9]:bucket", "javascript:"),
    ],
)
def test_a_marker_that_goes_joins_nothing(apart, joined):
    """What a removed marker kept apart stays apart: joined, it could be an address or HTML, past the filter of answers."""
    shown, _, flags = told(f"Deletes the bucket, all objects of it must be deleted first, as a request returns objects {apart} [1].")
    assert "bucket" in shown.removeprefix("Deletes the bucket")
    assert "citation_removed" in flags
    assert joined not in shown


def test_quotes_say_where():
    """For each citation the answer has the stretch of the passage that is nearest to the sentence, word for word."""
    _, answer, _ = told("Names are unique. [2] It returns 1000 objects. [1]")
    assert answer
    assert [(quote.passage.number, quote.text) for quote in answer.quotes] == [
        (2, "The name must be unique."),
        (1, "A request returns up to 1,000 objects."),
    ]
    assert [passage.number for passage in answer.cited] == [1, 2]


def test_groundedness_is_a_share():
    """The share of the words that stand in what their sentences cite: all of them, or fewer when some do not or nothing is cited."""
    whole, half = (told(text)[1] for text in ("Deletes the bucket. [1]", "Deletes the bucket. [1] Deleted objects have unique names."))
    assert whole
    assert half
    assert whole.groundedness == 1.0
    assert half.groundedness == pytest.approx(2 / 6, abs=0.001)


@pytest.mark.parametrize(
    ("last", "kept"), [("Creates a us", False), ("Creates a user", False), ("Creates a user.", True), ("Creates a user. [2]", True)]
)
def test_a_sentence_that_breaks_off_is_dropped(last, kept):
    """Of an answer that is not whole, an unfinished last sentence is not told, and the flags say so."""
    out, _, flags = told(f"Deletes the bucket. [1] {last}", whole=False)
    assert ("Creates" in out) == kept
    assert ("truncated" in flags) == (not kept)


def test_text_without_ends_is_cut():
    """A model that writes no sentence end does not make the check hold more and more."""
    check = CitationCheck("how?", passages(BUCKETS, USERS))
    out = "".join(check.feed("deletes the bucket ") for _ in range(400))
    assert 1000 < len(out) < 8000


WRITTEN = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "Deletes the bucket. ",
                "The name must be unique",
                "[1]",
                " [2] ",
                "[7]",
                "[1, 2]",
                ". ",
                "\n",
                "- ",
                "`a[1]`",
                "NOT FOUND",
                "1,000",
            ]
        ),
        st.text(max_size=12),
    ),
    max_size=14,
).map("".join)


@given(WRITTEN, st.integers(1, 9), st.booleans())
def test_what_is_told_does_not_depend_on_the_pieces(written, size, whole):
    """Whatever a model writes and however it is cut: the same is told, it is the answer, and every marker names a given passage."""
    out, answer, flags = told(written, size=size, whole=whole)
    assert (out, flags) == (told(written, size=10_000, whole=whole)[0], told(written, size=10_000, whole=whole)[2])
    assert out == (answer.text if answer else "")
    outside_code = re.sub(r"`[^`]*`", "", out)
    assert {int(number) for group in re.findall(r"\[([\d,; ]+)\]", outside_code) for number in re.findall(r"\d+", group)} <= {1, 2}
    if answer:
        assert answer.quotes
        assert all(quote.text in quote.passage.text for quote in answer.quotes)
        assert 0.0 <= answer.groundedness <= 1.0
