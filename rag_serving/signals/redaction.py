"""Secrets and personal data are taken out of what is logged and traced.

Secrets are known by their shape (keys of well-known services, JSON web tokens, private keys, passwords in addresses), by what stands before
them (`password=`, `Authorization:`), or by looking like nothing else: 24 characters or more in which small letters, capitals and digits take
turns. Personal data: e-mail addresses, telephone numbers, payment cards (Luhn's check digit) and IBANs (ISO 7064,
modulo 97). Hexadecimal ids of this service, such as trace ids and hashes, stay readable.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Status
from opentelemetry.util.types import AttributeValue

LEAST_BITS = 3.5  # of entropy a character, and
LEAST_CHANGES = 0.4  # of the steps lead to another kind of character, where a word of 24 characters is a secret
SHORTEST, LONGEST = 7, 100_000  # characters that are looked at; what comes after the longest is dropped

_NAMES = ("password", "passwd", "passphrase", "pwd", "secret", "token", "credential", "api", "access", "private", "session", "cookie")
_NAMED = r"pass(?:word|wd|phrase)|pwd|secret|token(?!s)|credentials?|api[_-]?key|access[_-]?key|private[_-]?key|session[_-]?id|cookie"
_SECRET_NAME = re.compile(rf"(?i:{_NAMED}|\bauthorization\b)")


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a pattern finds is replaced by `instead`, or its group `value` if it has one, when `holds` for it.

    The pattern is tried on texts that hold one of `needs`, in any case.
    """

    instead: str
    pattern: re.Pattern[str]
    needs: tuple[str, ...] = ("",)
    holds: Callable[[str], bool] = bool

    def applied(self, text: str) -> str:
        return self.pattern.sub(self._replacement, text)

    def _replacement(self, found: re.Match[str]) -> str:
        group = "value" if "value" in self.pattern.groupindex else 0
        if found[group].startswith("[") or not self.holds(found[group]):
            return found[0]
        start, end = found.start(group) - found.start(), found.end(group) - found.start()
        return f"{found[0][:start]}{self.instead}{found[0][end:]}"


def _luhn(card: str) -> bool:
    digits = re.sub(r"\D", "", card)
    doubled = [int(digit) * (2 if at % 2 else 1) for at, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _modulo_97(iban: str) -> bool:
    iban = iban.replace(" ", "")
    moved = iban[4:] + iban[:4]
    return 15 <= len(iban) <= 34 and int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _random(word: str) -> bool:
    body = "".join(character for character in word if character.isalnum())
    kinds = [character.islower() + 2 * character.isupper() + 3 * character.isdigit() for character in body]
    if not {1, 2, 3} <= set(kinds):
        return False
    changes = sum(one != other for one, other in pairwise(kinds)) / len(body)
    bits = -sum(count / len(body) * math.log2(count / len(body)) for count in Counter(body).values())
    return changes >= LEAST_CHANGES and bits >= LEAST_BITS


_RULES = (
    _Rule("[secret]", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"), ("-----begin",)),
    _Rule("[secret]", re.compile(r"\bA(?:KIA|SIA|GPA|ROA|IDA)[0-9A-Z]{16}"), ("akia", "asia", "agpa", "aroa", "aida")),
    _Rule(
        "[secret]",
        re.compile(
            r"\b(?:gh[opsur]_[0-9A-Za-z]{30,}|github_pat_\w{30,}|[rsp]k_(?:live|test)_\w{16,}|hf_\w{30,}|npm_\w{30,}|dop_v1_[0-9a-f]{64}"
            r"|ragline_[0-9a-f]{32,})"
        ),
        ("_",),
    ),
    _Rule("[secret]", re.compile(r"\b(?:glpat|xox[abeoprs]|sk|pypi)-[\w-]{16,}"), ("-",)),
    _Rule(
        "[secret]",
        re.compile(r"\b(?:AIza[\w-]{35}|ya29\.[\w-]{20,}|SG\.[\w-]{16,}\.[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}(?:\.[\w-]*)?)"),
        ("aiza", "ya29.", "sg.", "eyj"),
    ),
    _Rule("[secret]", re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"), ("://",)),
    _Rule(
        "[secret]",
        re.compile(r"(?i:authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token)\s+)?)(?P<value>[\w.~+/=-]{8,})"),
        ("auth",),
    ),
    _Rule("[secret]", re.compile(r"\b(?i:bearer\s+|basic\s+(?=[\w+/]{16}))(?P<value>[\w.~+/=-]{8,})"), ("bearer", "basic")),
    _Rule(
        "[secret]",
        re.compile(rf"(?i:{_NAMED})(?:[_-][\w-]{{0,20}})?[\"']?\s*[:=]\s*(?P<value>\"[^\"\n]+\"|'[^'\n]+'|[^\s\"',;&]+)"),
        _NAMES,
    ),
    _Rule("[email]", re.compile(r"\b[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"), ("@",)),
    _Rule("[iban]", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[0-9A-Z]{4}){2,7}(?: ?[0-9A-Z]{1,3})?\b"), holds=_modulo_97),
    _Rule("[card]", re.compile(r"(?<![\w.-])[2-6](?:[ -]?\d){12,18}(?![\w-])"), holds=_luhn),
    _Rule(
        "[phone]",
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,12}|(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?![\w-])"
        ),
    ),
    _Rule("[secret]", re.compile(r"\b[\w+-]{24,}={0,2}"), holds=_random),
)


def redacted(text: str) -> str:
    """The text with each secret and personal datum replaced by what it was, such as [email]."""
    text = text[:LONGEST]
    if len(text) >= SHORTEST:
        folded = text.lower()
        for rule in _RULES:
            if any(needed in folded for needed in rule.needs):
                text = rule.applied(text)
    return text


def redacted_value(value: AttributeValue) -> AttributeValue:
    """The same for a value of a span's attribute."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Sequence):
        return [redacted(each) if isinstance(each, str) else each for each in value]
    return value


def redacted_attributes(attributes: Mapping[str, AttributeValue] | None) -> dict[str, AttributeValue]:
    """The same for attributes by name; a text whose name says that it is a secret is one."""
    return {
        name: "[secret]" if isinstance(value, str) and _SECRET_NAME.search(name) else redacted_value(value)
        for name, value in (attributes or {}).items()
    }


def redacted_span(span: ReadableSpan) -> ReadableSpan:
    """An ended span as it may be exported: attributes, events (exceptions are among them) and the description of its status."""
    status = span.status
    return ReadableSpan(
        name=redacted(span.name),
        context=span.get_span_context(),
        parent=span.parent,
        resource=span.resource,
        attributes=redacted_attributes(span.attributes),
        events=[Event(event.name, redacted_attributes(event.attributes), event.timestamp) for event in span.events],
        links=span.links,
        kind=span.kind,
        status=Status(status.status_code, redacted(status.description)) if status.description else status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
