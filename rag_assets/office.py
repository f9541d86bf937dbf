"""Office files (DOCX, PPTX, XLSX) looked at before they are opened: they are archives of XML, and archives can lie."""

import io
import re
import zipfile
import zlib

from rag_assets.sources.items import Refused

MAX_ENTRIES = 10_000
MAX_RATIO = 100
MAX_UNPACKED = 2 << 30
_RATIO_COUNTS_FROM = 1 << 20
_PROLOG = 1 << 16
_DECLARATIONS = tuple(word.encode(encoding) for word in ("<!DOCTYPE", "<!ENTITY") for encoding in ("utf-8", "utf-16-le", "utf-16-be"))
_MARKERS = {".docx": "word/document.xml", ".pptx": "ppt/presentation.xml", ".xlsx": "xl/workbook.xml"}
_STAND_INS = dict(zip("&<>\"'", "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4", strict=True))
_NAMED = {b"amp": "&", b"lt": "<", b"gt": ">", b"quot": '"', b"apos": "'"}
_REFERENCE = re.compile(rb"&(?:(amp|lt|gt|quot|apos)|#([0-9]{1,7})|#x([0-9A-Fa-f]{1,6}));")
_ARCHIVES = (".zip", ".gz", ".tgz", ".7z", ".rar", ".tar", ".bz2", ".xz", ".jar")


def examine(data: bytes, suffix: str) -> bool:
    """Raise Refused unless it is a whole, unencrypted Office file that does not unpack to far more than it is. True: it has hidden text.

    Refused are more than MAX_ENTRIES entries, more than MAX_UNPACKED bytes or MAX_RATIO times its size unpacked (declared or real), archives
    within, and XML that declares a document type, which no Office program writes. Hidden is what Word marks so (w:vanish).
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_size(archive, len(data))
            names = {entry.filename for entry in archive.infolist()}
            if _MARKERS[suffix] not in names:
                raise Refused("wrong_format", f"it is an archive without {_MARKERS[suffix]}, so it is no {suffix} file")
            return _read_through(archive)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError) as error:
        encrypted = data.startswith(b"\xd0\xcf\x11\xe0")
        told = "it is encrypted, or of the format before 2007" if encrypted else f"its archive is damaged: {error}"
        raise Refused("encrypted" if encrypted else "damaged", told) from None


def _check_size(archive: zipfile.ZipFile, packed: int) -> None:
    entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_ENTRIES:
        raise Refused("archive_bomb", f"it holds {len(entries):,} entries; at most {MAX_ENTRIES:,} are opened")
    if unpacked > MAX_UNPACKED or (unpacked > _RATIO_COUNTS_FROM and unpacked > MAX_RATIO * packed):
        raise Refused("archive_bomb", f"it unpacks from {packed:,} to {unpacked:,} bytes")
    for entry in entries:
        if entry.flag_bits & 1:
            raise Refused("encrypted", f"its entry {entry.filename!r} is encrypted")
        if entry.filename.lower().endswith(_ARCHIVES):
            raise Refused("nested_archive", f"it holds an archive, {entry.filename!r}")


def _read_through(archive: zipfile.ZipFile) -> bool:
    hidden = False
    for entry in archive.infolist():
        if not entry.filename.lower().endswith((".xml", ".rels")):
            continue
        with archive.open(entry) as part:
            before = part.read(_PROLOG)
            if any(word in before for word in _DECLARATIONS):
                raise Refused("xml_entities", f"its part {entry.filename!r} declares a document type or entities")
            while before:
                after = part.read(_PROLOG)
                hidden = hidden or b"<w:vanish/>" in before[-16:] + after or b"<w:vanish/>" in before
                before = after
    return hidden


def with_stand_ins(data: bytes) -> bytes:
    """A DOCX file with a Unicode noncharacter for each XML reference, which `without_stand_ins` turns back in the text made of it.

    kreuzberg 4.10 leaves references in DOCX out of the text, so that AT&amp;T becomes ATT (xberg-io/xberg#1242).
    """
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(written, "w") as plain:
        for entry in archive.infolist():
            content = archive.read(entry)
            within = entry.filename.startswith("word/") and entry.filename.endswith(".xml")
            plain.writestr(entry.filename, _REFERENCE.sub(_stand_in, content) if within else content)
    return written.getvalue()


def without_stand_ins(text: str) -> str:
    return text.translate({ord(stand_in): character for character, stand_in in _STAND_INS.items()})


def _stand_in(reference: re.Match[bytes]) -> bytes:
    name, decimal, hexadecimal = reference.groups()
    code = int(decimal) if decimal else int(hexadecimal, 16) if hexadecimal else 0
    character = _NAMED[name] if name else chr(code) if 31 < code < 0xD800 or 0xDFFF < code < 0x110000 else " "
    return _STAND_INS.get(character, character).encode()
