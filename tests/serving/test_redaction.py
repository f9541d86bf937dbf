"""Secrets and personal data in logs and spans."""

import contextlib
import secrets
import string
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rag_serving.signals.redaction import redacted, redacted_attributes, redacted_span

# put together here, so that no scanner of secrets takes this file for a leak
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "dBjftJeZ4CVPmB92K27uhbUJU1p1r"
SECRETS = {
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitLab": "glpat-" + "x" * 20,
    "Slack": "xoxb-" + "1234567890-abcdef",
    "OpenAI": "sk-" + "proj-" + "Ab1" * 10,
    "Stripe": "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "Google": "AIza" + "Sy" + "A1b2C" * 6 + "abc",
    "Hugging Face": "hf_" + "AbCdEfGhIj" * 3 + "Klmn",
    "ragline": "ragline_" + "0123456789abcdef" * 4,
    "JSON web token": JWT,
    "random": "kJ8mQ2xV7nB4rT9wZ3yP6sD1",
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA " + "PRIVATE KEY-----",
}


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize("around", ["{}", "the query was {} and so on", '{{"query": "{}"}}', "https://example.org/?q={}&x=1", "({})"])
def test_secrets_by_their_shape(secret, around):
    """Keys of well-known services, tokens, private keys and random words go, wherever they stand."""
    found = redacted(around.format(secret))
    assert secret not in found
    assert secret[-8:] not in found
    assert "[secret]" in found


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("password=hunter2 next", "password=[secret] next"),
        ('{"api_key": "abc", "k": 5}', '{"api_key": [secret], "k": 5}'),
        ("client-secret: 'a b c'", "client-secret: [secret]"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer [secret]"),
        ("authorization=Basic dXNlcjpwYXNzd29yZA==", "authorization=Basic [secret]"),
        ("sent Bearer 0123456789abcdef", "sent Bearer [secret]"),
        ("postgresql://ragline:hunter2@db.example:5432/x", "postgresql://[secret]@db.example:5432/x"),
        ("GET /v1/query?token=abc123&k=5", "GET /v1/query?token=[secret]&k=5"),
        ("write to jane.doe+x@mail.example.org.", "write to [email]."),
        ("call +49 30 901820 or (555) 123-4567, 555-123-4567", "call [phone] or [phone], [phone]"),
        ("card 4111 1111 1111 1111, 5500-0000-0000-0004", "card [card], [card]"),
        ("IBAN DE89 3704 0044 0532 0130 00 and GB82WEST12345698765432", "IBAN [iban] and [iban]"),
    ],
)
def test_secrets_by_their_names_and_personal_data(text, left):
    """What stands after password= and the like goes, and addresses, numbers and accounts of people; the rest stays."""
    assert redacted(text) == left
    assert redacted(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "trace 0af7651916cd43dd8448eb211c80319c of snapshot minilm-20261122-101500-0af7651916cd",
        "sha256 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db, 0af76519-16cd-43dd-8448-eb211c80319c",
        "answering by words alone: http://127.0.0.1:8322 did not answer within 2.0 s at 2026-11-22T15:01:02.123Z",
        "4111 1111 1111 1112 has no valid check digit, 1763823600000 is a time, DE00 3704 0044 0532 0130 00 is no account",
        "max_tokens=128, tokens: 500, top_k=5, ModifyVpcEndpointServicePermissionsRequest20231101",
        "basic monitoring of the bearer of bad news; secretsmanager:GetSecretValue; what was passed: this",
        "rows 1,000,000 in 12.5 s; port 8321; error 0x7f3a",
    ],
)
def test_what_logs_are_read_for_stays(text):
    """Ids, hashes, addresses of the service, times, counts and long names are not taken for secrets."""
    assert redacted(text) == text


@given(st.integers(24, 64), st.randoms(use_true_random=False))
def test_most_random_words_are_seen(size, random):
    """A word drawn from letters and digits goes, unless by chance it has no digit, capital or small letter or few changes among them."""
    word = "".join(random.choice(string.ascii_letters + string.digits) for _ in range(size))
    switches = sum(one.isdigit() != other.isdigit() or one.isupper() != other.isupper() for one, other in pairwise(word))
    kinds = (str.islower, str.isupper, str.isdigit)
    if all(any(map(kind, word)) for kind in kinds) and switches >= 0.45 * size and len(set(word)) >= 16:
        assert redacted(word) == "[secret]"


def test_a_long_text_costs_no_more_than_its_beginning():
    """Only the first 100,000 characters are looked at and kept, so that no text can stall what logs it."""
    assert len(redacted("x " * 1_000_000)) == 100_000


def test_attributes():
    """Texts and lists of texts are redacted, numbers stay, and an attribute that is called a secret is one."""
    assert redacted_attributes(
        {"rag.query_tokens": 12, "who": "a@b.example", "all": ["a@b.example", "x"], "db.password": "abc", "ok": True}
    ) == {
        "rag.query_tokens": 12,
        "who": "[email]",
        "all": ["[email]", "x"],
        "db.password": "[secret]",
        "ok": True,
    }
    assert redacted_attributes(None) == {}


def test_a_span_with_an_exception():
    """Nothing of a secret is left in an ended span: name, attributes, events with tracebacks, status; ids, times and links stay."""
    secret, sink, provider = secrets.token_hex(4) + "@" + "corp.example", InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(sink))
    tracer = provider.get_tracer("test")
    with contextlib.suppress(ValueError), tracer.start_as_current_span(f"find {secret}") as open_span:
        open_span.set_attribute("who", secret)
        open_span.add_event("asked", {"by": secret})
        int(secret)
    (span,) = sink.get_finished_spans()
    assert span.to_json().count(secret) >= 5
    clean = redacted_span(span)
    assert secret not in clean.to_json()
    assert clean.attributes == {"who": "[email]"}
    assert [event.name for event in clean.events] == ["asked", "exception"]
    assert "[email]" in (clean.status.description or "")
    same = ("context", "parent", "kind", "start_time", "end_time", "resource", "links", "instrumentation_scope")
    assert [getattr(clean, name) for name in same] == [getattr(span, name) for name in same]
