"""Which parts of a corpus an eval set speaks of."""

import pytest

from evals.coverage import coverage, part_of


@pytest.mark.parametrize(
    ("doc_id", "part"),
    [
        ("guides/start/install.md", "guides"),
        ("s3.DeleteBucket", "s3"),
        ("1973_oil_crisis#4", "1973_oil_crisis"),
        ("README", "(root)"),
        ("/abs/page.md", "/abs"),
    ],
)
def test_part_of_a_document(doc_id, part):
    """A document's part is its first folder, else what stands before the first dot or #."""
    assert part_of(doc_id) == part


def test_untouched_parts_come_first_the_largest_ahead():
    """Parts without a judged document lead the list by size; counts are of documents, and unknown ids count nowhere."""
    parts = {**{f"a.{n}": "a" for n in range(10)}, **{f"b.{n}": "b" for n in range(3)}, **{f"c.{n}": "c" for n in range(5)}}
    found = coverage(parts, judged=["a.1", "a.2", "a.2", "gone.1"], retrieved=["a.1", "b.0", "b.0", "gone.9"])
    assert [part.name for part in found.parts] == ["c", "b", "a"]
    assert [(part.documents, part.judged, part.retrieved) for part in found.parts] == [(5, 0, 0), (3, 0, 1), (10, 2, 1)]
    assert [part.name for part in found.untouched] == ["c", "b"]
    assert (found.whole.documents, found.whole.judged, found.whole.touched) == (18, 2, pytest.approx(2 / 18))
