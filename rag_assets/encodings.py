"""Bytes to text: byte-order marks, UTF-8, UTF-16 without a mark, old single-byte encodings, and files that mix them."""

import codecs

from rag_assets.sources.items import Refused

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GUESSED_FROM = 1 << 18
_CONTROLS = frozenset(map(chr, range(32))) - set("\t\n\r\f\v\x1b\b\a")


def decode(data: bytes, *, told: str = "") -> tuple[str, str]:
    """The text of a file and the name of its encoding: a byte-order mark, else `told`, else what fits. Refused when it is no text.

    What is not UTF-8 is guessed by charset-normalizer from the first 256 KiB. A file with lines of valid UTF-8 beyond ASCII and others that
    are not is "mixed": each line is read as UTF-8 if it can be, else as Windows-1252.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None) or _wide(data)
    if encoding is None and b"\0" in data:
        raise Refused("binary", "it holds zero bytes, so it is no text")
    for name in [encoding] if encoding else ["utf-8", *([told] if told else [])]:
        try:
            return _checked(data.decode(name)), name.removesuffix("-sig")
        except (UnicodeError, LookupError):
            continue
    if encoding:
        raise Refused("undecodable", f"it starts as {encoding} and is not")
    return _guessed(data)


def _wide(data: bytes) -> str | None:
    """UTF-16 without a mark: nearly every other byte of a Western text is zero."""
    sample = data[: _GUESSED_FROM & ~1]
    if len(data) % 2 or len(sample) < 4:
        return None
    even, odd, half = sample[::2].count(0), sample[1::2].count(0), len(sample) // 2
    if odd > 0.3 * half and even < 0.05 * half:
        return "utf-16-le"
    return "utf-16-be" if even > 0.3 * half and odd < 0.05 * half else None


def _guessed(data: bytes) -> tuple[str, str]:
    lines = data.splitlines(keepends=True)
    read = [_as_utf8(line) for line in lines]
    if any(text is not None and not text.isascii() for text in read):
        joined = "".join(line.decode("cp1252", "replace") if text is None else text for line, text in zip(lines, read, strict=True))
        return _checked(joined), "mixed"
    from charset_normalizer import from_bytes

    fitting = from_bytes(data[:_GUESSED_FROM])
    best = fitting.best()
    if best is None:
        raise Refused("undecodable", "its bytes are no text in any known encoding")
    # Western European text decodes as several encodings without a fault; the common one is meant.
    best = next((each for each in fitting if each.encoding == "cp1252" and each.chaos <= best.chaos), best)
    try:
        return _checked(data.decode(best.encoding)), best.encoding
    except UnicodeDecodeError as error:
        raise Refused("undecodable", f"it starts as {best.encoding} and is not at byte {error.start}") from None


def _as_utf8(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _checked(text: str) -> str:
    sample = text[:_GUESSED_FROM]
    if sum(character in _CONTROLS for character in sample) > 0.02 * len(sample):
        raise Refused("binary", "it is full of control characters, so it is no text")
    return text
