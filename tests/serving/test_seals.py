"""Sealed records: what was written comes back, and an edit shows."""

import json

import pytest

from rag_serving.seals import SealBroken, sealed, unsealed

FIELDS = {"b": [1, 2.5, None], "a": {"name": "Grüße"}, "c": "x"}


def test_fields_come_back():
    """The fields are returned as they were sealed, whatever order they were given in."""
    assert unsealed(sealed(FIELDS)) == FIELDS
    assert sealed(dict(reversed(FIELDS.items()))) == sealed(FIELDS)


@pytest.mark.parametrize("edit", [{"c": "y"}, {"d": 1}, {"a": {"name": "Gruesse"}}])
def test_an_edit_breaks_the_seal(edit):
    """A changed or added field is a SealBroken."""
    record = json.dumps({**json.loads(sealed(FIELDS)), **edit}).encode()
    with pytest.raises(SealBroken):
        unsealed(record)


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"a": 1}', b"\xff"])
def test_what_is_no_record_is_no_broken_seal(record):
    """Bytes that are no JSON object with a seal are a ValueError that is not SealBroken."""
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - its kind is the promise
        unsealed(record)
    assert not isinstance(raised.value, SealBroken)
