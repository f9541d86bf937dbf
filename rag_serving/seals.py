"""JSON records that show an edit: their fields, and a sha256 over them as `seal`. Against accidents and hurried hands, not against forgery."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


class SealBroken(ValueError):
    """The fields are not those that were sealed."""


def sealed(fields: Mapping[str, Any]) -> bytes:
    """The record of `fields`, which hold what JSON can; equal fields give equal bytes."""
    return json.dumps({**fields, "seal": _seal_of(fields)}, sort_keys=True, indent=2).encode()


def unsealed(record: bytes) -> dict[str, Any]:
    """The fields of a record. SealBroken when one was changed, another ValueError when it is no sealed record at all."""
    found = json.loads(record)
    fields: dict[str, Any] = found if isinstance(found, dict) else {}
    seal = fields.pop("seal", None)
    if not isinstance(seal, str):
        raise ValueError("not a sealed record")  # noqa: TRY004 - one kind of error for whatever is no record
    if seal != _seal_of(fields):
        raise SealBroken("the fields are not those that were sealed")
    return fields


def _seal_of(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
