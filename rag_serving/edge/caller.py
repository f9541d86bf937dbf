"""Who asks: what an API key stands for. Documents with an access list are found only by callers of one of its groups."""

from dataclasses import dataclass

SCOPES = ("query", "feedback", "read")
"""What a key may do: ask questions, judge answers, read what is released."""


@dataclass(frozen=True, slots=True)
class Caller:
    """`name` is the key's own name, fit for logs; `key_id` is what traffic is split by. Neither tells the key."""

    name: str
    key_id: str = ""
    groups: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    anonymous: bool = False


ANONYMOUS = Caller("anonymous", scopes=frozenset(SCOPES), anonymous=True)
"""Whoever asks a service that has no keys: public documents only."""
